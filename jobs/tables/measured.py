"""Measurements of whole corpora by runs without a score: which are there, and their metrics. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.experiment.graph import Graph
from jobs.store.records import Result


@dataclass(frozen=True)
class Measured:
    """One method on one corpus."""

    corpus: str
    method: str
    name: str  # of its run
    status: str  # as in `jobs.tables.summary.Status`
    metrics: Mapping[str, float] | None  # None: no result yet

    def to_json(self) -> dict[str, Any]:
        metrics = None if self.metrics is None else dict(self.metrics)
        return {"corpus": self.corpus, "method": self.method, "status": self.status, "metrics": metrics}


def measured_of(graph: Graph, results: Mapping[str, Result], states: Mapping[str, str]) -> tuple[Measured, ...]:
    """One per run of a graph that has no score, in the order of the runs; arguments as for `jobs.tables.entries.entries_of`."""
    found = []
    for run in (run for run in graph.runs if run.method in graph.measurements):
        result = results.get(run.key)
        status = "accepted" if result is not None else states.get(run.key, "pending")
        numbers = {} if result is None else {name: value for name, value in result.metrics.items() if isinstance(value, int | float)}
        found.append(Measured(graph.corpus, run.method, run.name, status, None if result is None else numbers))
    return tuple(found)
