"""Control: a pass submits nothing twice, the loop ends, and what cannot start is not submitted for ever."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from jobs.controller import (
    MAX_SILENT,
    MAX_UNSEEN,
    Change,
    Desired,
    Event,
    Interrupts,
    Report,
    SeesQueue,
    count_silent,
    duration,
    reconcile,
    wait_for,
    without_silent,
)
from jobs.graph import Graph
from jobs.plan import Batch, InFlight, Limits, NodeFacts, Phase, Plan
from jobs.slurm_client import SlurmUnavailableError
from jobs.tasks import describe_batch
from jobs.worker import StopRequest, WorkerProcess, run_task
from tests.jobs import fake_registry, local_launch


@dataclass
class QueueOfThreads:
    """An executor with a queue of its own: every look at it runs the elements whose upstream is done, with the real worker."""

    folder: Path
    room: int = 0
    broken: bool = False  # jobs end before the worker begins
    refuses: int = 0  # the first so many batches are not taken
    unseen: int = 0  # the first so many looks fail
    queue: dict[str, InFlight] = field(default_factory=dict)
    submissions: list[Batch] = field(default_factory=list)
    upstreams: list[Mapping[str, InFlight]] = field(default_factory=list)
    processes: list[tuple[WorkerProcess, int, tuple[str, ...]]] = field(default_factory=list)

    def limits(self) -> Limits:
        return Limits(array_size=3, queue_room=self.room)

    def in_flight(self) -> Mapping[str, InFlight]:
        if self.unseen:
            self.unseen -= 1
            raise SlurmUnavailableError("squeue did not answer")
        return dict(self.queue)

    def live_jobs(self) -> frozenset[str] | None:
        return frozenset(flight.job for flight in self.queue.values())

    def submit(self, batch: Batch, graph: Graph, upstream: Mapping[str, InFlight]) -> Mapping[str, InFlight]:
        if self.refuses:
            self.refuses -= 1
            return {}
        self.submissions.append(batch)
        self.upstreams.append(upstream)
        description = describe_batch(local_launch.workplace(self.folder), graph, batch)
        taken: dict[str, InFlight] = {}
        for index, task in enumerate(batch.tasks):
            self.processes.append((WorkerProcess(description, 1, lambda line: None, StopRequest(), lag_seconds=0.0), index, task.keys))
            taken.update(dict.fromkeys(task.keys, InFlight(Phase.queued, f"{len(self.submissions)}_{index}")))
        self.queue.update(taken)
        return taken

    def run(self, report: Report) -> None:
        """Let everything that is queued run and leave the queue."""
        for process, index, keys in self.processes:
            if not self.broken:
                run_task(process, index)
            for key in keys:
                self.queue.pop(key)
        self.processes.clear()


@pytest.fixture
def executor(tmp_path: Path) -> QueueOfThreads:
    return QueueOfThreads(tmp_path)


def _wait(desired: Desired, executor: QueueOfThreads) -> tuple[Report, list[Event]]:
    events: list[Event] = []
    return wait_for(desired, executor, poll_seconds=0.001, tell=events.append, each_pass=executor.run), events


def test_the_whole_graph_is_submitted_in_one_pass_and_only_once(tmp_path: Path, executor: QueueOfThreads) -> None:
    """One pass hands everything over, with the jobs to depend on; the next finds it in flight."""
    desired = local_launch.desired(tmp_path, {})
    first = reconcile(desired, executor)
    assert sorted(first.submitted) == sorted(desired.graph.nodes)
    for batch, upstream in zip(executor.submissions, executor.upstreams, strict=True):
        assert len(batch.tasks) <= 3
        assert set(upstream) == {parent for key in batch.keys for parent in desired.graph.nodes[key].upstream.values()}
    second = reconcile(desired, executor)
    assert second.submitted == ()
    assert len(second.plan.waiting) == 20


def test_waiting_ends_when_everything_is_there(tmp_path: Path, executor: QueueOfThreads) -> None:
    """All runs get their results; every stage is told of once; a second wait submits nothing."""
    desired = local_launch.desired(tmp_path, {})
    report, events = _wait(desired, executor)
    assert report.complete
    assert [event.change for event in events] == [Change.done] * 20
    assert events[-1].done == events[-1].total == 20
    submitted = len(executor.submissions)
    report, events = _wait(desired, executor)
    assert report.complete
    assert events == []
    assert len(executor.submissions) == submitted


def test_failed_stages_are_submitted_up_to_the_limit(tmp_path: Path, executor: QueueOfThreads) -> None:
    """Two failures and a success; three failures and an end, with what needs it blocked."""
    recipe: dict[str, object] = {"failing": {"finetune vft 1 0": "fail:2", "tapt tapt 1 0": "fail:3"}}
    desired = local_launch.desired(tmp_path, recipe)
    report, events = _wait(desired, executor)
    assert not report.complete
    assert [desired.graph.nodes[key].stage for key in report.plan.given_up] == ["tapt"]
    assert len(report.plan.blocked) == 2
    assert sum(event.change is Change.failed for event in events) == 5
    starts = fake_registry.count(tmp_path / "corpus", "starts")
    assert sorted(starts.values()) == [1] * 16 + [3, 3]


def test_a_full_queue_defers(tmp_path: Path, executor: QueueOfThreads) -> None:
    """With room for three tasks at a time the experiment takes more passes and ends complete."""
    executor.room = 3
    report, _ = _wait(local_launch.desired(tmp_path, {}), executor)
    assert report.complete
    assert set(fake_registry.count(tmp_path / "corpus", "starts").values()) == {1}


def test_what_was_not_taken_is_planned_again(tmp_path: Path, executor: QueueOfThreads) -> None:
    """A batch that sbatch refused takes nothing with it: its dependants are kept back, and all of it follows in the next pass."""
    executor.refuses = 2
    desired = local_launch.desired(tmp_path, {})
    first = reconcile(desired, executor)
    for key in first.submitted:
        assert set(desired.graph.nodes[key].upstream.values()) <= set(first.submitted)
    assert len(first.submitted) < 20
    second = reconcile(desired, executor)
    assert sorted(first.submitted + second.submitted) == sorted(desired.graph.nodes)


def test_jobs_that_never_start_are_not_submitted_for_ever(tmp_path: Path, executor: QueueOfThreads) -> None:
    """A broken prologue leaves no attempt on disk; after a few times the stages are given up, with that reason."""
    executor.broken = True
    report, _ = _wait(local_launch.desired(tmp_path, {}), executor)
    assert not report.complete
    assert set(report.plan.given_up) == {key for key, node in local_launch.desired(tmp_path, {}).graph.nodes.items() if not node.upstream}
    assert all("before the worker began" in report.facts[key].error for key in report.plan.given_up)
    assert max(sum(key in batch.keys for batch in executor.submissions) for key in report.plan.given_up) == MAX_SILENT + 1


def test_a_queue_that_cannot_be_seen_is_waited_for_and_not_for_ever(tmp_path: Path, executor: QueueOfThreads) -> None:
    """Hiccups cost passes and nothing else; a Slurm that stays away ends the wait with its error."""
    executor.unseen = MAX_UNSEEN - 1
    report, _ = _wait(local_launch.desired(tmp_path, {}), executor)
    assert report.complete
    executor.unseen = MAX_UNSEEN
    with pytest.raises(SlurmUnavailableError):
        _wait(local_launch.desired(tmp_path, {}), executor)


def test_a_packed_stage_that_did_not_get_its_turn_is_not_silent() -> None:
    """Its job did begin; only jobs of which nothing was ever heard count."""
    graph = fake_registry.make_graph(methods=("vft",), folds=("1",), seeds=3)
    keys = [run.key for run in graph.runs]
    blank = {key: NodeFacts() for key in keys}
    nothing = Plan((), (), (), (), (), ())
    flights = {keys[0]: InFlight(Phase.running, "7_0"), keys[1]: InFlight(Phase.running, "7_0"), keys[2]: InFlight(Phase.running, "7_1")}
    before = Report(nothing, blank, flights)
    after = Report(nothing, {**blank, keys[0]: NodeFacts(attempts=1)}, {})
    assert count_silent(before, after, graph) == (keys[2],)
    assert count_silent(before, replace(after, in_flight=flights), graph) == ()


def test_silence_is_forgotten_once_there_is_a_result() -> None:
    """A finished stage is finished, whatever its earlier jobs did."""
    facts = {"a": NodeFacts(done=True), "b": NodeFacts(), "c": NodeFacts()}
    found = without_silent(facts, {"a": 9, "b": MAX_SILENT, "c": MAX_SILENT - 1})
    assert [found[key].refused for key in "abc"] == [False, True, False]


def test_an_executor_that_sees_the_queue_is_asked(executor: QueueOfThreads) -> None:
    """The optional method is found by its name."""
    assert isinstance(executor, SeesQueue)
    assert not isinstance(local_launch.executor(executor.folder), SeesQueue)


def test_an_interrupt_ends_the_wait_and_leaves_the_jobs(tmp_path: Path, executor: QueueOfThreads) -> None:
    """Ctrl-C in `--wait`: the report says so, nothing is withdrawn."""
    desired = local_launch.desired(tmp_path, {})
    main = threading.main_thread()
    timer = threading.Timer(0.3, lambda: _interrupt(main))
    timer.start()
    begun = time.monotonic()
    report = wait_for(desired, executor, poll_seconds=3600)
    timer.join()
    assert report.interrupted
    assert not report.complete
    assert len(executor.in_flight()) == 20
    assert time.monotonic() - begun < 30


def _interrupt(thread: threading.Thread) -> None:
    signal.pthread_kill(thread.ident or 0, signal.SIGINT)


def test_interrupts_restores_the_handlers() -> None:
    """Outside of the block Ctrl-C is what it was."""
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.count == 1
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4 s"), (12.4, "12 s"), (59.6, "60 s"), (61.0, "1 min 1 s"), (200.0, "3 min 20 s"), (18120.0, "5 h 2 min")],
)
def test_durations_in_words(seconds: float, text: str) -> None:
    """Two units at most."""
    assert duration(seconds) == text
