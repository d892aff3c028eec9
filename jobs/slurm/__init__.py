"""Executor for Slurm: queue, submissions, batch scripts, and the controller chain."""
