"""What fits into memory, worked out without a GPU or weights."""
