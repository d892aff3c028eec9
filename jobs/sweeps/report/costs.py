"""What a sweep cost, what sharing stages saved, and what early stopping did. `read_effort` reads files; the rest is pure.

A stage counts with the seconds of every attempt at it, times the processes that computed it: GPU-hours where it ran on GPUs (one for each
process), else CPU-hours, a core each (processes x threads), as `grid --dry-run` counts them. A stage that was finished before the sweep
began cost the sweep nothing, whoever computed it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from jobs.control.result_index import facts_of
from jobs.store.layout import StageFolder
from jobs.store.records import Result, attempt_numbers, read_claim, read_outcome


@dataclass(frozen=True)
class Hours:
    """Device time, of GPUs and of the cores of stages that used none."""

    gpu: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Hours) -> Hours:
        return Hours(self.gpu + other.gpu, self.cpu + other.cpu)

    def __sub__(self, other: Hours) -> Hours:
        return Hours(self.gpu - other.gpu, self.cpu - other.cpu)

    def __mul__(self, factor: float) -> Hours:
        return Hours(self.gpu * factor, self.cpu * factor)


@dataclass(frozen=True)
class Effort:
    """What went into a finished stage."""

    seconds: float  # wall-clock, of all attempts
    finished: float  # seconds since the epoch


@dataclass(frozen=True)
class TrialStages:
    """The stages that a trial needed, fold by fold, and how many folds it was not given because it was stopped early."""

    folds: tuple[frozenset[str], ...]  # keys
    not_given: int = 0


@dataclass(frozen=True)
class SweepCost:
    """`unshared` = `spent` + `saved_within` + `saved_before`."""

    spent: Hours  # by stages of this sweep, each computed once
    unshared: Hours  # what the trials would have cost, each by itself
    saved_within: Hours  # by stages that several trials had in common
    saved_before: Hours  # by stages that were finished when the sweep began
    saved_stopping: Hours  # estimate: the folds not given, at what the trial's own stages cost a fold
    stages: int  # different ones that were needed
    stages_before: int  # of them, those that were finished when the sweep began
    stages_unknown: int  # of them, those whose results are gone: counted nowhere


def read_effort(folder: StageFolder, result: Result) -> Effort:
    """Of all attempts at a stage, as their ends or their last heartbeats tell."""
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


def told_effort(result: Result) -> Effort:
    """As the result itself tells, of the attempts that led to it; finished at no time where it does not say."""
    try:
        finished = datetime.fromisoformat(str(result.provenance.get("finished"))).timestamp()
    except ValueError:
        finished = math.inf
    return Effort(facts_of(result, 0).all_seconds, finished)


def hours_of(result: Result, seconds: float) -> Hours:
    """Of one stage that took so many seconds."""
    facts = facts_of(result, 0)
    hours = seconds * max(1, facts.processes) / 3600
    return Hours(gpu=hours) if facts.on_gpu else Hours(cpu=hours * max(1, facts.threads))


def sweep_cost(trials: Sequence[TrialStages], results: Mapping[str, Result], efforts: Mapping[str, Effort], began: float) -> SweepCost:
    """The cost of the trials of a sweep. `results` and `efforts` are by key of the stage; an effort that is not there is the told one."""
    needed = sorted({key for trial in trials for keys in trial.folds for key in keys})
    effort = {key: efforts.get(key) or told_effort(results[key]) for key in needed if key in results}
    cost = {key: hours_of(results[key], each.seconds) for key, each in effort.items()}
    before = {key for key, each in effort.items() if each.finished < began}
    once, spent = _sum(cost.values()), _sum(hours for key, hours in cost.items() if key not in before)
    unshared = _sum(cost[key] for trial in trials for keys in trial.folds for key in sorted(keys) if key in cost)
    return SweepCost(
        spent=spent,
        unshared=unshared,
        saved_within=unshared - once,
        saved_before=once - spent,
        saved_stopping=_not_spent(trials, cost),
        stages=len(needed),
        stages_before=len(before),
        stages_unknown=len(needed) - len(cost),
    )


def _not_spent(trials: Sequence[TrialStages], cost: Mapping[str, Hours]) -> Hours:
    """Only stages that no other trial needed count: the others would have been computed anyway."""
    users = Counter(key for trial in trials for keys in trial.folds for key in keys)
    total = Hours()
    for trial in (trial for trial in trials if trial.not_given and trial.folds):
        own = _sum(cost[key] for keys in trial.folds for key in sorted(keys) if key in cost and users[key] == 1)
        total += own * (trial.not_given / len(trial.folds))
    return total


def _sum(hours: Iterable[Hours]) -> Hours:
    total = Hours()
    for each in hours:
        total += each
    return total
