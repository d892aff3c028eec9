"""Facts of stages from the store: which are done, failed, lost, executed or settling."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.control.controller import read_facts
from jobs.control.executor_protocol import Limits
from jobs.control.facts import Departure, StageFacts
from jobs.control.failure_policy import MAX_FAILED_STARTS, MAX_LOST, ended_attempts
from jobs.control.observe import PassContext
from jobs.control.plan import make_plan
from jobs.experiment.graph import Graph, Node
from jobs.store.attempts import AttemptFiles, new_claim
from jobs.store.cancellations import Cancelled
from jobs.store.failures import FailureClass
from jobs.store.layout import Layout
from jobs.store.records import Claim, Ending, Outcome, Result, claim_attempt, file_digest, write_outcome, write_result
from tests.jobs.fake_registry import make_graph


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "results", "exp")


@pytest.fixture
def graph() -> Graph:
    return make_graph(methods=("tapt",), folds=("1",), seeds=2)


def _finish(layout: Layout, node: Node, attempt: int = 1, job: str = "", diverged: str = "") -> None:
    folder = layout.stage(node.stage, node.key)
    output = folder.attempt(attempt).output
    output.mkdir(parents=True)
    (output / "model.bin").write_text(node.key)
    artifacts = {"model.bin": file_digest(output / "model.bin")}
    claim_attempt(folder, attempt, replace(_dead_claim(attempt), slurm_job=job))
    os.utime(folder.attempt(attempt).claim, (1, 1))
    result = Result(
        node.key, node.stage, 1, node.fold, node.seed, "fake", "d1", {}, node.upstream, attempt, {}, {"seconds": 2.5}, artifacts
    )
    write_result(folder, replace(result, diverged=diverged))


def _dead_claim(number: int, started: float = 0.0) -> Claim:
    return Claim(number, "elsewhere", 1, "", started)


ENDINGS = {FailureClass.interrupted: Ending.interrupted, FailureClass.time_limit: Ending.interrupted, FailureClass.refused: Ending.refused}


def _attempt(
    layout: Layout, node: Node, number: int, failure: FailureClass | None, started: float = 0.0, *, job: str = "", where: str = ""
) -> None:
    """An attempt that has ended, with its outcome or (None) without one."""
    folder = layout.stage(node.stage, node.key)
    claim_attempt(folder, number, replace(_dead_claim(number, started), slurm_job=job, node=where))
    os.utime(folder.attempt(number).claim, (1, 1))
    if failure is not None:
        ending = ENDINGS.get(failure, Ending.failed)
        outcome = Outcome(number, ending, "ValueError", f"number {number}", "", "elsewhere", 1.0, kind=failure.name)
        write_outcome(folder.attempt(number), outcome)


def _departed(*departures: Departure) -> Callable[[Collection[str]], Mapping[str, Sequence[Departure]]]:
    return lambda keys: {key: found for key in keys if (found := [each for each in departures if each.key == key])}


def _departure(node: Node, job: str, state: str = "", submitted: float = 10.0, *, withdrawn: bool = False) -> Departure:
    return Departure(node.key, job, state, submitted, submitted + 5, withdrawn, ended=submitted + 0.5)


def _node(graph: Graph, stage: str) -> Node:
    return next(node for node in graph.nodes.values() if node.stage == stage)


def test_stages_of_an_empty_store_have_blank_facts(layout: Layout, graph: Graph) -> None:
    """An empty store gives facts for every stage, all of them blank."""
    facts = read_facts(graph, layout)
    assert set(facts) == set(graph.nodes)
    assert set(facts.values()) == {StageFacts()}


def test_a_result_is_done_with_its_duration(layout: Layout, graph: Graph) -> None:
    """Seconds come from the result's provenance."""
    node = _node(graph, "tapt")
    _finish(layout, node)
    fact = read_facts(graph, layout)[node.key]
    assert fact.done
    assert fact.seconds == 2.5


def test_missing_artifacts_undo_a_stage_only_if_another_stage_reads_them(layout: Layout, graph: Graph) -> None:
    """A pretraining whose weights are gone is computed again while a fine-tuning needs it; a finished run counts without its weights."""
    for node in graph.nodes.values():
        _finish(layout, node)
        (layout.stage(node.stage, node.key).attempt(1).output / "model.bin").unlink()
    assert all(fact.done for fact in read_facts(graph, layout).values())
    tapt = _node(graph, "tapt")
    layout.stage("finetune", graph.runs[0].key).result.unlink()
    facts = read_facts(graph, layout)
    assert not facts[tapt.key].done
    assert facts[tapt.key].failures == 0
    plan = make_plan(graph, facts, {}, runs_per_task={}, limits=Limits())
    assert [batch.keys for batch in plan.batches] == [(tapt.key,), (graph.runs[0].key,)]


def test_missing_artifacts_are_found_recursively_upstream(layout: Layout) -> None:
    """When a recomputed stage reads another whose artifacts are missing too, that one is recomputed as well."""
    graph = make_graph(methods=("ptapt",), folds=("1",), seeds=1)
    for node in graph.nodes.values():
        if node.stage != "finetune":
            _finish(layout, node)
            (layout.stage(node.stage, node.key).attempt(1).output / "model.bin").unlink()
    assert not any(fact.done for fact in read_facts(graph, layout).values())


def test_failures_count_and_interruptions_do_not(layout: Layout, graph: Graph) -> None:
    """Memory, communication, interrupted: two that count, three that ended, and the error of the last one."""
    node = graph.nodes[graph.runs[0].key]
    for number, failure in enumerate((FailureClass.memory, FailureClass.communication, FailureClass.interrupted), 1):
        _attempt(layout, node, number, failure, where="n7")
    fact = read_facts(graph, layout)[node.key]
    assert (fact.failures, fact.attempts, fact.ended) == (2, 3, 3)
    assert fact.stopped == ""
    assert (fact.error, fact.failure) == ("ValueError: number 3", FailureClass.interrupted)
    assert (fact.request.relief, fact.request.exclude) == (1, ("n7",))


def test_the_last_attempt_decides_whether_a_stage_is_stopped(layout: Layout, graph: Graph) -> None:
    """A refused configuration stops it; a later attempt that ended otherwise shows that it was fixed."""
    first, second = (graph.nodes[run.key] for run in graph.runs)
    _attempt(layout, first, 1, FailureClass.refused)
    _attempt(layout, second, 1, FailureClass.refused)
    _attempt(layout, second, 2, FailureClass.memory)
    facts = read_facts(graph, layout)
    assert facts[first.key].stopped == "ValueError: number 1"
    assert not facts[second.key].stopped


def test_an_outcome_of_an_older_version_gets_its_class_from_its_ending(layout: Layout, graph: Graph) -> None:
    """A failure without a recorded class counts as one of code."""
    node = graph.nodes[graph.runs[0].key]
    claim_attempt(layout.stage(node.stage, node.key), 1, _dead_claim(1))
    write_outcome(layout.stage(node.stage, node.key).attempt(1), Outcome(1, Ending.failed, "KeyError", "x", "", "elsewhere", 1.0))
    assert read_facts(graph, layout)[node.key].failure is FailureClass.code


def test_failures_before_the_last_launch_do_not_count(layout: Layout, graph: Graph) -> None:
    """They still count as attempts."""
    node = graph.nodes[graph.runs[0].key]
    _attempt(layout, node, 1, FailureClass.code, started=100.0)
    _attempt(layout, node, 2, FailureClass.code, started=200.0)
    assert read_facts(graph, layout, PassContext(since=150.0))[node.key].failures == 1
    assert read_facts(graph, layout, PassContext(since=300.0))[node.key] == StageFacts(attempts=2, ended=2, all_seconds=1.0)


def test_a_live_claim_names_its_process_and_a_dead_one_is_lost(layout: Layout, graph: Graph) -> None:
    """This process is alive; a claim without a heartbeat for years is not."""
    first, second = (graph.nodes[run.key] for run in graph.runs)
    claim_attempt(layout.stage(first.stage, first.key), 1, new_claim(1))
    _attempt(layout, second, 1, None)
    facts = read_facts(graph, layout)
    assert str(os.getpid()) in facts[first.key].executed_by
    assert (facts[first.key].attempts, facts[first.key].ended) == (1, 0)
    assert not facts[second.key].executed_by
    assert (facts[second.key].failure, facts[second.key].failures) == (FailureClass.node, 0)


def test_the_previous_execution_of_a_requeued_job_has_ended(layout: Layout, graph: Graph) -> None:
    """However recent its heartbeat, and although the queue still shows its job."""
    node = graph.nodes[graph.runs[0].key]
    folder = layout.stage(node.stage, node.key)
    for number in (1, 2):
        claim_attempt(folder, number, replace(_dead_claim(number, float(number)), slurm_job="7_1", node=f"n{number}"))
    fact = read_facts(graph, layout, PassContext(live_jobs={"7_1"}))[node.key]
    assert fact.executed_by == "Slurm job 7_1"
    assert (fact.ended, fact.bad_nodes) == (1, ("n1",))


def test_a_live_claim_of_another_user_or_cluster_is_awaited(layout: Layout, graph: Graph) -> None:
    """One's own queue does not show its job, or shows another one of that number: its heartbeat of a minute ago decides."""
    node = graph.nodes[graph.runs[0].key]
    folder = layout.stage(node.stage, node.key)
    claim = replace(_dead_claim(1, 1.0), slurm_job="7_1", uid=os.getuid(), cluster="here")
    context = PassContext(live_jobs=frozenset(), clock=lambda: 1060.0, cluster=lambda: "here")
    for number, (other, awaited) in enumerate(
        ((claim, False), (replace(claim, uid=os.getuid() + 1), True), (replace(claim, cluster="there"), True)), 1
    ):
        claim_attempt(folder, number, replace(other, attempt=number, slurm_job=f"7_{number}"))
        os.utime(folder.attempt(number).claim, (1000.0, 1000.0))
        assert read_facts(graph, layout, context)[node.key].awaited is awaited
        write_outcome(folder.attempt(number), Outcome(number, Ending.interrupted, "Stop", "stopped", "", "node9", 1.0))


def test_a_torn_outcome_counts_as_no_outcome(layout: Layout, graph: Graph) -> None:
    """A half-written outcome is neither failure nor success."""
    node = graph.nodes[graph.runs[0].key]
    _attempt(layout, node, 1, FailureClass.code)
    outcome = layout.stage(node.stage, node.key).attempt(1).outcome
    outcome.write_text(outcome.read_text()[:30])
    fact = read_facts(graph, layout)[node.key]
    assert (fact.failures, fact.stopped, fact.failure) == (0, "", FailureClass.node)


def test_lost_attempts_are_free_up_to_a_limit_and_while_they_progress(layout: Layout, graph: Graph) -> None:
    """Without a newer checkpoint the sixth lost attempt in a row stops the stage; with one written since it is retried."""
    node = graph.nodes[graph.runs[0].key]
    for number in range(1, MAX_LOST + 2):
        _attempt(layout, node, number, None, started=float(number))
    assert "without a newer checkpoint" in read_facts(graph, layout)[node.key].stopped
    checkpoint = layout.stage(node.stage, node.key).checkpoint
    checkpoint.mkdir()
    (checkpoint / ".half-written").write_text("{")
    assert read_facts(graph, layout)[node.key].stopped
    (checkpoint / "state.json").write_text("{}")
    assert not read_facts(graph, layout)[node.key].stopped


def _files(*attempts: tuple[float, str, str]) -> list[AttemptFiles]:
    """Attempts that have ended: the checkpoint that each found, its job, and the class in its outcome ("": none)."""
    found = []
    for number, (checkpoint, job, kind) in enumerate(attempts, 1):
        claim = replace(_dead_claim(number, float(number)), checkpoint=checkpoint, slurm_job=job, node="n1")
        outcome = Outcome(number, Ending.interrupted, "Stopped", "at step 3", "", "n1", 1.0, kind=kind) if kind else None
        found.append(AttemptFiles(number, claim, outcome, alive=False))
    return found


def test_progress_is_a_newer_checkpoint_than_the_one_it_found() -> None:
    """The claim of the next attempt shows what this one left, the checkpoint folder what the last one left."""
    files = _files((0.0, "", ""), (5.0, "", ""), (5.0, "", ""))
    assert [each.progress for each in ended_attempts(files, [], 5.0)] == [True, False, False]
    assert [each.progress for each in ended_attempts(files, [], 6.0)] == [True, False, True]


def _classes(files: Sequence[AttemptFiles], *departures: tuple[str, str]) -> list[FailureClass]:
    states = [Departure("k", job, state, 0.0, 1.0) for job, state in departures]
    return [each.failure for each in ended_attempts(files, states, 0.0)]


@pytest.mark.parametrize(
    ("state", "failure", "blamed"),
    [
        ("NODE_FAIL", FailureClass.node, True),
        ("FAILED", FailureClass.node, False),
        ("PREEMPTED", FailureClass.node, False),
        ("", FailureClass.node, False),
        ("TIMEOUT", FailureClass.time_limit, False),
        ("OUT_OF_MEMORY", FailureClass.memory, False),
        ("CANCELLED by 1000", FailureClass.cancelled, False),
    ],
)
def test_the_state_of_its_job_explains_an_attempt_without_an_outcome(state: str, failure: FailureClass, blamed: bool) -> None:
    """By class of failure and in the error."""
    (found,) = ended_attempts(_files((0.0, "7_1", "")), [Departure("k", "7_1", state, 0.0, 1.0)], 0.0)
    assert (found.failure, found.nodes_fault, found.node) == (failure, blamed, "n1")
    assert (state or "nothing is known of its job") in found.error


def test_a_job_with_a_later_attempt_was_requeued() -> None:
    """Its last state is that of the last attempt; the node is blamed for the attempt before."""
    first, second = ended_attempts(_files((0.0, "7_1", ""), (0.0, "7_1", "")), [Departure("k", "7_1", "TIMEOUT", 0.0, 1.0)], 0.0)
    assert (first.failure, first.nodes_fault) == (FailureClass.node, True)
    assert "requeued" in first.error
    assert (second.failure, second.nodes_fault) == (FailureClass.time_limit, False)


def test_the_state_of_its_job_tells_why_a_worker_was_asked_to_stop() -> None:
    """The same signal precedes a time limit and a preemption; a requeued job had time left."""
    limit, asked = FailureClass.time_limit, FailureClass.interrupted
    assert _classes(_files((0.0, "7_1", "time_limit")), ("7_1", "FAILED")) == [limit]
    assert _classes(_files((0.0, "7_1", "time_limit")), ("7_1", "PREEMPTED")) == [asked]
    assert _classes(_files((0.0, "7_1", "time_limit"), (0.0, "7_1", "time_limit"))) == [asked, limit]
    assert _classes(_files((0.0, "7_1", "interrupted")), ("7_1", "TIMEOUT")) == [limit]
    assert _classes(_files((0.0, "7_1", "interrupted")), ("7_1", "CANCELLED")) == [asked]
    assert _classes(_files((0.0, "7_1", "memory")), ("7_1", "TIMEOUT")) == [FailureClass.memory]


def test_a_superseded_attempt_does_not_count_as_ended() -> None:
    """Nor does the attempt that has the result."""
    outcome = Outcome(1, Ending.interrupted, "Superseded", "too late", "", "n1", 1.0, kind="interrupted")
    superseded = AttemptFiles(1, _dead_claim(1), outcome, alive=False)
    published = AttemptFiles(2, _dead_claim(2), None, alive=False, published=True)
    assert ended_attempts([superseded, published], [], 0.0) == []


def test_a_finished_stage_remembers_the_node_that_failed_under_it(layout: Layout, graph: Graph) -> None:
    """Requeued from a dead node and finished elsewhere: the node is remembered until the next launch."""
    node = graph.nodes[graph.runs[0].key]
    _attempt(layout, node, 1, None, started=50.0, job="7_1", where="n3")
    _finish(layout, node, attempt=2, job="7_1")
    fact = read_facts(graph, layout, PassContext(since=40.0))[node.key]
    assert fact.done
    assert fact.bad_nodes == ("n3",)
    assert read_facts(graph, layout, PassContext(since=60.0))[node.key].bad_nodes == ()


def test_a_stage_is_settling_until_slurm_reports_how_its_job_ended(layout: Layout, graph: Graph) -> None:
    """Whether it was cancelled by hand or ran out of time decides what follows; the end counts once that is known."""
    node = graph.nodes[graph.runs[0].key]
    _attempt(layout, node, 1, FailureClass.memory, started=1.0, job="6_1")
    _attempt(layout, node, 2, FailureClass.interrupted, started=2.0, job="7_1")
    departures = _departed(_departure(node, "6_1", "FAILED"), _departure(node, "7_1"))
    waiting = read_facts(graph, layout, PassContext(departures=departures, settling={node.key}))[node.key]
    assert waiting.settling
    assert waiting.ended == 1
    known = _departed(_departure(node, "6_1", "FAILED"), _departure(node, "7_1", "CANCELLED by 1000"))
    told = read_facts(graph, layout, PassContext(departures=known))[node.key]
    assert (told.executed_by, told.ended, told.cancelled) == ("", 2, True)


@pytest.mark.parametrize(
    ("state", "ours", "submitted", "cancelled"),
    [
        ("CANCELLED by 1000", False, 10.0, True),
        ("CANCELLED by 1000", True, 10.0, False),
        ("CANCELLED by 1000", False, 4.0, False),
        ("CANCELLED by 0", False, 10.0, False),
        ("CANCELLED", False, 10.0, False),
    ],
)
def test_a_job_cancelled_by_its_owner_is_not_submitted_again(
    layout: Layout, graph: Graph, state: str, ours: bool, submitted: float, cancelled: bool
) -> None:
    """Unless the program or Slurm cancelled it, or the experiment was launched again since."""
    node = _node(graph, "tapt")
    departures = _departed(_departure(node, "7_1", state, submitted, withdrawn=ours))
    assert read_facts(graph, layout, PassContext(since=5.0, departures=departures))[node.key].cancelled is cancelled


def test_a_cancellation_by_the_owner_outlives_later_departures(layout: Layout, graph: Graph) -> None:
    """A late array that the program withdraws, or one that fails, does not change it."""
    node = _node(graph, "tapt")
    by_hand = _departure(node, "7_1", "CANCELLED by 1000", 10.0)
    withdrawn = _departure(node, "9_1", "CANCELLED by 1000", 20.0, withdrawn=True)
    lost = _departure(node, "11_1", "NODE_FAIL", 30.0)
    for later in ((withdrawn,), (lost,), (lost, withdrawn)):
        assert read_facts(graph, layout, PassContext(since=5.0, departures=_departed(by_hand, *later)))[node.key].cancelled
        assert not read_facts(graph, layout, PassContext(since=5.0, departures=_departed(*later)))[node.key].cancelled
        assert not read_facts(graph, layout, PassContext(since=15.0, departures=_departed(by_hand, *later)))[node.key].cancelled


def test_a_job_withdrawn_as_it_starts_is_not_cancelled_by_the_owner(layout: Layout, graph: Graph) -> None:
    """Slurm reports the same user for both; a killed attempt without an outcome is retried."""
    node = _node(graph, "tapt")
    _attempt(layout, node, 1, None, started=11.0, job="7_1")
    for ours, failure in ((True, FailureClass.interrupted), (False, FailureClass.cancelled)):
        departures = _departed(_departure(node, "7_1", "CANCELLED by 1000", withdrawn=ours))
        facts = read_facts(graph, layout, PassContext(since=5.0, departures=departures))[node.key]
        assert (facts.failure, facts.cancelled, facts.stopped) == (failure, not ours, "")


def test_an_end_counts_once_although_a_late_array_was_withdrawn_since(layout: Layout, graph: Graph) -> None:
    """The job whose end is still unknown need not be the last that departed."""
    node = _node(graph, "tapt")
    _attempt(layout, node, 1, FailureClass.interrupted, started=11.0, job="7_1")
    departures = _departed(_departure(node, "7_1"), _departure(node, "9_1", "CANCELLED by 1000", 20.0, withdrawn=True))
    assert read_facts(graph, layout, PassContext(departures=departures, settling={node.key}))[node.key].ended == 0
    assert read_facts(graph, layout, PassContext(departures=departures))[node.key].ended == 1


def test_cancelled_stages_are_cancelled(layout: Layout, graph: Graph) -> None:
    """Those named, or all that have no result."""
    tapt = _node(graph, "tapt")
    facts = read_facts(graph, layout, PassContext(cancelled=Cancelled(keys=frozenset((tapt.key,)))))
    assert [key for key, fact in facts.items() if fact.cancelled] == [tapt.key]
    _finish(layout, tapt)
    facts = read_facts(graph, layout, PassContext(cancelled=Cancelled(everything=True)))
    assert [fact.cancelled for fact in facts.values()] == [fact.done is False for fact in facts.values()]


def _silent_jobs(node: Node, number: int = MAX_FAILED_STARTS) -> list[Departure]:
    return [_departure(node, f"{job}_0", "FAILED", submitted=10.0 + job) for job in range(number)]


def test_jobs_that_end_before_the_worker_starts_stop_a_stage(layout: Layout, graph: Graph) -> None:
    """Not with one too few, not those of an earlier launch, and not while an upstream stage is missing."""
    tapt, run = _node(graph, "tapt"), graph.nodes[graph.runs[0].key]
    jobs = _silent_jobs(tapt)
    assert "before the worker began" in read_facts(graph, layout, PassContext(departures=_departed(*jobs)))[tapt.key].stopped
    assert not read_facts(graph, layout, PassContext(departures=_departed(*jobs[1:])))[tapt.key].stopped
    assert not read_facts(graph, layout, PassContext(since=11.0, departures=_departed(*jobs)))[tapt.key].stopped
    assert not read_facts(graph, layout, PassContext(departures=_departed(*_silent_jobs(run))))[run.key].stopped
    _finish(layout, tapt)
    os.utime(layout.stage("tapt", tapt.key).result, (16.0, 16.0))
    late = [replace(each, gone=20.0) for each in _silent_jobs(run)]
    assert not read_facts(graph, layout, PassContext(departures=_departed(*late[:2], *_silent_jobs(run)[:1], late[2])))[run.key].stopped
    assert read_facts(graph, layout, PassContext(departures=_departed(*late)))[run.key].stopped


def test_nodes_on_which_no_worker_begins_do_not_stop_a_stage_while_others_of_its_name_begin(layout: Layout) -> None:
    """Only where Slurm names the nodes, only jobs submitted before the last such start, and at most `policy.max_attempts` of them."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=2)
    run, other = (graph.nodes[each.key] for each in graph.runs)
    jobs = [replace(each, node=f"n{each.job}") for each in _silent_jobs(run, 12)]

    def stopped(departures: Sequence[Departure], most: int = 12) -> bool:
        return bool(read_facts(graph, layout, PassContext(max_attempts=most, departures=_departed(*departures)))[run.key].stopped)

    assert stopped(jobs[:4]), "no other has begun"
    _attempt(layout, other, 1, FailureClass.interrupted, started=13.5)
    assert not stopped(jobs[:7]), "three since"
    assert stopped(jobs[:8])
    assert stopped([replace(each, node="") for each in jobs[:4]])
    _finish(layout, other, attempt=2)
    os.utime(layout.stage("finetune", other.key).result, (100.0, 100.0))
    assert not stopped(jobs[:11])
    assert stopped(jobs)
    assert not stopped(jobs[:3], most=2)
    assert stopped(jobs[:4], most=2)


def test_jobs_that_slurm_cannot_start_are_not_submitted_for_ever(layout: Layout, graph: Graph) -> None:
    """An element that Slurm could not start is withdrawn by the program and counts nevertheless; its other withdrawals do not."""
    tapt = _node(graph, "tapt")
    failed = [_departure(tapt, f"{job}_0", "LAUNCH_FAILED", submitted=10.0 + job, withdrawn=True) for job in range(MAX_FAILED_STARTS)]
    assert "LAUNCH_FAILED" in read_facts(graph, layout, PassContext(departures=_departed(*failed)))[tapt.key].stopped
    assert not read_facts(graph, layout, PassContext(departures=_departed(*failed[1:])))[tapt.key].stopped
    withdrawn = [replace(each, state="CANCELLED by 1000") for each in failed]
    assert not read_facts(graph, layout, PassContext(departures=_departed(*withdrawn)))[tapt.key].stopped


def test_a_job_that_started_another_of_its_stages_is_not_a_failed_start(layout: Layout) -> None:
    """Packed stages that did not get their turn before the time limit, whether the others have finished since or not."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=3)
    first, second, third = (graph.nodes[run.key] for run in graph.runs)
    jobs = [f"{number}_0" for number in range(MAX_FAILED_STARTS)]
    departures = _departed(*(_departure(node, job, "TIMEOUT") for node in (first, second, third) for job in jobs))
    for number, job in enumerate(jobs[:-1], 1):
        _attempt(layout, first, number, FailureClass.time_limit, started=20.0 + number, job=job)
    assert read_facts(graph, layout, PassContext(departures=departures))[third.key].failure is FailureClass.node, "one was silent"
    _finish(layout, first, attempt=MAX_FAILED_STARTS, job=jobs[-1])
    facts = read_facts(graph, layout, PassContext(departures=departures))
    assert facts[first.key].done
    assert facts[second.key] == facts[third.key] == StageFacts()


def test_a_diverged_run_is_known_with_and_without_a_result(layout: Layout, graph: Graph) -> None:
    """NaN leaves an outcome, the training-side test a result that says so."""
    first, second = (graph.nodes[run.key] for run in graph.runs)
    _attempt(layout, first, 1, FailureClass.divergence)
    _finish(layout, second, diverged="the loss is still that of the prior")
    facts = read_facts(graph, layout, PassContext(since=1e9))
    assert (facts[first.key].done, facts[first.key].diverged) == (False, "ValueError: number 1")
    assert (facts[second.key].done, facts[second.key].diverged) == (True, "the loss is still that of the prior")


def test_only_the_given_keys_are_read_again(layout: Layout, graph: Graph) -> None:
    """The facts of the others are kept, even if the disk has changed."""
    known = read_facts(graph, layout)
    for node in graph.nodes.values():
        _finish(layout, node)
    one = graph.runs[0].key
    facts = read_facts(graph, layout, keys=[one], known=known)
    assert [key for key, fact in facts.items() if fact.done] == [one]


@pytest.mark.parametrize(("missed", "ended", "cancelled"), [(30, 10, True), (700, -5, False), (700, None, True), (-20, None, False)])
def test_a_job_of_an_earlier_launch_cancelled_by_its_owner(
    layout: Layout, graph: Graph, missed: float, ended: float | None, cancelled: bool
) -> None:
    """It counts if it ended after the launch, whenever a pass first missed it; a cancellation before the launch is lifted by it."""
    key, launched = graph.runs[0].key, 1000.0
    end = None if ended is None else launched + ended
    gone = Departure(key, "7_0", "CANCELLED by 1000", submitted=500.0, gone=launched + missed, ended=end)
    facts = read_facts(graph, layout, PassContext(since=launched, departures=lambda keys: {key: (gone,)}))
    assert facts[key].cancelled is cancelled
