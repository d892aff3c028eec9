"""Planning, case by case: what is held, withdrawn, deferred, excluded and packed."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from jobs.control.exclusions import excluded_nodes
from jobs.control.executor_protocol import Limits
from jobs.control.facts import InFlight, Phase, Request, StageFacts
from jobs.control.holds import ALIKE
from jobs.control.plan import Plan, critical_minutes, make_plan
from jobs.experiment.graph import Graph, build_graph, united
from jobs.store.failures import FailureClass
from tests.jobs.fake_registry import REGISTRY, make_graph

IN_FLIGHT = InFlight(Phase.queued, "7_1")


def test_upstream_of_finished_runs_is_not_computed_again() -> None:
    """When all runs of a fold are done, missing pretraining is not recomputed; when one run is missing, it is."""
    graph = make_graph(methods=("tapt",), folds=("1",), seeds=2)
    runs = [run.key for run in graph.runs]
    done = {key: StageFacts(done=True) for key in runs}
    assert make_plan(graph, done, {}, runs_per_task={}, limits=Limits()).complete
    plan = make_plan(graph, {runs[0]: StageFacts(done=True)}, {}, runs_per_task={}, limits=Limits())
    assert [batch.stage for batch in plan.batches] == ["tapt", "finetune"]
    assert plan.batches[1].keys == (runs[1],)


def _plan(graph: Graph, facts: Mapping[str, StageFacts], in_flight: Mapping[str, InFlight] | None = None, max_failures: int = 0) -> Plan:
    return make_plan(graph, facts, in_flight or {}, runs_per_task={}, limits=Limits(), max_failures=max_failures, since=100.0)


def _failed(failure: FailureClass = FailureClass.code, error: str = "ValueError: no layer 7") -> StageFacts:
    return StageFacts(failures=1, attempts=1, stopped=error, error=error, failure=failure)


DIVERGED = StageFacts(done=True, attempts=1, ua=25.0, diverged="training loss 1.386 is still at the class prior, 1.386")
LEARNT = StageFacts(done=True, attempts=1, ua=60.0)


@pytest.mark.parametrize(
    ("diverged", "learnt", "held"),
    [(2, 0, False), (3, 0, True), (3, 1, False), (5, 2, False), (6, 2, True), (5, 5, False), (6, 4, True), (10, 10, False), (11, 10, True)],
)
def test_a_method_that_does_not_learn_is_held(diverged: int, learnt: int, held: bool) -> None:
    """Its first three runs diverged, or more than half of the first ten; while more end, of all. Before: every run with every seed."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=30)
    facts = dict(zip([run.key for run in graph.runs], [DIVERGED] * diverged + [LEARNT] * learnt, strict=False))
    plan = _plan(graph, facts)
    rest = {run.key for run in graph.runs[diverged + learnt :]}
    assert set(plan.held_or_cancelled) == (rest if held else set())
    if held:
        reason = plan.reasons[plan.held_or_cancelled[0]]
        assert reason.startswith(f"held: {diverged} of the first {diverged + learnt} runs of vft diverged (training loss 1.386 is still")
        assert "policy.hold_diverging=false" in reason
        assert plan.settled
    assert not diverging_plan(graph, facts).held_or_cancelled


def diverging_plan(graph: Graph, facts: dict[str, StageFacts]) -> Plan:
    return make_plan(graph, facts, {}, runs_per_task={}, limits=Limits(), hold_diverging=False)


def test_a_held_method_holds_its_pretraining_but_not_what_others_need() -> None:
    """TAPT does not learn on fold 1: its pretraining of fold 2 is not started, V-FT is; what runs is left, what is queued is withdrawn."""
    graph = make_graph(methods=("vft", "tapt"), folds=("1", "2"), seeds=5)
    ours = [run.key for run in graph.runs if run.method == "tapt" and run.fold == "1"]
    tapt = {node.fold: key for key, node in graph.nodes.items() if node.stage == "tapt"}
    facts = {tapt["1"]: StageFacts(done=True), **dict.fromkeys(ours[:3], DIVERGED)}
    in_flight = {ours[3]: InFlight(Phase.running, "7_3"), ours[4]: IN_FLIGHT}
    plan = _plan(graph, facts, in_flight)
    assert tapt["2"] in plan.held_or_cancelled
    assert plan.waiting == (ours[3],)
    assert plan.withdrawn == (ours[4],)
    assert {batch.method for batch in plan.batches} == {"vft"}


def test_when_the_first_of_a_kind_all_fail_alike_the_rest_is_held() -> None:
    """With the same error but for numbers: queued stages are withdrawn, running ones are left, and the reason quotes the error."""
    graph = make_graph(methods=("vft", "tapt"), folds=("1",), seeds=8)
    runs = [run.key for run in graph.runs if run.method == "vft"]
    facts = {key: _failed(error=f"ValueError: no layer {number}") for number, key in enumerate(runs[:ALIKE])}
    in_flight = {runs[5]: InFlight(Phase.running, "7_5"), runs[6]: IN_FLIGHT}
    plan = _plan(graph, facts, in_flight)
    assert set(plan.given_up) == set(runs[:3])
    assert set(plan.held_or_cancelled) == {runs[3], runs[4], runs[6], runs[7]}
    assert plan.withdrawn == (runs[6],)
    assert plan.waiting == (runs[5],)
    assert "no layer 0" in plan.reasons[runs[3]]
    assert {(batch.stage, batch.method) for batch in plan.batches} == {("tapt", "tapt"), ("finetune", "tapt")}


@pytest.mark.parametrize(
    "other",
    [
        _failed(error="KeyError: 'angry'"),
        _failed(FailureClass.communication),
        StageFacts(done=True, finished=101.0),
        StageFacts(),
    ],
    ids=["other words", "another class", "a result", "only two"],
)
def test_failures_that_differ_hold_nothing(other: StageFacts) -> None:
    """It takes three failures of code with the same error, and no result since the launch."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=6)
    runs = [run.key for run in graph.runs]
    plan = _plan(graph, {runs[0]: _failed(), runs[1]: _failed(), runs[2]: other})
    assert not plan.held_or_cancelled
    old = _plan(graph, {runs[0]: _failed(), runs[1]: _failed(), runs[2]: _failed(), runs[3]: StageFacts(done=True, finished=99.0)})
    assert len(old.held_or_cancelled) == 2, "a result of an earlier launch says nothing of this one's code"


def test_a_spent_budget_ends_retries_only() -> None:
    """A failed stage is given up, with the reason; one that has not failed is still submitted."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=3)
    first, second, third = (run.key for run in graph.runs)
    facts = {first: StageFacts(failures=2, attempts=2), second: StageFacts(failures=1, attempts=1)}
    plan = _plan(graph, facts, max_failures=3)
    assert plan.given_up == (first, second)
    assert "policy.max_failures" in plan.reasons[first]
    assert [batch.keys for batch in plan.batches] == [(third,)]
    assert not _plan(graph, facts, max_failures=4).given_up


def test_a_diverged_run_counts_as_missing_only_while_it_fills_its_slot() -> None:
    """With or without a result: no reserve seed is left. A superseded one is not needed at all."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=2)
    first, second = (run.key for run in graph.runs)
    facts = {first: StageFacts(diverged="NaN at step 7", attempts=1), second: StageFacts(done=True, diverged="stuck at the prior")}
    plan = _plan(graph, facts)
    assert plan.given_up == (first, second)
    assert all("no reserve seed is left" in reason for reason in plan.reasons.values())
    assert not plan.complete
    reserve = make_graph(methods=("vft",), folds=("1",), seeds=2, generations={("vft", "1", 0): 1, ("vft", "1", 1): 1})
    done = {run.key: StageFacts(done=True) for run in reserve.runs}
    assert _plan(reserve, {**facts, **done}).complete


def test_a_node_that_failed_twice_is_excluded_for_all() -> None:
    """Once under each of two stages, one of them finished since; a failure of communication excludes it for that stage only."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=3)
    first, second, third = (run.key for run in graph.runs)
    facts = {first: StageFacts(done=True, bad_nodes=("n1",)), second: StageFacts(attempts=1, bad_nodes=("n1", "n2"))}
    facts[third] = StageFacts(attempts=1, request=Request(exclude=("n3",)))
    requests = {batch.keys: batch.request for batch in _plan(graph, facts).batches}
    assert requests == {(second,): Request(exclude=("n1",)), (third,): Request(exclude=("n1", "n3"))}


@pytest.mark.parametrize(
    ("nodes", "excluded"),
    [(0, ("n1", "n2", "n3", "n4")), (8, ("n1", "n2", "n3", "n4")), (7, ("n4",))],
    ids=["not known", "half of them", "more than half"],
)
def test_most_nodes_failing_is_no_fault_of_single_nodes(nodes: int, excluded: tuple[str, ...]) -> None:
    """Then only a node with an error that no other has is excluded."""
    failed = ("n1", "n2", "n3")
    facts = {"a": StageFacts(bad_nodes=(*failed, "n4"), faulty_nodes=("n4",)), "b": StageFacts(bad_nodes=(*failed, "n4", "n5"))}
    assert excluded_nodes(facts, nodes) == excluded


def test_what_is_queued_and_no_longer_needed_is_withdrawn() -> None:
    """A run that was replaced, one of an earlier configuration, and what is done; not what runs, nor what a queued job depends on."""
    slots = {("tapt", "1", 0): (0, 1000), ("tapt", "1", 1): (1,)}
    graph = build_graph(REGISTRY, {}, corpus="fake", corpus_digest="d1", methods=("tapt",), folds=("1",), seeds=slots)
    (superseded,), (first, second) = graph.superseded, graph.runs
    tapt = next(key for key, node in graph.nodes.items() if node.stage == "tapt")
    facts = {superseded.key: StageFacts(diverged="NaN at step 7"), tapt: StageFacts(done=True), second.key: StageFacts(done=True)}
    queued = dict.fromkeys((superseded.key, "of fewer folds", tapt, second.key), IN_FLIGHT)
    running = {**queued, superseded.key: InFlight(Phase.running, "7_0")}
    assert set(_plan(graph, facts, {**queued, first.key: IN_FLIGHT}).withdrawn) == {superseded.key, "of fewer folds", second.key}
    assert set(_plan(graph, facts, queued).withdrawn) == queued.keys()
    kept = make_plan(graph, facts, queued, runs_per_task={}, limits=Limits(), keep_old=True)
    assert set(kept.withdrawn) == queued.keys() - {"of fewer folds"}
    assert set(_plan(graph, facts, running).withdrawn) == queued.keys() - {superseded.key}


def test_a_cancelled_stage_blocks_its_downstream_stages() -> None:
    """Its own queued job and those downstream are withdrawn; another method continues."""
    graph = make_graph(methods=("vft", "tapt"), folds=("1",), seeds=1)
    tapt = next(key for key, node in graph.nodes.items() if node.stage == "tapt")
    run = next(run.key for run in graph.runs if run.method == "tapt")
    plan = _plan(graph, {tapt: StageFacts(cancelled=True)}, {tapt: IN_FLIGHT, run: IN_FLIGHT})
    assert (plan.held_or_cancelled, plan.blocked) == ((tapt,), (run,))
    assert set(plan.withdrawn) == {tapt, run}
    assert "launching again" in plan.reasons[tapt]
    assert len(plan.batches) == 1


def test_the_longest_chain_goes_first() -> None:
    """If the queue has little room, the stages with the longest chains downstream get it."""
    graph = make_graph(folds=("1",), seeds=3)
    plan = make_plan(graph, {}, {}, runs_per_task={}, limits=Limits(queue_room=1))
    assert [batch.stage for batch in plan.batches] == ["states"]
    assert len(plan.deferred) == len(graph.nodes) - 1


def test_runs_of_a_fold_are_packed_together() -> None:
    """Three runs per task: tasks hold runs of one fold, the last one what is left."""
    graph = make_graph(methods=("vft",), folds=("1", "2"), seeds=5)
    plan = make_plan(graph, {}, {}, runs_per_task={"finetune": 3}, limits=Limits())
    (batch,) = plan.batches
    assert [[graph.nodes[key].fold for key in task.keys] for task in batch.tasks] == [["1"] * 3, ["1"] * 2, ["2"] * 3, ["2"] * 2]


def test_a_task_may_hold_runs_with_different_upstream_stages() -> None:
    """As in a sweep, where every set has one P-TAPT: stages with the same upstream are together, what is left shares a task."""
    graph = united({f"set{number}": make_graph({"work": number}, methods=("tapt",), folds=("1",), seeds=3) for number in range(2)})
    plan = make_plan(graph, {}, {}, runs_per_task={"finetune": 2, "tapt": 4}, limits=Limits())
    tasks = {batch.stage: [[graph.nodes[key].upstream for key in task.keys] for task in batch.tasks] for batch in plan.batches}
    assert [len(task) for task in tasks["tapt"]] == [2]
    first, second, third = tasks["finetune"]
    assert first[0] == first[1] == second[0] != second[1] == third[0] == third[1]


@pytest.mark.parametrize(("room", "tasks"), [(0, 4), (-1, 0), (3, 3)])
def test_room_in_the_queue(room: int, tasks: int) -> None:
    """0 is no limit, a negative number is no room at all."""
    graph = make_graph(methods=("vft",), folds=("1", "2"), seeds=2)
    plan = make_plan(graph, {}, {}, runs_per_task={}, limits=Limits(queue_room=room))
    assert sum(len(batch.tasks) for batch in plan.batches) == tasks
    assert len(plan.deferred) == 4 - tasks
    assert not plan.settled


def test_stages_downstream_of_another_launcher_are_deferred() -> None:
    """A stage computed by a process that no job can depend on is waited for; those downstream are submitted once it is done."""
    graph = make_graph(methods=("tapt",), folds=("1",), seeds=2)
    tapt = next(key for key, node in graph.nodes.items() if node.stage == "tapt")
    plan = make_plan(graph, {tapt: StageFacts(executed_by="process 3 on node1")}, {}, runs_per_task={}, limits=Limits())
    assert plan.waiting == (tapt,)
    assert len(plan.deferred) == 2
    assert not plan.batches


def test_a_paused_stage_and_those_downstream_are_deferred_until_its_time() -> None:
    """The others are submitted."""
    graph = make_graph(methods=("vft", "tapt"), folds=("1",), seeds=2)
    tapt = next(key for key, node in graph.nodes.items() if node.stage == "tapt")
    facts = {tapt: StageFacts(attempts=1, failure=FailureClass.storage, not_before=100.0)}
    early, late = (make_plan(graph, facts, {}, runs_per_task={}, limits=Limits(), now=now) for now in (99.0, 100.0))
    assert tapt in early.deferred
    assert len(early.deferred) == 3
    assert {key for batch in early.batches for key in batch.keys} == {run.key for run in graph.runs if run.method == "vft"}
    assert not early.settled
    assert not late.deferred


def test_critical_minutes_add_up_the_longest_chain() -> None:
    """states 10 + cluster 5 + ptapt 20 + finetune 1."""
    graph = make_graph(methods=("ptapt",), folds=("1",), seeds=1)
    minutes = {"states": 10.0, "cluster": 5.0, "ptapt": 20.0, "finetune": 1.0}
    found = {graph.nodes[key].stage: value for key, value in critical_minutes(graph, minutes.__getitem__).items()}
    assert found == {"states": 36.0, "cluster": 26.0, "ptapt": 21.0, "finetune": 1.0}


def test_a_batch_names_the_lost_jobs_of_its_stages() -> None:
    """A worker cannot ask the queue: the batch lists the former jobs that are known to have ended; this does not change its identity."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=2)
    first, second = (run.key for run in graph.runs)
    facts = {first: StageFacts(attempts=1, lost_jobs=("7_0",)), second: StageFacts(attempts=1, lost_jobs=("7_1",))}
    (batch,) = make_plan(graph, facts, {}, runs_per_task={}, limits=Limits()).batches
    assert batch.gone == ("7_0", "7_1")
