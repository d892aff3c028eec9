"""Ray on this machine or on the nodes of a Slurm allocation."""
