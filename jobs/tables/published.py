"""Published results from `configs/published.yaml`, printed below ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from jobs.errors import UsageError
from jobs.statistics import Interval, round_half_up
from jobs.text import did_you_mean, one_line


@dataclass(frozen=True)
class PublishedRow:
    """One row of a published table, percent."""

    method: str | None  # None: not one of the methods, for example human listeners
    label: str
    ua: Mapping[str, float]  # fold -> UA
    sd: Mapping[str, float]  # fold -> sd over seeds; empty if not published
    mean_ua: float  # as published, rounded by its authors


@dataclass(frozen=True)
class Published:
    """The published part of one table; no rows if nothing was published for an experiment."""

    source: str = ""
    title: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)  # method -> printed name
    columns: Mapping[str, str] = field(default_factory=dict)  # fold -> heading
    rows: tuple[PublishedRow, ...] = ()


def load_published(file: Path, table: str | None) -> Published:
    """The entry `table`, or only the methods' labels if it is None.

    Raises UsageError in one line for an unknown entry and for an entry of another shape.
    """
    import yaml

    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{file}: {one_line(error)}") from error
    try:
        labels = {str(method): str(label) for method, label in loaded["methods"].items()}
        source = str(loaded["source"])
        tables = dict(loaded["tables"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{file}: expected the keys source, methods and tables") from error
    if table is None:
        return Published(labels=labels)
    if table not in tables:
        hint = did_you_mean(table, tables)
        raise UsageError(f"table {table!r} is not in {file} (known: {', '.join(tables)}){hint and f': {hint}'}")
    try:
        entry = tables[table]
        folds = [str(fold) for fold in entry["folds"]]
        columns = dict(zip(folds, map(str, entry["columns"]), strict=True))
        rows = tuple(_row(folds, row) for row in entry["rows"])
        return Published(source, str(entry["title"]), labels, columns, rows)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{file}: tables.{table}: {error} (expected title, folds, columns, rows with method, label, ua, mean)") from error


def position(published: float, interval: Interval) -> str:
    """Where a published mean lies beside the interval of ours, as printed: `inside`, `below` or `above`."""
    value, low, high = (Decimal(round_half_up(each)) for each in (published, *interval))
    return "below" if value < low else "above" if value > high else "inside"


def to_json(published: Published) -> dict[str, Any] | None:
    """JSON values of the published part; None without rows."""
    if not published.rows:
        return None
    return {"source": published.source, "title": published.title, "rows": [asdict(row) for row in published.rows]}


def _row(folds: list[str], row: Any) -> PublishedRow:
    ua = dict(zip(folds, map(float, row["ua"]), strict=True))
    sd = dict(zip(folds, map(float, row["sd"]), strict=True)) if "sd" in row else {}
    method = row["method"]
    return PublishedRow(None if method is None else str(method), str(row["label"]), ua, sd, float(row["mean"]))
