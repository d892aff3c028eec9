"""The state of trials and the folds to evaluate, from scores alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.control.facts import StageFacts
from jobs.experiment.sweep_section import Search, Stopping, SweepSettings
from jobs.sweeps.decisions import Decisions, Score, Scores, Trial, TrialState, decide, running_means, scores_of
from jobs.sweeps.records import read_proposals
from jobs.sweeps.space import Point
from jobs.sweeps.stages import SweepGraphs
from tests.jobs.sweeps.fake_registry import make_sweep

FOLDS = ("1", "2", "3", "4", "5")
POINTS = tuple(Point((k,)) for k in (16, 64, 256, 1024))
ASHA, NONE = SweepSettings(), SweepSettings(stopping=Stopping.none)


def one_batch(points: Sequence[Point] = POINTS) -> Callable[[Sequence[Sequence[Trial]]], Sequence[Point]]:
    return lambda former: () if former else points


def by_name(batches: Sequence[Sequence[Trial]]) -> dict[str, Trial]:
    return {trial.point.name: trial for batch in batches for trial in batch}


def scores(uas: Mapping[str, Sequence[float | None]]) -> dict[tuple[str, str], Score]:
    """Name of a point -> UA by fold; None: the fold has failed."""
    return {
        (name, fold): Score(error="out of memory") if ua is None else Score(ua)
        for name, found in uas.items()
        for fold, ua in zip(FOLDS, found, strict=False)
    }


def test_without_stopping_every_fold_is_wanted_at_once() -> None:
    """Nothing has to wait for a decision, so that all stages can be submitted together."""
    found = by_name(decide(NONE, FOLDS, one_batch(), {}))
    assert {name: (trial.state, trial.wanted) for name, trial in found.items()} == {p.name: (TrialState.running, 5) for p in POINTS}


@pytest.mark.slow
def test_a_rung_is_judged_when_all_its_trials_have_reached_it() -> None:
    """Before that no trial gets another fold; then the better half gets the folds up to the next rung."""
    first = {"k16": [50.0], "k64": [60.0], "k256": [55.0]}
    waiting = by_name(decide(ASHA, FOLDS, one_batch(), scores(first)))
    assert {trial.wanted for trial in waiting.values()} == {1}
    assert {trial.state for trial in waiting.values()} == {TrialState.running}
    judged = by_name(decide(ASHA, FOLDS, one_batch(), scores({**first, "k1024": [40.0]})))
    assert {name: (trial.state, trial.wanted) for name, trial in judged.items()} == {
        "k16": (TrialState.stopped, 1),
        "k64": (TrialState.running, 2),
        "k256": (TrialState.running, 2),
        "k1024": (TrialState.stopped, 1),
    }
    later = by_name(decide(ASHA, FOLDS, one_batch(), scores({**first, "k1024": [40.0], "k64": [60.0, 60.0], "k256": [55.0, 54.0]})))
    assert (later["k64"].wanted, later["k256"].state) == (4, TrialState.stopped)


@pytest.mark.slow
def test_a_failed_trial_does_not_keep_the_others_waiting() -> None:
    """It is no part of the rung, and is not counted as stopped."""
    found = by_name(decide(ASHA, FOLDS, one_batch(), scores({"k16": [None], "k64": [60.0], "k256": [55.0], "k1024": [50.0]})))
    assert (found["k16"].state, found["k16"].error) == (TrialState.failed, "out of memory")
    assert found["k64"].wanted == 2
    assert found["k1024"].state is TrialState.stopped


def test_a_trial_ends_with_its_last_fold() -> None:
    """The mean is over all folds; folds computed beyond a rung by an earlier sweep do not count."""
    found = by_name(decide(ASHA, FOLDS, one_batch(POINTS[:2]), scores({"k16": [50.0] * 5, "k64": [60.0] * 5})))
    assert (found["k64"].state, found["k64"].means[-1]) == (TrialState.complete, 60.0)
    assert (found["k16"].state, found["k16"].scores) == (TrialState.stopped, {"1": 50.0})


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(st.lists(st.one_of(st.none(), st.integers(40, 60).map(float)), min_size=5, max_size=5), min_size=4, max_size=4), st.data())
def test_decisions_do_not_depend_on_the_order_of_results(uas: list[list[float | None]], data: st.DataObject) -> None:
    """Results arrive one by one in any order, and only those that were wanted: the end is always that of all results at once.

    A decision once made is never taken back meanwhile, and the number of wanted folds never falls.
    """
    every = scores({point.name: found for point, found in zip(POINTS, uas, strict=True)})
    at_once = decide(ASHA, FOLDS, one_batch(), every)
    known: dict[tuple[str, str], Score] = {}
    before = by_name(decide(ASHA, FOLDS, one_batch(), known))
    while missing := [cell for cell in _wanted(before) if cell not in known]:
        cell = data.draw(st.sampled_from(missing))
        known[cell] = every[cell]
        now = by_name(decide(ASHA, FOLDS, one_batch(), known))
        for name, trial in now.items():
            assert trial.wanted >= before[name].wanted
            assert before[name].state in (TrialState.running, trial.state)
        before = now
    assert before == {name: _seen(trial, known) for name, trial in by_name(at_once).items()}


def _wanted(trials: Mapping[str, Trial]) -> list[tuple[str, str]]:
    return [(name, fold) for name, trial in trials.items() for fold in FOLDS[: trial.wanted]]


def _seen(trial: Trial, known: Scores) -> Trial:
    return replace(trial, scores={fold: ua for fold, ua in trial.scores.items() if (trial.point.name, fold) in known})


def test_batches_follow_one_another(tmp_path: Path) -> None:
    """Optuna's next points are proposed when the trials of the last batch have ended, from the record if they were proposed before."""
    sweep = make_sweep(tmp_path, SweepSettings(counts=[16, 64, 256], search=Search.optuna, trials=6, at_once=2, stopping=Stopping.none))
    watching = Decisions(sweep, read_only=True)
    assert len(watching.trials) == 2
    assert read_proposals(sweep) == ()
    decisions, graphs = Decisions(sweep), SweepGraphs(sweep)
    assert [trial.point for trial in decisions.trials] == [trial.point for trial in watching.trials]
    for number in (2, 4, 6):
        assert len(decisions.trials) == number
        assert [each.point for batch in read_proposals(sweep) for each in batch] == [trial.point for trial in decisions.trials]
        graph = graphs.graph([(trial.point, trial.wanted) for trial in decisions.trials])
        facts = {key: StageFacts(done=True, ua=50.0 + len(node.upstream)) for key, node in graph.nodes.items()}
        halfway = {**facts, graph.runs[-1].key: StageFacts()}
        assert decisions.extend(graph, halfway) is None
        refill = decisions.extend(graph, facts)
        assert (refill is None) is (number == 6)
        assert decisions.extend(graph, facts) is refill or refill is not None
    assert {trial.state for trial in decisions.trials} == {TrialState.complete}
    again = Decisions(sweep)
    assert [trial.point for trial in again.trials] == [trial.point for trial in decisions.trials[:2]]


def test_scores_follow_from_facts(tmp_path: Path) -> None:
    """The mean of a fold's fine-tunings when all are done; an error where a stage was given up, or no seed is left; else nothing."""
    sweep = make_sweep(tmp_path, SweepSettings(sets=[[16], [64]], seeds=2))
    graph = SweepGraphs(sweep).graph([(Point((16,)), 2), (Point((64,)), 2)])
    facts = {key: StageFacts(done=True, ua=50.0) for key in graph.nodes}
    assert scores_of(graph, facts) == {(name, fold): Score(50.0) for name in ("k16", "k64") for fold in ("1", "2")}
    runs = {(run.method, run.fold, run.slot): run.key for run in graph.runs}
    states = next(key for key, node in graph.nodes.items() if node.stage == "states" and node.fold == "2")
    facts |= {
        runs["k16", "1", 0]: StageFacts(done=True, ua=54.0),
        runs["k64", "1", 0]: StageFacts(),
        runs["k16", "2", 0]: StageFacts(done=True, ua=50.0, diverged="loss is NaN"),
        runs["k64", "2", 1]: StageFacts(),
        states: StageFacts(stopped="3 attempts failed"),
    }
    found = scores_of(graph, facts)
    assert found["k16", "1"] == Score(52.0)
    assert ("k64", "1") not in found
    assert found["k16", "2"].error == f"{graph.nodes[runs['k16', '2', 0]].name}: loss is NaN"
    assert ("k64", "2") not in found  # P-TAPT is done, so that nothing upstream of it is needed
    ptapt = graph.nodes[runs["k64", "2", 1]].upstream["backbone"]
    clusters = {key: StageFacts() for key in graph.nodes[ptapt].upstream.values()}
    found = scores_of(graph, {**facts, ptapt: StageFacts(), **clusters})
    assert found["k64", "2"].error == f"{graph.nodes[states].name}: 3 attempts failed"
    unscored = {**facts, runs["k16", "1", 0]: StageFacts(done=True)}
    assert "no confusion matrix" in scores_of(graph, unscored)["k16", "1"].error


@pytest.mark.parametrize("uas", [[], [50.0], [50.0, 60.0, 61.0]])
def test_running_means(uas: list[float]) -> None:
    assert running_means(uas) == tuple(sum(uas[:count]) / count for count in range(1, len(uas) + 1))
