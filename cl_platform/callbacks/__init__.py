"""Lightning callbacks: progress, graceful interruption."""
