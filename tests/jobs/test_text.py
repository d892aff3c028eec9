"""Numbers in words."""

from __future__ import annotations

import pytest

from jobs.text import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4 s"), (12.4, "12 s"), (59.6, "60 s"), (61.0, "1 min 1 s"), (200.0, "3 min 20 s"), (18120.0, "5 h 2 min")],
)
def test_durations_in_words(seconds: float, text: str) -> None:
    """Two units at most."""
    assert duration(seconds) == text
