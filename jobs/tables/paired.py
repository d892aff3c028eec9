"""Differences between two methods that differ in one setting, in the score and in metrics beside it. Pure.

An entry of `configs/published.yaml` names the pairs (`paired`). Other tests leave them out where the setting is one that methods must have
in common to be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jobs.statistics import CrossedMean, PairedTest, crossed_mean, differences_by_key, holm, known, mean, paired_by_key, sd, slot_means
from jobs.tables.as_json import interval_json, paired_test_json
from jobs.tables.format import csv_text
from jobs.tables.published import PairedMetric, PairedRow, PairedTable
from jobs.tables.summary import Summary, accepted

Cells = Mapping[str, Mapping[int, float]]  # fold -> slot -> value
PAIRED_COLUMNS = (
    *("corpus", "row", "metric", "first", "second", "mean_first", "sd_first", "mean_second", "sd_second", "difference", "low", "high"),
    *("pairs", "t_p", "t_p_holm", "low_folds_and_seeds", "high_folds_and_seeds", "p_folds_and_seeds", "p_folds_and_seeds_holm"),
)


@dataclass(frozen=True)
class Side:
    """One method: mean of the cell means, and sd over slots of the mean over folds."""

    method: str
    mean: float | None
    sd: float | None


@dataclass(frozen=True)
class PairedDifference:
    """`second - first` of one metric on one corpus, in the unit of the score."""

    corpus: str
    label: str  # of the row
    heading: str  # of the metric
    first: Side
    second: Side
    over_pairs: PairedTest  # (fold, slot) pairs that both have
    crossed: CrossedMean | None  # of the differences, over folds and seeds
    t_p_holm: float | None = None
    crossed_p_holm: float | None = None


def paired_differences(summary: Summary, wanted: PairedTable) -> tuple[PairedDifference, ...]:
    """Row by row: the score, then each metric that one of the two methods has. p-values are corrected for all differences of a corpus."""
    found: list[PairedDifference] = []
    measures = (PairedMetric("", summary.score.label), *wanted.metrics)
    for corpus in dict.fromkeys(method.corpus for method in summary.methods):
        own = [
            _difference(corpus, row, measure.heading, [_cells(summary, corpus, method, measure) for method in row.methods])
            for row in wanted.rows
            for measure in measures
        ]
        there = [each for each in own if each.first.mean is not None or each.second.mean is not None]
        tests = holm([each.over_pairs.t_p for each in there]), holm([each.crossed.p if each.crossed else None for each in there])
        found.extend(replace(each, t_p_holm=t, crossed_p_holm=p) for each, t, p in zip(there, *tests, strict=True))
    return tuple(found)


def paired_json(summary: Summary, wanted: PairedTable | None) -> list[dict[str, Any]] | None:
    """JSON of the differences, not rounded; None if the entry does not ask for them."""
    if wanted is None:
        return None
    return [
        {
            "corpus": each.corpus,
            "row": each.label,
            "metric": each.heading,
            "first": vars(each.first),
            "second": vars(each.second),
            "over_pairs": {**paired_test_json(each.over_pairs), "t_p_holm": each.t_p_holm},
            "over_folds_and_seeds": each.crossed
            and {
                "folds": each.crossed.folds,
                "seeds": each.crossed.seeds,
                "mean_difference": each.crossed.mean,
                "interval_95": interval_json(each.crossed.interval),
                "p": each.crossed.p,
                "p_holm": each.crossed_p_holm,
            },
        }
        for each in paired_differences(summary, wanted)
    ]


def render_paired_csv(summary: Summary, wanted: PairedTable) -> str:
    """One row per difference, columns `PAIRED_COLUMNS`; numbers are not rounded."""
    rows = []
    for each in paired_differences(summary, wanted):
        first, second, test = each.first, each.second, each.over_pairs
        both = (None, None, None) if each.crossed is None else (*each.crossed.interval, each.crossed.p)
        means = (first.mean, first.sd, second.mean, second.sd, test.mean, *(test.interval or (None, None)))
        tests = (test.pairs, test.t_p, each.t_p_holm, *both, each.crossed_p_holm)
        rows.append((each.corpus, each.label, each.heading, first.method, second.method, *means, *tests))
    return csv_text(PAIRED_COLUMNS, rows)


def _cells(summary: Summary, corpus: str, method: str, wanted: PairedMetric) -> Cells:
    """Values of the accepted runs; a metric without a name is the score."""
    if not wanted.metric:
        cells = [cell for each in summary.methods if (each.corpus, each.method) == (corpus, method) for cell in each.cells]
        return {cell.fold: accepted(cell.runs) for cell in cells}
    return {
        cell.fold: {slot: wanted.factor * value for slot, value in cell.by_slot.items()}
        for each in summary.further
        if (each.corpus, each.method, each.column.name) == (corpus, method, wanted.metric)
        for cell in each.cells
    }


def _difference(corpus: str, row: PairedRow, heading: str, cells: list[Cells]) -> PairedDifference:
    sides = [
        Side(method, mean(known(mean(list(slots.values())) for slots in own.values())), sd(slot_means([*own.values()])))
        for method, own in zip(row.methods, cells, strict=True)
    ]
    first, second = ({(fold, slot): value for fold, slots in own.items() for slot, value in slots.items()} for own in cells)
    differences = [differences_by_key(slots, cells[1][fold]) for fold, slots in cells[0].items() if fold in cells[1]]
    crossed = crossed_mean(list(filter(None, differences)))
    return PairedDifference(corpus, row.label, heading, sides[0], sides[1], paired_by_key(first, second), crossed)
