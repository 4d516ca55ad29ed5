"""The paper in pure functions: no files, no ranks, no network."""
