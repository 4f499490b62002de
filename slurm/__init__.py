"""Jobs of Slurm: submitting runs and sweeps, what a job does, and how a sweep stands."""
