"""A metric of runs beside their score, and its mean and spread. Pure.

As for the score, a method's mean is the mean of its cell means, and its sd is over slots, of the mean over folds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jobs.experiment.recipes import MetricColumn
from jobs.statistics import known, mean, sd, slot_means


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
