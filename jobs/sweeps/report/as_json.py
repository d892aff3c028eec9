"""JSON of a sweep (schema 1): keys are added, never removed or renamed. UA in percent, not rounded. Pure."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from jobs.sweeps.decisions import TrialState
from jobs.sweeps.report.choice import Choice
from jobs.sweeps.report.costs import SweepCost
from jobs.sweeps.report.summary import FoldSummary, Group, Measure, PointSummary, SweepSummary, remark_of
from jobs.sweeps.space import overrides_of
from jobs.tables.as_json import interval_json, paired_test_json, picked

SCHEMA = 1


def to_json(summary: SweepSummary, choice: Choice) -> dict[str, Any]:
    """All numbers of a report."""
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
        **picked(summary, "under_way", "planned", "diverged"),
        "compared": summary.tested,
        "trials": {state.value: summary.trials.get(state, 0) for state in TrialState},
        "points": [point_json(summary, point) for point in summary.points],
        "best": None if summary.best is None else summary.best.point.label,
        "smaller": None if summary.smaller is None else summary.smaller.point.label,
        "by_fold": [
            {"fold": found.fold, "point": found.point.point.label, "mean_ua": found.mean_ua, "counts": list(found.point.point.counts)}
            for found in summary.by_fold
        ],
        "by_count": [{"k": group.value, **_group(group)} for group in summary.by_count],
        "by_size": [{"size": group.value, **_group(group)} for group in summary.by_size],
        "proxies": {name: None if found is None else asdict(found) for name, found in summary.correlations.items()},
        "cost": _cost(summary.cost),
        "choice": {
            "grid": choice.grid or None,
            "smaller": choice.smaller or None,
            "by_fold": [{"fold": found.fold, "grid": command} for found, command in choice.by_fold],
            "collect": choice.collect or None,
            "caveats": list(choice.caveats),
        },
        "code": summary.code.to_json(),
    }


def point_json(summary: SweepSummary, point: PointSummary) -> dict[str, Any]:
    """All numbers of one point."""
    return {
        **point.point.to_json(),
        **picked(point, "trial", "error", "placed_ua", "runs", "diverged"),
        "point": point.point.label,
        "overrides": list(overrides_of(summary.sweep.experiment, point.point)),
        "state": point.state.value,
        "remark": remark_of(summary, point),
        **_measure("ua", point.ua),
        **_measure("wa", point.wa),
        **_measure("macro_f1", point.macro_f1),
        "folds": [_fold(fold) for fold in point.folds],
        "to_best": _difference(point),
        "proxies": {**point.proxies.of_set, "k": {str(k): dict(values) for k, values in point.proxies.of_k.items()}},
    }


def _fold(fold: FoldSummary) -> dict[str, Any]:
    runs = [picked(run, "slot", "seed", "key", "ua", "wa", "macro_f1") for run in fold.runs]
    return {**picked(fold, "fold", "mean_ua", "sd_ua", "diverged"), "runs": runs}


def _measure(name: str, measure: Measure) -> dict[str, Any]:
    return {
        f"mean_{name}": measure.mean,
        f"sd_{name}": measure.sd,
        f"sd_{name}_all_runs": measure.sd_all_runs,
        f"interval_95_{name}": interval_json(measure.interval),
    }


def _difference(point: PointSummary) -> dict[str, Any] | None:
    if point.to_best is None:
        return None
    return {
        **paired_test_json(point.to_best.test),
        **({} if point.complete else {"t_p": None, "wilcoxon_p": None}),
        "holm_p": point.to_best.holm_p,
        "distinguishable": None if point.to_best.alike is None else not point.to_best.alike,
    }


def _group(group: Group) -> dict[str, Any]:
    return {**picked(group, "points", "mean_ua"), "interval_95": interval_json(group.interval)}


def _cost(cost: SweepCost) -> dict[str, Any]:
    hours = {
        "spent": cost.spent,
        "unshared": cost.unshared,
        "saved_by_sharing": cost.saved_within + cost.saved_before,
        "saved_within": cost.saved_within,
        "saved_before": cost.saved_before,
        "saved_stopping_estimate": cost.saved_stopping,
    }
    by_name = {name: {"gpu_hours": each.gpu, "cpu_hours": each.cpu} for name, each in hours.items()}
    return {**by_name, **picked(cost, "stages", "stages_before", "stages_unknown")}
