"""Chaos on a real Slurm: faults of processes, nodes, slurmctld, file system and clocks strike a grid at random; its table must not change.

python -m tests.chaos [--faults 300] [--minutes 20] [--seed N]        (make chaos; docs/chaos.md)
"""
