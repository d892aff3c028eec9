"""Facts from files: what counts as done, failed, lost, held."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from jobs.graph import Graph, Node
from jobs.layout import Layout
from jobs.liveness import new_claim
from jobs.observe import MAX_LOST, AttemptFacts, judge_attempts, read_facts
from jobs.plan import Limits, make_plan
from jobs.records import Claim, Ending, Outcome, Result, claim_attempt, file_digest, write_outcome, write_result
from tests.jobs.fake_registry import make_graph


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "results", "exp")


@pytest.fixture
def graph() -> Graph:
    return make_graph(methods=("tapt",), folds=("1",), seeds=2)


def _finish(layout: Layout, node: Node, attempt: int = 1) -> None:
    folder = layout.stage(node.stage, node.key)
    output = folder.attempt(attempt).output
    output.mkdir(parents=True)
    (output / "model.bin").write_text(node.key)
    artifacts = {"model.bin": file_digest(output / "model.bin")}
    claim_attempt(folder, attempt, _dead_claim(attempt))
    os.utime(folder.attempt(attempt).claim, (1, 1))
    write_result(
        folder,
        Result(node.key, node.stage, 1, node.fold, node.seed, "fake", "d1", {}, node.upstream, attempt, {}, {"seconds": 2.5}, artifacts),
    )


def _dead_claim(number: int, started: float = 0.0) -> Claim:
    return Claim(number, "elsewhere", 1, "", started)


def _attempt(layout: Layout, node: Node, number: int, ending: Ending | None, started: float = 0.0) -> None:
    folder = layout.stage(node.stage, node.key)
    claim_attempt(folder, number, _dead_claim(number, started))
    os.utime(folder.attempt(number).claim, (1, 1))
    if ending is not None:
        write_outcome(folder.attempt(number), Outcome(number, ending, "ValueError", f"number {number}", "", "elsewhere", 1.0))


def _node(graph: Graph, stage: str) -> Node:
    return next(node for node in graph.nodes.values() if node.stage == stage)


def test_nothing_on_disk_is_nothing_begun(layout: Layout, graph: Graph) -> None:
    """An empty store gives facts for every stage, all of them blank."""
    facts = read_facts(graph, layout)
    assert set(facts) == set(graph.nodes)
    assert not any(fact.done or fact.failures or fact.held for fact in facts.values())


def test_a_result_is_done_with_its_duration(layout: Layout, graph: Graph) -> None:
    """Seconds come from the result's provenance."""
    node = _node(graph, "tapt")
    _finish(layout, node)
    fact = read_facts(graph, layout)[node.key]
    assert fact.done
    assert fact.seconds == 2.5


def test_missing_artifacts_undo_a_stage_only_for_those_who_read_them(layout: Layout, graph: Graph) -> None:
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
    plan = make_plan(graph, facts, {}, runs_per_task={}, limits=Limits(), max_attempts=3)
    assert [batch.keys for batch in plan.batches] == [(tapt.key,), (graph.runs[0].key,)]


def test_missing_artifacts_are_found_all_the_way_up(layout: Layout) -> None:
    """When a recomputed stage reads one whose artifacts are gone as well, that one is undone too."""
    graph = make_graph(methods=("ptapt",), folds=("1",), seeds=1)
    for node in graph.nodes.values():
        if node.stage != "finetune":
            _finish(layout, node)
            (layout.stage(node.stage, node.key).attempt(1).output / "model.bin").unlink()
    assert not any(fact.done for fact in read_facts(graph, layout).values())


def test_failures_count_and_interruptions_do_not(layout: Layout, graph: Graph) -> None:
    """Failed, failed, interrupted: two failures, and the error of the last one."""
    node = graph.nodes[graph.runs[0].key]
    for number, ending in enumerate((Ending.failed, Ending.failed, Ending.interrupted), 1):
        _attempt(layout, node, number, ending)
    fact = read_facts(graph, layout)[node.key]
    assert fact.failures == 2
    assert fact.attempts == 3
    assert not fact.refused
    assert fact.error == "ValueError: number 2"


def test_the_last_ending_says_whether_it_is_refused(layout: Layout, graph: Graph) -> None:
    """Refused is the user's to mend; what came after it tells whether it was."""
    first, second = (graph.nodes[run.key] for run in graph.runs)
    _attempt(layout, first, 1, Ending.refused)
    _attempt(layout, second, 1, Ending.refused)
    _attempt(layout, second, 2, Ending.failed)
    facts = read_facts(graph, layout)
    assert facts[first.key].refused
    assert not facts[second.key].refused


def test_launching_again_forgives(layout: Layout, graph: Graph) -> None:
    """Failures of attempts begun before `since` do not count."""
    node = graph.nodes[graph.runs[0].key]
    _attempt(layout, node, 1, Ending.refused, started=100.0)
    _attempt(layout, node, 2, Ending.failed, started=200.0)
    assert read_facts(graph, layout, since=150.0)[node.key].failures == 1
    fact = read_facts(graph, layout, since=300.0)[node.key]
    assert fact.failures == 0
    assert not fact.error


def test_a_live_claim_is_held_and_a_dead_one_is_lost(layout: Layout, graph: Graph) -> None:
    """Our own process lives; a claim without heartbeat for years does not."""
    first, second = (graph.nodes[run.key] for run in graph.runs)
    claim_attempt(layout.stage(first.stage, first.key), 1, new_claim(1))
    _attempt(layout, second, 1, None)
    facts = read_facts(graph, layout)
    assert str(os.getpid()) in facts[first.key].held
    assert not facts[second.key].held
    assert facts[second.key].failures == 0


def test_a_torn_outcome_is_an_attempt_without_a_word(layout: Layout, graph: Graph) -> None:
    """A half-written outcome is neither failure nor success."""
    node = graph.nodes[graph.runs[0].key]
    _attempt(layout, node, 1, Ending.failed)
    outcome = layout.stage(node.stage, node.key).attempt(1).outcome
    outcome.write_text(outcome.read_text()[:30])
    assert read_facts(graph, layout)[node.key].failures == 0


def test_lost_attempts_are_free_up_to_a_limit_and_while_they_progress(layout: Layout, graph: Graph) -> None:
    """Without a newer checkpoint the sixth lost attempt counts as a failure, with one none does."""
    node = graph.nodes[graph.runs[0].key]
    for number in range(1, MAX_LOST + 2):
        _attempt(layout, node, number, None, started=float(number))
    fact = read_facts(graph, layout)[node.key]
    assert fact.failures == 1
    assert "without a newer checkpoint" in fact.error
    checkpoint = layout.stage(node.stage, node.key).checkpoint
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text("{}")
    assert read_facts(graph, layout)[node.key].failures == 0


@pytest.mark.parametrize(("checkpoint", "failures"), [(0.0, 3), (5.0, 0), (2.0, 2)])
def test_progress_resets_the_count(checkpoint: float, failures: int) -> None:
    """Only attempts begun since the last checkpoint was written count against the limit."""
    lost = [AttemptFacts(_dead_claim(number, started=float(number)), False, None) for number in range(1, MAX_LOST + 4)]
    assert judge_attempts(lost, checkpoint=checkpoint, since=0.0).failures == failures


def test_only_the_keys_asked_for_are_read_again(layout: Layout, graph: Graph) -> None:
    """The rest is taken as known, also where the disk says otherwise by now."""
    known = read_facts(graph, layout)
    for node in graph.nodes.values():
        _finish(layout, node)
    one = graph.runs[0].key
    facts = read_facts(graph, layout, keys=[one], known=known)
    assert [key for key, fact in facts.items() if fact.done] == [one]


def test_finished_runs_are_read_quickly(layout: Layout) -> None:
    """A pass over a finished experiment takes well under a millisecond a run."""
    graph = make_graph(methods=("vft",), folds=tuple("12345"), seeds=40)
    for node in graph.nodes.values():
        folder = layout.stage(node.stage, node.key)
        folder.path.mkdir(parents=True)
        write_result(folder, Result(node.key, node.stage, 1, "1", 0, "fake", "d1", {}, {}, 1, {}, {}))
    begun = time.process_time()
    assert all(fact.done for fact in read_facts(graph, layout).values())
    assert time.process_time() - begun < 0.001 * len(graph.nodes)
