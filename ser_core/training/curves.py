"""Training curves: part of the checkpoint, written as TensorBoard event files and, thinned, as `curves.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"
FILE = "curves.json"
SCHEMA = 1
MOST_POINTS = 200  # of a curve in `curves.json`

Row = list[Any]  # [step, {name: value}]
References = Mapping[str, tuple[float, str]]  # name of a curve -> a value to compare it with, and what that is


class Curves:
    """Scalars by step, written to `output/tensorboard`.

    Each attempt has its own output folder. A resumed one first writes the rows of earlier attempts (from the checkpoint), so every folder
    holds the whole curve. With `output` None (all processes except the leader) nothing is written.
    """

    def __init__(self, output: Path | None, rows: list[Row]) -> None:
        self.rows = rows
        self._output = output
        self._writer: Any = None
        if output is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(output / FOLDER))
        for step, values in rows:
            self._write(step, values)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Add scalars after `step` steps."""
        self.rows.append([step, values])
        self._write(step, values)

    def publish(self, references: References) -> None:
        """Write `curves.json` at the end of the training: `curves`, name -> at most `MOST_POINTS` pairs of step and value; `references`."""
        if self._output is not None:
            value = {"schema": SCHEMA, "curves": thinned(self.rows), "references": dict(references)}
            (self._output / FILE).write_text(json.dumps(value, sort_keys=True) + "\n", encoding="utf-8")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self._writer is None:
            return
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


def thinned(rows: Sequence[Row], most: int = MOST_POINTS) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) of at most `most` entries of each curve, evenly spaced, the last one among them."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for step, values in rows:
        for name, value in values.items():
            curves.setdefault(name, []).append((step, value))
    return {name: _evenly(points, most) for name, points in curves.items()}


def _evenly(points: list[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    if len(points) <= most:
        return points
    return [points[-1 - len(points) * back // most] for back in range(most - 1, -1, -1)]
