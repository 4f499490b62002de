"""Jobs of Slurm: arrays, what a task of a job does, and queueing again. Of the project it imports only how fields are
checked."""
