"""Counter-based noise."""
