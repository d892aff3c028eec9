"""Training curves: part of the checkpoint, written as TensorBoard event files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = "tensorboard"

Row = list[Any]  # [step, {name: value}]


class Curves:
    """Scalars by step, written to `output/tensorboard`.

    Each attempt has its own output folder. A resumed one first writes the rows of earlier attempts (from the checkpoint), so every folder
    holds the whole curve. With `output` None (all processes except the leader) nothing is written.
    """

    def __init__(self, output: Path | None, rows: list[Row]) -> None:
        self.rows = rows
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

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self._writer is None:
            return
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
