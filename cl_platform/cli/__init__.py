"""Commands: parsing and printing, no logic."""
