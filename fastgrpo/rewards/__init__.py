"""Stage 4: judges, and the queue that scores one video while the next is sampled."""
