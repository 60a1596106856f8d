"""The rungs: ways to run a batch of tasks, all with the same results to rounding."""
