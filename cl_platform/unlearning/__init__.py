"""Forgetting a task on request: what holds it, how it goes, and the proof that it is gone."""
