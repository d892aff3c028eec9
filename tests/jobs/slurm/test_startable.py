"""Requests that can never start: told from those that wait, by the site as it is configured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.experiment.config import SlurmSite, resources_of
from jobs.slurm.script import ArrayJob, Header
from jobs.slurm.startable import ConfiguredNode, parse_limit, parse_nodes, why_impossible
from tests.jobs.slurm_cases import arrays_of, batch_of, experiment_of, node
from tests.slurm_cluster import Cluster

UNAVAILABLE = "allocation failure: Requested node configuration is not available"
SINFO = """\
gpu|2-00:00:00|64|512000|gpu:a100:4(S:0-1),nvme:1
gpu|2-00:00:00|64|512000|gpu:a100:4(S:0-1),nvme:1
short*|30:00|16|64000|(null)
gpu|half a line
"""


def header(**changes: Any) -> Header:
    """The request of an array in the partition `gpu`: one core, one GPU, 0.5 GB, an hour."""
    resources = resources_of(experiment_of(minutes=60, gpus=1), "states")
    job = ArrayJob(name="a", size=1, resources=resources, stages_per_element=1, command=("true",), description="/", folder="/", output="/")
    return replace(job.header(SlurmSite(partition="gpu")), **changes)


def test_nodes_as_partitions_offer_them() -> None:
    """Of each partition the time limit, cores, memory and GPUs of its nodes; a line that cannot be read is left out."""
    a100 = ConfiguredNode("gpu", False, 2880, 64, 512000, (("a100", 4),))
    assert parse_nodes(SINFO) == (a100, a100, ConfiguredNode("short", True, 30, 16, 64000))
    limits = {"infinite": 0, "n/a": 0, "10:00": 10, "1:30:00": 90, "7-00:00:00": 10080, "0:30": 0}
    assert {text: parse_limit(text) for text in limits} == limits


@pytest.mark.parametrize(
    ("changes", "said", "why"),
    [
        ({}, "", ""),
        ({}, UNAVAILABLE, ""),  # the nodes that fit are down: they come back
        ({"gpus": "a100:4", "nodes": 2}, UNAVAILABLE, ""),
        ({"minutes": 2881}, "", "its time limit, 2881 min, is above the 2880 min of partition gpu (PartitionTimeLimit)"),
        ({"gpus": "8"}, UNAVAILABLE, "partition gpu has no node with 1 cores, 512 MB, 8 GPUs (BadConstraints): "),
        ({"gpus": "8"}, "", ""),  # Slurm knows better
        ({"gpus": "h100:1"}, UNAVAILABLE, "partition gpu has no node with 1 cores, 512 MB, h100:1 GPUs"),
        ({"nodes": 3}, UNAVAILABLE, "partition gpu has no 3 nodes with"),
        ({"memory_mb": 600000}, UNAVAILABLE, "partition gpu has no node with 1 cores, 600000 MB"),
        ({"cpus": 20, "processes_per_node": 4}, UNAVAILABLE, "partition gpu has no node with 80 cores"),
        ({"partition": None, "gpus": "", "minutes": 31}, "", "above the 30 min of partition short"),
        ({"partition": "short,gpu", "minutes": 31}, "", ""),
        ({"partition": "elsewhere", "minutes": 31}, UNAVAILABLE, ""),
        ({}, "allocation failure: Invalid feature specification", "Invalid feature specification"),
        ({}, "sbatch did not answer within 30 s", ""),
        ({}, "allocation failure: Required partition not available (inactive or drain)", ""),
        ({}, "sbatch: error: QOSMaxSubmitJobPerUserLimit", ""),
    ],
)
def test_what_can_never_start(changes: dict[str, Any], said: str, why: str) -> None:
    """A request above what the configuration has; not one whose nodes are down, nor one that the queue has no room for now."""
    found = why_impossible(header(**changes), parse_nodes(SINFO), said)
    assert why in found
    assert bool(why) == bool(found)


@pytest.fixture
def drained(slurm_cluster: Cluster) -> Iterator[Cluster]:
    """Every node drained, as in a maintenance."""
    nodes = ",".join(slurm_cluster.settings.node_names)
    slurm_cluster.run("scontrol", "update", f"nodename={nodes}", "state=drain", "reason=maintenance")
    yield slurm_cluster
    slurm_cluster.run("scontrol", "update", f"nodename={nodes}", "state=resume")


@pytest.mark.slurm
def test_a_maintenance_makes_nothing_impossible(drained: Cluster, tmp_path: Path) -> None:
    """Slurm rejects both requests with the same words while all nodes are drained; only what no node ever has is impossible."""
    batch = batch_of([node("one", "states")])
    for memory, impossible in ((1, False), (900, True)):
        found = arrays_of(tmp_path, experiment_of(memory_gb=memory)).impossible([batch])
        assert [("BadConstraints" in why, UNAVAILABLE in why) for why in found.values()] == [(True, True)] * impossible


@pytest.mark.slurm
def test_a_time_limit_above_the_partitions_is_impossible(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """`sbatch --test-only` accepts it, and the job would wait for ever with the reason PartitionTimeLimit."""
    batch, site = batch_of([node("one", "states")]), SlurmSite(partition="hidden")
    (why,) = arrays_of(tmp_path, experiment_of(site, minutes=90)).impossible([batch]).values()
    assert why == "its time limit, 90 min, is above the 60 min of partition hidden (PartitionTimeLimit)"
    assert not arrays_of(tmp_path, experiment_of(site, minutes=60)).impossible([batch])
