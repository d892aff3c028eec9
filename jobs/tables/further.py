"""Further metrics of runs, beside their score: those that a method's recipe names, over the runs that count. Pure.

As for the score, a method's mean is the mean of its cell means, and its sd is over slots, of the mean over folds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.experiment.graph import Graph
from jobs.experiment.recipes import MetricColumn
from jobs.statistics import known, mean, sd
from jobs.store.records import Result
from jobs.tables.format import csv_text
from jobs.tables.summary import Status, Summary, slot_means

METRIC_COLUMNS = ("corpus", "method", "fold", "slot", "seed", "metric", "value")
RunName = tuple[str, str, str, int, int]  # corpus, method, fold, slot, seed


@dataclass(frozen=True)
class MetricCell:
    """One metric of one method on one fold. `runs`: slot, seed and value of each run that counts and has it."""

    fold: str
    runs: tuple[tuple[int, int, float], ...]

    @property
    def by_slot(self) -> dict[int, float]:
        return {slot: value for slot, _, value in self.runs}


@dataclass(frozen=True)
class FurtherMetric:
    """One metric of one method on one corpus."""

    corpus: str
    method: str
    column: MetricColumn
    cells: tuple[MetricCell, ...]

    @property
    def mean(self) -> float | None:
        return mean(known(mean(list(cell.by_slot.values())) for cell in self.cells))

    @property
    def sd(self) -> float | None:
        return sd(slot_means([cell.by_slot for cell in self.cells]))

    @property
    def n(self) -> int:
        return sum(len(cell.runs) for cell in self.cells)

    def to_json(self) -> dict[str, Any]:
        cells = [
            {
                "fold": cell.fold,
                "mean": mean(list(cell.by_slot.values())),
                "sd": sd(list(cell.by_slot.values())),
                "runs": [{"slot": slot, "seed": seed, "value": value} for slot, seed, value in cell.runs],
            }
            for cell in self.cells
        ]
        named = {"corpus": self.corpus, "method": self.method, "metric": self.column.name, "heading": self.column.heading}
        return {**named, "mean": self.mean, "sd": self.sd, "n": self.n, "cells": cells}


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
    return tuple(found)


def render_metrics_csv(summary: Summary) -> str:
    """One row per run and metric, columns `METRIC_COLUMNS`; numbers are not rounded."""
    return csv_text(METRIC_COLUMNS, _rows(summary))


def _rows(summary: Summary) -> Iterator[tuple[Any, ...]]:
    for each in summary.further:
        for cell in each.cells:
            for slot, seed, value in cell.runs:
                yield each.corpus, each.method, cell.fold, slot, seed, each.column.name, value
