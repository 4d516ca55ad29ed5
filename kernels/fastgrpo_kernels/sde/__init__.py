"""The SDE step, its log-probability and the clipped loss."""
