"""Tables of an experiment beside the one of methods and folds: methods by settings, prior work, further metrics, measured corpora. Pure.

An entry of `configs/published.yaml` asks for them; measured corpora have a table without one too. `settings` puts methods of the
experiment, each with settings of its own, into the cells of a table of methods and columns, with one row of ratios. `prior_work` lists
published results, ours among them. `measured` chooses the metrics of measured corpora.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from jobs.experiment.recipes import MetricColumn
from jobs.statistics import round_half_up
from jobs.tables.format import DASH, code_sentence, interval_text
from jobs.tables.measured import Measured
from jobs.tables.metrics import FurtherMetric
from jobs.tables.published import MeasuredColumn, MeasuredTable, Published, Ratio, SettingsTable, position
from jobs.tables.summary import MethodSummary, Summary


@dataclass(frozen=True)
class PlainTable:
    """A table of texts; each format escapes them."""

    name: str  # part of its file's name and label
    caption: tuple[str, ...]  # sentences
    columns: tuple[str, ...]
    blocks: tuple[tuple[tuple[str, ...], ...], ...]  # rows, in groups that a line divides


def plain_tables(summary: Summary, published: Published) -> tuple[PlainTable, ...]:
    """The tables that the published entry asks for, and those of further metrics and of measured corpora."""
    tables = (
        _by_settings(summary, published),
        _prior_work(summary, published),
        _further(summary, published),
        _measured(summary, published),
    )
    return tuple(table for table in tables if table is not None)


def ratio(base: float | None, of: float | None, to: float | None) -> float | None:
    """Gain of `of` over `base` in percent of the gain of `to`, exact in decimal; None where one is not known or `to` has no gain."""
    if base is None or of is None or to is None:
        return None
    exact = [Fraction(repr(float(value))) for value in (base, of, to)]
    gain = exact[2] - exact[0]
    return float(100 * (exact[1] - exact[0]) / gain) if gain > 0 else None


def settings_json(summary: Summary, published: Published) -> dict[str, Any] | None:
    """Means and ratios by setting, not rounded; None if the entry does not ask for them."""
    wanted = published.settings
    if wanted is None:
        return None
    means = _means(summary)
    rows = {row.label: [means.get(method) for method in row.methods] for row in wanted.rows}
    ratios = None if wanted.ratio is None else _ratios(wanted.ratio, rows)
    return {"columns": list(wanted.columns), "mean_ua": rows, "ratio": ratios}


def _by_settings(summary: Summary, published: Published) -> PlainTable | None:
    wanted = published.settings
    if wanted is None:
        return None
    found = {method.method: method for method in summary.methods}
    ours = [(row.label, *(_cell(found.get(method)) for method in row.methods)) for row in wanted.rows]
    theirs = [(f"{row.label}, published", *(_number(value) for value in row.ua)) for row in wanted.rows if row.ua]
    sentences = [
        f"{wanted.title}: mean ± sd over slots, n runs of each cell.",
        "All stages of a run train on the same part of the training utterances; smaller parts are parts of larger ones.",
        "Dropped runs, and mean and sd over all runs, are in the table of methods.",
    ]
    if wanted.ratio is not None:
        means = _means(summary)
        values = _ratios(wanted.ratio, {row.label: [means.get(method) for method in row.methods] for row in wanted.rows})
        ours.append((wanted.ratio.label, *map(_percent, values)))
        of, to, base = wanted.ratio.of, wanted.ratio.to, wanted.ratio.base
        what = f"gain of {of} over {base} in percent of the gain of {to}, from unrounded means; – where {to} has no gain"
        sentences.append(f"{wanted.ratio.label}: {what}.")
        published_ua = {row.label: list(row.ua) for row in wanted.rows}
        if theirs:
            theirs.append((f"{wanted.ratio.label}, published", *map(_percent, _ratios(wanted.ratio, published_ua))))
    if theirs:
        sentences.append(f"Published figures: {published.source}.")
        sentences.extend(_beside_published(wanted, found))
    blocks = tuple(tuple(rows) for rows in (ours, theirs) if rows)
    return PlainTable("settings", tuple(sentences), ("", *wanted.columns), blocks)


def _beside_published(wanted: SettingsTable, found: Mapping[str, MethodSummary]) -> tuple[str, ...]:
    """Where each published figure lies beside our interval over seeds."""
    places = []
    for row in wanted.rows:
        own = [
            f"{column} {position(value, interval)}"
            for column, method, value in zip(wanted.columns, row.methods, row.ua, strict=False)
            if method in found and (interval := found[method].interval) is not None
        ]
        places.extend([f"{row.label} {', '.join(own)}"] if own else [])
    what = "A published figure lies inside, below or above our 95 % interval over seeds (no test: it has no spread)"
    return (f"{what}: {'; '.join(places)}.",) if places else ()


def _prior_work(summary: Summary, published: Published) -> PlainTable | None:
    if not published.prior_work:
        return None
    rows = [(work.label, work.features, round_half_up(work.ua), DASH) for work in published.prior_work]
    ours = [
        (_label(method, published), "this experiment", _cell(method), interval_text(method.crossed.interval if method.crossed else None))
        for method in summary.methods
    ]
    caption = (
        "Unweighted accuracy (UA, %) beside prior work; the interval is that over folds and seeds.",
        "Prior work was tested on folds and splits of its own, and states no spread: the rows are no paired comparison.",
        f"Published figures: as given by {published.source}.",
    )
    return PlainTable("prior-work", caption, ("", "Features", "UA", "95 % interval"), (tuple(rows), tuple(ours)))


def _further(summary: Summary, published: Published) -> PlainTable | None:
    """A row per method that has metrics beside its score, and a column per metric."""
    columns = list(dict.fromkeys(each.column for each in summary.further))
    if not columns:
        return None
    found: dict[tuple[str, str], dict[MetricColumn, FurtherMetric]] = {}
    for each in summary.further:
        found.setdefault((each.corpus, each.method), {})[each.column] = each
    several = len({corpus for corpus, _ in found}) > 1
    rows = []
    for (corpus, method), own in found.items():
        label = f"{published.labels.get(method, method)}{f' on {corpus}' if several else ''}"
        rows.append((label, *(_spread(own.get(column)) for column in columns), str(max(each.n for each in own.values()))))
    corpora = ", ".join(dict.fromkeys(corpus for corpus, _ in found))
    caption = (
        f"Further metrics of the runs on {corpora}: mean over folds ± sd over slots of that mean, n runs that count.",
        *dict.fromkeys(column.meaning for column in columns),
    )
    return PlainTable("metrics", caption, ("", *(column.heading for column in columns), "n"), (tuple(rows),))


def _spread(metric: FurtherMetric | None) -> str:
    if metric is None or metric.mean is None:
        return DASH
    spread = "" if metric.sd is None else f" ± {round_half_up(metric.sd, metric.column.decimals)}"
    return f"{round_half_up(metric.mean, metric.column.decimals)}{spread}"


def _measured(summary: Summary, published: Published) -> PlainTable | None:
    """A row per measured corpus and a column per metric: those that the published entry names, else all."""
    if not summary.measured:
        return None
    wanted = published.measured or _every_metric(summary.measured)
    labels = {row.corpus: row.label for row in wanted.rows}
    several = len({each.method for each in summary.measured}) > 1
    ours = []
    for each in summary.measured:
        method = f", {published.labels.get(each.method, each.method)}" if several else ""
        state = "" if each.metrics is not None else f" ({each.status})†"
        values = (_number((each.metrics or {}).get(column.metric), column.decimals) for column in wanted.columns)
        ours.append((f"{labels.get(each.corpus, each.corpus)}{method}{state}", *values))
    theirs = [
        (f"{row.label}, published", *(_number(row.values.get(column.metric), column.decimals) for column in wanted.columns))
        for row in wanted.rows
        if row.values
    ]
    sentences = [f"{wanted.title}.", *wanted.notes]
    if any(each.metrics is None for each in summary.measured):
        sentences.append("† No result yet.")
    if theirs:
        sentences.append(f"Published figures: {published.source}.")
    if not summary.methods:  # else these are in the caption of the methods
        if summary.code.weights:
            sentences.append(f"Weights: {'; '.join(summary.code.weights)}.")
        sentences.append(code_sentence(f"Experiment {summary.experiment}", summary.code, ("python", "torch", "transformers")))
    blocks = tuple(tuple(rows) for rows in (ours, theirs) if rows)
    return PlainTable("measured", tuple(sentences), ("", *(column.heading for column in wanted.columns)), blocks)


def _every_metric(measured: Sequence[Measured]) -> MeasuredTable:
    names = dict.fromkeys(name for each in measured for name in each.metrics or {})
    return MeasuredTable("Measurements of whole corpora", tuple(MeasuredColumn(name, name) for name in names))


def _label(method: MethodSummary, published: Published) -> str:
    return published.labels.get(method.method, method.method)


def _means(summary: Summary) -> dict[str, float | None]:
    return {method.method: method.mean_ua for method in summary.methods}


def _ratios(wanted: Ratio, rows: Mapping[str, Sequence[float | None]]) -> list[float | None]:
    columns = zip(*(rows[label] for label in (wanted.base, wanted.of, wanted.to)), strict=True)
    return [ratio(base, of, to) for base, of, to in columns]


def _cell(method: MethodSummary | None) -> str:
    if method is None or method.mean_ua is None:
        return DASH
    spread = f" ± {round_half_up(method.sd_ua)}" if method.sd_ua is not None else ""
    wanted = sum(cell.slots for cell in method.cells)
    note = f" (n {method.n})" if method.complete else f" ({method.n}/{wanted})†"
    return f"{round_half_up(method.mean_ua)}{spread}{note}{'‡' if method.unresolved else ''}"


def _number(value: float | None, decimals: int = 1) -> str:
    return DASH if value is None else round_half_up(value, decimals)


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{round_half_up(value)} %"
