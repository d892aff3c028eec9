"""The stable JSON of a sweep (schema 1): keys are only ever added. UA in percent, nothing rounded. Pure."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from jobs.statistics import Interval
from jobs.sweeps.records import TrialState
from jobs.sweeps.report.choice import Choice
from jobs.sweeps.report.costs import Hours
from jobs.sweeps.report.summary import FoldSummary, Group, Measure, PointSummary, SweepSummary
from jobs.sweeps.report.tables import remark_of

SCHEMA = 1


def to_json(summary: SweepSummary, choice: Choice) -> dict[str, Any]:
    """Everything that a report says of a sweep."""
    sweep, settings = summary.sweep, summary.sweep.experiment.sweep
    return {
        "schema": SCHEMA,
        "experiment": sweep.experiment.name,
        "corpus": sweep.corpus.name,
        "sweep": sweep.digest,
        "search": settings.search.name,
        "stopping": settings.stopping.name,
        "seeds": settings.seeds,
        "folds": list(sweep.folds),
        "validation": {fold: list(sweep.validation.get(fold, ())) for fold in sweep.folds},
        "launched": sweep.launched,
        "under_way": summary.under_way,
        "planned": summary.planned,
        "compared": summary.tested,
        "trials": {state.value: summary.trials.get(state, 0) for state in TrialState},
        "diverged": summary.diverged,
        "points": [_point(summary, point) for point in summary.points],
        "best": None if summary.best is None else summary.best.point.label,
        "smaller": None if summary.smaller is None else summary.smaller.point.label,
        "by_fold": [
            {"fold": found.fold, "point": found.point.point.label, "mean_ua": found.mean_ua, "counts": list(found.point.point.counts)}
            for found in summary.by_fold
        ],
        "by_count": [{"k": group.value, **_group(group)} for group in summary.by_count],
        "by_size": [{"size": group.value, **_group(group)} for group in summary.by_size],
        "proxies": {name: None if found is None else asdict(found) for name, found in summary.correlations.items()},
        "cost": _cost(summary),
        "choice": {
            "grid": choice.grid or None,
            "smaller": choice.smaller or None,
            "by_fold": [{"fold": found.fold, "grid": command} for found, command in choice.by_fold],
            "collect": choice.collect or None,
            "caveats": list(choice.caveats),
        },
        "code": {
            "commits": list(summary.code.commits),
            "modified": summary.code.modified,
            "packages": {name: list(versions) for name, versions in summary.code.packages.items()},
        },
    }


def _point(summary: SweepSummary, point: PointSummary) -> dict[str, Any]:
    return {
        "point": point.point.label,
        "counts": list(point.point.counts),
        "settings": dict(point.point.settings),
        "overrides": list(point.point.overrides),
        "trial": point.trial,
        "state": point.state.value,
        "error": point.error,
        "remark": remark_of(summary, point),
        **_measure("ua", point.ua),
        **_measure("wa", point.wa),
        **_measure("macro_f1", point.macro_f1),
        "placed_ua": point.placed_ua,
        "runs": point.runs,
        "diverged": point.diverged,
        "folds": [_fold(fold) for fold in point.folds],
        "to_best": _difference(point),
        "proxies": {**point.proxies.of_set, "k": {str(k): dict(values) for k, values in point.proxies.of_k.items()}},
    }


def _fold(fold: FoldSummary) -> dict[str, Any]:
    runs = [{"slot": run.slot, "seed": run.seed, "key": run.key, "ua": run.ua, "wa": run.wa, "macro_f1": run.macro_f1} for run in fold.runs]
    return {"fold": fold.fold, "mean_ua": fold.mean_ua, "sd_ua": fold.sd_ua, "diverged": fold.diverged, "runs": runs}


def _measure(name: str, measure: Measure) -> dict[str, Any]:
    return {
        f"mean_{name}": measure.mean,
        f"sd_{name}": measure.sd,
        f"sd_{name}_all_runs": measure.sd_all_runs,
        f"interval_95_{name}": _interval(measure.interval),
    }


def _difference(point: PointSummary) -> dict[str, Any] | None:
    if point.to_best is None:
        return None
    test = point.to_best.test
    return {
        "pairs": test.pairs,
        "mean_difference": test.mean,
        "interval_95": _interval(test.interval),
        "t_p": test.t_p if point.complete else None,
        "wilcoxon_p": test.wilcoxon_p if point.complete else None,
        "holm_p": point.to_best.holm_p,
        "distinguishable": None if point.to_best.alike is None else not point.to_best.alike,
    }


def _group(group: Group) -> dict[str, Any]:
    return {"points": group.points, "mean_ua": group.mean_ua, "interval_95": _interval(group.interval)}


def _cost(summary: SweepSummary) -> dict[str, Any]:
    cost = summary.cost
    return {
        "spent": _hours(cost.spent),
        "unshared": _hours(cost.unshared),
        "saved_by_sharing": _hours(cost.saved_within + cost.saved_before),
        "saved_within": _hours(cost.saved_within),
        "saved_before": _hours(cost.saved_before),
        "saved_stopping_estimate": _hours(cost.saved_stopping),
        "stages": cost.stages,
        "stages_before": cost.stages_before,
        "stages_unknown": cost.stages_unknown,
    }


def _hours(hours: Hours) -> dict[str, float]:
    return {"gpu_hours": hours.gpu, "cpu_hours": hours.cpu}


def _interval(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]
