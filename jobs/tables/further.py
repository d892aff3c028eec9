"""Further metrics of runs, beside their score: those that a method's recipe names, over the runs that count. Pure.

As for the score, a method's mean is the mean of its cell means, and its sd is over slots, of the mean over folds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jobs.experiment.graph import Graph
from jobs.experiment.recipes import MetricColumn
from jobs.statistics import known, mean, sd
from jobs.store.records import Result
from jobs.tables.format import csv_text
from jobs.tables.metrics import FurtherMetric, MetricCell
from jobs.tables.summary import MethodSummary, Status, Summary, slot_means

METRIC_COLUMNS = ("corpus", "method", "fold", "slot", "seed", "metric", "value")
RunName = tuple[str, str, str, int, int]  # corpus, method, fold, slot, seed


def metrics_of(graph: Graph, results: Mapping[str, Result], names: Mapping[str, str] | None = None) -> dict[RunName, Mapping[str, Any]]:
    """The metrics in the results of a graph's runs. `names`: method of the graph -> its name in the tables, where they differ."""
    renamed = names or {}
    return {
        (graph.corpus, renamed.get(run.method, run.method), run.fold, run.slot, run.seed): results[run.key].metrics
        for run in (*graph.superseded, *graph.runs)
        if run.key in results
    }


def further_of(summary: Summary, metrics: Mapping[RunName, Mapping[str, Any]]) -> tuple[FurtherMetric, ...]:
    """The metrics that the recipes of a summary name, of its accepted runs. `metrics`: `metrics_of` its runs."""
    columns = {recipe.method: recipe.metrics for recipe in summary.recipes}
    return tuple(_further(method, column, metrics) for method in summary.methods for column in columns.get(method.method, ()))


def _further(method: MethodSummary, column: MetricColumn, metrics: Mapping[RunName, Mapping[str, Any]]) -> FurtherMetric:
    cells, by_fold = [], []
    for cell in method.cells:
        accepted = [entry for entry in cell.runs if entry.status is Status.accepted]
        given = [(each, metrics.get((each.corpus, each.method, each.fold, each.slot, each.seed), {}).get(column.name)) for each in accepted]
        runs = tuple((each.slot, each.seed, float(value)) for each, value in given if isinstance(value, int | float))
        values = [value for *_, value in runs]
        cells.append(MetricCell(cell.fold, mean(values), sd(values), runs))
        by_fold.append({slot: value for slot, _, value in runs})
    of_cells = mean(known(cell.mean for cell in cells))
    return FurtherMetric(method.corpus, method.method, column, of_cells, sd(slot_means(by_fold)), tuple(cells))


def render_metrics_csv(summary: Summary) -> str:
    """One row per run and metric, columns `METRIC_COLUMNS`; numbers are not rounded."""
    return csv_text(METRIC_COLUMNS, _rows(summary))


def _rows(summary: Summary) -> Iterator[tuple[Any, ...]]:
    for each in summary.further:
        for cell in each.cells:
            for slot, seed, value in cell.runs:
                yield each.corpus, each.method, cell.fold, slot, seed, each.column.name, value
