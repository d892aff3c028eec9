"""Control: a pass submits nothing twice, the loop ends, and what cannot start is not submitted for ever."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from jobs.control.controller import Change, Desired, Event, Report, changes, context_of, look, reconcile, wait_for
from jobs.control.facts import InFlight, Phase, Request, StageFacts
from jobs.control.failure_policy import COMMUNICATION_RETRIES, MAX_FAILED_STARTS, MAX_REFUSALS
from jobs.control.holds import ALIKE, FIRST
from jobs.errors import SlurmUnavailableError
from jobs.experiment.config import Policy
from jobs.experiment.graph import Graph, Refill, Slot
from jobs.store.cancellations import record_cancellation
from jobs.store.layout import Layout
from tests.jobs import fake_registry, local_launch
from tests.jobs.control.queue_of_threads import QueueOfThreads


@pytest.fixture
def executor(tmp_path: Path) -> QueueOfThreads:
    return QueueOfThreads(tmp_path)


def _wait(desired: Desired, executor: QueueOfThreads) -> tuple[Report, list[Event]]:
    events: list[Event] = []
    return wait_for(desired, executor, poll_seconds=0.001, on_event=events.append, on_pass=executor.run), events


def test_the_whole_graph_is_submitted_in_one_pass_and_only_once(tmp_path: Path, executor: QueueOfThreads) -> None:
    """One pass submits everything, with the jobs to depend on; the next finds it in flight."""
    desired = local_launch.desired(tmp_path, {})
    first = reconcile(desired, executor)
    assert sorted(first.submitted) == sorted(desired.graph.nodes)
    for batch, upstream in zip(executor.submissions, executor.upstreams, strict=True):
        assert len(batch.tasks) <= 3
        assert set(upstream) == {parent for key in batch.keys for parent in desired.graph.nodes[key].upstream.values()}
    second = reconcile(desired, executor)
    assert second.submitted == ()
    assert len(second.plan.waiting) == 20


def test_cyclic_garbage_is_not_collected_during_a_pass(tmp_path: Path, executor: QueueOfThreads, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while it plans and submits either, which took a sixth of a first pass over 100 000 runs; after it collection is enabled again."""
    seen = []
    limits = executor.limits

    def watched() -> object:
        seen.append(gc.isenabled())
        return limits()

    monkeypatch.setattr(executor, "limits", watched)
    reconcile(local_launch.desired(tmp_path, {}), executor)
    assert seen == [False]
    assert gc.isenabled()


def test_a_rejected_request_blocks_no_other_and_is_given_up(tmp_path: Path, executor: QueueOfThreads) -> None:
    """The other stages of the grid are computed; what Slurm rejects three times in a row ends with its message.

    Before: the first rejected batch ended every pass, and nothing behind it was submitted.
    """
    desired = local_launch.desired(tmp_path, {})
    executor.rejects = next(node.stage for node in desired.graph.nodes.values() if node.stage != "finetune" and not node.upstream)
    first = reconcile(desired, executor)
    assert set(first.refused) == {"QOSMaxCpuPerJobLimit"}
    assert first.submitted, "the rest"
    report, _ = _wait(desired, executor)
    assert report.settled
    assert not report.complete
    given_up = [report.graph.nodes[key] for key in report.plan.given_up]
    assert {node.stage for node in given_up} == {executor.rejects}
    assert {len(executor.rejected[node.key]) for node in given_up} == {MAX_REFUSALS}
    assert all("QOSMaxCpuPerJobLimit" in report.plan.reasons[node.key] for node in given_up)
    executor.rejects = ""
    again, _ = _wait(replace(desired, since=time.time()), executor)
    assert again.complete


def test_waiting_ends_when_everything_is_done(tmp_path: Path, executor: QueueOfThreads) -> None:
    """All runs get their results; every stage is reported once; a second wait submits nothing."""
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


def test_results_extend_the_graph_in_the_pass_that_sees_them(tmp_path: Path, executor: QueueOfThreads) -> None:
    """A second fold is wanted when the first is done; its stages are submitted in the same pass, also by a process that starts then."""

    def refill(folds: tuple[str, ...], generations: Mapping[Slot, int]) -> Graph:
        return fake_registry.make_graph({}, methods=("tapt",), folds=folds, generations=generations)

    def extend(graph: Graph, facts: Mapping[str, StageFacts]) -> Refill | None:
        larger = len({run.fold for run in graph.runs}) == 1 and all(facts[run.key].done for run in graph.runs)
        return partial(refill, ("1", "2")) if larger else None

    first = partial(refill, ("1",))
    desired = replace(local_launch.desired(tmp_path, {}), graph=first({}), refill=first, extend=extend)
    assert len(reconcile(desired, executor).graph.nodes) == 3
    report, events = _wait(desired, executor)
    assert report.complete
    assert [run.fold for run in report.graph.runs] == ["1", "1", "2", "2"]
    assert (len(events), events[-1].done, events[-1].total) == (6, 6, 6)
    assert [{report.graph.nodes[key].fold for key in batch.keys} for batch in executor.submissions] == [*({"1"}, {"1"}, {"2"}, {"2"})]
    assert look(desired).graph.nodes == report.graph.nodes


def test_each_class_of_failure_has_its_policy(tmp_path: Path, executor: QueueOfThreads) -> None:
    """Communication: on other nodes, a few times. Memory: with relief. Code: once, its downstream stages are blocked. All are reported."""
    failing = {"finetune vft 1 0": "comm:2", "finetune vft 1 1": "oom:2", "finetune vft 2 0": "comm:9", "tapt tapt 1 0": "fail:9"}
    desired = local_launch.desired(tmp_path, {"failing": failing})
    report, events = _wait(desired, executor)
    assert not report.complete
    assert {desired.graph.nodes[key].name.split(" [")[0] for key in report.plan.given_up} == {
        "tapt tapt fold 1 seed 0",
        "finetune vft fold 2 seed 0",
    }
    assert len(report.plan.blocked) == 2
    assert sum(event.change is Change.failed for event in events) == 2 + 2 + (COMMUNICATION_RETRIES + 1) + 1
    starts = fake_registry.count(tmp_path / "corpus", "starts")
    assert sorted(starts.values()) == [1] * 15 + [3, 3, COMMUNICATION_RETRIES + 1]
    requests = {batch.request for batch in executor.submissions}
    assert requests == {Request(), Request(1, 1.5), Request(2, 2.25), Request(exclude=("n1",))}


def test_a_diverged_run_is_replaced_by_the_reserve_seed(tmp_path: Path, executor: QueueOfThreads) -> None:
    """Detected as NaN, or by the training-side test of an existing result: the slot's next seed runs, and the first is recorded."""
    recipe: dict[str, object] = {"failing": {"finetune vft 1 0": "nan", "finetune tapt 2 1": "collapse"}}
    report, events = _wait(local_launch.desired(tmp_path, recipe), executor)
    assert report.complete
    assert report.judgements.generations == {("vft", "1", 0): 1, ("tapt", "2", 1): 1}
    assert {run.seed for run in report.graph.superseded} == {0, 1}
    assert {run.seed for run in report.graph.runs if run.generation} == {1000, 1001}
    dropped = [event.line for event in events if event.change is Change.dropped]
    assert len(dropped) == 2
    assert all("gets another seed" in line for line in dropped)
    assert "still at the class prior" in "".join(dropped)
    again = look(local_launch.desired(tmp_path, recipe))
    assert again.judgements == report.judgements, "another process, later, decides the same"


def test_an_outlier_is_rerun_until_the_seeds_are_used_up(tmp_path: Path, executor: QueueOfThreads) -> None:
    """One low run is replaced; a slot that diverges with every seed is given up, with that reason."""
    low = {"failing": {"finetune vft 1 0": "low"}}

    def refill(generations: Mapping[Slot, int]) -> Graph:
        return fake_registry.make_graph(low, methods=("vft",), folds=("1",), seeds=3, generations=generations)

    desired = replace(local_launch.desired(tmp_path, {}, Policy(sigmas=1.2)), graph=refill({}), refill=refill)
    report, _ = _wait(desired, executor)
    assert report.complete
    (dropped,) = report.judgements.dropped
    assert (dropped.slot, dropped.seed, dropped.round) == (0, 0, 1)
    other = QueueOfThreads(tmp_path / "other")
    stuck: dict[str, object] = {"failing": {f"finetune vft 1 {seed}": "collapse" for seed in (0, 1000, 2000)}}
    report, _ = _wait(local_launch.desired(other.folder, stuck, Policy(max_seeds=3)), other)
    assert not report.complete
    (key,) = report.plan.given_up
    assert report.plan.reasons[key].endswith("no reserve seed is left")


def _vft(folder: Path, behaviour: str, seeds: int = 6) -> Desired:
    graph = fake_registry.make_graph({"failing": {"finetune vft * *": behaviour}}, methods=("vft",), folds=("1",), seeds=seeds)
    return replace(local_launch.desired(folder, {}), graph=graph, refill=None)


def test_a_recipe_that_does_not_learn_is_not_multiplied(tmp_path: Path, executor: QueueOfThreads) -> None:
    """Four runs of which every seed diverges: three are computed, and the user is told. Before: all four with all their seeds, 24."""
    executor.at_once = 1
    collapsing: dict[str, object] = {"failing": {"finetune vft * *": "collapse"}}

    def refill(generations: Mapping[Slot, int]) -> Graph:
        return fake_registry.make_graph(collapsing, methods=("vft",), folds=("1",), seeds=4, generations=generations)

    desired = replace(local_launch.desired(tmp_path, {}), graph=refill({}), refill=refill)
    report, events = _wait(desired, executor)
    assert sum(fake_registry.count(tmp_path / "corpus", "starts").values()) == FIRST
    assert not report.complete
    assert len(report.plan.held_or_cancelled) == 4
    assert any(event.change is Change.held and "runs of vft diverged" in event.line for event in events)
    other = QueueOfThreads(tmp_path / "other")
    desired = replace(desired, layout=Layout(other.folder / "results", "exp"), policy=Policy(hold_diverging=False, max_seeds=2))
    report, _ = _wait(desired, other)
    assert sum(fake_registry.count(other.folder / "corpus", "starts").values()) == 8


def test_when_the_first_all_fail_alike_the_rest_is_withdrawn(tmp_path: Path, executor: QueueOfThreads) -> None:
    """Three of six run and fail with the same error; the others do not start until it is fixed and launched again."""
    executor.at_once = 1
    report, events = _wait(_vft(tmp_path, "broken"), executor)
    assert not report.complete
    assert len(report.plan.given_up) == ALIKE
    assert len(report.plan.held_or_cancelled) == 6 - ALIKE
    assert executor.queue == {}
    assert len(fake_registry.count(tmp_path / "corpus", "starts")) == ALIKE
    (told,) = [event for event in events if event.change is Change.held]
    assert "and 2 more: held: the first 3 of finetune vft all failed alike" in told.text
    assert not _wait(replace(_vft(tmp_path, "broken"), since=0.0), executor)[0].complete
    (tmp_path / "corpus" / "mended").touch()
    assert _wait(_vft(tmp_path, "broken"), executor)[0].complete


def test_cancelled_stages_are_not_submitted_before_the_next_launch(tmp_path: Path, executor: QueueOfThreads) -> None:
    """By the cancellation record or the owner's scancel: nothing is submitted, queued jobs are withdrawn, and a launch lifts it."""
    desired = _vft(tmp_path, "", seeds=2)
    first, second = (run.key for run in desired.graph.runs)
    reconcile(desired, executor)
    record_cancellation(desired.layout, [first], time.time())
    report = reconcile(desired, executor)
    assert (report.plan.held_or_cancelled, report.plan.waiting) == ((first,), (second,))
    assert set(executor.queue) == {second}
    executor.processes.clear()
    executor.leave([second], "CANCELLED by 1000")
    report = reconcile(desired, executor)
    assert set(report.plan.held_or_cancelled) == {first, second}
    assert (report.submitted, report.settled, report.complete) == ((), True, False)
    assert set(reconcile(_vft(tmp_path, "", seeds=2), executor).submitted) == {first, second}


def test_a_cancelled_stage_is_reported_as_cancelled(tmp_path: Path, executor: QueueOfThreads) -> None:
    """Stopping while it runs, then cancelled, also if its job ended by `scancel`. Before: failed."""
    desired = _vft(tmp_path, "", seeds=2)
    first, second = (run.key for run in desired.graph.runs)
    former = reconcile(desired, executor)
    record_cancellation(desired.layout, [first], time.time())
    executor.leave([second], "CANCELLED by 1000")
    report = reconcile(desired, executor)
    assert {event.node.key: (event.change, event.text) for event in changes(former, report)} == {
        first: (Change.cancelled, "cancelled"),
        second: (Change.cancelled, "cancelled"),
    }
    assert changes(report, reconcile(desired, executor)) == []
    running = replace(report, plan=replace(report.plan, waiting=(first,)))
    assert [event.text for event in changes(former, running) if event.node.key == first] == ["cancelled, stopping"]


def test_jobs_on_nodes_that_do_not_see_the_results_are_explained(tmp_path: Path, executor: QueueOfThreads) -> None:
    """The jobs of two stages end before their worker began: both errors ask for the folder; that of one job alone does not.

    Before: "jobs ended before the worker began" four times for each stage, and nothing to do about it.
    """
    desired = _vft(tmp_path, "", seeds=3)
    first, second, third = (run.key for run in desired.graph.runs)
    reconcile(desired, executor)
    for number, key in enumerate((first, second), 1):
        executor.queue[key] = InFlight(Phase.queued, f"7_{number}")
        executor.leave([key], "FAILED")
        errors = [reconcile(desired, executor).facts[each].error for each in (first, second, third)]
        asked = f"1 job ended before the worker began (last 7_{number}, Slurm says FAILED)"
        assert asked in errors[number - 1]
        assert [f"can the nodes see {desired.layout.root}? run `doctor`" in error for error in errors] == [number == 2, number == 2, False]


def test_nothing_is_submitted_until_slurm_reports_how_a_job_ended(tmp_path: Path, executor: QueueOfThreads) -> None:
    """A job that has just left the queue may have been cancelled by hand."""
    desired = _vft(tmp_path, "comm:1", seeds=1)
    (key,) = desired.graph.nodes
    first = reconcile(desired, executor)
    executor.run(first)
    executor.unsettled = frozenset((key,))
    waiting = reconcile(desired, executor)
    assert (waiting.submitted, waiting.plan.waiting) == ((), (key,))
    assert changes(first, waiting) == []
    executor.unsettled = frozenset()
    then = reconcile(desired, executor)
    assert then.submitted == (key,)
    (event,) = changes(waiting, then)
    assert "(tried again)" in event.text


def test_a_pass_without_an_answer_of_slurm_changes_nothing(tmp_path: Path, executor: QueueOfThreads) -> None:
    """Nothing is submitted, withdrawn or written."""
    desired = _vft(tmp_path, "")
    reconcile(desired, executor)
    held, files = dict(executor.queue), sorted(tmp_path.rglob("*"))
    executor.unseen = 1
    with pytest.raises(SlurmUnavailableError):
        reconcile(desired, executor)
    assert (executor.queue, len(executor.submissions), sorted(tmp_path.rglob("*"))) == (held, 2, files)


def test_jobs_of_an_earlier_configuration_do_not_disturb_a_pass(tmp_path: Path, executor: QueueOfThreads) -> None:
    """They are in the queue and not in the graph, and no pass fails when they end."""
    desired = _vft(tmp_path, "", seeds=1)
    executor.queue["another"] = InFlight(Phase.running, "9_0")
    report, events = _wait(desired, executor)
    assert report.complete
    former = replace(report, in_flight=dict(executor.queue))
    executor.queue.clear()
    assert changes(former, reconcile(desired, executor)) == []
    assert [event.change for event in events] == [Change.done]


def test_a_full_queue_defers(tmp_path: Path, executor: QueueOfThreads) -> None:
    """With room for three tasks at a time the experiment takes more passes and ends complete."""
    executor.room = 3
    report, _ = _wait(local_launch.desired(tmp_path, {}), executor)
    assert report.complete
    assert set(fake_registry.count(tmp_path / "corpus", "starts").values()) == {1}


def test_rejected_batches_are_planned_again(tmp_path: Path, executor: QueueOfThreads) -> None:
    """If sbatch rejects a batch, its downstream stages are not submitted either; all of it follows in the next pass."""
    executor.refuses = 2
    desired = local_launch.desired(tmp_path, {})
    first = reconcile(desired, executor)
    for key in first.submitted:
        assert set(desired.graph.nodes[key].upstream.values()) <= set(first.submitted)
    assert len(first.submitted) < 20
    second = reconcile(desired, executor)
    assert sorted(first.submitted + second.submitted) == sorted(desired.graph.nodes)


def test_jobs_that_never_start_are_not_submitted_for_ever(tmp_path: Path, executor: QueueOfThreads) -> None:
    """A failing prologue leaves no attempt on disk; after a few times the stages are given up, with that reason."""
    executor.broken = True
    report, _ = _wait(local_launch.desired(tmp_path, {}), executor)
    assert not report.complete
    assert set(report.plan.given_up) == {key for key, node in local_launch.desired(tmp_path, {}).graph.nodes.items() if not node.upstream}
    assert all("before the worker began" in report.facts[key].error for key in report.plan.given_up)
    assert {sum(key in batch.keys for batch in executor.submissions) for key in report.plan.given_up} == {MAX_FAILED_STARTS}


def test_the_context_of_a_pass_holds_what_its_executor_knows(tmp_path: Path, executor: QueueOfThreads) -> None:
    """The queue of one that has it; of the local executor the tasks that departed, and no queue."""
    desired = local_launch.desired(tmp_path, {})
    executor.queue, executor.unsettled = {"key": InFlight(Phase.queued, "1_0")}, frozenset(("other",))
    seen = context_of(desired, executor)
    assert (seen.live_jobs, seen.settling, seen.departures) == ({"1_0"}, {"other"}, executor.departures)
    local = local_launch.executor(executor.folder)
    seen = context_of(desired, local)
    assert (seen.live_jobs, seen.settling, seen.departures) == (None, frozenset(), local.departures)
