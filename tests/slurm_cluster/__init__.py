"""A real multi-node Slurm on this machine, for tests: munge, accounting database, controller and one daemon per node."""

from tests.slurm_cluster.cluster import Cluster, ClusterError
from tests.slurm_cluster.configuration import ClusterSettings

__all__ = ["Cluster", "ClusterError", "ClusterSettings"]
