"""The cost of a sweep in device time, and the savings by shared stages and early stopping. `read_effort` reads files; the rest is pure.

A stage costs the seconds of all its attempts times its number of processes: GPU-hours if it ran on GPUs (one per process), else CPU-hours
(processes x threads), as in `grid --dry-run`. A stage that was finished before the sweep started costs nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from jobs.control.result_index import facts_of
from jobs.store.layout import StageFolder
from jobs.store.records import Result, attempt_numbers, read_claim, read_outcome
from jobs.sweeps.report.scores import TrialRecord


@dataclass(frozen=True)
class Hours:
    """Device time: of GPUs, and of the cores of stages without GPUs."""

    gpu: float = 0.0
    cpu: float = 0.0

    @property
    def text(self) -> str:
        return f"{self.gpu:.1f} GPU-hours and {self.cpu:.1f} CPU-hours"

    def __add__(self, other: Hours) -> Hours:
        return Hours(self.gpu + other.gpu, self.cpu + other.cpu)

    def __sub__(self, other: Hours) -> Hours:
        return Hours(self.gpu - other.gpu, self.cpu - other.cpu)

    def __mul__(self, factor: float) -> Hours:
        return Hours(self.gpu * factor, self.cpu * factor)


@dataclass(frozen=True)
class Effort:
    """The time spent on a finished stage."""

    seconds: float  # wall-clock, all attempts
    finished: float  # seconds since the epoch


@dataclass(frozen=True)
class SweepCost:
    """`unshared` = `spent` + `saved_within` + `saved_before`."""

    spent: Hours  # on the stages of this sweep, each computed once
    unshared: Hours  # if every trial computed all its stages
    saved_within: Hours  # by stages that several trials share
    saved_before: Hours  # by stages that were finished before the sweep started
    saved_stopping: Hours  # estimate: the skipped folds, at the mean cost per fold of stages that only this trial needs
    stages: int  # number of distinct stages
    stages_before: int  # of them, finished before the sweep started
    stages_unknown: int  # of them, without a result: not counted in any cost


def read_effort(folder: StageFolder, result: Result) -> Effort:
    """The time of all attempts at a stage, from their outcomes or last heartbeats."""
    total = 0.0
    for number in attempt_numbers(folder):
        attempt = folder.attempt(number)
        if number == result.attempt:
            total += facts_of(result, 0).seconds
        elif outcome := read_outcome(attempt):
            total += outcome.seconds
        elif claim := read_claim(attempt):
            total += max(0.0, attempt.claim.stat().st_mtime - claim.started)
    return Effort(total or facts_of(result, 0).all_seconds, folder.result.stat().st_mtime)


def reported_effort(result: Result) -> Effort:
    """The time that a result reports for its attempts; `finished` is infinite if it is not reported."""
    try:
        finished = datetime.fromisoformat(str(result.provenance.get("finished"))).timestamp()
    except ValueError:
        finished = math.inf
    return Effort(facts_of(result, 0).all_seconds, finished)


def hours_of(result: Result, seconds: float) -> Hours:
    """Device time of a stage that took so many seconds."""
    facts = facts_of(result, 0)
    hours = seconds * max(1, facts.processes) / 3600
    return Hours(gpu=hours) if facts.on_gpu else Hours(cpu=hours * max(1, facts.threads))


def sweep_cost(
    trials: Sequence[TrialRecord], skipped: Mapping[str, int], results: Mapping[str, Result], efforts: Mapping[str, Effort], began: float
) -> SweepCost:
    """The cost of the trials of a sweep. `skipped`: trial -> number of folds that early stopping has skipped.

    `results` and `efforts` are by stage key; a missing effort is that reported by the result.
    """
    needed = sorted({key for trial in trials for fold in trial.folds for key in fold.stages})
    effort = {key: efforts.get(key) or reported_effort(results[key]) for key in needed if key in results}
    cost = {key: hours_of(results[key], each.seconds) for key, each in effort.items()}
    before = {key for key, each in effort.items() if each.finished < began}
    once, spent = sum(cost.values(), Hours()), sum((hours for key, hours in cost.items() if key not in before), Hours())
    unshared = sum((cost[key] for trial in trials for fold in trial.folds for key in sorted(fold.stages) if key in cost), Hours())
    return SweepCost(
        spent=spent,
        unshared=unshared,
        saved_within=unshared - once,
        saved_before=once - spent,
        saved_stopping=_saved_by_stopping(trials, skipped, cost),
        stages=len(needed),
        stages_before=len(before),
        stages_unknown=len(needed) - len(cost),
    )


def _saved_by_stopping(trials: Sequence[TrialRecord], skipped: Mapping[str, int], cost: Mapping[str, Hours]) -> Hours:
    """Counts only stages that no other trial needs: the others would have been computed anyway."""
    users = Counter(key for trial in trials for fold in trial.folds for key in fold.stages)
    total = Hours()
    for trial in (trial for trial in trials if trial.folds):
        own = sum((cost[key] for fold in trial.folds for key in sorted(fold.stages) if key in cost and users[key] == 1), Hours())
        total += own * (skipped.get(trial.trial, 0) / len(trial.folds))
    return total
