"""The numbers of a sweep, computed from its trials: scores, comparison with the best point, proxies, groups of points, cost. Pure.

Conventions, repeated in every caption: UA in percent, on the validation speakers. The mean of a point is the mean of its fold means; its
sd and 95 % interval are over slots, of the mean over the evaluated folds, as in the tables of a grid: they measure the variance between
fine-tuning seeds. Points are compared with the best over the (fold, slot) pairs that both have, since folds differ more than points.
Only complete points are tested, with Holm's correction: the others were stopped because of the difference that the test asks for.

The mean of a point without all folds cannot be compared with other means. Its *placed* UA is the mean of the best plus its mean
difference to the best over the pairs that both have; that of a complete point is its mean. Proxies (`jobs.experiment.registry`) are
means over the evaluated folds and, for a set, over its cluster counts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jobs.experiment.registry import ProxyColumn
from jobs.experiment.sweep_section import Search
from jobs.statistics import (
    ALPHA,
    Interval,
    PairedTest,
    RankCorrelation,
    holm,
    known,
    mean,
    paired_by_key,
    rank_correlation,
    sd,
    slot_means,
    t_interval,
)
from jobs.store.records import Result
from jobs.sweeps.decisions import TrialState
from jobs.sweeps.records import Sweep
from jobs.sweeps.report.costs import Effort, SweepCost, sweep_cost
from jobs.sweeps.report.scores import FoldRecord, RunRecord, TrialRecord
from jobs.sweeps.space import Point, number_of_points, swept_method
from jobs.tables.summary import CodeFacts, code_facts

LISTED = (TrialState.complete, TrialState.stopped, TrialState.failed, TrialState.running, TrialState.interrupted)


@dataclass(frozen=True)
class Measure:
    """One score of a point, in percent; None with too few runs."""

    mean: float | None  # of the fold means
    sd: float | None  # sample sd over slots, of the mean over folds
    interval: Interval | None  # Student's t over these
    sd_all_runs: float | None  # sample sd over all runs of all folds: mostly the differences between folds


@dataclass(frozen=True)
class FoldSummary:
    """One point on one fold."""

    fold: str
    mean_ua: float | None
    sd_ua: float | None  # over seeds
    runs: tuple[RunRecord, ...]  # by slot
    diverged: int  # number of diverged runs


@dataclass(frozen=True)
class Difference:
    """`this point - the best`, in points of UA."""

    test: PairedTest
    holm_p: float | None = None  # None: not tested
    alike: bool | None = None  # not distinguishable from the best; None: not tested


@dataclass(frozen=True)
class Proxies:
    """Known values by name."""

    of_set: Mapping[str, float]
    of_k: Mapping[int, Mapping[str, float]]  # by cluster count


@dataclass(frozen=True)
class PointSummary:
    """One row of the table."""

    point: Point
    trial: str
    state: TrialState
    error: str  # of a failed trial
    folds: tuple[FoldSummary, ...]  # evaluated, in the order of the sweep
    ua: Measure
    wa: Measure
    macro_f1: Measure
    proxies: Proxies
    to_best: Difference | None = None  # None for the best, without a best, and without common pairs
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
        """Size of a set: its number of counts, then their sum."""
        return len(self.point.counts), sum(self.point.counts)


@dataclass(frozen=True)
class Group:
    """Mean placed UA of points with the same property."""

    value: int  # a cluster count that their sets contain, or the size of their sets
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
    """All numbers of the report of a sweep."""

    sweep: Sweep
    points: tuple[PointSummary, ...]  # complete ones first, the best first among them
    best: PointSummary | None
    smaller: PointSummary | None  # the smallest complete point that is smaller than the best and not distinguishable from it
    by_fold: tuple[FoldChoice, ...]  # of the folds with a result
    correlations: Mapping[str, RankCorrelation | None]  # of each proxy with the UA, over complete points
    by_count: tuple[Group, ...]
    by_size: tuple[Group, ...]
    trials: Mapping[TrialState, int]
    cost: SweepCost
    code: CodeFacts

    @property
    def tested(self) -> int:
        """Number of comparisons that the p-values are corrected for."""
        return sum(point.to_best is not None and point.to_best.holm_p is not None for point in self.points)

    @property
    def diverged(self) -> int:
        return sum(point.diverged for point in self.points)

    @property
    def planned(self) -> int:
        """Number of points of the search."""
        return number_of_points(self.sweep.experiment)

    @property
    def proxy_columns(self) -> Sequence[ProxyColumn]:
        return swept_method(self.sweep.experiment).proxies

    @property
    def under_way(self) -> bool:
        begun = [self.trials.get(state, 0) for state in (TrialState.running, TrialState.interrupted)]
        return not self.points or any(begun) or len(self.points) < self.planned

    @property
    def grid_folds(self) -> tuple[str, ...]:
        """The folds of a grid of the experiment; the sweep may evaluate fewer."""
        return tuple(self.sweep.experiment.folds or self.sweep.corpus.folds)

    @property
    def tests_apart(self) -> bool:
        """Whether no fold tests validation speakers of another fold: they are the same in all folds, or there is one fold."""
        folds = self.sweep.folds
        speakers = {tuple(sorted(self.sweep.validation.get(fold, ()))) for fold in folds}
        return len(speakers) == 1 and (len(folds) > 1 or set(self.grid_folds) <= set(folds))

    @property
    def folds_apart(self) -> bool:
        """Whether the points that a fold can choose from do not depend on validation speakers of other folds."""
        stopped = any(point.state is TrialState.stopped for point in self.points)
        return self.sweep.experiment.sweep.search is not Search.optuna and not stopped


def summarise(
    sweep: Sweep, trials: Sequence[TrialRecord], results: Mapping[str, Result], efforts: Mapping[str, Effort] | None = None
) -> SweepSummary:
    """The numbers of a sweep, finished or not.

    `results` maps stage keys to results, for their provenance and duration; scores are in the records of the trials. `efforts` maps
    stage keys to the time spent on them (default: as the result reports).
    """
    columns = swept_method(sweep.experiment).proxies
    found = [_point(sweep, trial, results, columns) for trial in trials]
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
        correlations={column.name: _correlation(column.name, points) for column in columns},
        by_count=_groups(sorted({k for point in points for k in point.point.counts}), points, lambda point: point.point.counts),
        by_size=_groups(sorted({len(point.point.counts) for point in points}), points, lambda point: (len(point.point.counts),)),
        trials=Counter(point.state for point in points),
        cost=_cost(sweep, trials, found, results, efforts or {}),
        code=code_facts(results[key] for key in sorted(keys) if key in results),
    )


def _point(sweep: Sweep, trial: TrialRecord, results: Mapping[str, Result], columns: Sequence[ProxyColumn]) -> PointSummary:
    records = {record.fold: record for record in trial.folds}
    done = [records[fold] for fold in sweep.folds if fold in records]
    folds = tuple(_fold(record, results) for record in done)
    return PointSummary(
        point=trial.point,
        trial=trial.trial,
        state=trial.state,
        error=trial.error,
        folds=folds,
        ua=_measure([{run.slot: run.ua for run in fold.runs} for fold in folds]),
        wa=_measure([{run.slot: run.wa for run in fold.runs if run.wa is not None} for fold in folds]),
        macro_f1=_measure([{run.slot: run.macro_f1 for run in fold.runs if run.macro_f1 is not None} for fold in folds]),
        proxies=proxies_of(done, columns),
    )


def _fold(record: FoldRecord, results: Mapping[str, Result]) -> FoldSummary:
    runs = tuple(sorted(record.runs, key=lambda run: run.slot))
    values = [run.ua for run in runs]
    diverged = sum(bool(results[key].diverged) for key in record.stages if key in results)
    return FoldSummary(record.fold, mean(values), sd(values), runs, diverged)


def _measure(by_fold: Sequence[Mapping[int, float]]) -> Measure:
    done = [scores for scores in by_fold if scores]
    by_slot = slot_means(done)
    return Measure(
        mean=mean(known(mean(list(scores.values())) for scores in done)),
        sd=sd(by_slot),
        interval=t_interval(by_slot),
        sd_all_runs=sd([value for scores in done for value in scores.values()]),
    )


def _rank(point: PointSummary) -> tuple[float, tuple[int, int], str]:
    """Sort key: best first, the smaller of equal ones first."""
    return -(point.ua.mean if point.ua.mean is not None else float("-inf")), point.size, point.point.label


def _listed(point: PointSummary) -> tuple[int, int, float, tuple[int, int], str]:
    placed = point.placed_ua if point.placed_ua is not None else float("-inf")
    return LISTED.index(point.state), -len(point.folds), -placed, point.size, point.point.label


def _compared(points: Sequence[PointSummary], best: PointSummary | None) -> list[PointSummary]:
    """The points with their differences to the best and their placed UA."""
    if best is None:
        return [replace(point, placed_ua=point.ua.mean) for point in points]
    tests = {point.trial: paired_by_key(_pairs(best), _pairs(point)) for point in points if point is not best}
    tested = [point.trial for point in points if point.complete and point is not best]
    corrected = dict(zip(tested, holm([tests[trial].t_p for trial in tested]), strict=True))
    found = []
    for point in points:
        test = tests.get(point.trial)
        if test is None or not test.pairs or test.mean is None or best.ua.mean is None:
            found.append(replace(point, placed_ua=point.ua.mean if point.complete else None))
            continue
        p = corrected.get(point.trial)
        alike = None if not point.complete else p >= ALPHA if p is not None else True if _all_equal(test) else None
        placed = point.ua.mean if point.complete else best.ua.mean + test.mean
        found.append(replace(point, to_best=Difference(test, p, alike), placed_ua=placed))
    return found


def _pairs(point: PointSummary) -> dict[tuple[str, int], float]:
    """(fold, slot) -> UA."""
    return {(fold.fold, run.slot): run.ua for fold in point.folds for run in fold.runs}


def _all_equal(test: PairedTest) -> bool:
    """Two or more pairs with all differences zero, for which there is no p-value."""
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
        choices = [FoldChoice(fold, point, value) for point, value in means if value is not None]
        if choices:
            found.append(min(choices, key=lambda choice: (-choice.mean_ua, choice.point.size, choice.point.point.label)))
    return tuple(found)


def _correlation(name: str, points: Sequence[PointSummary]) -> RankCorrelation | None:
    usable = [point for point in points if point.complete and point.ua.mean is not None and name in point.proxies.of_set]
    return rank_correlation([point.proxies.of_set[name] for point in usable], known(point.ua.mean for point in usable))


def _groups(values: Sequence[int], points: Sequence[PointSummary], belongs: Callable[[PointSummary], Sequence[int]]) -> tuple[Group, ...]:
    found = []
    for value in values:
        placed = known(point.placed_ua for point in points if value in belongs(point))
        found.append(Group(value, len(placed), mean(placed), t_interval(placed)))
    return tuple(found)


def _cost(
    sweep: Sweep,
    trials: Sequence[TrialRecord],
    points: Sequence[PointSummary],
    results: Mapping[str, Result],
    efforts: Mapping[str, Effort],
) -> SweepCost:
    skipped = {point.trial: len(sweep.folds) - len(point.folds) for point in points if point.state is TrialState.stopped}
    return sweep_cost(trials, skipped, results, efforts, sweep.began)


def remark_of(summary: SweepSummary, point: PointSummary) -> str:
    """Short remark on a point: its state, or how it compares with the best."""
    if not point.complete:
        return point.state.text
    if summary.best is point:
        return "best"
    alike = None if point.to_best is None else point.to_best.alike
    return "not tested" if alike is None else "not distinguishable from the best" if alike else "below the best"


def proxies_of(folds: Sequence[FoldRecord], columns: Sequence[ProxyColumn]) -> Proxies:
    """Means of the proxies over evaluated folds, and for a set over its counts."""
    by_fold = [{int(k): values for k, values in _per_count(fold).items() if isinstance(values, Mapping)} for fold in folds]
    of_set: dict[str, float | None] = {}
    of_k: dict[int, dict[str, float | None]] = {k: {} for k in sorted({k for by_k in by_fold for k in by_k})}
    for column in columns:
        name = column.name
        if column.per_count:
            values = [{k: _number(proxies.get(name)) for k, proxies in by_k.items()} for by_k in by_fold]
            of_set[name] = mean(known(mean(known(of_fold.values())) for of_fold in values))
            for k, proxies in of_k.items():
                proxies[name] = mean(known(of_fold.get(k) for of_fold in values))
        else:
            of_set[name] = mean(known(_number(fold.proxies.get(name)) for fold in folds))
    return Proxies(_without_none(of_set), {k: _without_none(proxies) for k, proxies in of_k.items()})


def _per_count(fold: FoldRecord) -> Mapping[str, Any]:
    found = fold.proxies.get("k")
    return found if isinstance(found, Mapping) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _without_none(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}
