"""The JSON of the numbers of an experiment, `summary.json`. Pure."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from jobs.experiment.recipes import MethodRecipe
from jobs.statistics import CrossedMean, Interval, PairedTest
from jobs.store.scores import UNWEIGHTED
from jobs.tables.adaptation import Adapted, adaptations_of
from jobs.tables.summary import VERDICT, CellSummary, Comparison, Entry, MethodSummary, Summary, verdict_values

SCHEMA = 1


def to_json(summary: Summary, published: object = None) -> dict[str, Any]:
    """JSON of an experiment (schema 1): keys are added, never removed or renamed. Numbers are not rounded.

    Keys with `ua` have the name of the score instead where the registry has another one than UA.
    """
    value = _to_json(summary, published)
    if summary.score == UNWEIGHTED:
        return value
    return {"score": asdict(summary.score), **summary.score.renamed(value)}


def _to_json(summary: Summary, published: object) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        **picked(summary, "experiment", "complete"),
        "methods": [_method_json(method) for method in summary.methods],
        "comparisons": [_comparison_json(comparison) for comparison in summary.comparisons],
        "measured": [each.to_json() for each in summary.measured],
        "outlier_rule": summary.outlier_rule,
        "unreplaced": summary.unreplaced.value,
        **({"adaptations": [adaptation_json(each) for each in adapted]} if (adapted := adaptations_of(summary)) else {}),
        **({"further_metrics": [each.to_json() for each in summary.further]} if summary.further else {}),
        "recipes": [_recipe_json(recipe) for recipe in summary.recipes],
        "code": summary.code.to_json(),
        "arithmetic": summary.arithmetic.to_json(),
        "published": published,
        "corpus_captions": {corpus: list(sentences) for corpus, sentences in summary.corpus_captions.items()},
    }


def interval_json(interval: Interval | None) -> list[float] | None:
    """`[low, high]`."""
    return None if interval is None else list(interval)


def picked(value: object, *names: str) -> dict[str, Any]:
    """Attributes of an object by name, for its JSON."""
    return {name: getattr(value, name) for name in names}


def _recipe_json(recipe: MethodRecipe) -> dict[str, Any]:
    found = asdict(recipe)
    for name in ("metrics", "adaptation"):
        if not found[name]:
            del found[name]
    return found


def _method_json(method: MethodSummary) -> dict[str, Any]:
    return {
        **picked(method, "method", "corpus", "mean_ua", "sd_ua", "mean_ua_all_runs", "n", "dropped", "rerun", "unresolved"),
        "cells": [_cell_json(cell) for cell in method.cells],
        **picked(method, "complete", "sd_ua_all_runs"),
        "interval_95": interval_json(method.interval),
        "over_folds_and_seeds": None if method.crossed is None else _method_crossed_json(method.crossed),
        "outliers": {"dropped": method.outliers.runs, "rerun": method.outliers.rerun},
        "diverged": {"dropped": method.diverged.runs, "rerun": method.diverged.rerun},
        "size": None if method.size is None else method.size.to_json(),
    }


def _cell_json(cell: CellSummary) -> dict[str, Any]:
    return {
        **picked(cell, "fold", "mean_ua", "sd_ua"),
        "runs": [_run_json(entry) for entry in cell.runs],
        **picked(cell, "n", "dropped", "slots", "complete", "mean_ua_all_runs", "sd_ua_all_runs"),
        "interval_95": interval_json(cell.interval),
    }


def _run_json(entry: Entry) -> dict[str, Any]:
    scores = {"ua": None, "wa": None, "macro_f1": None} if entry.scores is None else asdict(entry.scores)
    verdict = dict(zip(VERDICT, verdict_values(entry), strict=True))
    return {**picked(entry, "slot", "seed"), **scores, "status": entry.status.value, **verdict}


def adaptation_json(adapted: Adapted) -> dict[str, Any]:
    """Score of one method before and after its adaptation, and the paired differences."""
    return {
        **picked(adapted, "source", "corpus", "method"),
        "mean_ua_before": adapted.mean_before,
        "mean_ua_after": adapted.mean_after,
        "difference": _comparison_json(adapted.difference),
    }


def _comparison_json(comparison: Comparison) -> dict[str, Any]:
    corrected, crossed = comparison.corrected, comparison.crossed
    return {
        **picked(comparison, "corpus", "first", "second"),
        "over_pairs": {
            **paired_test_json(comparison.over_pairs),
            "t_p_holm": corrected.pairs_t,
            "wilcoxon_p_holm": corrected.pairs_wilcoxon,
        },
        "over_folds": {**paired_test_json(comparison.over_folds), "t_p_holm": corrected.folds_t},
        "over_folds_and_seeds": None
        if crossed is None
        else {
            **picked(crossed, "folds", "seeds", "p"),
            "p_holm": corrected.crossed,
            "mean_difference": crossed.mean,
            "interval_95": interval_json(crossed.interval),
            "degrees_of_freedom": crossed.degrees,
            "detectable_difference": crossed.detectable,
        },
    }


def _method_crossed_json(crossed: CrossedMean) -> dict[str, Any]:
    shares = None if crossed.shares is None else asdict(crossed.shares)
    interval = interval_json(crossed.interval)
    return {**picked(crossed, "folds", "seeds"), "interval_95": interval, "degrees_of_freedom": crossed.degrees, "variance_shares": shares}


def paired_test_json(test: PairedTest) -> dict[str, Any]:
    """Paired differences and their uncorrected p-values."""
    return {**picked(test, "pairs", "t_p", "wilcoxon_p"), "mean_difference": test.mean, "interval_95": interval_json(test.interval)}
