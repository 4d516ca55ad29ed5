"""Published reward models."""
