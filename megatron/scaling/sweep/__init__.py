"""Grids of runs, here or as SLURM jobs."""
