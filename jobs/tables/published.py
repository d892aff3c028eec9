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
    ua: Mapping[str, float]  # fold -> UA; empty if only the mean was published
    sd: Mapping[str, float]  # fold -> sd over seeds; empty if not published
    mean_ua: float  # as published, rounded by its authors


@dataclass(frozen=True)
class SettingsRow:
    """One row of a table by settings."""

    label: str
    methods: tuple[str, ...]  # of the experiment, one per column; "": no method can be there
    ua: tuple[float, ...] = ()  # as published, percent; empty if it was not


@dataclass(frozen=True)
class Ratio:
    """A row of ratios: gain of row `of` over row `base` in percent of the gain of row `to`, all by label."""

    label: str
    base: str
    of: str
    to: str


@dataclass(frozen=True)
class SettingsTable:
    """Which methods of an experiment are the cells of a table by settings."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[SettingsRow, ...]
    ratio: Ratio | None = None


@dataclass(frozen=True)
class PairedMetric:
    """A metric beside the score, in the unit of the score after multiplication."""

    metric: str
    heading: str
    factor: float = 1.0


@dataclass(frozen=True)
class PairedRow:
    """Two methods of an experiment that differ in the setting of the columns alone."""

    label: str
    methods: tuple[str, str]


@dataclass(frozen=True)
class PairedTable:
    """Which methods of an experiment stand side by side under two settings, with their differences."""

    title: str
    columns: tuple[str, str]
    rows: tuple[PairedRow, ...]
    metrics: tuple[PairedMetric, ...] = ()  # beside the score
    notes: tuple[str, ...] = ()  # sentences of the caption


@dataclass(frozen=True)
class MeasuredColumn:
    """A metric of measured corpora, as a column of their table; with a standard error, its 95 % interval (Student's t)."""

    metric: str
    heading: str
    decimals: int = 2
    standard_error: str = ""  # metric with the standard error of `metric`; "": the column has the metric itself
    count: str = ""  # metric with the number of values that the standard error is over


@dataclass(frozen=True)
class MeasuredRow:
    """A corpus in the table of measured corpora, with published values."""

    corpus: str
    label: str
    values: Mapping[str, float] = field(default_factory=dict)  # metric -> value as published


@dataclass(frozen=True)
class MeasuredTable:
    """Which metrics of measured corpora are shown, and what was published for them."""

    title: str
    columns: tuple[MeasuredColumn, ...]
    rows: tuple[MeasuredRow, ...] = ()
    notes: tuple[str, ...] = ()  # sentences of the caption


@dataclass(frozen=True)
class PriorWork:
    """A published result of others."""

    label: str
    features: str
    ua: float  # percent


@dataclass(frozen=True)
class Published:
    """The published part of one table; no rows if nothing was published for an experiment."""

    source: str = ""
    title: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)  # method -> printed name
    columns: Mapping[str, str] = field(default_factory=dict)  # fold -> heading
    rows: tuple[PublishedRow, ...] = ()
    settings: SettingsTable | None = None
    prior_work: tuple[PriorWork, ...] = ()
    measured: MeasuredTable | None = None
    notes: tuple[str, ...] = ()  # sentences of the caption on the published figures
    paired: PairedTable | None = None


def load_published(file: Path, table: str | None) -> Published:
    """The entry `table`, or only the methods' labels if it is None.

    Raises UsageError in one line for an unknown entry and for an entry of another shape.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # that of libyaml, if PyYAML was built with it: ten times as fast
    try:
        loaded = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)  # noqa: S506 - both are safe loaders
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
        settings = _settings(entry["settings"]) if "settings" in entry else None
        prior_work = tuple(PriorWork(str(row["label"]), str(row["features"]), float(row["ua"])) for row in entry.get("prior_work", ()))
        measured = _measured(entry["measured"]) if "measured" in entry else None
        notes = tuple(map(str, entry.get("notes", ())))
        source = str(entry.get("source", source))
        paired = _paired(entry["paired"]) if "paired" in entry else None
        return Published(source, str(entry["title"]), labels, columns, rows, settings, prior_work, measured, notes, paired)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{file}: tables.{table}: {error} (expected title, folds, columns, rows with method, label, ua, mean)") from error


def position(published: float, interval: Interval, digits: int = 1) -> str:
    """Where a published mean lies beside the interval of ours, as printed with so many digits: `inside`, `below` or `above`."""
    value, low, high = (Decimal(round_half_up(each, digits)) for each in (published, *interval))
    return "below" if value < low else "above" if value > high else "inside"


def to_json(published: Published) -> dict[str, Any] | None:
    """JSON values of the published part; None without rows."""
    if not published.rows:
        return None
    return {"source": published.source, "title": published.title, "rows": [asdict(row) for row in published.rows]}


def _row(folds: list[str], row: Any) -> PublishedRow:
    ua = dict(zip(folds, map(float, row["ua"]), strict=True)) if "ua" in row else {}
    sd = dict(zip(folds, map(float, row["sd"]), strict=True)) if "sd" in row else {}
    method = row["method"]
    return PublishedRow(None if method is None else str(method), str(row["label"]), ua, sd, float(row["mean"]))


def _measured(entry: Any) -> MeasuredTable:
    """Raises ValueError for a row with a metric that has no column, and for an interval of a standard error without a count."""
    columns = tuple(
        MeasuredColumn(
            str(each["metric"]),
            str(each["heading"]),
            int(each.get("decimals", 2)),
            str(each.get("standard_error", "")),
            str(each.get("count", "")),
        )
        for each in entry["columns"]
    )
    for column in columns:
        if bool(column.standard_error) != bool(column.count):
            raise ValueError(f"measured: column {column.heading}: an interval is of a standard_error and a count")
    rows = tuple(
        MeasuredRow(str(row["corpus"]), str(row["label"]), {str(name): float(value) for name, value in row.get("values", {}).items()})
        for row in entry.get("rows", ())
    )
    unknown = [name for row in rows for name in row.values if name not in {column.metric for column in columns}]
    if unknown:
        raise ValueError(f"measured: no column for {unknown[0]}")
    return MeasuredTable(str(entry["title"]), columns, rows, tuple(map(str, entry.get("notes", ()))))


def _paired(entry: Any) -> PairedTable:
    """Raises ValueError unless there are two columns, and two methods in each row."""
    columns = tuple(map(str, entry["columns"]))
    rows = tuple((str(row["label"]), tuple(map(str, row["methods"]))) for row in entry["rows"])
    if len(columns) != 2 or any(len(methods) != 2 for _, methods in rows):
        raise ValueError("paired: expected two columns, and two methods in each row")
    metrics = tuple(
        PairedMetric(str(each["metric"]), str(each["heading"]), float(each.get("factor", 1))) for each in entry.get("metrics", ())
    )
    return PairedTable(
        str(entry["title"]),
        (columns[0], columns[1]),
        tuple(PairedRow(label, (methods[0], methods[1])) for label, methods in rows),
        metrics,
        tuple(map(str, entry.get("notes", ()))),
    )


def _settings(entry: Any) -> SettingsTable:
    """Raises ValueError for a row that has not one method or figure per column, and for a ratio of unknown rows."""
    columns = tuple(map(str, entry["columns"]))
    rows = tuple(
        SettingsRow(
            str(row["label"]),
            tuple("" if method is None else str(method) for method in row["methods"]),
            tuple(map(float, row.get("ua", ()))),
        )
        for row in entry["rows"]
    )
    for row in rows:
        if len(row.methods) != len(columns) or len(row.ua) not in (0, len(columns)):
            raise ValueError(f"row {row.label}: expected a method and a figure for each of the columns {', '.join(columns)}")
    ratio = Ratio(**{key: str(value) for key, value in entry["ratio"].items()}) if "ratio" in entry else None
    if ratio is not None and not {ratio.base, ratio.of, ratio.to} <= {row.label for row in rows}:
        raise ValueError(f"ratio: of rows that are not there, {ratio.base}, {ratio.of}, {ratio.to}")
    return SettingsTable(str(entry["title"]), columns, rows, ratio)
