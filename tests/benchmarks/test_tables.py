"""Collapsed runs planted in a CSV file: `collect --from` names them, whether the seeds of all folds vary equally or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.tables import SPREADS, measured


@pytest.mark.parametrize("spread", list(SPREADS))
@pytest.mark.parametrize("runs", [75, 300])
def test_planted_runs_are_found(runs: int, spread: str, tmp_path: Path) -> None:
    """All of them, at 5 and at 20 seeds; of the others at most six of a hundred; the mean UA changes by less than 0.3 points."""
    rows, _, _, found, flags, bias = measured(runs, spread, 3, tmp_path)
    planted = max(1, runs // 100)
    assert (rows, found) == (str(runs), f"{planted} of {planted}")
    assert float(flags.removesuffix(" %")) <= 6
    assert abs(float(bias)) < 0.3
