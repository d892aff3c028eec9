"""Tables of an experiment beside the one of methods and folds: by settings, in pairs, prior work, further metrics, measured corpora. Pure.

An entry of `configs/published.yaml` asks for them; measured corpora have a table without one too. `settings` puts methods of the
experiment, each with settings of its own, into the cells of a table of methods and columns, with one row of ratios. `prior_work` lists
published results, ours among them. `paired` puts methods side by side that differ in one setting. `measured` chooses the metrics of
measured corpora.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.experiment.recipes import MetricColumn
from jobs.statistics import Interval, interval_about, p_text, round_half_up
from jobs.tables.adaptation import Adapted, adaptations_of
from jobs.tables.as_json import interval_json
from jobs.tables.format import DASH, code_sentence, difference_cells, interval_text, negative, signed
from jobs.tables.measured import Measured
from jobs.tables.metrics import FurtherMetric
from jobs.tables.paired import PairedDifference, Side, paired_differences
from jobs.tables.published import MeasuredColumn, MeasuredTable, Published, Ratio, SettingsTable, position
from jobs.tables.ratio import GainRatio, gain_ratio, ratio
from jobs.tables.summary import MethodSummary, Summary, by_pair


@dataclass(frozen=True)
class PlainTable:
    """A table of texts; each format escapes them."""

    name: str  # part of its file's name and label
    caption: tuple[str, ...]  # sentences
    columns: tuple[str, ...]
    blocks: tuple[tuple[tuple[str, ...], ...], ...]  # rows, in groups that a line divides
    texts: int = 1  # how many of the first columns are text; the others are numbers


def plain_tables(summary: Summary, published: Published) -> tuple[PlainTable, ...]:
    """The tables that the published entry asks for, and those of further metrics and of measured corpora."""
    tables = (
        _by_settings(summary, published),
        _in_pairs(summary, published),
        _prior_work(summary, published),
        *_adaptations(summary, published),
        _further(summary, published),
        _measured(summary, published),
    )
    return tuple(table for table in tables if table is not None)


def settings_json(summary: Summary, published: Published) -> dict[str, Any] | None:
    """Means, ratios and the intervals of ratio and denominator by setting, not rounded; None if the entry does not ask for them."""
    wanted = published.settings
    if wanted is None:
        return None
    means = {method.method: method.mean_ua for method in summary.methods}
    rows = {row.label: [means.get(method) for method in row.methods] for row in wanted.rows}
    ratios = _ratios(wanted, {method.method: method for method in summary.methods})
    return {
        "columns": list(wanted.columns),
        "mean_ua": rows,
        "ratio": None if wanted.ratio is None else [each and each.percent for each in ratios],
        "ratio_interval_95": [each and interval_json(each.interval) for each in ratios],
        "denominator_interval_95": [each and interval_json(each.gain_interval) for each in ratios],
    }


def _by_settings(summary: Summary, published: Published) -> PlainTable | None:
    wanted = published.settings
    if wanted is None:
        return None
    found = {method.method: method for method in summary.methods}
    placed = {row.label: [found.get(method) for method in row.methods] for row in wanted.rows}
    counts = {method.n for methods in placed.values() for method in methods if method is not None and method.complete}
    n = f"n = {counts.pop()}" if len(counts) == 1 else "n"  # in the caption, else in each cell
    ours = [(label, *(_cell(method, stated=n != "n") for method in methods)) for label, methods in placed.items()]
    theirs = [(f"{row.label}, published", *(_number(value) for value in row.ua)) for row in wanted.rows if row.ua]
    sentences = [
        f"{wanted.title}: mean ± sd over slots; runs of each cell: {n}.",
        f"All stages of a run train on the same part of the training {summary.terms.examples}; smaller parts are parts of larger ones.",
        *_with_dropped(
            [
                (f"{row.label} {column}", found.get(name))
                for row in wanted.rows
                for column, name in zip(wanted.columns, row.methods, strict=True)
            ]
        ),
        *_marks([method for methods in placed.values() for method in methods]),
    ]
    if wanted.ratio is not None:
        ratios = _ratios(wanted, found)
        ours.append((wanted.ratio.label, *map(_ratio_cell, ratios)))
        sentences.extend(_ratio_sentences(wanted.ratio, wanted.columns, ratios))
        if theirs:
            theirs.append((f"{wanted.ratio.label}, published", *map(_percent, _published_ratios(wanted, wanted.ratio))))
            sentences.append("Published ratios are of the published means, which have no spread.")
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
    if wanted.ratio is not None:
        own = [
            f"{column} {position(value, each.interval)}"
            for column, value, each in zip(wanted.columns, _published_ratios(wanted, wanted.ratio), _ratios(wanted, found), strict=True)
            if value is not None and each is not None and each.interval is not None
        ]
        places.extend([f"{wanted.ratio.label} {', '.join(own)}"] if own else [])
    what = "A published figure lies inside, below or above our 95 % interval over seeds (no test: it has no spread)"
    return (f"{what}: {'; '.join(places)}.",) if places else ()


def _in_pairs(summary: Summary, published: Published) -> PlainTable | None:
    """A row per pair of methods and metric; None if the entry does not ask for them or no run is finished."""
    wanted = published.paired
    found = paired_differences(summary, wanted) if wanted is not None else ()
    if wanted is None or not found:
        return None
    several = len({each.corpus for each in found}) > 1
    groups: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    for each in found:
        label = f"{each.label}{f' on {each.corpus}' if several else ''}"
        groups.setdefault((each.corpus, each.label), []).append((label, each.heading, *_paired_numbers(each)))
    named = {row.label: row.methods for row in wanted.rows}
    methods = {(each.corpus, each.method): each for each in summary.methods}
    both = [
        (f"{label}, {column.lower()}", methods.get((corpus, method)))
        for corpus, label in groups
        for column, method in zip(wanted.columns, named[label], strict=True)
    ]
    first, second = wanted.columns
    sentences = [
        f"{wanted.title}: mean over folds ± sd over slots of that mean.",
        f"Difference: {second.lower()} minus {first.lower()}, in points, over (fold, slot) pairs that both have: mean, 95 % interval, "
        "paired t-test, for new seeds on these folds; folds and seeds: interval and test for new folds too (mixed model).",
        "p-values are two-sided; Holm: corrected for the number of differences in the table.",
        *wanted.notes,
        *_with_dropped(both),
    ]
    incomplete = [f"{name} {method.n}" for name, method in both if method is not None and not method.complete]
    if incomplete:
        sentences.append(f"Incomplete, with their runs: {', '.join(incomplete)}.")
    columns = ("", "", first, second, "Difference", "95 % interval", "Pairs", "t-test p", "Holm", "Folds and seeds", "p", "Holm")
    return PlainTable("paired", tuple(sentences), columns, tuple(map(tuple, groups.values())), texts=2)


def _paired_numbers(found: PairedDifference) -> tuple[str, ...]:
    test, crossed = found.over_pairs, found.crossed
    mean = DASH if test.mean is None else signed(test.mean)
    both = (interval_text(crossed.interval), p_text(crossed.p), p_text(found.crossed_p_holm)) if crossed else (DASH,) * 3
    tests = (interval_text(test.interval), str(test.pairs), p_text(test.t_p), p_text(found.t_p_holm))
    return (*map(_side, (found.first, found.second)), mean, *tests, *both)


def _side(side: Side) -> str:
    return _mean_text(side.mean, side.sd)


def _prior_work(summary: Summary, published: Published) -> PlainTable | None:
    if not published.prior_work:
        return None
    rows = [(work.label, work.features, round_half_up(work.ua), DASH) for work in published.prior_work]
    ours = [
        (_label(method, published), "this experiment", _cell(method), interval_text(method.crossed.interval if method.crossed else None))
        for method in summary.methods
    ]
    caption = (
        f"{summary.score.heading} beside prior work; the interval is that over folds and seeds.",
        "Prior work was tested on folds and splits of its own, and states no spread: the rows are no paired comparison.",
        *_with_dropped([(_label(method, published), method) for method in summary.methods]),
        f"Published figures: as given by {published.source}.",
    )
    return PlainTable("prior-work", caption, ("", "Features", summary.score.label, "95 % interval"), (tuple(rows), tuple(ours)), texts=2)


def _adaptations(summary: Summary, published: Published) -> tuple[PlainTable, ...]:
    """Rows of sources and methods, and for each corpus the score before and after; a table of the paired differences. () without any."""
    adapted = adaptations_of(summary)
    if not adapted:
        return ()
    corpora = list(dict.fromkeys(each.corpus for each in adapted))
    by_place = {(each.source, each.method, each.corpus): each for each in adapted}
    alone = [each for each in summary.methods if each.corpus in corpora and each.method not in {own.method for own in adapted}]
    label, names = summary.score.label, published.labels
    rows = []
    for source, method in dict.fromkeys((each.source, each.method) for each in adapted):
        places = [by_place.get((source, method, corpus)) for corpus in corpora]
        rows.append((source, names.get(method, method), *(text for place in places for text in _before_after(place))))
    for method in dict.fromkeys(each.method for each in alone):
        found = {each.corpus: each for each in alone if each.method == method}
        rows.append((DASH, names.get(method, method), *(text for corpus in corpora for text in (DASH, _after(found.get(corpus))))))
    caption = (
        f"{label} before and after adaptation: rows are sources, columns are the corpora that methods are adapted to and tested on.",
        "Before: the model that was trained on the source, tested on the held-out folds of the corpus, on which it was not trained; it is "
        "computed once for all seeds of a fold. After: trained further on the training part of the corpus.",
        f"Mean over folds ± sd over slots of that mean. {DASH} as source: trained on the corpus alone.",
    )
    table = PlainTable("adaptation", caption, ("Source", "", *_stages_of(corpora)), (tuple(rows),), texts=2)
    lines = tuple(
        (f"{each.source} to {each.corpus}", names.get(each.method, each.method), *difference_cells(each.difference)) for each in adapted
    )
    differences = (
        f"Differences of {label} in points, after − before adaptation, over (fold, slot) pairs: mean, 95 % interval, paired t-test, "
        "Wilcoxon signed-rank test.",
        "The score before is the same for all seeds of a fold, so these p-values are valid for new seeds of the second stage only.",
        "Folds and seeds: interval and test for new folds and new seeds, from a mixed model in which both are random effects.",
        "p-values are two-sided; Holm: corrected for the rows of one corpus.",
    )
    columns = (
        "",
        "",
        "Difference",
        "95 % interval",
        "Pairs",
        "t p",
        "Holm",
        "Wilcoxon p",
        "Holm",
        "Folds and seeds",
        "p",
        "Holm",
        "Detectable",
    )
    return table, PlainTable("adaptation-differences", differences, columns, (lines,), texts=2)


def _stages_of(corpora: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{corpus}, {when}" for corpus in corpora for when in ("before", "after"))


def _before_after(adapted: Adapted | None) -> tuple[str, str]:
    if adapted is None:
        return DASH, DASH
    spread = adapted.sd_before or None  # 0: the seeds of a fold share their first stage
    return _mean_text(adapted.mean_before, spread), _mean_text(adapted.mean_after, adapted.sd_after)


def _after(method: MethodSummary | None) -> str:
    return DASH if method is None else _mean_text(method.mean_ua, method.sd_ua)


def _further(summary: Summary, published: Published) -> PlainTable | None:
    """A row per method that has metrics beside its score, and a column per metric that a run has; None if there are none."""
    present = [each for each in summary.further if each.n]
    columns = list(dict.fromkeys(each.column for each in present))
    if not columns:
        return None
    found: dict[tuple[str, str], dict[MetricColumn, FurtherMetric]] = {}
    for each in present:
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
        values = (_measured_text(column, each.metrics or {}) for column in wanted.columns)
        ours.append((f"{labels.get(each.corpus, each.corpus)}{method}{state}", *values))
    theirs = [
        (f"{row.label}, published", *(_measured_text(column, row.values) for column in wanted.columns)) for row in wanted.rows if row.values
    ]
    sentences = [f"{wanted.title}.", *wanted.notes]
    if any(each.metrics is None for each in summary.measured):
        sentences.append("† No result yet.")
    if theirs:
        sentences.append(f"Published figures: {published.source}.")
        sentences.extend(_published_losses(wanted, summary.measured))
    if not summary.methods:  # else these are in the caption of the methods
        if summary.code.weights:
            sentences.append(f"Weights: {'; '.join(summary.code.weights)}.")
        sentences.append(code_sentence(f"Experiment {summary.experiment}", summary.code, ("python", "torch", "transformers")))
    blocks = tuple(tuple(rows) for rows in (ours, theirs) if rows)
    return PlainTable("measured", tuple(sentences), ("", *(column.heading for column in wanted.columns)), blocks)


def _measured_text(column: MeasuredColumn, metrics: Mapping[str, float]) -> str:
    """The cell of a column: its metric, or the interval of it."""
    if column.standard_error:
        return interval_text(_interval(column, metrics), column.decimals)
    return _number(metrics.get(column.metric), column.decimals)


def _interval(column: MeasuredColumn, metrics: Mapping[str, float]) -> Interval | None:
    """None where a metric is not there, and below two values."""
    centre, error, count = (metrics.get(name) for name in (column.metric, column.standard_error, column.count))
    if centre is None or error is None or count is None or count < 2:
        return None
    return interval_about(centre, error, count - 1)


def _published_losses(wanted: MeasuredTable, measured: Sequence[Measured]) -> tuple[str, ...]:
    """Where each published value of a measured corpus lies beside the interval of ours."""
    values = {row.corpus: row for row in wanted.rows}
    places = [
        f"{values[each.corpus].label} {position(values[each.corpus].values[column.metric], interval, column.decimals)}"
        for column in wanted.columns
        for each in measured
        if each.corpus in values and column.metric in values[each.corpus].values
        if column.standard_error and (interval := _interval(column, each.metrics or {})) is not None
    ]
    what = "A published figure lies inside, below or above our 95 % interval of the same corpus (no test: it has no spread)"
    return (f"{what}: {', '.join(places)}.",) if places else ()


def _every_metric(measured: Sequence[Measured]) -> MeasuredTable:
    names = dict.fromkeys(name for each in measured for name in each.metrics or {})
    return MeasuredTable("Measurements of whole corpora", tuple(MeasuredColumn(name, name) for name in names))


def _label(method: MethodSummary, published: Published) -> str:
    return published.labels.get(method.method, method.method)


def _ratios(wanted: SettingsTable, found: Mapping[str, MethodSummary]) -> list[GainRatio | None]:
    """One per column; None where one of its three methods is not there or not complete."""
    if wanted.ratio is None:
        return []
    rows = {row.label: row.methods for row in wanted.rows}
    ratios: list[GainRatio | None] = []
    for names in zip(*(rows[label] for label in (wanted.ratio.base, wanted.ratio.of, wanted.ratio.to)), strict=True):
        three = [found[name] for name in names if name in found and found[name].complete]
        ratios.append(gain_ratio(*map(by_pair, three)) if len(three) == len(names) else None)
    return ratios


def _with_dropped(named: Sequence[tuple[str, MethodSummary | None]]) -> Iterator[str]:
    """Mean and sd over all runs of the methods that have dropped ones. `named`: each with its name."""
    found = [(name, method) for name, method in named if method is not None and method.dropped]
    if not found:
        yield "No run was dropped."
        return
    each = ", ".join(f"{name} {_mean_text(method.mean_ua_all_runs, method.sd_ua_all_runs)} ({method.dropped})" for name, method in found)
    yield f"Means ± sd over all runs, dropped ones (their number) included: {each}; no other run was dropped."


def _marks(methods: Sequence[MethodSummary | None]) -> Iterator[str]:
    """What the marks of cells mean; None: no method of the experiment is there."""
    if None in methods:
        yield f"{DASH}: no such method in this experiment."
    known = [method for method in methods if method is not None]
    if not all(method.complete for method in known):
        yield "† Incomplete: finished / expected runs; such a column has no ratio."
    if any(method.unresolved for method in known):
        yield "‡ Has outliers that were not replaced."


def _ratio_cell(found: GainRatio | None) -> str:
    return DASH if found is None or found.percent is None else f"{_percent(found.percent)} ({interval_text(found.interval)})"


def _ratio_sentences(wanted: Ratio, columns: Sequence[str], ratios: Sequence[GainRatio | None]) -> Iterator[str]:
    """What the row is, and the gain in each column that has no ratio because of it."""
    what = f"gain of {wanted.of} over {wanted.base} in percent of the gain of {wanted.to}"
    yield f"{wanted.label}: {what}, from unrounded means, in brackets its 95 % interval over (fold, slot) pairs (Fieller)."
    without = [
        f"{column} {DASH if each.gain is None else signed(each.gain)} ({interval_text(each.gain_interval)})"
        for column, each in zip(columns, ratios, strict=True)
        if each is not None and each.percent is None
    ]
    if without:
        listed = ", ".join(without)
        yield f"There is no ratio where the 95 % interval of the gain of {wanted.to}, in points, is not above zero: {listed}."


def _published_ratios(table: SettingsTable, wanted: Ratio) -> list[float | None]:
    ua = {row.label: row.ua for row in table.rows}
    columns = zip(*(ua[label] for label in (wanted.base, wanted.of, wanted.to)), strict=False)  # a row of them may have no figures
    return [ratio(*means) for means in columns] or [None] * len(table.columns)


def _cell(method: MethodSummary | None, *, stated: bool = False) -> str:
    """`stated`: the number of runs of complete cells is in the caption."""
    if method is None:
        return DASH
    wanted = sum(cell.slots for cell in method.cells)
    note = f" ({method.n}/{wanted})†" if not method.complete else "" if stated else f" (n {method.n})"
    return f"{_mean_text(method.mean_ua, method.sd_ua)}{note}{'‡' if method.unresolved else ''}"


def _mean_text(mean: float | None, sd: float | None) -> str:
    return _number(mean) if sd is None else f"{_number(mean)} ± {round_half_up(sd)}"


def _number(value: float | None, decimals: int = 1) -> str:
    return DASH if value is None else negative(round_half_up(value, decimals))


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{_number(value)} %"
