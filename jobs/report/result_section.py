"""The first answer of a report: means with intervals, beside published figures; and the tables as `collect` prints them."""

from __future__ import annotations

from jobs.report.drawing import colour, figure, legend, linear, named, panel, shape
from jobs.report.material import Material
from jobs.report.page import RUNS, SCORE, Cell, Figure, Row, Section, Table, View, number
from jobs.statistics import ALPHA, Interval, crossed_mean, p_text, slot_means, t_interval
from jobs.tables.display import Cell as PrintedCell
from jobs.tables.display import Table as PrintedTable
from jobs.tables.display import tables_of
from jobs.tables.format import interval_text
from jobs.tables.order import order_sentences
from jobs.tables.plain import plain_tables
from jobs.tables.summary import MethodSummary, all_by_slot
from jobs.text import counted

ROW = 36  # height of each mean


def result_section(material: Material) -> Section:
    """What the means are, and how far they are known."""
    summary = material.summary
    missing = len(summary.missing) + sum(each.metrics is None for each in summary.measured)
    state = "complete" if summary.complete else f"incomplete: {counted(missing, 'run')} missing"
    total, dropped = sum(method.n for method in summary.methods), sum(method.dropped for method in summary.methods)
    left_out = f"{dropped} dropped by the outlier rule or diverged"
    sentences = [f"{summary.experiment} is {state}."]
    if summary.methods:
        sentences.append(f"{counted(total, 'run')} in the means, {left_out}.")
    parts: list[Table | Figure] = []
    printed = tables_of(summary, material.published)
    for place, (corpus, table) in enumerate(zip(material.corpora, printed, strict=True)):
        sentences.extend(_best_sentence(material, corpus))
        for metric in material.by_metric:
            for runs in RUNS:
                parts.append(_means_table(material, corpus, View(metric, runs)))
                parts.append(_means_figure(material, corpus, View(metric, runs), f"means-{place}-{metric}-{runs}"))
        parts.append(_printed(table))
    sentences.extend(order_sentences(summary, material.labels).values())
    sentences.extend(summary.arithmetic.warnings)
    parts.extend(
        Table(
            plain.caption[0],
            plain.columns,
            tuple(Row(row) for rows in plain.blocks for row in rows),
            numbers=plain.texts,
            note=plain.caption[1:],
        )
        for plain in plain_tables(summary, material.published)
    )
    return Section("result", "What is the result?", tuple(sentences), tuple(parts))


def intervals_of(method: MethodSummary, runs: str) -> tuple[Interval | None, Interval | None]:
    """The 95 % intervals of a mean over seeds, and over folds and seeds together; of all runs, a slot counts with the mean of its runs."""
    if runs == "kept":
        return method.interval, method.crossed.interval if method.crossed else None
    by_fold = [all_by_slot(cell.runs) for cell in method.planned]
    crossed = crossed_mean(by_fold)
    return t_interval(slot_means(by_fold)), crossed.interval if crossed else None


def mean_of(method: MethodSummary, runs: str) -> float | None:
    """The mean over kept runs or over all."""
    return method.mean_ua if runs == "kept" else method.mean_ua_all_runs


def _best_sentence(material: Material, corpus: str) -> list[str]:
    """The method with the best mean, and whether its difference to the second is more than what seeds and folds explain."""
    known = [(method.mean_ua, method) for method in material.methods(corpus) if method.mean_ua is not None]
    if not known:
        return [f"No run on {corpus} has a result yet."]
    if len({method.folds for _, method in known}) > 1:
        return [f"Methods on {corpus} were run on different folds, so their means are not compared."]
    score = material.summary.score
    ordered = [method for _, method in sorted(known, key=lambda each: score.order(each[0]))]
    first = ordered[0]
    which = "Highest" if score.higher_is_better else "Lowest"
    sentence = f"{which} mean {score.label} on {corpus}: {material.label(first.method)} with {number(first.mean_ua)} {score.unit}".rstrip()
    crossed = first.crossed.interval if first.crossed else None
    sentence += f" (95 % interval over folds and seeds {interval_text(crossed)})." if crossed else "."
    if len(ordered) < 2:
        return [sentence]
    pair = {first.method, ordered[1].method}
    found = next((each for each in material.summary.comparisons if each.corpus == corpus and {each.first, each.second} == pair), None)
    if found is None or found.crossed is None or found.corrected.crossed is None:
        return [sentence]
    verb = "is" if found.corrected.crossed < ALPHA else "is not"
    second, p = material.label(ordered[1].method), p_text(found.corrected.crossed)
    return [f"{sentence} Its difference to {second} {verb} significant over folds and seeds (Holm-corrected p {p})."]


def _means_table(material: Material, corpus: str, view: View) -> Table:
    rows = []
    for method in material.methods(corpus, view.metric):
        seeds, both = intervals_of(method, view.runs)
        spread = method.sd_ua if view.runs == "kept" else method.sd_ua_all_runs
        count = method.n if view.runs == "kept" else sum(entry.scores is not None for cell in method.cells for entry in cell.runs)
        numbers = (number(mean_of(method, view.runs)), number(spread), interval_text(seeds), interval_text(both))
        rows.append(Row((material.label(method.method), *numbers, str(count), str(method.dropped))))
    columns = ("Method", f"mean {material.axis(view.metric)}", "sd", "95 % over seeds", "95 % over folds and seeds", "runs", "dropped")
    return Table(f"{material.heading(view.metric)} on {corpus}, {RUNS[view.runs]}", columns, tuple(rows), view)


def _means_figure(material: Material, corpus: str, view: View, name: str) -> Figure:
    methods = material.methods(corpus, view.metric)
    heading = material.heading(view.metric)
    published = {row.method: row for row in material.published.rows} if view.metric == SCORE else {}
    shown = len(material.corpora) == 1 and any(method.method in published for method in methods)

    found = [(method, mean_of(method, view.runs), *intervals_of(method, view.runs)) for method in methods]
    theirs = {name: row.mean_ua for name, row in published.items()} if shown else {}
    ends = [end for _, _, *intervals in found for interval in intervals if interval for end in interval]
    beside = [theirs[method.method] for method in methods if method.method in theirs]
    values = [*ends, *beside, *(mean for _, mean, *_ in found if mean is not None)]
    names = [material.label(method.method) for method in reversed(methods)]
    drawn, height = panel(linear(values, material.axis(view.metric)), named(names), height=12 + ROW * len(methods))
    for place, (method, mean, seeds, both) in enumerate(found):
        y, style = float(len(methods) - 1 - place), colour(place)
        if both is not None:
            drawn.line([(both.low, y), (both.high, y)], style, f"95 % over folds and seeds: {interval_text(both)}")
        if seeds is not None:
            drawn.line([(seeds.low, y), (seeds.high, y)], f"thick {style}", f"95 % over seeds: {interval_text(seeds)}")
        if mean is not None:
            drawn.mark(mean, y, shape(place), f"{style} ring", f"{material.label(method.method)}: {number(mean)}", 6)
        if method.method in theirs:
            drawn.mark(theirs[method.method], y + 0.3, "diamond", "open", f"published: {number(theirs[method.method])}")
    keys = [("line", "thick m0", "95 % over seeds"), ("line", "m0", "95 % over folds and seeds")]
    keys += [("diamond", "open", "published")] if shown else []
    what = f"Marks: mean over folds of the mean over seeds, {RUNS[view.runs]}. Thick lines: 95 % interval for new seeds on these folds; "
    what += "thin lines: for new folds and seeds."
    if shown:
        what += f" Open diamonds: {material.published.source}."
    return figure(name, f"Mean {heading} on {corpus}", what, height, (drawn.svg(), legend(keys)), view=view)


def _printed(table: PrintedTable) -> Table:
    """The table that `collect` prints: methods and folds."""
    rows = []
    for index, block in enumerate(table.blocks):
        for row in block.rows:
            label = f"{row.label}, published" if index else row.label
            trained = (row.trained,) if table.sized else ()
            rows.append(Row((label, *map(_cell, (*row.cells, row.mean)), row.n, row.dropped, _cell(row.every), *trained)))
    columns = ("", *table.columns, "Mean", "n", "Dropped", "All runs", *(("Trained",) if table.sized else ()))
    return Table(table.caption[0], columns, tuple(rows), note=(*table.caption[1:], *table.details))


def _cell(cell: PrintedCell) -> Cell:
    spread = f" ± {cell.sd}" if cell.sd else ""
    note = f" ({cell.note})†" if cell.note else ""
    return Cell(f"{cell.mean}{spread}{note}{'‡' if cell.unresolved else ''}", strong=cell.best)
