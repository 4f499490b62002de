"""Jobs of Slurm: arrays, what a task of a job does, and queueing again. Imports nothing of the project."""
