"""What a site does that a test cluster of root alone does not: hidden partitions, limits, other users, jobs of other programs."""

from __future__ import annotations

import getpass
import os
import pwd
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.control.facts import Phase
from jobs.errors import RequestRefusedError
from jobs.experiment.config import SlurmSite
from jobs.slurm.executor import SlurmArrays
from tests.jobs.slurm_cases import arrays_of, batch_of, experiment_of, facts_of, graph_of, node, runs_of
from tests.slurm_cluster import Cluster
from tests.slurm_cluster.users import as_user, folder_of, interpreter_of, make_users, require_user
from tests.waiting import until

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


@pytest.fixture
def strict_qos(slurm_cluster: Cluster) -> Iterator[Cluster]:
    """The QOS of all users with a limit on the time of a job, which denies what is above it."""
    modify = ("sacctmgr", "--immediate", "modify", "qos", "normal", "set")
    slurm_cluster.run(*modify, "MaxWall=5", "flags=DenyOnLimit")
    yield slurm_cluster
    slurm_cluster.run(*modify, "MaxWall=-1", "flags=-1")


def test_a_permanent_denial_is_no_full_queue(strict_qos: Cluster, user: OrdinaryUser) -> None:
    """A request above a limit of the QOS is rejected with the limit's name; one below it is accepted.

    Before: it counted as a full queue, because Slurm's general message mentions the submit limit, and was tried for 14 days.
    """
    nodes = [node("one", "states")]
    graph, batch = graph_of(nodes), batch_of(nodes)

    def submit(minutes: int) -> set[str]:
        return set(arrays_of(user.folder, experiment_of(user.site(), minutes=minutes)).submit(batch, graph, {}))

    def check(minutes: int) -> list[str]:
        from jobs.commands.doctor import collect_slurm
        from jobs.slurm.client import SlurmClient

        facts = collect_slurm(SlurmClient(), user.site(), experiment_of(user.site(), minutes=minutes))
        return [f"{name}: {said}" for name, said in facts.refused.items()]

    (refused,) = user(check, 10)
    assert refused.startswith("default: ")
    assert "QOSMaxWallDurationPerJobLimit" in refused
    assert user(check, 5) == []
    with pytest.raises(AssertionError, match=r"RequestRefusedError.*QOSMaxWallDurationPerJobLimit"):
        user(submit, 10)
    assert user(submit, 5) == {"one"}


def test_a_job_that_another_account_cancelled_is_not_given_up(slurm_cluster: Cluster, user: OrdinaryUser) -> None:
    """A second user, an operator, cancels a running and a pending element: the owner's stages count as lost, not as cancelled.

    Before: any scancel but root's was taken for the owner's, and was final.
    """
    other = make_users()[1]
    slurm_cluster.run("sacctmgr", "--immediate", "modify", "user", other, "set", "AdminLevel=Operator")
    nodes = [node(key, "states", sleep=60) for key in ("one", "two")]
    worker = (user.python, "launch.py", "worker")

    def arrays() -> SlurmArrays:
        return arrays_of(user.folder, experiment_of(user.site()), worker=worker, settle_seconds=5)

    def states() -> list[str]:
        executor = arrays()
        executor.in_flight()
        return sorted(each.state for left in executor.departures(["one", "two"]).values() for each in left)

    user(lambda: set(arrays().submit(batch_of(nodes), graph_of(nodes), {})))
    until(lambda: facts_of(user.folder, "two", begun=True) is not None)
    slurm_cluster.run("scancel", f"--user={user.name}", user=other)
    expected = f"CANCELLED by another account ({pwd.getpwnam(other).pw_uid})"
    until(lambda: user(states) == [expected, expected])
    slurm_cluster.run("sacctmgr", "--immediate", "modify", "user", other, "set", "AdminLevel=None")


def test_a_reservation_is_waited_for_and_an_unknown_one_is_rejected(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """What waits for a reservation is queued, not stuck, and can be withdrawn; without the reservation Slurm's message is reported."""
    window = ("starttime=now+60minutes", "duration=60", "nodes=n1", f"users={getpass.getuser()}")
    slurm_cluster.run("scontrol", "create", "reservation", "reservationname=lab", *window)
    nodes = [node("one", "states")]
    arrays = arrays_of(tmp_path, experiment_of(SlurmSite(extra={"reservation": "lab"})))
    arrays.submit(batch_of(nodes), graph_of(nodes), {})
    until(lambda: arrays.in_flight()["one"].phase is Phase.queued and arrays.pending()["one"].reason == "Reservation")
    assert arrays.stuck() == {}
    assert arrays.cancel(["one"]) == ("one",)
    until(lambda: not arrays.in_flight())
    slurm_cluster.run("scontrol", "delete", "reservation=lab")
    with pytest.raises(RequestRefusedError, match="reservation"):
        arrays.submit(batch_of(nodes), graph_of(nodes), {})


def test_a_job_in_special_exit_is_shown_as_stuck(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Requeued and held: it waits for the user, and a later pass may withdraw it. Before: it counted as running for ever."""
    nodes = [node("one", "states", sleep=60)]
    arrays = arrays_of(tmp_path)
    job = arrays.submit(batch_of(nodes), graph_of(nodes), {})["one"].job
    until(lambda: facts_of(tmp_path, "one", begun=True) is not None)
    slurm_cluster.run("scontrol", "requeuehold", "State=SpecialExit", job)
    until(lambda: slurm_cluster.run("squeue", "--noheader", "--format=%T") == "SPECIAL_EXIT")
    assert arrays.in_flight()["one"].phase is Phase.queued
    assert "SPECIAL_EXIT" in arrays.stuck()["one"]
    assert arrays.cancel(["one"]) == ("one",)
    until(lambda: not arrays.in_flight())
