"""The tables of a sweep, rendered as LaTeX, Markdown and CSV. Pure.

Rows are points: first the complete ones, best first, then those stopped early, failed, and running. Numbers in tables are rounded half
up; those in CSV are not rounded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jobs.experiment.registry import ProxyColumn
from jobs.statistics import ALPHA, EXACT_POINTS, MIN_POINTS, p_text, round_half_up
from jobs.sweeps.decisions import TrialState
from jobs.sweeps.report.as_json import point_json
from jobs.sweeps.report.choice import Choice, lines_of, states_in_words
from jobs.sweeps.report.costs import Hours
from jobs.sweeps.report.summary import PointSummary, SweepSummary, remark_of
from jobs.sweeps.space import recipe_of_sweep, swept_method
from jobs.tables.format import DASH, code_sentence, csv_text, interval_text, negative, rendered, signed
from jobs.text import counted

TEMPLATES = Path(__file__).parent / "templates"
PAGE_ROWS = 28  # rows of a table per page in LaTeX
CAPTION_PACKAGES = ("python", "torch", "transformers", "ray", "optuna", "scikit-learn")
POINT_COLUMNS = (  # the proxies and `error` follow
    *("point", "counts", "size", "settings", "state", "mean_ua", "sd_ua", "sd_ua_all_runs", "ua_low", "ua_high", "placed_ua"),
    *("mean_wa", "sd_wa", "mean_macro_f1", "sd_macro_f1", "folds", "runs", "diverged"),
    *("pairs", "difference", "difference_low", "difference_high", "t_p", "holm_p", "remark"),
)
RUN_COLUMNS = ("point", "counts", "settings", "fold", "slot", "seed", "ua", "wa", "macro_f1", "state")
FIGURE = (
    "Left: sets of one k, and the mean of all sets that contain it. Right: all sets by how many numbers they hold, and the mean of "
    "each size. Intervals are over sets, which share numbers. Hollow: not every fold done; placed by the difference to the best on the "
    "folds done, so those that were stopped early stand too low on average."
)


@dataclass(frozen=True)
class Row:
    """One point, as printed."""

    label: str
    ua: str
    sd: str
    interval: str
    folds: str
    runs: str
    difference: str
    difference_interval: str
    pairs: str
    p: str
    remark: str
    best: bool


@dataclass(frozen=True)
class Lines:
    """A small table of plain texts."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: tuple[str, ...]


@dataclass(frozen=True)
class Tables:
    """Everything printed for a sweep, as plain text; each format escapes it."""

    title: str
    lead: tuple[str, ...]  # sentences
    rows: tuple[Row, ...]
    caption: tuple[str, ...]
    proxies: Lines
    cost: Lines
    folds: Lines
    failures: tuple[str, ...]
    figure: str
    commands: tuple[str, ...]  # shell commands and comments


def tables_of(summary: SweepSummary, choice: Choice) -> Tables:
    """Everything printed for a sweep."""
    return Tables(
        title=f"Sweep of {summary.sweep.experiment.name}",
        lead=_lead(summary),
        rows=tuple(_row(summary, point) for point in summary.points),
        caption=_caption(summary),
        proxies=_proxies(summary),
        cost=_cost(summary),
        folds=_folds(summary),
        failures=tuple(
            f"{point.point.label}: {point.error or 'no reason on record'}" for point in summary.points if point.state is TrialState.failed
        ),
        figure=FIGURE,
        commands=lines_of(summary, choice),
    )


def render(file: str, summary: SweepSummary, choice: Choice) -> str:
    """`sweep.tex`: a complete LaTeX document (booktabs) with `plot.pdf` if it exists. `sweep.md`: Markdown with `plot.png`."""
    return rendered(TEMPLATES / f"{file}.j2", tables=tables_of(summary, choice), page_rows=PAGE_ROWS)


def render_points_csv(summary: SweepSummary) -> str:
    """One row per point; unknown numbers are empty."""
    names = [column.name for column in summary.proxy_columns]
    return _csv((*POINT_COLUMNS, *names, "error"), [_point_values(summary, point, names) for point in summary.points])


def render_runs_csv(summary: SweepSummary) -> str:
    """One row per run that did not diverge, columns `RUN_COLUMNS`."""
    rows: list[dict[str, object]] = []
    for point in summary.points:
        identity = {"point": point.point.label, **_setting(point), "state": point.state.value}
        rows.extend({**asdict(run), **identity} for fold in point.folds for run in fold.runs)
    return _csv(RUN_COLUMNS, rows)


def _row(summary: SweepSummary, point: PointSummary) -> Row:
    test = None if point.to_best is None else point.to_best.test
    return Row(
        label=point.point.label,
        ua=DASH if point.ua.mean is None else round_half_up(point.ua.mean),
        sd="" if point.ua.sd is None else round_half_up(point.ua.sd),
        interval=interval_text(point.ua.interval),
        folds=f"{len(point.folds)}/{len(summary.sweep.folds)}",
        runs=str(point.runs),
        difference=DASH if test is None or test.mean is None else signed(test.mean),
        difference_interval=DASH if test is None else interval_text(test.interval),
        pairs=DASH if test is None else str(test.pairs),
        p=p_text(None if point.to_best is None else point.to_best.holm_p),
        remark=remark_of(summary, point),
        best=summary.best is point,
    )


def _lead(summary: SweepSummary) -> tuple[str, ...]:
    settings, sweep = summary.sweep.experiment.sweep, summary.sweep
    sentences = [
        f"Search: {settings.search.name}, early stopping: {settings.stopping.name}; {states_in_words(summary)}.",
        f"Every trial: {counted(len(sweep.folds), 'held-out fold')} ({', '.join(sweep.folds)}), "
        f"{counted(settings.seeds, 'fine-tuning')} each, scored on validation speakers; the held-out fold was not opened.",
    ]
    if summary.under_way:
        sentences.append("The sweep is not finished; all numbers are those so far.")
    if summary.best is None:
        sentences.append("No point is complete, so there is no best.")
    return tuple(sentences)


def _caption(summary: SweepSummary) -> tuple[str, ...]:
    sentences = [
        f"Validation unweighted accuracy (UA, %) of {swept_method(summary.sweep.experiment).label} on {summary.sweep.corpus.name} "
        "by set of cluster counts.",
        "Mean of the fold means ± sample standard deviation over slots, of the mean over folds, with its 95 % interval (Student's t): "
        "they describe the variation between fine-tuning seeds, not between speakers.",
    ]
    if summary.sweep.experiment.sweep.seeds == 2:  # Student's t is 12.7 with one degree of freedom, and 12.7 / sqrt(2) is 9
        sentences.append("With two seeds an interval is nine standard deviations wide on either side: compare the differences instead.")
    if summary.best is not None and len(summary.points) > 1:
        sentences.append(
            "Difference: to the best, in points, over the (fold, slot) pairs that both have, with its 95 % interval, not corrected for "
            "the number of comparisons."
        )
        if summary.tested:
            sentences.append(
                f"p: paired t-test, two-sided, corrected for {counted(summary.tested, 'comparison')} (Holm); not distinguishable: p of "
                f"{ALPHA} or more, which does not show that a set is as good: the test has little power with few pairs."
            )
        sentences.append(
            "The best was selected on these speakers: its UA is biased upwards, and p-values are too small; pairs of one fold share "
            "speakers and upstream stages."
        )
    if any(not point.complete for point in summary.points):
        sentences.append(
            "The mean of an incomplete point is over its evaluated folds and cannot be compared with other means; its difference can, "
            "and is not tested. Points were stopped early because of low first folds, so their differences are biased downwards."
        )
    if summary.diverged:
        sentences.append(f"{counted(summary.diverged, 'run')} diverged, were replaced by reserve seeds and are not included.")
    sentences.extend(recipe_of_sweep(summary.sweep.experiment, summary.sweep.code))
    return (*sentences, code_sentence(f"Sweep {summary.sweep.digest}", summary.code, CAPTION_PACKAGES))


def _proxies(summary: SweepSummary) -> Lines:
    columns = summary.proxy_columns
    rows = [
        (point.point.label, *(_proxy(column, point.proxies.of_set.get(column.name)) for column in columns), _row(summary, point).ua)
        for point in summary.points
        if point.proxies.of_set
    ]
    found = [summary.correlations.get(column.name) for column in columns]
    if rows:
        rows.append(("Rank correlation with UA", *(DASH if each is None else negative(round_half_up(each.rho, 2)) for each in found), ""))
        rows.append(("p (points)", *(DASH if each is None else f"{p_text(each.p)} ({each.n})" for each in found), ""))
    return Lines(
        headings=("", *(column.heading for column in columns), "UA"),
        rows=tuple(rows),
        caption=(
            "Proxies, known before fine-tuning: means over the evaluated folds and the k of a set.",
            *swept_method(summary.sweep.experiment).proxies_caption,
            f"Rank correlation: Spearman's, with the validation UA over complete points, from {MIN_POINTS} points on; p two-sided, not "
            f"corrected for {len(columns)} proxies (exact up to {EXACT_POINTS} points).",
        ),
    )


def _cost(summary: SweepSummary) -> Lines:
    cost = summary.cost
    rows = [
        ("Without sharing: every trial computes all its stages", cost.unshared),
        ("Saved by sharing stages within the sweep", cost.saved_within),
        ("Saved by stages that were finished before the sweep started", cost.saved_before),
        ("Spent by this sweep", cost.spent),
        ("Saved by early stopping (estimate)", cost.saved_stopping),
    ]
    with_gpu = bool(cost.unshared.gpu)
    unknown = f"; {counted(cost.stages_unknown, 'result')} of them are missing and not included" if cost.stages_unknown else ""
    return Lines(
        headings=("", *(["GPU-hours"] if with_gpu else []), "CPU-hours"),
        rows=tuple((label, *_hours(hours, with_gpu)) for label, hours in rows),
        caption=(
            f"Cost of {counted(cost.stages, 'different stage')}, {cost.stages_before} of them finished before the sweep started{unknown}: "
            "time of all attempts at the stages of evaluated folds.",
            "GPU-hours: one GPU per process of stages on GPUs, also if processes share a GPU; CPU-hours: cores of stages without GPUs.",
            "Estimate: the skipped folds, at the mean cost per fold of stages that no other trial needed.",
        ),
    )


def _folds(summary: SweepSummary) -> Lines:
    rows = tuple(
        (choice.fold, ", ".join(summary.sweep.validation.get(choice.fold, ())), choice.point.point.label, round_half_up(choice.mean_ua))
        for choice in summary.by_fold
    )
    caption = ["Best point of each held-out fold by the UA of its own validation speakers: the nested choice."]
    if not summary.folds_apart:
        caption.append("Early stopping or Optuna made its candidates depend on other folds too.")
    return Lines(("Fold", "Validation speakers", "Best point", "UA"), rows, tuple(caption))


def _point_values(summary: SweepSummary, point: PointSummary, proxies: Sequence[str]) -> dict[str, object]:
    values = point_json(summary, point)
    to_best = values["to_best"] or {}
    low, high = values["interval_95_ua"] or (None, None)
    difference_low, difference_high = to_best.get("interval_95") or (None, None)
    return {
        **values,
        **_setting(point),
        **{name: values["proxies"].get(name) for name in proxies},
        **{name: to_best.get(name) for name in ("pairs", "t_p", "holm_p")},
        "size": len(point.point.counts),
        "ua_low": low,
        "ua_high": high,
        "folds": len(point.folds),
        "difference": to_best.get("mean_difference"),
        "difference_low": difference_low,
        "difference_high": difference_high,
    }


def _setting(point: PointSummary) -> dict[str, object]:
    settings = json.dumps(dict(point.point.settings)) if point.point.settings else ""
    return {"counts": " ".join(map(str, point.point.counts)), "settings": settings}


def _csv(columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> str:
    return csv_text(columns, ([row[column] for column in columns] for row in rows))


def _proxy(column: ProxyColumn, value: float | None) -> str:
    return DASH if value is None else negative(round_half_up(value, column.decimals))


def _hours(hours: Hours, with_gpu: bool) -> tuple[str, ...]:
    values = (hours.gpu, hours.cpu) if with_gpu else (hours.cpu,)
    return tuple(round_half_up(value, 2) for value in values)
