"""Studies: many runs and their evaluations, here or as jobs of Slurm."""
