"""A metric of runs beside their score, as tables keep it. Its values are chosen in `jobs.tables.further`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jobs.experiment.recipes import MetricColumn


@dataclass(frozen=True)
class MetricCell:
    """One metric of one method on one fold, with its mean and sd. `runs`: slot, seed and value of each run that counts and has it."""

    fold: str
    mean: float | None
    sd: float | None
    runs: tuple[tuple[int, int, float], ...]


@dataclass(frozen=True)
class FurtherMetric:
    """One metric of one method on one corpus: mean of the cell means, sd over slots of the mean over folds."""

    corpus: str
    method: str
    column: MetricColumn
    mean: float | None
    sd: float | None
    cells: tuple[MetricCell, ...]

    @property
    def n(self) -> int:
        """Runs that count and have it."""
        return sum(len(cell.runs) for cell in self.cells)

    def to_json(self) -> dict[str, Any]:
        cells = [
            {
                "fold": cell.fold,
                "mean": cell.mean,
                "sd": cell.sd,
                "runs": [{"slot": slot, "seed": seed, "value": value} for slot, seed, value in cell.runs],
            }
            for cell in self.cells
        ]
        named = {"corpus": self.corpus, "method": self.method, "metric": self.column.name, "heading": self.column.heading}
        return {**named, "mean": self.mean, "sd": self.sd, "n": self.n, "cells": cells}
