"""What a site does that a test cluster of root alone does not: hidden partitions, limits, other users, jobs of other programs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.experiment.config import SlurmSite
from tests.jobs.slurm_cases import arrays_of, batch_of, experiment_of, graph_of, node, runs_of, until
from tests.slurm_cluster import Cluster
from tests.slurm_cluster.users import as_user, folder_of, interpreter_of, require_user

pytestmark = pytest.mark.slurm


class OrdinaryUser:
    """Makes calls of the product as an ordinary user of the cluster, in a folder of their own."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.name = require_user()
        self.cluster = cluster
        self.folder = folder_of(self.name, folder)
        self.python, self.variables = interpreter_of(self.name)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return as_user(self.name, function, *arguments)

    def site(self, **settings: Any) -> SlurmSite:
        """A site profile under which the user's jobs find their interpreter."""
        return SlurmSite(python=self.python, environment=self.variables, **settings)

    def run(self, *command: str) -> str:
        return self.cluster.run(*command, user=self.name)


@pytest.fixture
def user(slurm_cluster: Cluster) -> OrdinaryUser:
    """An ordinary user whose folder is open to the jobs on the nodes."""
    return OrdinaryUser(slurm_cluster, slurm_cluster.folder / f"user-{os.getpid()}-{os.urandom(3).hex()}")


def test_jobs_in_a_hidden_partition_are_seen(user: OrdinaryUser) -> None:
    """An ordinary user's array in a partition with Hidden=YES stays in flight, and a pass does not submit it again.

    Before: `squeue` without `--all` left it out, and each pass submitted all of it once more.
    """
    nodes = [node(key, "states", sleep=3) for key in ("one", "two")]
    graph, batch = graph_of(nodes), batch_of(nodes)
    worker = (user.python, "launch.py", "worker")
    experiment = experiment_of(user.site(partition="hidden"))

    def submit() -> set[str]:
        return set(arrays_of(user.folder, experiment, worker=worker).submit(batch, graph, {}))

    def in_flight() -> set[str]:
        return set(arrays_of(user.folder, experiment, worker=worker).in_flight())

    assert user(submit) == {"one", "two"}
    assert user.run("squeue", "--noheader") == "", "hidden from an ordinary squeue"
    assert user(in_flight) == {"one", "two"}
    user(submit)
    until(lambda: not user(in_flight))
    assert [len(runs_of(user.folder, key)) for key in ("one", "two")] == [1, 1]


def test_names_of_other_jobs_do_not_mislead(user: OrdinaryUser) -> None:
    """A job of another program with line breaks and separators in its name: the queue is still read, and that job is no other.

    Before: such a name made every pass end with an unexpected output of squeue.
    """
    forged = "x\n99_0|RUNNING|None|trial\ny"
    user.run("sbatch", "--output=/dev/null", f"--job-name={forged}", "--wrap=sleep 30")

    def names() -> list[tuple[str, str]]:
        from jobs.slurm.client import SlurmClient

        return [(each.job, each.name) for each in SlurmClient().queue()]

    ((job, name),) = user(names)
    assert job != "99_0"
    assert name == forged


def test_accounting_of_another_job_with_the_same_number_is_not_ours(slurm_cluster: Cluster) -> None:
    """Asked for a number and a name, accounting gives nothing if the job of that number has another name.

    Before: a slurmctld that had lost its state gave a number again, and the end of that job was taken for ours.
    """
    from jobs.slurm.client import SlurmClient

    job = slurm_cluster.run("sbatch", "--parsable", "--output=/dev/null", "--job-name=other", "--wrap=false")
    until(lambda: (SlurmClient().accounting({job: "other"}) or {}).get(job) is not None)
    until(lambda: (SlurmClient().accounting({job: "other"}) or {})[job].state == "FAILED")
    assert SlurmClient().accounting({job: "ours"}) == {}
    assert [each.state for each in SlurmClient().jobs_known([job])] == ["FAILED"]
    assert SlurmClient().jobs_known(["999999"]) == ()
