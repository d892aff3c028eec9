"""Which further metrics runs have beside their score: those that a method's recipe names, of the runs that count. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jobs.experiment.graph import Graph
from jobs.store.records import Result
from jobs.tables.format import csv_text
from jobs.tables.metrics import FurtherMetric, MetricCell
from jobs.tables.summary import Status, Summary

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
    """The metrics that the recipes of a summary name, of its accepted runs, without metrics that no run has.

    `metrics`: `metrics_of` its runs.
    """
    columns = {recipe.method: recipe.metrics for recipe in summary.recipes}
    found = []
    for method in summary.methods:
        for column in columns.get(method.method, ()):
            cells = []
            for cell in method.cells:
                accepted = [entry for entry in cell.runs if entry.status is Status.accepted]
                names = [(entry.corpus, entry.method, entry.fold, entry.slot, entry.seed) for entry in accepted]
                values = [(name[3], name[4], metrics.get(name, {}).get(column.name)) for name in names]
                cells.append(MetricCell(cell.fold, tuple((s, seed, float(v)) for s, seed, v in values if isinstance(v, int | float))))
            found.append(FurtherMetric(method.corpus, method.method, column, tuple(cells)))
    measured = {each.column for each in found if each.n}
    return tuple(each for each in found if each.column in measured)


def render_metrics_csv(summary: Summary) -> str:
    """One row per run and metric, columns `METRIC_COLUMNS`; numbers are not rounded."""
    return csv_text(METRIC_COLUMNS, _rows(summary))


def _rows(summary: Summary) -> Iterator[tuple[Any, ...]]:
    for each in summary.further:
        for cell in each.cells:
            for slot, seed, value in cell.runs:
                yield each.corpus, each.method, cell.fold, slot, seed, each.column.name, value
