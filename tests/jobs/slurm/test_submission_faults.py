"""What goes wrong around sbatch, on a real Slurm: nothing doubled, nothing lost, nobody waits for ever, and nothing is left behind.

Lost replies, launchers killed at every step, a controller that dies, limits of the site, accounting that is away, names used twice.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.control.executor_protocol import Batch, Limits
from jobs.control.facts import Phase
from jobs.control.plan import make_plan
from jobs.errors import SlurmUnavailableError, UsageError
from jobs.experiment.config import SlurmSite
from jobs.experiment.graph import Graph
from jobs.slurm.client import SlurmClient, sbatch_under_way
from jobs.slurm.executor import SlurmArrays
from jobs.slurm.submissions import State, Submission, SubmissionBook, Writer, new_submission
from tests.jobs.slurm_cases import (
    ROOT,
    array_jobs,
    arrays_of,
    arrays_since,
    batch_of,
    drained,
    ended,
    experiment_of,
    facts_of,
    graph_of,
    layout_of,
    node,
    runs_of,
    started,
)
from tests.slurm_cluster import Cluster
from tests.slurm_cluster.configuration import ClusterSettings
from tests.waiting import until

pytestmark = pytest.mark.slurm
UP, DOWN = ("u0", "u1"), ("r0", "r1", "r2", "r3")


def two_levels(sleep: float = 0.5) -> tuple[Graph, Batch, Batch]:
    """Two upstream stages, the second one of `sleep` seconds, and four that wait for one of them each."""
    upstream = [node("u0", "states", sleep=0.2), node("u1", "states", sleep=sleep)]
    runs = [node(key, "finetune", {"states": f"u{number % 2}"}) for number, key in enumerate(DOWN)]
    return graph_of([*upstream, *runs]), batch_of(upstream), batch_of(runs)


def put_in_path(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of ours before the real one, which the script calls `REAL`."""
    real = shutil.which(name)
    file = folder / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/bin/bash\nREAL={real}\nHERE={file.parent}\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{file.parent}:{os.environ['PATH']}")


def as_before_the_reply(book: SubmissionBook, record: Submission, batch: Batch, created: float) -> None:
    """Turn a record back into the intent that it was."""
    book.withdraw(record)
    book.begin(new_submission(record.name, batch, created))


def finish(folder: Path, graph: Graph, batches: Sequence[Batch]) -> SlurmArrays:
    """Pass after pass of a fresh launcher, until every stage has run and the queue is empty."""
    arrays = arrays_of(folder, settle_seconds=0.5)

    def passed() -> bool:
        held = dict(arrays.in_flight())
        for batch in batches:  # also a part of one: Slurm may fail to start single elements again after its restart
            left = tuple(task for task in batch.tasks if not any(key in held or facts_of(folder, key) for key in task.keys))
            if left:
                held.update(arrays.submit(replace(batch, tasks=left), graph, held))
        return not held and all(facts_of(folder, key) for key in graph.nodes)

    until(passed)
    return arrays


KILLED = """\
import os, signal, sys
from pathlib import Path

import jobs.slurm.executor
from jobs.slurm.client import SlurmClient
from jobs.slurm.submissions import SubmissionBook
from tests.jobs.slurm_cases import arrays_of
from tests.jobs.slurm.test_submission_faults import two_levels

folder, point, sleep = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
graph, upstream, runs = two_levels(sleep)
arrays = arrays_of(folder)
held = arrays.submit(upstream, graph, {})
(folder / "bin").mkdir(exist_ok=True)
(folder / "bin" / "launcher").write_text(str(os.getpid()))
points = {
    "tasks": (jobs.slurm.executor, "write_description"),
    "intent": (SubmissionBook, "begin"),
    "sbatch": (SlurmClient, "submit"),
    "record": (SubmissionBook, "change"),
}
if point in points:
    owner, name = points[point]
    real = getattr(owner, name)

    def dying(*arguments, **named):
        real(*arguments, **named)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, dying)
arrays.submit(runs, graph, held)
"""


def killed_launcher(folder: Path, point: str, sleep: float) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), point, str(sleep)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("point", ["tasks", "intent", "sbatch", "record"])
def test_a_launcher_killed_at_any_step(slurm_cluster: Cluster, tmp_path: Path, point: str) -> None:
    """The next launcher makes exactly one array, which runs everything once; elements wait for their own upstream jobs only."""
    unrefined = point == "record"
    graph, upstream, runs = two_levels(5 if unrefined else 0.5)
    before = array_jobs(slurm_cluster)
    killed_launcher(tmp_path, point, 5 if unrefined else 0.5)
    finish(tmp_path, graph, [upstream, runs])
    assert {key: len(runs_of(tmp_path, key)) for key in graph.nodes} == dict.fromkeys(graph.nodes, 1)
    assert len(arrays_since(slurm_cluster, before)) == 2
    if unrefined:
        assert started(tmp_path, "r0") < ended(tmp_path, "u1"), "made good by the first pass of the next launcher"
    assert not list(tmp_path.rglob("*.pkl"))


def test_sbatch_survives_its_launcher(slurm_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher is known to be dead, but its sbatch runs: nothing is submitted before it has ended."""
    graph, upstream, runs = two_levels()
    slow = 'case $(grep job-name "$1") in *finetune*) kill -9 $(cat $HERE/launcher); sleep 3;; esac\nexec $REAL "$@"'
    before = array_jobs(slurm_cluster)
    with monkeypatch.context() as during:
        put_in_path(tmp_path, "sbatch", slow, during)
        killed_launcher(tmp_path, "in sbatch", 0.5)
    assert sbatch_under_way(layout_of(tmp_path).submissions / "scripts")
    finish(tmp_path, graph, [upstream, runs])
    assert not sbatch_under_way(layout_of(tmp_path).submissions / "scripts")
    assert {len(runs_of(tmp_path, key)) for key in graph.nodes} == {1}
    assert len(arrays_since(slurm_cluster, before)) == 2


@pytest.mark.parametrize(
    "ending",
    ["kill -9 $$", "exit 0", "sleep 60", 'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv" >&2; exit 1'],
    ids=["killed", "silent", "hangs", "times out"],
)
def test_the_reply_of_sbatch_is_lost(slurm_cluster: Cluster, tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It made the array without reporting it: the intent stays, the array is found by its name and is the only one."""
    nodes = [node("one", "states"), node("two", "states")]
    graph, batch = graph_of(nodes), batch_of(nodes)
    monkeypatch.setattr("jobs.slurm.client.SUBMIT_SECONDS", 2)
    before = array_jobs(slurm_cluster)
    arrays = arrays_of(tmp_path)
    with monkeypatch.context() as during:
        put_in_path(tmp_path, "sbatch", f'$REAL --hold "$@" >/dev/null\n{ending}', during)
        held = arrays.submit(batch, graph, {})
    assert {flight.job[0] for flight in held.values()} == {"?"}
    assert not list((layout_of(tmp_path).submissions / "scripts").glob(".*")), "no temporary script stays"
    found = arrays.in_flight()
    assert found["two"].job.endswith("_1")
    assert arrays.submit(batch, graph, {}) == found
    slurm_cluster.run("scontrol", "release", found["one"].job.partition("_")[0])
    until(drained(arrays))
    assert [len(runs_of(tmp_path, key)) for key in ("one", "two")] == [1, 1]
    assert len(arrays_since(slurm_cluster, before)) == 1


def test_sbatch_that_never_submits(slurm_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before its request: after the settle time the same name is used again."""
    nodes = [node("one", "states")]
    graph, batch = graph_of(nodes), batch_of(nodes)
    with monkeypatch.context() as during:
        put_in_path(tmp_path, "sbatch", "kill -9 $$", during)
        assert arrays_of(tmp_path).submit(batch, graph, {})["one"].job.startswith("?")
    (record,) = SubmissionBook(layout_of(tmp_path)).open()
    finish(tmp_path, graph, [batch])
    assert len(runs_of(tmp_path, "one")) == 1
    assert {each.name for each in SubmissionBook(layout_of(tmp_path)).open()} <= {record.name}


def test_slurmctld_dies_before_the_request(slurm_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch waits in vain; when slurmctld is back and does not know the name, the batch is submitted again."""

    class Cut(SlurmClient):
        def submit(self, folder: Path, script: str, parameters: Mapping[str, Any], site: SlurmSite) -> str:
            slurm_cluster.stop_controller(signal.SIGKILL)
            try:
                return super().submit(folder, script, parameters, site)
            finally:
                slurm_cluster.start_controller()

    monkeypatch.setattr("jobs.slurm.client.SUBMIT_SECONDS", 2)
    nodes = [node("one", "states")]
    graph, batch = graph_of(nodes), batch_of(nodes)
    assert arrays_of(tmp_path, client=Cut()).submit(batch, graph, {})["one"].job.startswith("?")
    finish(tmp_path, graph, [batch])
    assert len(runs_of(tmp_path, "one")) == 1


def test_slurmctld_accepts_the_job_after_sbatch_gave_up(slurm_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job is found by its name and is the only one."""

    class Deaf(SlurmClient):
        def submit(self, folder: Path, script: str, parameters: Mapping[str, Any], site: SlurmSite) -> str:
            slurm_cluster.pause_controller()
            try:
                return super().submit(folder, script, parameters, site)
            finally:
                slurm_cluster.resume_controller()

    monkeypatch.setattr("jobs.slurm.client.SUBMIT_SECONDS", 2)
    nodes = [node("one", "states")]
    graph, batch = graph_of(nodes), batch_of(nodes)
    before = array_jobs(slurm_cluster)
    assert arrays_of(tmp_path, client=Deaf()).submit(batch, graph, {})["one"].job.startswith("?")
    finish(tmp_path, graph, [batch])
    assert len(runs_of(tmp_path, "one")) == 1
    assert len(arrays_since(slurm_cluster, before)) == 1


def test_slurmctld_killed_right_after_a_submission(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Whether it kept the job or not: every stage runs, and at the end the record is closed."""
    graph, upstream, runs = two_levels()
    arrays = arrays_of(tmp_path)
    arrays.submit(runs, graph, dict(arrays.submit(upstream, graph, {})))
    slurm_cluster.stop_controller(signal.SIGKILL)
    slurm_cluster.start_controller()
    finish(tmp_path, graph, [upstream, runs])
    assert all(facts_of(tmp_path, key) for key in graph.nodes)


def test_two_arrays_of_one_name(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """The second is submitted by hand: its pending elements are withdrawn, and the first runs everything once."""
    graph, upstream, runs = two_levels()
    arrays = arrays_of(tmp_path)
    slurm_cluster.run("scontrol", "update", "PartitionName=main", "State=DOWN")  # nothing starts before both are there
    held = dict(arrays.submit(upstream, graph, {}))
    held |= arrays.submit(runs, graph, held)
    first = held["r0"].job.partition("_")[0]
    script = layout_of(tmp_path).submissions / "scripts" / f"{first}_submission.sh"
    assert script.stat().st_mode & 0o777 == 0o600
    second = slurm_cluster.run("sbatch", "--parsable", str(script))
    found = arrays.in_flight()
    assert {found[key].job.partition("_")[0] for key in DOWN} == {first}
    assert second not in slurm_cluster.run("squeue", "-h", "-o", "%F", "-t", "PENDING").split()
    (double,) = (record for record in SubmissionBook(layout_of(tmp_path)).open() if record.job == second)
    assert double.cancelled == (0, 1, 2, 3)
    slurm_cluster.run("scontrol", "update", "PartitionName=main", "State=UP")
    until(drained(arrays))
    assert {key: runs_of(tmp_path, key) for key in DOWN} == {key: [f"{first}_{index}"] for index, key in enumerate(DOWN)}


def test_one_stage_in_two_arrays(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Two launchers make different batches: of two pending elements the younger is withdrawn, beside a running one the pending one."""
    nodes = [node("one", "states", sleep=3), node("two", "states"), node("three", "states")]
    graph = graph_of(nodes)
    arrays = arrays_of(tmp_path, experiment_of(throttle=1))
    held = arrays.submit(batch_of(nodes[:2]), graph, {})
    until(lambda: arrays.in_flight()["one"].phase is Phase.running)
    arrays.submit(batch_of([nodes[0], nodes[1], nodes[2]]), graph, {})
    records = SubmissionBook(layout_of(tmp_path))
    until(lambda: arrays.in_flight()["two"].phase is Phase.queued and any(record.cancelled for record in records.open()), 5)
    until(drained(arrays))
    assert runs_of(tmp_path, "one")[:1] == [held["one"].job]
    assert runs_of(tmp_path, "two") == [held["two"].job]
    assert len(runs_of(tmp_path, "three")) == 1


def test_an_array_larger_than_the_site_allows(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Slurm rejects it in one line and no intent stays; split at the site's limit, all of it is accepted."""
    first = node("first", "states", sleep=60)
    rest = [node(f"key{number:04}", "finetune", {"states": "first"}) for number in range(1003)]
    graph = graph_of([first, *rest])
    arrays = arrays_of(tmp_path)
    held = dict(arrays.submit(batch_of([first]), graph, {}))
    with pytest.raises(UsageError, match="Invalid job array specification"):
        arrays.submit(batch_of(rest), graph, held)
    assert len(SubmissionBook(layout_of(tmp_path)).open()) == 1
    plan = make_plan(graph, {}, held, runs_per_task={}, limits=arrays.limits())
    assert [len(batch.tasks) for batch in plan.batches] == [1001, 2]
    for batch in plan.batches:
        held |= arrays.submit(batch, graph, held)
    assert len(arrays.in_flight()) == 1004
    assert len(arrays.cancel_all()) == 1004
    until(drained(arrays))


class Enforcing(Cluster):
    """A Slurm that enforces the limits of its accounts."""

    def _write_files(self) -> None:
        super()._write_files()
        with self.slurm_conf.open("a") as file:
            file.write("AccountingStorageEnforce=limits\n")


@contextlib.contextmanager
def another_cluster(kind: type[Cluster], settings: ClusterSettings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A Slurm for one test; a guard takes it down however the test ends."""
    folder = Path(tempfile.mkdtemp(prefix="ser-grid-", dir="/tmp"))  # a socket's path below it must be short
    command = [sys.executable, "-m", "tests.slurm_cluster", "guard", str(folder)]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, cwd=ROOT)
    try:
        cluster = kind(folder, settings)
        cluster.up()
        for name in ("SLURM_CONF", "PATH"):
            monkeypatch.setenv(name, cluster.environment[name])
        yield cluster
    finally:
        if guard.stdin is not None:
            guard.stdin.close()
        guard.wait(60)


def test_a_submit_limit_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The account's limit is read from the site; what exceeds it is deferred, also if the limit was not known before."""
    with another_cluster(Enforcing, ClusterSettings(nodes=1), monkeypatch) as cluster:
        user = ["user", "where", f"user={cluster.run('id', '-un')}"]
        cluster.run("sacctmgr", "--immediate", "add", "user", user[2].partition("=")[2], "account=root", check=False)
        cluster.run("sacctmgr", "--immediate", "modify", *user, "set", "MaxSubmitJobs=3")
        nodes = [node(key, "states", sleep=1) for key in ("one", "two")]
        more = [node(key, "tapt") for key in ("three", "four")]
        graph = graph_of([*nodes, *more])
        arrays = arrays_of(tmp_path)
        assert arrays.limits() == Limits(array_size=1001, queue_room=3)
        arrays.submit(batch_of(nodes), graph, {})
        assert arrays.submit(batch_of(more), graph, {}) == {}, "sbatch was declined: four are more than three"
        assert len(SubmissionBook(layout_of(tmp_path)).open()) == 1
        arrays.in_flight()
        assert arrays.limits().queue_room == 1
        finish(tmp_path, graph, [batch_of(more)])
        assert [len(runs_of(tmp_path, key)) for key in graph.nodes] == [1, 1, 1, 1]


def test_a_site_without_accounting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The final state is what slurmctld still knows, which is not who cancelled: no waiting; a stage that failed can be submitted again."""
    with another_cluster(Cluster, ClusterSettings(nodes=1, accounting=False), monkeypatch) as cluster:
        nodes = [node("one", "states", fail=True), node("two", "states", sleep=60)]
        graph, batch = graph_of(nodes), batch_of(nodes)
        arrays = arrays_of(tmp_path)
        held = arrays.submit(batch, graph, {})
        until(lambda: facts_of(tmp_path, "two", begun=True) is not None)
        cluster.run("scancel", "--signal=KILL", held["two"].job)
        until(drained(arrays))
        assert {key: [each.state for each in found] for key, found in arrays.departures(["one", "two"]).items()} == {
            "one": ["FAILED"],
            "two": [""],
        }
        assert arrays.settling() == frozenset()
        assert SubmissionBook(layout_of(tmp_path)).open() == ()
        assert arrays.submit(batch, graph, {})["one"].job != held["one"].job


def test_a_lost_reply_is_found_by_name(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """sbatch made the job, its reply was lost, the launcher died: the next pass finds the job and submits nothing."""
    nodes = [node("one", "states", sleep=20), node("two", "states", sleep=0)]
    graph, batch = graph_of(nodes), batch_of(nodes)
    held = arrays_of(tmp_path).submit(batch, graph, {})
    book = SubmissionBook(layout_of(tmp_path))
    (record,) = book.open()
    as_before_the_reply(book, record, batch, time.time())
    before = array_jobs(slurm_cluster)
    later = arrays_of(tmp_path)
    looked = later.look_only()
    assert looked["one"].job == held["one"].job
    assert book.open()[0].state is State.intent, "a dry run writes nothing"
    found = later.in_flight()
    assert found["one"].job == held["one"].job
    (record,) = book.open()
    assert (record.state, record.job) == (State.submitted, held["one"].job.partition("_")[0])
    later.submit(batch, graph, {})
    assert not arrays_since(slurm_cluster, before)


def test_an_ended_job_with_a_lost_reply_is_found_in_accounting(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """It has left the queue, but accounting knows it: recorded as submitted and ended, not as lost."""
    nodes = [node("one", "states")]
    graph, batch = graph_of(nodes), batch_of(nodes)
    arrays = arrays_of(tmp_path)
    arrays.submit(batch, graph, {})
    book = SubmissionBook(layout_of(tmp_path))
    (record,) = book.open()
    until(lambda: "COMPLETED" in slurm_cluster.run("sacct", "-S", "now-1day", "-X", "-n", f"--name={record.name}"))
    until(lambda: not slurm_cluster.run("squeue", "-h"))
    as_before_the_reply(book, record, batch, time.time() - 5)
    assert arrays_of(tmp_path).in_flight() == {}
    assert book.open() == ()
    assert book.next_name(batch).endswith(".2")


def test_an_intent_without_a_job_is_submitted_again_after_the_settle_time(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Until then its stages count as queued and nothing downstream is submitted; then the same name is used again."""
    nodes = [node("one", "states"), node("two", "finetune", {"states": "one"})]
    graph, batch = graph_of(nodes), batch_of(nodes[:1])
    now = time.time()
    clock = [now]
    arrays = arrays_of(tmp_path, settle_seconds=60, clock=lambda: clock[0])
    book = SubmissionBook(layout_of(tmp_path))
    name = book.next_name(batch)
    assert book.begin(replace(new_submission(name, batch, now), writer=Writer("elsewhere", 7, "another boot/pid:[1]/7")))
    held = arrays.in_flight()
    assert held["one"].phase is Phase.queued
    assert arrays.submit(batch, graph, {}) == held
    assert arrays.submit(batch_of(nodes[1:]), graph, held) == {}
    clock[0] = now + 230  # sbatch might still be waiting for the controller
    assert arrays.in_flight() == held
    clock[0] = now + 301
    assert arrays.in_flight() == {}
    submitted = arrays.submit(batch, graph, {})
    assert submitted["one"].job.endswith("_0")
    (record,) = book.open()
    assert (record.name, record.state) == (name, State.submitted)


def test_a_failed_squeue_is_an_error(slurm_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And never an empty queue: nothing follows from a slurmctld that is down or from unexpected output."""
    nodes = [node("one", "states", sleep=30)]
    graph = graph_of(nodes)
    client = SlurmClient(look_seconds=1.0, looks=2, pause=0.1)
    arrays = arrays_of(tmp_path, client=client)
    arrays.submit(batch_of(nodes), graph, {})
    slurm_cluster.pause_controller()
    try:
        with pytest.raises(SlurmUnavailableError, match="squeue failed 2 times"):
            arrays.in_flight()
        second = [node("two", "states")]
        with pytest.raises(SlurmUnavailableError):
            arrays.submit(batch_of(second), graph_of(second), {})
    finally:
        slurm_cluster.resume_controller()
    until(lambda: "UP" in slurm_cluster.run("scontrol", "ping", check=False))
    assert set(arrays.in_flight()) == {"one"}, "no intent stays of what was never asked for"
    put_in_path(tmp_path, "squeue", "echo something else", monkeypatch)
    with pytest.raises(SlurmUnavailableError, match="something else"):
        arrays.in_flight()


def test_a_rejected_request_is_reported_and_leaves_no_intent(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """One line with Slurm's reason; with a corrected profile the same batch is accepted."""
    nodes = [node("one", "states")]
    graph, batch = graph_of(nodes), batch_of(nodes)
    with pytest.raises(UsageError, match="Invalid partition name"):
        arrays_of(tmp_path, experiment_of(SlurmSite(partition="no such"))).submit(batch, graph, {})
    arrays = arrays_of(tmp_path, experiment_of(SlurmSite(partition="main")))
    assert arrays.in_flight() == {}
    assert arrays.submit(batch, graph, {})["one"].job.endswith("_0")


def test_without_refinement_elements_start_later_and_never_too_early(
    slurm_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """scontrol fails: every element waits for the whole upstream array."""
    graph, upstream, runs = two_levels(3)
    put_in_path(tmp_path, "scontrol", "exit 1", monkeypatch)
    arrays = arrays_of(tmp_path)
    arrays.submit(runs, graph, dict(arrays.submit(upstream, graph, {})))
    until(drained(arrays))
    last = max(ended(tmp_path, key) for key in UP)
    assert all(started(tmp_path, key) >= last for key in DOWN)
