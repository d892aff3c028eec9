"""The tables of a sweep: one display model, rendered as LaTeX, Markdown and CSV. Pure.

Rows are points: complete ones, the best first, then those that were stopped early, failed, and are under way. Numbers of tables are
rounded half up; those of CSV are not rounded.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.statistics import ALPHA, EXACT_POINTS, MIN_POINTS, Interval, p_text, round_half_up
from jobs.sweeps.records import TrialState
from jobs.sweeps.report.choice import Choice, lines_of, states_in_words
from jobs.sweeps.report.costs import Hours
from jobs.sweeps.report.summary import NAMES, PointSummary, SweepSummary
from jobs.tables.format import DASH, code_sentence, counted, interval_text, latex, markdown, negative, rendered, signed

TEMPLATES = Path(__file__).parent / "templates"
PAGE_ROWS = 28  # of a table on one page of LaTeX
BEST = "best"
ALIKE = "not distinguishable from the best"
REMARKS = {
    TrialState.stopped: "stopped early",
    TrialState.failed: "failed",
    TrialState.running: "under way",
    TrialState.interrupted: "interrupted",
}
HEADINGS = {
    "purity": "Purity",
    "nmi": "NMI",
    "inertia": "Inertia a frame",
    "entropy_share": "Entropy share",
    "ptapt_loss_share": "P-TAPT loss share",
}
DECIMALS = {"inertia": 2}  # of a proxy in a table; of the others 3
CAPTION_PACKAGES = ("python", "torch", "transformers", "ray", "optuna", "scikit-learn")
POINT_COLUMNS = (
    *("point", "counts", "size", "settings", "state", "mean_ua", "sd_ua", "sd_ua_all_runs", "ua_low", "ua_high", "placed_ua"),
    *("mean_wa", "sd_wa", "mean_macro_f1", "sd_macro_f1", "folds", "runs", "diverged"),
    *("pairs", "difference", "difference_low", "difference_high", "t_p", "holm_p", "remark"),
    *NAMES,
    "error",
)
RUN_COLUMNS = ("point", "counts", "settings", "fold", "slot", "seed", "ua", "wa", "macro_f1", "state")


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
    """A small table: headings, rows of plain texts, and what is to be said of it."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: tuple[str, ...]


@dataclass(frozen=True)
class Tables:
    """All that is printed of a sweep, as plain text that every format escapes for itself."""

    title: str
    lead: tuple[str, ...]  # sentences
    rows: tuple[Row, ...]
    caption: tuple[str, ...]
    proxies: Lines
    cost: Lines
    folds: Lines
    failures: tuple[str, ...]
    figure: str
    commands: tuple[str, ...]  # of a shell, and comments

    @property
    def pages(self) -> tuple[tuple[Row, ...], ...]:
        return tuple(self.rows[start : start + PAGE_ROWS] for start in range(0, len(self.rows), PAGE_ROWS))

    @property
    def proxy_pages(self) -> tuple[tuple[tuple[str, ...], ...], ...]:
        return tuple(self.proxies.rows[start : start + PAGE_ROWS] for start in range(0, len(self.proxies.rows), PAGE_ROWS))


def tables_of(summary: SweepSummary, choice: Choice) -> Tables:
    """Everything printed of a sweep."""
    return Tables(
        title=f"Sweep of {summary.sweep.experiment.name}",
        lead=_lead(summary),
        rows=tuple(_row(summary, point) for point in summary.points),
        caption=_caption(summary),
        proxies=_proxies(summary),
        cost=_cost(summary),
        folds=_folds(summary),
        failures=tuple(f"{point.point.label}: {point.error or 'no reason on record'}" for point in summary.points if _failed(point)),
        figure=_figure(),
        commands=lines_of(summary, choice),
    )


def render_latex(summary: SweepSummary, choice: Choice) -> str:
    """A LaTeX document (booktabs) that pdflatex compiles as it stands; it shows `plot.pdf` if that lies beside it."""
    return rendered(TEMPLATES / "sweep.tex.j2", latex, tables=tables_of(summary, choice))


def render_markdown(summary: SweepSummary, choice: Choice) -> str:
    """The same as Markdown, with `plot.png`."""
    return rendered(TEMPLATES / "sweep.md.j2", markdown, tables=tables_of(summary, choice))


def render_points_csv(summary: SweepSummary) -> str:
    """One row a point, columns `POINT_COLUMNS`; empty where there is no number."""
    return _csv(POINT_COLUMNS, [_point_values(summary, point) for point in summary.points])


def render_runs_csv(summary: SweepSummary) -> str:
    """One row for every run that counts, columns `RUN_COLUMNS`."""
    rows: list[dict[str, object]] = []
    for point in summary.points:
        identity = {"point": point.point.label, **_setting(point), "state": point.state.value}
        for run in (run for fold in point.folds for run in fold.runs):
            scores = {"ua": run.ua, "wa": run.wa, "macro_f1": run.macro_f1}
            rows.append({**identity, "fold": run.fold, "slot": run.slot, "seed": run.seed, **scores})
    return _csv(RUN_COLUMNS, rows)


def remark_of(summary: SweepSummary, point: PointSummary) -> str:
    """What is to be said of a point in a few words."""
    if not point.complete:
        return REMARKS[point.state]
    if summary.best is point:
        return BEST
    alike = None if point.to_best is None else point.to_best.alike
    return "not tested" if alike is None else ALIKE if alike else "below the best"


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
        sentences.append("The sweep is not at its end; everything here is of what is done.")
    if summary.best is None:
        sentences.append("No point is complete, so there is no best.")
    return tuple(sentences)


def _caption(summary: SweepSummary) -> tuple[str, ...]:
    sentences = [
        f"Validation unweighted accuracy (UA, %) of P-TAPT on {summary.sweep.corpus.name} by set of cluster counts.",
        "Mean of the fold means ± sample standard deviation over slots, of the mean over folds, with its 95 % interval (Student's t): "
        "they speak of fine-tuning seeds, not of new speakers.",
    ]
    if summary.sweep.experiment.sweep.seeds == 2:  # t is 12.7 with one degree of freedom, and 12.7 / sqrt 2 is 9
        sentences.append("With two seeds an interval reaches nine standard deviations to either side: go by the differences.")
    if summary.best is not None and len(summary.points) > 1:
        sentences.append(
            "Difference: to the best, in points, over the (fold, slot) pairs that both have, with its 95 % interval, which is of one "
            "comparison by itself."
        )
        if summary.tested:
            sentences.append(
                f"p: paired t-test, two-sided, corrected for {counted(summary.tested, 'comparison')} (Holm); not distinguishable: p of "
                f"{ALPHA} or more, which does not show that a set is as good: few pairs tell little apart."
            )
        sentences.append(
            "The best is the highest of several on these very speakers: its UA is too high for new ones, and p-values are too small; "
            "pairs of one fold share speakers and what comes before fine-tuning."
        )
    if any(not point.complete for point in summary.points):
        sentences.append(
            "A point that is not complete has its mean over the folds done, which compares with no other mean; its difference does, "
            "and is not tested. One that was stopped early was stopped for a low beginning, so its difference is, on average, too low."
        )
    if summary.diverged:
        sentences.append(f"{counted(summary.diverged, 'run')} diverged, were replaced by reserve seeds and count nowhere.")
    return (*sentences, code_sentence(f"Sweep {summary.sweep.digest}", summary.code, CAPTION_PACKAGES))


def _proxies(summary: SweepSummary) -> Lines:
    rows = [
        (point.point.label, *(_proxy(name, point.proxies.of_set.get(name)) for name in NAMES), _row(summary, point).ua)
        for point in summary.points
        if point.proxies.of_set
    ]
    found = [summary.correlations.get(name) for name in NAMES]
    if rows:
        rows.append(("Rank correlation with UA", *(DASH if each is None else negative(round_half_up(each.rho, 2)) for each in found), ""))
        rows.append(("p (points)", *(DASH if each is None else f"{p_text(each.p)} ({each.n})" for each in found), ""))
    return Lines(
        headings=("", *(HEADINGS[name] for name in NAMES), "UA"),
        rows=tuple(rows),
        caption=(
            "What is known before fine-tuning: means over the folds done and the k of a set.",
            "Purity and normalised mutual information (NMI): of the clusters of frames with the labels of their utterances; entropy share: "
            "entropy of cluster use over ln k; P-TAPT loss share: final loss over that of a uniform guess.",
            "None of them compares sets of different k as it stands: purity grows with k (NMI too, where a cluster has few frames), "
            "inertia falls, and more clusters are harder to predict; a rank correlation over sets of different k is one with k too.",
            f"Rank correlation: Spearman's, with the validation UA over complete points, from {MIN_POINTS} points on; p two-sided, not "
            f"corrected for {len(NAMES)} proxies (exact up to {EXACT_POINTS} points).",
        ),
    )


def _cost(summary: SweepSummary) -> Lines:
    cost = summary.cost
    rows = [
        ("Without sharing: what the trials would have cost, each by itself", cost.unshared),
        ("Saved by sharing stages within the sweep", cost.saved_within),
        ("Saved by stages that were finished before the sweep began", cost.saved_before),
        ("Spent by this sweep", cost.spent),
        ("Saved by early stopping (estimate)", cost.saved_stopping),
    ]
    with_gpu = bool(cost.unshared.gpu)
    unknown = f"; {counted(cost.stages_unknown, 'result')} of them are gone and counted nowhere" if cost.stages_unknown else ""
    return Lines(
        headings=("", *(["GPU-hours"] if with_gpu else []), "CPU-hours"),
        rows=tuple((label, *_hours(hours, with_gpu)) for label, hours in rows),
        caption=(
            f"Cost of {counted(cost.stages, 'different stage')}, {cost.stages_before} of them finished before the sweep began{unknown}: "
            "time of all attempts at stages of folds that are done.",
            "GPU-hours: a GPU for each process of a stage that ran on GPUs, also where several shared it; CPU-hours: cores of stages that "
            "used none.",
            "Estimate: the folds that trials were not given, at what the stages that no other trial needed cost them a fold.",
        ),
    )


def _folds(summary: SweepSummary) -> Lines:
    rows = tuple(
        (choice.fold, ", ".join(summary.sweep.validation.get(choice.fold, ())), choice.point.point.label, round_half_up(choice.mean_ua))
        for choice in summary.by_fold
    )
    caption = ["Best point of each held-out fold by the UA of its own validation speakers: the nested choice."]
    if not summary.folds_apart:
        caption.append("Which points it could choose from was decided by other folds too, by early stopping or by Optuna.")
    return Lines(("Fold", "Validation speakers", "Best point", "UA"), rows, tuple(caption))


def _figure() -> str:
    return (
        "Left: sets of one k, and the mean of all sets that contain it. Right: all sets by how many numbers they hold, and the mean of "
        "each size. Intervals are over sets, which share numbers. Hollow: not every fold done; placed by the difference to the best on the "
        "folds done, so those that were stopped early stand too low on average."
    )


def _point_values(summary: SweepSummary, point: PointSummary) -> dict[str, object]:
    test = None if point.to_best is None else point.to_best.test
    low, high = _ends(point.ua.interval)
    difference_low, difference_high = _ends(None if test is None else test.interval)
    return {
        "point": point.point.label,
        **_setting(point),
        "size": len(point.point.counts),
        "state": point.state.value,
        "mean_ua": point.ua.mean,
        "sd_ua": point.ua.sd,
        "sd_ua_all_runs": point.ua.sd_all_runs,
        "ua_low": low,
        "ua_high": high,
        "placed_ua": point.placed_ua,
        "mean_wa": point.wa.mean,
        "sd_wa": point.wa.sd,
        "mean_macro_f1": point.macro_f1.mean,
        "sd_macro_f1": point.macro_f1.sd,
        "folds": len(point.folds),
        "runs": point.runs,
        "diverged": point.diverged,
        "pairs": None if test is None else test.pairs,
        "difference": None if test is None else test.mean,
        "difference_low": difference_low,
        "difference_high": difference_high,
        "t_p": None if test is None or not point.complete else test.t_p,
        "holm_p": None if point.to_best is None else point.to_best.holm_p,
        "remark": remark_of(summary, point),
        **{name: point.proxies.of_set.get(name) for name in NAMES},
        "error": point.error,
    }


def _setting(point: PointSummary) -> dict[str, object]:
    settings = json.dumps(dict(point.point.settings)) if point.point.settings else ""
    return {"counts": " ".join(map(str, point.point.counts)), "settings": settings}


def _csv(columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        values = [row[column] for column in columns]
        writer.writerow(["" if value is None else repr(value) if isinstance(value, float) else value for value in values])
    return text.getvalue()


def _failed(point: PointSummary) -> bool:
    return point.state is TrialState.failed


def _ends(interval: Interval | None) -> tuple[float | None, float | None]:
    return (None, None) if interval is None else (interval.low, interval.high)


def _proxy(name: str, value: float | None) -> str:
    return DASH if value is None else negative(round_half_up(value, DECIMALS.get(name, 3)))


def _hours(hours: Hours, with_gpu: bool) -> tuple[str, ...]:
    values = (hours.gpu, hours.cpu) if with_gpu else (hours.cpu,)
    return tuple(round_half_up(value, 2) for value in values)
