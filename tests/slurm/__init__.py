"""A real Slurm of several nodes on this machine, whose nodes can be killed; see `cluster`."""
