from __future__ import annotations

import json
from pathlib import Path

import pytest

from ser_core.training.schedule import constant, warmup_flat_linear

GOLDEN = Path(__file__).parents[1] / "golden" / "schedules.json"


@pytest.mark.parametrize("stage", ["tapt", "ptapt", "states"])
def test_the_factor_is_that_of_the_authors_code(stage: str) -> None:
    """Values of the authors' schedule (see golden/README.md), at its corner points and between them."""
    golden = json.loads(GOLDEN.read_text())[f"schedule_{stage}"]
    schedule = warmup_flat_linear(golden["steps"], golden["warmup_steps"], int(golden["flat_fraction"] * golden["steps"]))
    for step, factor in golden["factors"].items():
        assert schedule(int(step)) == pytest.approx(factor, rel=1e-9, abs=1e-15)


def test_short_schedules_have_no_division_by_zero() -> None:
    """No warm-up, no decay, or more warm-up than steps."""
    assert warmup_flat_linear(10, 0, 0)(0) == 1.0
    assert warmup_flat_linear(10, 0, 10)(9) == 1.0
    assert [warmup_flat_linear(2, 4, 0)(step) for step in (0, 1)] == [0.0, 0.25]
    assert constant()(10**6) == 1.0
