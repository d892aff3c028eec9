"""What a sweep cost, and what it did not: sharing within it, stages that were there before, and early stopping."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from jobs.store.layout import StageFolder
from jobs.store.records import Claim, Ending, Outcome, claim_attempt, write_outcome, write_result
from jobs.sweeps.records import TrialRecord, TrialState
from jobs.sweeps.report.costs import Effort, Hours, SweepCost, hours_of, read_effort, told_effort
from jobs.sweeps.report.summary import summarise
from tests.jobs.sweeps import report_cases as cases

ALL = dict.fromkeys(cases.FOLDS, (60.0, 61.0))


def _cost(*trials: TrialRecord, seconds: dict[str, float] | None = None, **provenance: object) -> SweepCost:
    return summarise(cases.sweep(), trials, cases.results(trials, seconds, **provenance)).cost


def test_each_stage_is_paid_for_once() -> None:
    """Two sets of one fold share its states and one k-means; by themselves they would have cost these twice."""
    one = {"1": (60.0,)}
    found = _cost(cases.trial([16], one, TrialState.running), cases.trial([16, 64], one, TrialState.running))
    assert found.stages == 7  # states, two k-means, two pretrainings, two fine-tunings
    assert found.spent == Hours(cpu=7)
    assert found.unshared == Hours(cpu=9)
    assert (found.saved_within, found.saved_before, found.saved_stopping) == (Hours(cpu=2), Hours(), Hours())


def test_what_was_there_before_the_sweep_cost_it_nothing() -> None:
    """Of a stage that two trials share, one use is saved by its being there, and the other by sharing."""
    one = {"1": (60.0,)}
    trials = [cases.trial([16], one, TrialState.running), cases.trial([64], one, TrialState.running)]
    results = cases.results(trials)
    results["s-1"] = cases.result("s-1", "states", 36000.0, ended=cases.LAUNCHED - 1)
    found = summarise(cases.sweep(), trials, results).cost
    assert (found.spent, found.unshared) == (Hours(cpu=6), Hours(cpu=26))
    assert (found.saved_before, found.saved_within) == (Hours(cpu=10), Hours(cpu=10))
    assert (found.stages, found.stages_before) == (7, 1)


def test_a_sweep_that_was_launched_again_began_with_its_first_trial() -> None:
    """What it computed before it was interrupted was not there before."""
    record = cases.trial([16], {"1": (60.0,)}, TrialState.running)
    results = cases.results([record])
    later = replace(cases.sweep(), launched=cases.LAUNCHED + 10_000)
    assert summarise(later, [record], results).cost.stages_before == 0


def test_early_stopping_saves_what_nobody_else_needed() -> None:
    """Two folds at one pretraining and two fine-tunings each: states and k-means another set needs as well."""
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


def test_results_that_are_gone_are_counted_as_such() -> None:
    """Their cost is not known, and no other takes its place."""
    record = cases.trial([16], {"1": (60.0,)}, TrialState.running)
    results = cases.results([record])
    del results["s-1"]
    found = summarise(cases.sweep(), [record], results).cost
    assert (found.stages, found.stages_unknown, found.spent) == (4, 1, Hours(cpu=3))


def test_efforts_that_were_read_count_in_place_of_the_told_ones() -> None:
    """The result knows of the attempts that led to it; the files of all."""
    record = cases.trial([16], {"1": (60.0,)}, TrialState.running)
    told = summarise(cases.sweep(), [record], cases.results([record], seconds_before=1800.0)).cost
    assert told.spent == Hours(cpu=6)
    read = {"s-1": Effort(7200.0, cases.LAUNCHED - 50)}
    found = summarise(cases.sweep(), [record], cases.results([record]), read).cost
    assert (found.spent, found.saved_before) == (Hours(cpu=3), Hours(cpu=2))


def test_all_attempts_are_read(tmp_path: Path) -> None:
    """One that failed by its last word, one that was killed by its heartbeat, one that succeeded by the result."""
    folder = StageFolder(tmp_path / "states" / "s-1")
    for number in (1, 2, 3):
        claim_attempt(folder, number, Claim(number, "host", 1, "", 1000.0))
    write_outcome(folder.attempt(1), Outcome(1, Ending.failed, "Error", "no", "", "host", 20.0))
    os.utime(folder.attempt(2).claim, (1007.0, 1007.0))
    result = replace(cases.result("s-1", "states", 100.0), attempt=3)
    write_result(folder, result)
    os.utime(folder.result, (5000.0, 5000.0))
    assert read_effort(folder, result) == Effort(127.0, 5000.0)


def test_a_result_that_does_not_say_when_was_not_there_before() -> None:
    """Nothing is counted as saved without a reason."""
    assert told_effort(cases.result("s-1", "states", 5.0, finished="someday")).finished == float("inf")
