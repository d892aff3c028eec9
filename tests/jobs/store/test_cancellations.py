"""What the user cancelled: final until the next launch, also where the record was damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.errors import UsageError
from jobs.store.cancellations import Cancelled, last_cancellation, read_cancellations, record_cancellation
from jobs.store.layout import Layout


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path, "exp")


def test_nothing_was_cancelled_where_there_is_no_record(layout: Layout) -> None:
    """Reading does not create one."""
    assert read_cancellations(layout, 0.0) == Cancelled()
    assert not layout.folder.exists()


def test_cancellations_add_up(layout: Layout) -> None:
    """Some stages, then others; then everything."""
    record_cancellation(layout, ["b", "a"], 10.0)
    record_cancellation(layout, {"c"}, 11.0)
    found = read_cancellations(layout, 0.0)
    assert last_cancellation(layout) == 11.0
    assert found.keys == {"a", "b", "c"}
    assert "a" in found
    assert "d" not in found
    record_cancellation(layout, None, 12.0)
    assert "d" in read_cancellations(layout, 0.0)


def test_an_empty_cancellation_is_not_everything(layout: Layout) -> None:
    """No stage is no stage."""
    record_cancellation(layout, [], 10.0)
    assert read_cancellations(layout, 0.0) == Cancelled()


@pytest.mark.parametrize(("since", "keys"), [(10.0, {"a", "b"}), (10.5, {"b"}), (12.0, set())])
def test_launching_again_lifts_what_was_cancelled_before(layout: Layout, since: float, keys: set[str]) -> None:
    """A cancellation at the very moment of the launch holds."""
    record_cancellation(layout, ["a"], 10.0)
    record_cancellation(layout, ["b"], 11.0)
    assert read_cancellations(layout, since).keys == keys


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"schema": 1, "cancelled": [{"time"',
        '{"schema": 2, "cancelled": []}',
        '{"schema": 1}',
        '{"schema": 1, "cancelled": [{"time": "soon", "keys": null}]}',
        '{"schema": 1, "cancelled": [{"time": 5, "keys": "abc"}]}',
    ],
)
def test_a_damaged_record_is_an_error(layout: Layout, text: str) -> None:
    """One line that names the file; nothing is overwritten."""
    layout.folder.mkdir()
    layout.cancellations.write_text(text)
    with pytest.raises(UsageError, match=r"cancelled\.json: damaged"):
        read_cancellations(layout, 0.0)
    with pytest.raises(UsageError):
        record_cancellation(layout, ["a"], 10.0)
    assert layout.cancellations.read_text() == text
