"""A run in several processes: the coordinator, the workers, how they start."""
