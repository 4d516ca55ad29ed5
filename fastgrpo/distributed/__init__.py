"""What the ranks of a job do together."""
