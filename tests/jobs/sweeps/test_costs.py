"""Cost of a sweep, and savings by sharing, by stages finished before, and by early stopping."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from jobs.store.layout import StageFolder
from jobs.store.records import Claim, Ending, Outcome, claim_attempt, write_outcome, write_result
from jobs.sweeps.decisions import TrialState
from jobs.sweeps.report.costs import Effort, Hours, SweepCost, hours_of, read_effort, reported_effort
from jobs.sweeps.report.scores import TrialRecord
from jobs.sweeps.report.summary import summarise
from tests.jobs.sweeps import report_cases as cases

ALL = dict.fromkeys(cases.FOLDS, (60.0, 61.0))


def _cost(*trials: TrialRecord, seconds: dict[str, float] | None = None, **provenance: object) -> SweepCost:
    return summarise(cases.sweep(), trials, cases.results(trials, seconds, **provenance)).cost


def test_each_stage_is_counted_once() -> None:
    """Two sets on one fold share its states and one k-means; without sharing these would be computed twice."""
    one = {"1": (60.0,)}
    found = _cost(cases.trial([16], one, TrialState.running), cases.trial([16, 64], one, TrialState.running))
    assert found.stages == 7  # states, two k-means, two pretrainings, two fine-tunings
    assert found.spent == Hours(cpu=7)
    assert found.unshared == Hours(cpu=9)
    assert (found.saved_within, found.saved_before, found.saved_stopping) == (Hours(cpu=2), Hours(), Hours())


def test_stages_finished_before_the_sweep_cost_nothing() -> None:
    """Of a stage that two trials share, one use is saved because it was finished before, the other by sharing."""
    one = {"1": (60.0,)}
    trials = [cases.trial([16], one, TrialState.running), cases.trial([64], one, TrialState.running)]
    results = cases.results(trials)
    results["s-1"] = cases.result("s-1", "states", 36000.0, ended=cases.LAUNCHED - 1)
    found = summarise(cases.sweep(), trials, results).cost
    assert (found.spent, found.unshared) == (Hours(cpu=6), Hours(cpu=26))
    assert (found.saved_before, found.saved_within) == (Hours(cpu=10), Hours(cpu=10))
    assert (found.stages, found.stages_before) == (7, 1)


def test_start_of_a_resumed_sweep_is_that_of_its_first_trial() -> None:
    """Stages computed before an interruption are part of the cost of the sweep."""
    record = cases.trial([16], {"1": (60.0,)}, TrialState.running)
    results = cases.results([record])
    later = replace(cases.sweep(), launched=cases.LAUNCHED + 10_000)
    assert summarise(later, [record], results).cost.stages_before == 0


def test_early_stopping_saves_only_unshared_stages() -> None:
    """Two folds with one pretraining and two fine-tunings each; another set also needs the states and k-means."""
    stopped = cases.trial([16], {"1": (50.0, 51.0)}, TrialState.stopped)
    found = _cost(stopped, cases.trial([16, 64], ALL), seconds={"ptapt": 7200.0})
    assert found.saved_stopping == Hours(cpu=2 * (2 + 2))
    assert _cost(cases.trial([16], {"1": (50.0, 51.0)}, TrialState.running)).saved_stopping == Hours()
    assert _cost(cases.trial([16], {}, TrialState.stopped)).saved_stopping == Hours()


def test_units_are_gpus_and_cores() -> None:
    """A GPU for each process of a stage on GPUs; the cores of all processes of another. An older result names neither."""
    gpu = cases.result("s-1", "states", 3600.0, device="4 x NVIDIA H200", processes=8, threads=6)
    cpu = cases.result("c-1-16", "cluster", 1800.0, processes=2, threads=4)
    bare = cases.result("c-1-16", "cluster", 1800.0, processes=None, threads=None)
    assert (hours_of(gpu, 3600.0), hours_of(cpu, 1800.0), hours_of(bare, 1800.0)) == (Hours(gpu=8), Hours(cpu=4), Hours(cpu=0.5))


def test_missing_results_are_counted() -> None:
    """Their cost is unknown and not replaced by another."""
    record = cases.trial([16], {"1": (60.0,)}, TrialState.running)
    results = cases.results([record])
    del results["s-1"]
    found = summarise(cases.sweep(), [record], results).cost
    assert (found.stages, found.stages_unknown, found.spent) == (4, 1, Hours(cpu=3))


def test_measured_efforts_replace_reported_ones() -> None:
    """A result reports only the attempts that led to it; the files have all attempts."""
    record = cases.trial([16], {"1": (60.0,)}, TrialState.running)
    told = summarise(cases.sweep(), [record], cases.results([record], seconds_before=1800.0)).cost
    assert told.spent == Hours(cpu=6)
    read = {"s-1": Effort(7200.0, cases.LAUNCHED - 50)}
    found = summarise(cases.sweep(), [record], cases.results([record]), read).cost
    assert (found.spent, found.saved_before) == (Hours(cpu=3), Hours(cpu=2))


def test_all_attempts_are_read(tmp_path: Path) -> None:
    """A failed attempt by its outcome, a killed one by its heartbeat, a successful one by the result."""
    folder = StageFolder(tmp_path / "states" / "s-1")
    for number in (1, 2, 3):
        claim_attempt(folder, number, Claim(number, "host", 1, "", 1000.0))
    write_outcome(folder.attempt(1), Outcome(1, Ending.failed, "Error", "no", "", "host", 20.0))
    os.utime(folder.attempt(2).claim, (1007.0, 1007.0))
    result = replace(cases.result("s-1", "states", 100.0), attempt=3)
    write_result(folder, result)
    os.utime(folder.result, (5000.0, 5000.0))
    assert read_effort(folder, result) == Effort(127.0, 5000.0)


def test_a_result_without_a_finish_time_is_not_from_before_the_sweep() -> None:
    """Savings are not overestimated."""
    assert reported_effort(cases.result("s-1", "states", 5.0, finished="someday")).finished == float("inf")
