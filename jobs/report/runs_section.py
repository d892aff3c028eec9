"""Every run as a dot, the share of the variance that folds and seeds have, the dropped runs with their reasons, and the table of runs."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.report.drawing import Panel, colour, figure, legend, linear, named, panel, shape, spread
from jobs.report.material import Material, entries_of_summary
from jobs.report.page import Cell, Figure, Row, Section, Table, View, number
from jobs.statistics import round_half_up
from jobs.tables.format import DASH, signed
from jobs.tables.summary import DROPPED, Entry, MethodSummary, Status
from jobs.text import counted

BESIDE = 0.7  # width that the methods of a fold take
WITHIN = 0.5  # share of a method's width that its seeds take


def spread_section(material: Material) -> Section:
    """Whether folds (what they hold out) or seeds make the scores differ."""
    parts: list[Table | Figure] = []
    for place, corpus in enumerate(material.corpora):
        for metric in material.by_metric:
            parts.append(_dots(material, corpus, metric, f"runs-{place}-{metric}"))
            parts.extend(_shares(material, corpus, metric))
    groups = material.summary.terms.groups
    sentence = f"Every run is a mark. Where the marks of a fold lie close together and the folds apart, {groups} matter more than seeds."
    return Section("spread", f"Do seeds or {groups} matter?", (sentence,), tuple(parts))


def dropped_section(material: Material) -> Section:
    """Which runs are in no mean, by which rule, and what the means are with them."""
    summary = material.summary
    cells = [cell for method in summary.methods for cell in method.cells]
    audit = [_audit(material, entry, cell.runs) for cell in cells for entry in cell.runs if entry.status in DROPPED or entry.unreplaced]
    columns = ("Run", "Corpus", "Seed", summary.score.axis, "centre", "scale", "distance", "why", "what became of it")
    parts: list[Table | Figure] = []
    if audit:
        caption = "Dropped and unresolved runs; the distance is in scales from the centre of the cell"
        parts.append(Table(caption, columns, tuple(audit), numbers=2, texts=2))
    rows = []
    for method in summary.methods:
        means = (number(method.mean_ua), number(method.mean_ua_all_runs), _change(method))
        rows.append(Row((material.label(method.method), method.corpus, *means, str(method.dropped))))
    headings = ("Method", "Corpus", "kept runs", "all runs", "difference", "dropped")
    parts.append(Table(f"Mean {summary.score.axis} without and with the dropped runs", headings, tuple(rows), numbers=2))
    sentences = [f"Outlier rule: {summary.outlier_rule if summary.outlier_rule != 'none' else 'none in force'}."]
    if not audit:
        sentences.append("No run was dropped.")
    return Section("dropped", "What was dropped?", tuple(sentences), tuple(parts))


def runs_section(material: Material) -> Section:
    """All runs, to be sorted and filtered."""
    entries = list(entries_of_summary(material.summary))
    listed = [entry for entry in entries if entry.unreplaced or entry.status is not Status.accepted] if material.large else entries
    rows = tuple(_run_row(material, entry) for entry in listed)
    score = material.summary.score
    unit = "scores in percent." if score.unit == "%" else f"{score.axis}; WA and macro F1 in percent."
    columns = ("Run", "Corpus", "Method", "Fold", "Slot", "Seed", score.label, "WA", "macro F1", "State")
    which = f"{len(listed)} of {counted(len(entries), 'run')}" if material.large else counted(len(entries), "run")
    caption = f"{which}; {unit} A click or Enter on a heading sorts; once more, the other way round."
    sentences = (f"Of {counted(len(entries), 'run')} those are listed that were dropped or have no result; all are in runs.csv below.",)
    return Section(
        "runs", "All runs", sentences if material.large else (), (Table(caption, columns, rows, sortable=True, numbers=4, texts=1),)
    )


def _dots(material: Material, corpus: str, metric: str, name: str) -> Figure:
    methods = material.methods(corpus, metric)
    folds = [cell.fold for cell in methods[0].cells]
    names = [material.published.columns.get(fold, f"Fold {fold}") for fold in folds]
    values = [entry.scores.ua for method in methods for cell in method.cells for entry in cell.runs if entry.scores is not None]
    drawn, height = panel(named(names), linear(values, material.axis(metric)), height=280)
    centres, width = spread(len(methods), BESIDE * (1 - 1 / len(methods))), BESIDE / len(methods) * WITHIN
    for place, (method, centre) in enumerate(zip(methods, centres, strict=True)):
        for fold, cell in ((fold, cell) for fold, cell in enumerate(method.cells) if cell.runs):
            slots = sorted({entry.slot for entry in cell.runs})
            offsets = dict(zip(slots, spread(len(slots), width), strict=True))
            if cell.mean_ua is not None:
                reach = [(fold + centre + sign * width, cell.mean_ua) for sign in (-1, 1)]
                drawn.line(reach, colour(place), f"{material.label(method.method)}, fold {cell.fold}: mean {number(cell.mean_ua)}")
            for entry in (entry for entry in cell.runs if entry.scores is not None):
                tip = "" if material.large and entry.status is Status.accepted and not entry.unreplaced else _tip(material, entry)
                _draw_run(drawn, fold + centre + offsets[entry.slot], entry, place, tip)
    keys = [(shape(place), colour(place), material.label(method.method)) for place, method in enumerate(methods)]
    what = "One mark a run, by fold and method; short lines: means of kept runs. Hollow with a cross: dropped outlier; "
    what += "hollow triangle: diverged; ring: outlier that no run replaces."
    title = f"{material.heading(metric)} of every run on {corpus}"
    return figure(name, title, what, height, (drawn.svg(), legend(keys)), view=View(metric))


def _draw_run(panel: Panel, x: float, entry: Entry, place: int, tip: str) -> None:
    ua = entry.scores.ua if entry.scores else 0.0
    if entry.status is Status.diverged:
        panel.mark(x, ua, "down", f"{colour(place)} hollow", tip, 6)
    elif entry.status is Status.outlier:
        panel.mark(x, ua, shape(place), f"{colour(place)} hollow", tip, 6)
        panel.mark(x, ua, "cross", f"{colour(place)} cross", tip, 3)
    else:
        panel.mark(x, ua, shape(place), f"{colour(place)}{' ring' if entry.unreplaced else ''}", tip)


def _shares(material: Material, corpus: str, metric: str) -> list[Table]:
    found = [(method, method.crossed.shares) for method in material.methods(corpus, metric) if method.crossed and method.crossed.shares]
    rows = [
        Row((material.label(method.method), *(f"{round_half_up(100 * share, 0)} %" for share in (shares.folds, shares.seeds, shares.rest))))
        for method, shares in found
    ]
    caption = f"Share of the variance of a run's {material.heading(metric)} (mixed model, fold and seed as random effects)"
    return [Table(caption, ("Method", "folds", "seeds", "the rest"), tuple(rows), View(metric))] if rows else []


def _audit(material: Material, entry: Entry, cell: Sequence[Entry]) -> Row:
    verdict = entry.verdict
    numbers = (DASH,) * 3 if verdict is None else tuple(number(value, 2) for value in (verdict.centre, verdict.scale, verdict.distance))
    later = [each for each in cell if each.slot == entry.slot and each is not entry and each.status not in DROPPED]
    fate = _replacement(material, later[-1]) if later else "not replaced"
    if entry.unreplaced:
        fate = "left out of the means" if entry.status is Status.outlier else "kept in the means: no reserve seed is left"
    why = "further from the centre than the rule allows"
    if entry.status is Status.diverged:
        why = "training diverged, or stayed at the loss of the class prior"
    ua = DASH if entry.scores is None else number(entry.scores.ua)
    return Row((f"{material.label(entry.method)} / {entry.fold} / {entry.slot}", entry.corpus, str(entry.seed), ua, *numbers, why, fate))


def _replacement(material: Material, entry: Entry) -> str:
    return f"replaced by seed {entry.seed}" + (
        "" if entry.scores is None else f", {material.summary.score.label} {number(entry.scores.ua)}"
    )


def _run_row(material: Material, entry: Entry) -> Row:
    scores = (None,) * 3 if entry.scores is None else (entry.scores.ua, entry.scores.wa, entry.scores.macro_f1)
    state = "unresolved outlier" if entry.unreplaced else entry.status.value
    cells = (entry.name, entry.corpus, material.label(entry.method), entry.fold, str(entry.slot), str(entry.seed))
    return Row((*cells, *(Cell(number(value, 2), value) for value in scores), state), dropped=entry.status in DROPPED)


def _tip(material: Material, entry: Entry) -> str:
    state = "unresolved outlier" if entry.unreplaced else entry.status.value
    score = number(entry.scores.ua if entry.scores else None, 2)
    return f"{material.label(entry.method)}, fold {entry.fold}, slot {entry.slot}, seed {entry.seed}: {score} ({state})"


def _change(method: MethodSummary) -> str:
    if method.mean_ua is None or method.mean_ua_all_runs is None:
        return DASH
    return signed(method.mean_ua - method.mean_ua_all_runs)
