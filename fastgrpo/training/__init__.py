"""One iteration, and one run."""
