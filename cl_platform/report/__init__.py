"""What a finished or running run looks like: reads run folders, never a live learner, and draws only when asked."""
