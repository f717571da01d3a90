"""What to try next: studies, strategies, the loop and the command line."""
