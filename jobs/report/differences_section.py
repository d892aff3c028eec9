"""Whether one method is better than another: paired differences per run and fold, with intervals and corrected tests."""

from __future__ import annotations

from jobs.report.drawing import colour, figure, legend, linear, named, panel, spread
from jobs.report.material import Material
from jobs.report.page import Figure, Row, Section, Table, View, number
from jobs.statistics import differences_by_key, mean, p_text
from jobs.tables.display import tables_of
from jobs.tables.format import DASH, interval_text, signed
from jobs.tables.summary import Comparison, MethodSummary, accepted

WITHIN = 0.5  # width of the marks of a fold
COLUMNS = (
    *("Difference", "mean", "95 % interval", "pairs", "t", "t, Holm", "Wilcoxon", "Wilcoxon, Holm"),
    *("95 % over folds and seeds", "p", "p, Holm", "detectable"),
)


def differences_section(material: Material) -> Section | None:
    """All pairs of methods of each corpus; None where each corpus has a single method."""
    parts: list[Table | Figure] = []
    tables = tables_of(material.summary, material.published)
    for place, (corpus, printed) in enumerate(zip(material.corpora, tables, strict=True)):
        for metric, summary in material.by_metric.items():
            compared = [found for found in summary.comparisons if found.corpus == corpus]
            for pair, found in enumerate(compared):
                parts.append(_differences(material, found, metric, f"differences-{place}-{pair}-{metric}"))
            rows, note = tuple(_row(material, found) for found in compared), printed.differences_caption[1:]
            if rows:
                parts.append(Table(f"Differences of {material.heading(metric)} in points", COLUMNS, rows, View(metric), note=note))
    sentence = "A pair is two runs of the same fold and slot. An interval that holds zero means that the difference may be chance."
    return Section("differences", "Is one method better than another?", (sentence,), tuple(parts)) if parts else None


def _differences(material: Material, found: Comparison, metric: str, name: str) -> Figure:
    by_name = {method.method: method for method in material.methods(found.corpus, metric)}
    first, second = by_name[found.first], by_name[found.second]
    pairs = _pairs(first, second)
    folds = list(pairs)
    names = [material.published.columns.get(fold, f"Fold {fold}") for fold in folds]
    crossed = found.crossed.interval if found.crossed else None
    values = [value for fold in pairs.values() for value in fold.values()]
    drawn, height = panel(
        named([*names, "All"]), linear([0.0, *values, *(crossed or ())], f"{material.heading(metric)}, points"), height=220
    )
    drawn.line([(drawn.x.low, 0.0), (drawn.x.high, 0.0)], "dashed grey")
    means: list[tuple[float, float]] = []
    for place, (fold, differences) in enumerate(pairs.items()):
        offsets = spread(len(differences), WITHIN)
        for (slot, value), offset in zip(differences.items(), offsets, strict=True):
            tip = "" if material.large else f"fold {fold}, slot {slot}: {signed(value)}"
            drawn.mark(place + offset, value, "circle", colour(0), tip, 3.5)
        if (middle := mean(list(differences.values()))) is not None:
            means.append((float(place), middle))
    drawn.line(means, "grey")
    for x, middle in means:
        drawn.mark(x, middle, "square", "grey", f"mean of the fold: {signed(middle)}")
    if crossed is not None and found.crossed is not None:
        at = float(len(folds))
        drawn.line([(at, crossed.low), (at, crossed.high)], f"medium {colour(1)}", f"95 %: {interval_text(crossed)}")
        drawn.mark(at, found.crossed.mean, "diamond", colour(1), f"mean: {signed(found.crossed.mean)}", 6)
    title = f"{material.label(found.second)} − {material.label(found.first)} on {found.corpus}"
    keys = [
        ("circle", colour(0), "a pair"),
        ("square", "grey", "mean of a fold"),
        ("diamond", colour(1), "mean, 95 % over folds and seeds"),
    ]
    what = f"Differences of {material.heading(metric)} of kept runs, pair by pair; squares: means of folds, joined; diamond: mean over "
    what += "folds and seeds with its 95 % interval for new folds and seeds."
    return figure(name, title, what, height, (drawn.svg(), legend(keys)), view=View(metric))


def _pairs(first: MethodSummary, second: MethodSummary) -> dict[str, dict[int, float]]:
    """Fold -> slot -> difference, of the folds and slots that both have."""
    of_second = {cell.fold: accepted(cell.runs) for cell in second.cells}
    found = {cell.fold: differences_by_key(accepted(cell.runs), of_second.get(cell.fold, {})) for cell in first.cells}
    return {fold: differences for fold, differences in found.items() if differences}


def _row(material: Material, found: Comparison) -> Row:
    pairs, crossed, corrected = found.over_pairs, found.crossed, found.corrected
    tests = map(p_text, (pairs.t_p, corrected.pairs_t, pairs.wilcoxon_p, corrected.pairs_wilcoxon))
    both: tuple[str, ...] = (DASH,) * 4
    if crossed is not None:
        both = (interval_text(crossed.interval), p_text(crossed.p), p_text(corrected.crossed), number(crossed.detectable))
    middle = DASH if pairs.mean is None else signed(pairs.mean)
    label = f"{material.label(found.second)} − {material.label(found.first)}"
    return Row((label, middle, interval_text(pairs.interval), str(pairs.pairs), *tests, *both))
