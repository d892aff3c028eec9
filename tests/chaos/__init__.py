"""Chaos on a real Slurm: nodes, steps, controllers and slurmctld are killed at random while a grid runs; its table must not change.

python -m tests.chaos [--minutes 10] [--seed N]        (make chaos)
"""
