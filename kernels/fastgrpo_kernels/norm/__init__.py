"""The pointwise work of the transformer's blocks."""
