"""From the trials of a sweep to what it says of every point. Pure.

Conventions, which every caption repeats: UA in percent, on the validation speakers. The mean of a point is the mean of
its fold means; its ± and 95 % interval are over slots, of the mean over the folds done, as in the tables of a grid: they speak of
fine-tuning seeds. Points are compared with the best over the (fold, slot) pairs that both have, since folds differ by more than points do.
Only complete points are tested, with a correction for their number: the others were stopped for what the test would ask.

A point that has not done every fold cannot be put beside the others by its own mean. Its *placed* UA is the mean of the best plus its mean
difference to the best over the pairs that both have; that of a complete point is its mean.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jobs.experiment.sweep_section import Search
from jobs.statistics import ALPHA, Interval, PairedTest, RankCorrelation, holm, mean, paired_test, rank_correlation, sd, t_interval
from jobs.store.records import Result
from jobs.sweeps.records import FoldRecord, RunRecord, Sweep, TrialRecord, TrialState
from jobs.sweeps.report.costs import Effort, SweepCost, TrialStages, sweep_cost
from jobs.sweeps.space import Point, grid_points, random_points
from jobs.tables.summary import CodeFacts, code_facts

OF_K = ("purity", "nmi", "inertia", "entropy_share")
OF_SET = ("ptapt_loss_share",)
NAMES = (*OF_K, *OF_SET)
LISTED = (TrialState.complete, TrialState.stopped, TrialState.failed, TrialState.running, TrialState.interrupted)


@dataclass(frozen=True)
class Measure:
    """One score of a point, in percent; None of no runs, or where there are too few of them."""

    mean: float | None  # of the fold means
    sd: float | None  # sample sd over slots, of the mean over folds
    interval: Interval | None  # Student's t over these
    sd_all_runs: float | None  # sample sd over all runs of all folds: mostly how much folds differ


@dataclass(frozen=True)
class FoldSummary:
    """One point on one fold."""

    fold: str
    mean_ua: float | None
    sd_ua: float | None  # over seeds
    runs: tuple[RunRecord, ...]  # that count, by slot
    diverged: int  # runs that do not


@dataclass(frozen=True)
class Difference:
    """`this point - the best`, in points of UA."""

    test: PairedTest
    holm_p: float | None = None  # None: not tested
    alike: bool | None = None  # not distinguishable from the best; None: not tested


@dataclass(frozen=True)
class Proxies:
    """Values by name; what is not known has none."""

    of_set: Mapping[str, float]
    of_k: Mapping[int, Mapping[str, float]]


@dataclass(frozen=True)
class PointSummary:
    """One row of the table."""

    point: Point
    trial: str
    state: TrialState
    error: str  # of a failed one
    folds: tuple[FoldSummary, ...]  # done, in the order of the sweep
    ua: Measure
    wa: Measure
    macro_f1: Measure
    proxies: Proxies
    to_best: Difference | None = None  # None: is the best, or there is none, or it shares no pair with it
    placed_ua: float | None = None

    @property
    def complete(self) -> bool:
        return self.state is TrialState.complete

    @property
    def runs(self) -> int:
        return sum(len(fold.runs) for fold in self.folds)

    @property
    def diverged(self) -> int:
        return sum(fold.diverged for fold in self.folds)

    @property
    def size(self) -> tuple[int, int]:
        """How large a set is: how many counts, then what they add up to."""
        return len(self.point.counts), sum(self.point.counts)


@dataclass(frozen=True)
class Group:
    """Points that have something in common, by their placed UA."""

    value: int  # a number of clusters that their sets contain, or how many their sets hold
    points: int
    mean_ua: float | None
    interval: Interval | None  # over points


@dataclass(frozen=True)
class FoldChoice:
    """The best point by the validation UA of one held-out fold alone."""

    fold: str
    point: PointSummary
    mean_ua: float


@dataclass(frozen=True)
class SweepSummary:
    """Everything that the report of a sweep says."""

    sweep: Sweep
    points: tuple[PointSummary, ...]  # complete ones first, the best first among them
    best: PointSummary | None
    smaller: PointSummary | None  # the smallest complete point that is smaller than the best and not distinguishable from it
    by_fold: tuple[FoldChoice, ...]  # of the folds that some point has done
    correlations: Mapping[str, RankCorrelation | None]  # of each proxy with the UA of complete points
    by_count: tuple[Group, ...]
    by_size: tuple[Group, ...]
    trials: Mapping[TrialState, int]
    cost: SweepCost
    code: CodeFacts

    @property
    def tested(self) -> int:
        """Comparisons that the p-values are corrected for."""
        return sum(point.to_best is not None and point.to_best.holm_p is not None for point in self.points)

    @property
    def diverged(self) -> int:
        return sum(point.diverged for point in self.points)

    @property
    def planned(self) -> int:
        """How many points the search tries; of one that chooses as it goes none twice."""
        asked, space = self.sweep.experiment.sweep, self.sweep.space
        if asked.search is Search.optuna:
            return int(min(asked.trials, space.size))
        return len(grid_points(space) if asked.search is Search.grid else random_points(space, asked.trials, asked.seed))

    @property
    def under_way(self) -> bool:
        begun = [self.trials.get(state, 0) for state in (TrialState.running, TrialState.interrupted)]
        return not self.points or any(begun) or len(self.points) < self.planned

    @property
    def grid_folds(self) -> tuple[str, ...]:
        """What a grid of the experiment tests: the sweep may have evaluated some of it."""
        return tuple(self.sweep.experiment.folds or self.sweep.corpus.folds)

    @property
    def tests_apart(self) -> bool:
        """Whether no fold of a grid tests the validation speakers of another: they are the same in all folds, or there is one fold."""
        folds = self.sweep.folds
        speakers = {tuple(sorted(self.sweep.validation.get(fold, ()))) for fold in folds}
        return len(speakers) == 1 and (len(folds) > 1 or set(self.grid_folds) <= set(folds))

    @property
    def folds_apart(self) -> bool:
        """Whether what a fold could choose from was decided without the validation speakers of other folds."""
        searched_apart = self.sweep.experiment.sweep.search is not Search.optuna
        return searched_apart and not any(point.state is TrialState.stopped for point in self.points)


def summarise(
    sweep: Sweep, trials: Sequence[TrialRecord], results: Mapping[str, Result], efforts: Mapping[str, Effort] | None = None
) -> SweepSummary:
    """The numbers of a sweep, also of one under way.

    `results` maps the keys of stages to results: their metrics and provenance are read, their scores are in the trials' records.
    `efforts` is what went into them; where it does not say, the results do.
    """
    found = [_point(sweep, trial, results) for trial in trials]
    best = min((point for point in found if point.complete), key=_rank, default=None)
    points = sorted(_compared(found, best), key=_listed)
    best = next((point for point in points if point.complete), None)
    keys = {key for trial in trials for fold in trial.folds for key in fold.stages}
    return SweepSummary(
        sweep=sweep,
        points=tuple(points),
        best=best,
        smaller=_smaller(points, best),
        by_fold=_by_fold(sweep.folds, points),
        correlations={name: _correlation(name, points) for name in NAMES},
        by_count=_groups(sorted({k for point in points for k in point.point.counts}), points, lambda point: point.point.counts),
        by_size=_groups(sorted({len(point.point.counts) for point in points}), points, lambda point: (len(point.point.counts),)),
        trials=Counter(point.state for point in points),
        cost=_cost(sweep, trials, found, results, efforts or {}),
        code=code_facts(results[key] for key in sorted(keys) if key in results),
    )


def _point(sweep: Sweep, trial: TrialRecord, results: Mapping[str, Result]) -> PointSummary:
    records = {record.fold: record for record in trial.folds}
    done = [records[fold] for fold in sweep.folds if fold in records]
    folds = tuple(_fold(record, results) for record in done)
    return PointSummary(
        point=trial.point,
        trial=trial.trial,
        state=TrialState.complete if len(folds) == len(sweep.folds) else trial.state,  # whoever evaluated it may not have come to say so
        error=trial.error,
        folds=folds,
        ua=_measure([{run.slot: run.ua for run in fold.runs} for fold in folds]),
        wa=_measure([{run.slot: run.wa for run in fold.runs if run.wa is not None} for fold in folds]),
        macro_f1=_measure([{run.slot: run.macro_f1 for run in fold.runs if run.macro_f1 is not None} for fold in folds]),
        proxies=proxies_of(done),
    )


def _fold(record: FoldRecord, results: Mapping[str, Result]) -> FoldSummary:
    runs = tuple(sorted((run for run in record.runs if not run.diverged), key=lambda run: (run.slot, run.seed)))
    values = [run.ua for run in runs]
    diverged = sum(bool(results[key].diverged) for key in record.stages if key in results)
    return FoldSummary(record.fold, mean(values), sd(values), runs, diverged)


def _measure(by_fold: Sequence[Mapping[int, float]]) -> Measure:
    done = [found for found in by_fold if found]
    slots = [slot for slot in (done[0] if done else {}) if all(slot in found for found in done)]
    by_slot = _known(mean([found[slot] for found in done]) for slot in slots)
    return Measure(
        mean=mean(_known(mean(list(found.values())) for found in done)),
        sd=sd(by_slot),
        interval=t_interval(by_slot),
        sd_all_runs=sd([value for found in done for value in found.values()]),
    )


def _rank(point: PointSummary) -> tuple[float, tuple[int, int], str]:
    """Best first; of equally good ones the smaller."""
    return -(point.ua.mean if point.ua.mean is not None else float("-inf")), point.size, point.point.label


def _listed(point: PointSummary) -> tuple[int, int, float, tuple[int, int], str]:
    placed = point.placed_ua if point.placed_ua is not None else float("-inf")
    return LISTED.index(point.state), -len(point.folds), -placed, point.size, point.point.label


def _compared(points: Sequence[PointSummary], best: PointSummary | None) -> list[PointSummary]:
    """The same points with their differences to the best, and where these put them."""
    if best is None:
        return [replace(point, placed_ua=point.ua.mean) for point in points]
    tests = {point.trial: _test(best, point) for point in points if point is not best}
    tested = [point.trial for point in points if point.complete and point is not best]
    corrected = dict(zip(tested, holm([tests[trial].t_p for trial in tested]), strict=True))
    found = []
    for point in points:
        test = tests.get(point.trial)
        if test is None or not test.pairs or test.mean is None or best.ua.mean is None:
            found.append(replace(point, placed_ua=point.ua.mean if point.complete else None))
            continue
        p = corrected.get(point.trial)
        alike = None if not point.complete else p >= ALPHA if p is not None else True if _nothing_differs(test) else None
        placed = point.ua.mean if point.complete else best.ua.mean + test.mean
        found.append(replace(point, to_best=Difference(test, p, alike), placed_ua=placed))
    return found


def _test(best: PointSummary, point: PointSummary) -> PairedTest:
    first = {(fold.fold, run.slot): run.ua for fold in best.folds for run in fold.runs}
    second = {(fold.fold, run.slot): run.ua for fold in point.folds for run in fold.runs}
    shared = [pair for pair in first if pair in second]
    return paired_test([first[pair] for pair in shared], [second[pair] for pair in shared])


def _nothing_differs(test: PairedTest) -> bool:
    """Two pairs or more, every difference zero: there is no test of that, and no need of one."""
    return test.t_p is None and test.interval is not None and test.mean == 0


def _smaller(points: Sequence[PointSummary], best: PointSummary | None) -> PointSummary | None:
    alike = [point for point in points if point.to_best is not None and point.to_best.alike]
    return min(
        (point for point in alike if best is not None and point.size < best.size),
        key=lambda point: (point.size, *_rank(point)),
        default=None,
    )


def _by_fold(folds: Sequence[str], points: Sequence[PointSummary]) -> tuple[FoldChoice, ...]:
    found = []
    for fold in folds:
        means = [(point, done.mean_ua) for point in points for done in point.folds if done.fold == fold]
        known = [FoldChoice(fold, point, value) for point, value in means if value is not None]
        if known:
            found.append(min(known, key=lambda choice: (-choice.mean_ua, choice.point.size, choice.point.point.label)))
    return tuple(found)


def _correlation(name: str, points: Sequence[PointSummary]) -> RankCorrelation | None:
    known = [point for point in points if point.complete and point.ua.mean is not None and name in point.proxies.of_set]
    return rank_correlation([point.proxies.of_set[name] for point in known], _known(point.ua.mean for point in known))


def _groups(values: Sequence[int], points: Sequence[PointSummary], belongs: Callable[[PointSummary], Sequence[int]]) -> tuple[Group, ...]:
    found = []
    for value in values:
        placed = _known(point.placed_ua for point in points if value in belongs(point))
        found.append(Group(value, len(placed), mean(placed), t_interval(placed)))
    return tuple(found)


def _cost(
    sweep: Sweep,
    trials: Sequence[TrialRecord],
    points: Sequence[PointSummary],
    results: Mapping[str, Result],
    efforts: Mapping[str, Effort],
) -> SweepCost:
    not_given = {point.trial: len(sweep.folds) - len(point.folds) for point in points if point.state is TrialState.stopped}
    needed = [TrialStages(tuple(frozenset(fold.stages) for fold in trial.folds), not_given.get(trial.trial, 0)) for trial in trials]
    return sweep_cost(needed, results, efforts, min([sweep.launched, *(trial.began for trial in trials if trial.began)]))


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def proxies_of(folds: Sequence[FoldRecord]) -> Proxies:
    """Of the folds that a point has done."""
    by_fold = [_of_k(fold) for fold in folds]
    counts = sorted({k for found in by_fold for k in found})
    of_set = {name: _mean(_mean(facts[name] for facts in found.values()) for found in by_fold) for name in OF_K}
    of_set |= {name: _mean(_number(fold.proxies.get(name)) for fold in folds) for name in OF_SET}
    of_k = {k: _mean_of_known({name: _mean(found[k][name] for found in by_fold if k in found) for name in OF_K}) for k in counts}
    return Proxies(_mean_of_known(of_set), of_k)


def _of_k(fold: FoldRecord) -> dict[int, dict[str, float | None]]:
    told = fold.proxies.get("k")
    by_k = told if isinstance(told, Mapping) else {}
    return {int(k): {name: _number(values.get(name)) for name in OF_K} for k, values in by_k.items() if isinstance(values, Mapping)}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _mean(values: Iterable[float | None]) -> float | None:
    return mean([value for value in values if value is not None])


def _mean_of_known(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}
