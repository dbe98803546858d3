"""A cluster in one process: a storage in memory, with faults, and workers in simulated time."""
