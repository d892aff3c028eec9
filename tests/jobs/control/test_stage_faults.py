"""Faults around single stages on a real Slurm: lost artifacts, two controllers, a full queue or disk, a Slurm that does not answer."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.control.controller import Report, read_facts, reconcile, run_local
from jobs.control.executor_protocol import Batch, Task
from jobs.control.facts import Phase
from jobs.control.holds import ALIKE
from jobs.errors import SlurmUnavailableError
from jobs.experiment.config import SlurmSite
from jobs.slurm.client import SlurmClient
from jobs.slurm.submissions import State, SubmissionBook, new_submission
from jobs.store.cancellations import record_cancellation
from jobs.store.failures import FailureClass
from jobs.store.layout import Layout
from jobs.store.records import attempt_numbers, read_outcome, read_result
from jobs.worker.task import describe, write_description
from tests.jobs import fake_registry, local_launch
from tests.jobs.failure_trial import ROOT, Trial
from tests.slurm_cluster import Cluster
from tests.waiting import wait_until


@pytest.mark.slurm
def test_when_the_first_tasks_all_fail_alike_the_rest_is_withdrawn(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Six tasks, one at a time: after the third failure the waiting ones leave the queue, until it is mended and launched again."""
    trial = Trial(tmp_path, dict.fromkeys(range(6), "broken"), seeds=6, throttle=1)
    report = trial.settle()
    starts = sum(fake_registry.count(trial.corpus, "starts").values())
    assert ALIKE <= starts < 6
    assert len(report.plan.given_up) == starts
    assert len(report.plan.held_or_cancelled) == 6 - starts
    assert wait_until(lambda: not slurm_cluster.run("squeue", "-h")), "nothing waits; the last task may still be completing"
    assert "all failed alike" in report.plan.reasons[report.plan.held_or_cancelled[0]]
    (trial.corpus / "mended").touch()
    assert not trial.look().submitted, "nothing is tried again by itself"
    trial.experiment.resources["default"].throttle = 0
    trial.launch_again()
    assert trial.settle().complete


@pytest.mark.slurm
def test_a_node_that_has_lost_its_storage_is_avoided(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Jobs fail there at once, before a worker begins, and the node is free for the next: they are submitted again without it.

    Before: the node took them again and again, and after four jobs each stage was given up.
    """
    trial = Trial(tmp_path, {}, seeds=3)
    with slurm_cluster.hidden_from("n1", trial.layout.root):
        assert trial.settle().complete
    for slot in range(3):
        assert [claim.node for claim in trial.claims(slot)] in (["n2"], ["n3"])
        assert trial.states(slot)[:1] == ["FAILED"]
        assert "#SBATCH --exclude=n1\n" in trial.script(trial.claims(slot)[0].slurm_job)


@pytest.mark.slurm
def test_a_missing_artifact_is_computed_again_although_slurm_let_its_reader_start(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """`afterok` proves nothing: what was written is gone when the reader starts, which waits, and reads what is made anew."""
    trial = Trial(tmp_path, {}, seeds=1, methods=("tapt",))
    first = trial.look()
    (tapt,) = (trial.layout.stage(node.stage, key) for key, node in first.graph.nodes.items() if node.stage == "tapt")
    reader = first.in_flight[first.graph.runs[0].key].job
    slurm_cluster.run("scontrol", "hold", reader)
    assert wait_until(lambda: read_result(tapt, tapt.path.name) is not None)
    (tapt.attempt(1).output / "sum.json").unlink()
    assert wait_until(lambda: "Dependency" not in slurm_cluster.run("squeue", "-h", "-j", reader, "-o", "%r"))
    slurm_cluster.run("scontrol", "release", reader)
    assert wait_until(lambda: slurm_cluster.run("squeue", "-h", "-j", reader, "-o", "%T") == "RUNNING")
    assert trial.settle().complete
    assert attempt_numbers(tapt) == (1, 2)
    assert trial.starts(0) == 1
    assert trial.classes(0) == []


def passes(trial: Trial, number: int) -> None:
    """What a controller in a process of its own does."""
    for _ in range(number):
        reconcile(trial.desired, trial.executor())
        time.sleep(0.1)


@pytest.mark.slurm
def test_two_controllers_execute_every_stage_once(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Twenty passes each, at the same time, on one experiment whose runs fail now and then."""
    trial = Trial(tmp_path, {1: "comm:1", 3: "oom:1", 4: "nan"}, seeds=6, methods=("tapt", "vft"))
    context = multiprocessing.get_context("fork")
    controllers = [context.Process(target=passes, args=(trial, 20)) for _ in range(2)]
    for controller in controllers:
        controller.start()
    for controller in controllers:
        controller.join()
    assert [controller.exitcode for controller in controllers] == [0, 0]
    report = trial.settle()
    assert report.complete
    assert set(fake_registry.count(trial.corpus, "ends").values()) == {1}
    starts = fake_registry.count(trial.corpus, "starts")
    assert [starts.pop(trial.run(slot).key) for slot in (1, 3)] == [2, 2]
    assert set(starts.values()) == {1}


@pytest.mark.slurm
def test_no_more_is_submitted_than_the_queue_may_hold(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Room for three: the rest is deferred, not failed, and follows. A job that Slurm has never heard of is waited for, and made good."""
    trial = Trial(tmp_path, {}, seeds=7, site=SlurmSite(max_submit=3), settle_seconds=1.0)
    book, keys = SubmissionBook(trial.layout), tuple(run.key for run in trial.desired.graph.runs)
    vanished = Batch("finetune", "vft", (Task((keys[0],)),))
    record = new_submission(book.next_name(vanished), vanished, time.time())
    assert book.begin(record)
    book.change(record, state=State.submitted, job="99999")
    deferred: set[str] = set()

    def watch(report: Report) -> None:
        deferred.update(report.plan.deferred)
        assert len(trial.arrays.live_jobs() or ()) <= 3

    report = trial.settle(each=watch)
    assert report.complete
    assert len(deferred) >= 3
    assert set(fake_registry.count(trial.corpus, "starts").values()) == {1}
    (departure, _) = trial.arrays.departures(keys)[keys[0]]
    assert (departure.job, departure.state) == ("99999_0", "")


@pytest.mark.slurm
def test_what_is_cancelled_as_it_ends_stays_either_way(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """One stage has just computed its numbers, one waits: whatever Slurm makes of it, nothing is begun again before the next launch."""
    trial = Trial(tmp_path, {}, seeds=2, throttle=1)
    trial.look()
    assert wait_until(lambda: bool(fake_registry.count(trial.corpus, "ends")), step=0.01)
    record_cancellation(trial.layout, None, time.time())
    trial.arrays.cancel_all()
    report = trial.settle()
    begun = fake_registry.count(trial.corpus, "starts")
    for _ in range(3):
        assert not trial.look().submitted
    assert fake_registry.count(trial.corpus, "starts") == begun
    assert {*report.plan.reused, *report.plan.held_or_cancelled} == {run.key for run in report.graph.runs}
    assert report.plan.held_or_cancelled
    trial.launch_again()
    assert trial.settle().complete


@pytest.mark.slurm
def test_a_queue_that_cannot_be_seen_or_lies_submits_nothing(
    slurm_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """squeue fails: no pass, and no file touched. squeue is empty while a worker runs: its heartbeat holds the stage."""
    trial = Trial(tmp_path, {0: "stall:1"}, seeds=1)
    trial.look()
    assert wait_until(lambda: trial.starts(0) == 1)
    trial.look()
    files = {path: path.stat().st_mtime_ns for path in trial.layout.submissions.rglob("*")}
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    with monkeypatch.context() as shadowed:
        shadowed.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
        squeue.write_text("#!/bin/sh\nexit 1\n")
        squeue.chmod(0o755)
        trial.arrays = trial.executor(SlurmClient(looks=2, pause=0.05))
        with pytest.raises(SlurmUnavailableError):
            trial.look()
        assert {path: path.stat().st_mtime_ns for path in trial.layout.submissions.rglob("*")} == files
        squeue.write_text("#!/bin/sh\n")
        report = trial.look()
        assert report.submitted == ()
        assert report.plan.waiting == (trial.run(0).key,)
        assert report.facts[trial.run(0).key].executed_by == f"Slurm job {trial.claims(0)[0].slurm_job}"
    trial.arrays = trial.executor()
    report = trial.look()
    assert report.in_flight[trial.run(0).key].phase is Phase.running
    slurm_cluster.run("scancel", "--signal=USR1", trial.claims(0)[0].slurm_job)
    assert trial.settle().complete
    assert trial.starts(0) == 2


@pytest.mark.slow
def test_a_torn_result_is_computed_again(tmp_path: Path) -> None:
    """Half of a result is neither success nor failure, wherever it was cut."""
    desired = local_launch.desired(tmp_path, {})
    key = desired.graph.runs[0].key
    folder = desired.layout.stage("finetune", key)
    with local_launch.executor(tmp_path) as executor:
        assert run_local(desired, executor).complete
        text = folder.result.read_bytes()
        folder.result.write_bytes(text[: len(text) // 2])
        report = run_local(desired, executor)
    assert report.complete
    result = read_result(folder, key)
    assert result is not None
    assert result.attempt == 2
    assert report.facts[key].failures == 0
    assert fake_registry.count(tmp_path / "corpus", "starts").pop(key) == 2


ON_A_SMALL_DISK = """
import json, sys
from pathlib import Path
from jobs.worker.task import read_description
from jobs.worker.stage import WorkerProcess, execute
from jobs.signals import StopRequest

process = WorkerProcess(read_description(Path(sys.argv[1])), 1, lambda line: None, StopRequest(), lag_seconds=0.0)
nodes = process.description.nodes
print(json.dumps([execute(process, nodes[key]).value for (key,) in process.description.tasks]))
"""


def test_a_full_disk_is_its_own_class_and_leaves_nothing_torn(tmp_path: Path) -> None:
    """A real disk of eight megabytes: the worker's outcome still fits, there is no result, and the small stage succeeds."""
    folder, disk = tmp_path / "trial", tmp_path / "trial" / "results"
    place = local_launch.workplace(folder)
    graph = fake_registry.make_graph({"failing": {"finetune vft 1 0": "write:20"}}, methods=("vft",), folds=("1",), seeds=2)
    disk.mkdir()
    large, small = (graph.nodes[run.key] for run in graph.runs)
    write_description(folder / "tasks.json", describe(place, graph, [[large.key], [small.key]]))
    kept = tmp_path / "kept"
    lines = [
        f"mount -t tmpfs -o size=8m tmpfs {disk}",
        f"{sys.executable} -c '{ON_A_SMALL_DISK}' {folder}/tasks.json",
        f"cp -r {disk} {kept}",
    ]
    command = [*namespace(), "sh", "-c", " && ".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["failed", "done"]
    layout = Layout(kept, "exp")
    attempt = layout.stage("finetune", large.key).attempt(1)
    outcome = read_outcome(attempt)
    assert outcome is not None
    assert (outcome.error, outcome.kind) == ("OSError", FailureClass.storage.name)
    assert outcome.message == f"[Errno {errno.ENOSPC}] No space left on device: '{disk}/store/finetune/{large.key}/attempts/0001/output'"
    assert not attempt.output.exists()
    assert not list(kept.rglob(".*")), "no temporary file"
    facts = read_facts(graph, layout)
    assert (facts[large.key].failure, facts[large.key].stopped, facts[small.key].done) == (FailureClass.storage, "", True)


def namespace() -> list[str]:
    """The command in front of another that lets it mount."""
    for command in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    pytest.fail("no way to mount a small disk here")
