"""Which classes are recognised: recall per class with its range over folds, confusion matrices, and their differences between methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from jobs.report.drawing import (
    LETTER,
    LONGEST,
    WIDTH,
    Axis,
    Box,
    Panel,
    colour,
    figure,
    left_margin,
    legend,
    linear,
    named,
    panel,
    shape,
    spread,
)
from jobs.report.material import Material
from jobs.report.page import Figure, Row, Section, Table, number
from jobs.statistics import known, mean
from jobs.store.scores import Confusion, confusion_of, summed
from jobs.tables.format import signed

FIELD = 44.0  # side of a cell of a matrix
GAP = 26.0
TOP = 46.0
Key = tuple[str, str]  # corpus, method
Show = Callable[[float], tuple[float, str, str]]  # value -> opacity, class of the colour, text


def classes_section(material: Material) -> Section | None:
    """None without confusion matrices, as for runs from a CSV file."""
    found = _confusions(material)
    parts: list[Table | Figure] = []
    for place, corpus in enumerate(material.corpora):
        methods = {method.method: found[corpus, method.method] for method in material.methods(corpus) if (corpus, method.method) in found}
        totals = {method: summed(each for fold in by_fold.values() for each in fold) for method, by_fold in methods.items()}
        if totals:
            parts.append(_recalls(material, corpus, methods, totals, f"recall-{place}"))
            parts.append(_matrices(material, corpus, totals, f"confusion-{place}"))
        if len(totals) > 1:
            parts.append(_changes(material, corpus, totals, f"change-{place}"))
    sentence = "Over the runs that fill the slots, dropped ones left out."
    return Section("classes", "Which classes are recognised?", (sentence,), tuple(parts)) if parts else None


def recalls(confusion: Confusion) -> dict[str, float]:
    """Class -> recall in percent; classes without examples are left out."""
    rows = zip(confusion.classes, confusion.counts, strict=True)
    return {name: 100 * row[place] / sum(row) for place, (name, row) in enumerate(rows) if sum(row)}


def _confusions(material: Material) -> dict[Key, dict[str, list[Confusion]]]:
    """Corpus and method -> fold -> confusion matrix of each run."""
    found: dict[Key, dict[str, list[Confusion]]] = {}
    for source in material.sources:
        for run, result in source.runs():
            confusion = confusion_of(result)
            if confusion is not None:
                by_fold = found.setdefault((source.graph.corpus, source.method(run)), {})
                by_fold.setdefault(run.fold, []).append(confusion)
    return found


def _recalls(
    material: Material, corpus: str, methods: Mapping[str, Mapping[str, Sequence[Confusion]]], totals: Mapping[str, Confusion], name: str
) -> Figure:
    classes = list(dict.fromkeys(each for total in totals.values() for each in total.classes))
    by_fold = {method: [recalls(summed(runs)) for runs in folds.values()] for method, folds in methods.items()}
    values = [value for folds in by_fold.values() for fold in folds for value in fold.values()]
    drawn, height = panel(named(classes), linear(values, "recall (%)"), height=220)
    rows = []
    for place, (method, folds) in enumerate(by_fold.items()):
        offset = spread(len(by_fold), 0.5)[place]
        cells = []
        for at, each in enumerate(classes):
            seen = known(fold.get(each) for fold in folds)
            middle = mean(seen)
            cells.append(f"{number(middle)} ({number(min(seen))} to {number(max(seen))})" if middle is not None else "–")
            if middle is not None:
                text = f"{material.label(method)}, {each}: {cells[-1]}"
                drawn.line([(at + offset, min(seen)), (at + offset, max(seen))], colour(place), text)
                drawn.mark(at + offset, middle, shape(place), colour(place), text)
        rows.append(Row((material.label(method), *cells)))
    keys = [(shape(place), colour(place), material.label(method)) for place, method in enumerate(by_fold)]
    what = "Marks: mean over folds of the recall over all runs of a fold; lines: from the lowest fold to the highest."
    tables = (Table("Recall in percent: mean (lowest to highest fold)", ("Method", *classes), tuple(rows)),)
    return figure(name, f"Recall per class on {corpus}", what, height, (drawn.svg(), legend(keys)), tables=tables)


def _matrices(material: Material, corpus: str, totals: Mapping[str, Confusion], name: str) -> Figure:
    examples = material.summary.terms.examples
    shares = {material.label(method): _shares(total) for method, total in totals.items()}
    tables = [
        Table(f"{material.label(method)}: {examples}, rows: true class", ("", *total.classes), tuple(_counts(total)))
        for method, total in totals.items()
    ]
    classes = next(iter(totals.values())).classes
    parts, height = _side_by_side(classes, shares, lambda share: (share, "m0", f"{100 * share:.0f}"))
    what = f"Rows: true class; columns: predicted class; percent of the {examples} of the true class, summed over runs."
    return figure(name, f"Confusion on {corpus}", what, height, parts, tables=tables)


def _changes(material: Material, corpus: str, totals: Mapping[str, Confusion], name: str) -> Figure:
    (first, base), *others = totals.items()
    before = _shares(base)
    changes = {
        f"{material.label(method)} − {material.label(first)}": [
            [now - then for now, then in zip(row, former, strict=True)] for row, former in zip(_shares(total), before, strict=True)
        ]
        for method, total in others
        if total.classes == base.classes
    }
    largest = max((abs(value) for matrix in changes.values() for row in matrix for value in row), default=0.0) or 1.0
    parts, height = _side_by_side(
        base.classes, changes, lambda value: (abs(value) / largest, "m0" if value > 0 else "m1", signed(100 * value))
    )
    what = f"Difference of the shares to {material.label(first)}, in points; blue: more, red: less. On the diagonal, more is better."
    return figure(name, f"What a method changes on {corpus}", what, height, parts)


def _side_by_side(classes: Sequence[str], matrices: Mapping[str, Sequence[Sequence[float]]], show: Show) -> tuple[list[str], float]:
    """Matrices beside one another, as many as the drawing is wide, and the height of the drawing."""
    left, side = left_margin(classes), FIELD * len(classes)
    below = 14 + LETTER * min(max(map(len, classes)), LONGEST)
    in_row = max(1, int((WIDTH - left + GAP) // (side + GAP)))
    rows = Axis(-0.5, len(classes) - 0.5, tuple((float(place), each) for place, each in enumerate(reversed(classes))))
    parts = []
    for place, (title, matrix) in enumerate(matrices.items()):
        line, column = divmod(place, in_row)
        box = Box(left + column * (side + GAP), TOP + line * (side + below + TOP), side, side)
        drawn = Panel(named(classes), replace(rows, ticks=rows.ticks if column == 0 else ()), box, title, turned=True)
        for true, row in enumerate(matrix):
            for predicted, value in enumerate(row):
                opacity, style, text = show(value)
                tip = f"{title}: true {classes[true]}, predicted {classes[predicted]}: {text}"
                drawn.field(predicted, len(classes) - 1 - true, opacity, style, text, tip)
        parts.append(drawn.svg())
    return parts, (1 + (len(matrices) - 1) // in_row) * (side + below + TOP)


def _shares(confusion: Confusion) -> list[list[float]]:
    """Rows of shares of the true class; zeros for a class without examples."""
    return [[count / max(sum(row), 1) for count in row] for row in confusion.counts]


def _counts(confusion: Confusion) -> list[Row]:
    return [Row((name, *map(str, row))) for name, row in zip(confusion.classes, confusion.counts, strict=True)]
