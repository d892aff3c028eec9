"""Tables in the layout of the paper, and their text as Markdown, CSV and for a terminal. Pure.

Rows are methods, columns are held-out folds; our results are above the published ones. In each block the best mean of a
column is bold (with all ties on the printed digits); a column with an incomplete cell has no best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.experiment.recipes import comparison_sentences, recipe_sentences, training_sentences
from jobs.statistics import round_half_up
from jobs.store.scores import Score
from jobs.tables.format import DASH, code_sentence, csv_text, difference_cells, interval_text, rendered
from jobs.tables.order import order_sentences
from jobs.tables.plain import PlainTable, plain_tables
from jobs.tables.published import Published, position
from jobs.tables.sizes import differ, size_sentences
from jobs.tables.summary import VERDICT, Comparison, Dropped, MethodSummary, Summary, Unreplaced, verdict_values
from jobs.text import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable


TEMPLATES = Path(__file__).parent / "templates"
CSV_COLUMNS = ("corpus", "method", "fold", "slot", "seed", "ua", "wa", "macro_f1", "status", *VERDICT)
METHOD_COLUMNS = (
    *("corpus", "method", "mean_ua", "sd_ua", "mean_ua_all_runs", "sd_ua_all_runs", "n"),
    *("outliers", "outliers_rerun", "diverged", "diverged_rerun", "unresolved", "complete", "outlier_rule"),
    *("trained_parameters", "parameters"),
)
MEASURED_COLUMNS = ("corpus", "method", "metric", "value")
CAPTION_PACKAGES = ("python", "torch", "transformers", "scikit-learn", "numpy")
BOLD = "Bold: best mean of a column, ties included."
DIFFERENCES_CAPTION = (
    "Differences of {label} between methods in points, over (fold, slot) pairs: mean, 95 % interval, paired t-test, "
    "Wilcoxon signed-rank test.",
    "Pairs of one fold share {groups} and upstream stages, so these p-values are valid for new seeds on these folds only.",
    "Folds and seeds: interval and test for new folds and new seeds, from a mixed model in which both are random effects; "
    "detectable: the smallest difference that this test finds with probability 0.8 at this number of folds and seeds.",
    "p-values are two-sided; Holm: corrected for the number of comparisons in the table; – if there are too few data.",
)


OVER_FOLDS = "The 95 % interval over folds and seeds is for new folds too (mixed model, fold and seed as random effects)."
ONE_FOLD = "One fold is held out: there is no interval over folds, and every ± and interval is over seeds only."


@dataclass(frozen=True)
class Cell:
    """One cell as printed."""

    mean: str  # rounded, or a dash
    sd: str = ""  # rounded, or empty
    note: str = ""  # `3/5` if runs are missing
    best: bool = False
    unresolved: bool = False  # includes an outlier that was not replaced


@dataclass(frozen=True)
class Row:
    """One method (or other row) of a table."""

    label: str
    cells: tuple[Cell, ...]
    mean: Cell
    interval: str = ""  # over seeds
    both: str = ""  # interval over folds and seeds
    n: str = ""  # runs a cell
    dropped: str = ""
    every: Cell = Cell("")  # mean and sd over all runs, dropped ones included
    trained: str = ""  # trained parameters and their share


@dataclass(frozen=True)
class Block:
    """Rows from one source."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Table:
    """Everything printed for one corpus, as plain text; each format escapes it."""

    title: str
    columns: tuple[str, ...]
    blocks: tuple[Block, ...]
    differences: tuple[tuple[str, ...], ...]  # the cells of a row for each comparison of methods
    caption: tuple[str, ...]  # sentences
    details: tuple[str, ...]  # more sentences: what the runs were computed with
    outliers: tuple[str, ...]  # sentences of the caption on dropped runs
    differences_caption: tuple[str, ...]
    sized: bool = False  # whether methods train different numbers of parameters, which are a column then


def tables_of(summary: Summary, published: Published) -> tuple[Table, ...]:
    """One table per corpus, in the order of the summary."""
    corpora = dict.fromkeys(method.corpus for method in summary.methods)
    return tuple(_table(summary, published, corpus) for corpus in corpora)


def render_markdown(summary: Summary, published: Published) -> str:
    """The tables as Markdown."""
    plain = plain_tables(summary, published)
    return rendered(TEMPLATES / "table.md.j2", experiment=summary.experiment, tables=tables_of(summary, published), plain=plain)


def render_csv(summary: Summary) -> str:
    """One row per run, columns `CSV_COLUMNS`; numbers are not rounded, and empty for a run without scores or verdict."""
    entries = (entry for method in summary.methods for cell in method.cells for entry in cell.runs)
    rows = []
    for entry in entries:
        scores = (None, None, None) if entry.scores is None else astuple(entry.scores)
        out, *place = verdict_values(entry)
        flag = "" if out is None else _flag(out)
        rows.append((entry.corpus, entry.method, entry.fold, entry.slot, entry.seed, *scores, entry.status.value, flag, *place))
    return csv_text([*map(summary.score.named, CSV_COLUMNS)], rows)


def render_methods_csv(summary: Summary) -> str:
    """One row per method, columns `METHOD_COLUMNS`: means over accepted and over all runs, dropped runs, outlier rule, parameters."""
    rows = []
    for method in summary.methods:
        numbers = (method.mean_ua, method.sd_ua, method.mean_ua_all_runs, method.sd_ua_all_runs, method.n)
        counts = (*astuple(method.outliers), *astuple(method.diverged), method.unresolved)
        size = (None, None) if method.size is None else astuple(method.size)
        rows.append((method.corpus, method.method, *numbers, *counts, _flag(method.complete), summary.outlier_rule, *size))
    return csv_text([*map(summary.score.named, METHOD_COLUMNS)], rows)


def render_measured_csv(summary: Summary) -> str:
    """One row per metric of a measured corpus, columns `MEASURED_COLUMNS`; numbers are not rounded."""
    rows = [(each.corpus, each.method, name, value) for each in summary.measured for name, value in (each.metrics or {}).items()]
    return csv_text(MEASURED_COLUMNS, rows)


def _flag(value: bool) -> str:
    return "true" if value else "false"


def terminal_tables(summary: Summary, published: Published) -> tuple[RichTable, ...]:
    """The same tables for rich: methods x folds, mean ± sd, and n."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    found = []
    for table in tables_of(summary, published):
        shown = RichTable(title=Text(f"{summary.experiment}: {table.title}"), box=SIMPLE_HEAD, pad_edge=False, title_justify="left")
        shown.caption = Text(table.blocks[1].title) if len(table.blocks) > 1 else None
        rows = [
            (
                index,
                (f"{row.label}, published" if index else row.label, *map(_plain_cell, (*row.cells, row.mean)), *_runs_of(row, table)),
                row,
            )
            for index, block in enumerate(table.blocks)
            for row in block.rows
        ]
        headings = ("", *table.columns, "Mean", "n", "Dropped", "All runs", *(("Trained",) if table.sized else ()))
        for place, heading in enumerate(headings):
            # A narrow terminal breaks cells between words; a number is never cut.
            words = [word for text in (heading, *(texts[place] for _, texts, _ in rows)) for word in text.split()]
            shown.add_column(Text(heading), justify="right" if place else "left", min_width=max(map(len, words), default=1))
        for index, (label, *texts), row in rows:
            if index and len(shown.rows) == len(table.blocks[0].rows):
                shown.add_section()
            cells = (*row.cells, row.mean)
            bold = [Text(text, style="bold" if cell.best else "") for text, cell in zip(texts, cells, strict=False)]
            shown.add_row(Text(label), *bold, *map(Text, texts[len(cells) :]), style="dim" if index else "")
        found.append(shown)
    return tuple(found)


def _runs_of(row: Row, table: Table) -> tuple[str, ...]:
    return row.n, row.dropped, _plain_cell(row.every), *((row.trained,) if table.sized else ())


def print_tables(summary: Summary, published: Published, console: Console | None = None) -> None:
    """Print the tables (default: on stdout); a pipe gets plain lines as wide as needed."""
    if console is None:
        from rich.console import Console

        console = Console(highlight=False)
    for table, shown in zip(tables_of(summary, published), terminal_tables(summary, published), strict=True):
        _print_whole(console, shown)
        if _judged(summary):
            rule = summary.outlier_rule.partition(":")[0]
            console.print(f"Outlier rule: {rule}. {' '.join(table.outliers)}", markup=False, soft_wrap=True)
    for plain in plain_tables(summary, published):
        _print_whole(console, _plain_rich(plain))
    for method in (method for method in summary.methods if not method.complete):
        wanted = sum(cell.slots for cell in method.cells)
        label = published.labels.get(method.method, method.method)
        console.print(f"incomplete: {label} has {method.n} of {counted(wanted, 'run')}", markup=False, soft_wrap=True)


def _plain_rich(table: PlainTable) -> RichTable:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(title=Text(table.caption[0]), box=SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for place, column in enumerate(table.columns):
        shown.add_column(Text(column), justify="left" if place < table.texts else "right")
    for rows in table.blocks:
        for row in rows:
            shown.add_row(*map(Text, row))
        shown.add_section()
    return shown


def _print_whole(console: Console, table: RichTable) -> None:
    """A pipe has no width limit: lines are as long as needed. A narrow terminal wraps lines but never cuts a number."""
    needed = console.measure(table, options=console.options.update(max_width=10_000))
    before = console.width
    console.width = max(before, needed.minimum if console.is_terminal else max(needed.maximum, len(str(table.title))))
    try:
        console.print(table)
    finally:
        console.width = before


def _table(summary: Summary, published: Published, corpus: str) -> Table:
    methods = [method for method in summary.methods if method.corpus == corpus]
    folds = [cell.fold for cell in methods[0].cells]
    blocks = [Block("This experiment", _best([_measured(method, published) for method in methods], len(methods), summary.score))]
    if published.rows:
        rows = [
            Row(row.label, tuple(_cell(row.ua.get(fold), row.sd.get(fold)) for fold in folds), _cell(row.mean_ua, None))
            for row in published.rows
        ]
        blocks.append(
            Block(f"Published: {published.source}", _best(rows, sum(row.method is not None for row in published.rows), summary.score))
        )
    differences = tuple(_difference(found, published) for found in summary.comparisons if found.corpus == corpus)
    title = published.title or f"{summary.score.heading} on {corpus}, one column per held-out fold"
    return Table(
        title=title,
        columns=tuple(published.columns.get(fold, f"Fold {fold}") for fold in folds),
        blocks=tuple(blocks),
        differences=differences,
        caption=(f"{title}.", *_caption(summary, methods, published, folds)),
        details=_details(summary, published),
        outliers=_dropping_sentences(summary, methods, published),
        differences_caption=(*_differences_caption(folds, summary), *comparison_sentences(summary.recipes)),
        sized=differ(method.size for method in methods),
    )


def _measured(method: MethodSummary, published: Published) -> Row:
    cells = [_cell(cell.mean_ua, cell.sd_ua, "" if cell.complete else f"{cell.n}/{cell.slots}") for cell in method.cells]
    wanted = sum(cell.slots for cell in method.cells)
    mean = replace(_cell(method.mean_ua, method.sd_ua, "" if method.complete else f"{method.n}/{wanted}"), unresolved=method.unresolved > 0)
    counts = {cell.n for cell in method.planned}
    n = str(min(counts)) if len(counts) == 1 else f"{min(counts)}–{max(counts)}"
    every = _cell(method.mean_ua_all_runs, method.sd_ua_all_runs)
    both = interval_text(method.crossed.interval if method.crossed else None)
    trained = method.size.text if method.size else DASH
    seeds = interval_text(method.interval)
    return Row(_label(method, published), tuple(cells), mean, seeds, both, n, str(method.dropped), every, trained)


def _cell(mean: float | None, sd: float | None, note: str = "") -> Cell:
    return Cell(DASH if mean is None else round_half_up(mean), "" if sd is None else round_half_up(sd), note)


def _best(rows: Sequence[Row], competing: int, score: Score) -> tuple[Row, ...]:
    """Rows with the best of every column marked among the first `competing`; nothing is marked if there is only one."""
    contenders = rows[:competing]
    alike = len({tuple(_absent(cell) for cell in row.cells) for row in contenders}) == 1  # their means are over the same folds
    columns = [*zip(*(row.cells for row in contenders), strict=True), tuple(row.mean for row in contenders if alike)]
    tops = [_top(column, score) for column in columns]
    marked = [
        replace(row, cells=tuple(_mark(cell, top) for cell, top in zip(row.cells, tops, strict=False)), mean=_mark(row.mean, tops[-1]))
        for row in contenders
    ]
    return (*marked, *rows[competing:])


def _top(column: Sequence[Cell], score: Score) -> str | None:
    present = [cell for cell in column if not _absent(cell)]
    if len(present) < 2 or any(cell.note for cell in present):
        return None
    return (max if score.higher_is_better else min)((cell.mean for cell in present), key=Decimal)


def _absent(cell: Cell) -> bool:
    """Whether there is no such cell, rather than one whose runs are missing."""
    return cell.mean == DASH and not cell.note


def _mark(cell: Cell, top: str | None) -> Cell:
    return replace(cell, best=cell.mean == top)


def _difference(found: Comparison, published: Published) -> tuple[str, ...]:
    first, second = (published.labels.get(name, name) for name in (found.first, found.second))
    return (f"{second} − {first}", *difference_cells(found))


def _plain_cell(cell: Cell) -> str:
    spread = f" ± {cell.sd}" if cell.sd else ""
    return f"{cell.mean}{spread}{f' ({cell.note})†' if cell.note else ''}{'‡' if cell.unresolved else ''}"


def _caption(summary: Summary, methods: Sequence[MethodSummary], published: Published, folds: Sequence[str]) -> tuple[str, ...]:
    counts = sorted({cell.n for method in methods for cell in method.planned})
    n = f"n = {counted(counts[0], 'run')}" if len(counts) == 1 else f"n = {counts[0]} to {counted(counts[-1], 'run')}"
    sentences = [
        f"Cells: mean ± sample standard deviation over seeds, {n} a cell.",
        *filter(None, (summary.terms.seeds,)),
        "Mean: mean of the cell means; its ± and the 95 % interval over seeds (Student's t) are over slots, of the mean over folds: "
        f"they describe the variation between seeds, not between {summary.terms.groups}.",
        OVER_FOLDS if len(folds) > 1 else ONE_FOLD,
        "n: runs a cell in the means; dropped: runs that are not; all runs: mean and ± with the dropped runs.",
    ]
    if any(not method.complete for method in methods):
        sentences.append("† Incomplete: finished / expected runs; such a column has no best, and a mean is over the folds with runs.")
    shorter = [method for method in methods if len(method.folds) < len(folds)]
    if shorter:
        named = ", ".join(f"{_label(method, published)} {len(method.folds)} of {len(folds)}" for method in shorter)
        sentences.append(f"{DASH}: no such runs in this experiment; a mean is over the folds that a method has ({named}).")
    sentences.append(BOLD)
    if not summary.score.higher_is_better:
        sentences.append(f"Lower {summary.score.label} is better.")
    sentences.append(f"Outlier rule: {summary.outlier_rule if _judged(summary) else 'none in force'}.")
    sentences.extend(_dropping_sentences(summary, methods, published))
    sentences.extend(sentence for corpus, sentence in order_sentences(summary, published.labels).items() if corpus == methods[0].corpus)
    sentences.extend(summary.corpus_captions.get(methods[0].corpus, ()))
    shares = [(_label(method, published), method.crossed.shares) for method in methods if method.crossed and method.crossed.shares]
    if shares:
        each = ", ".join(f"{label} {' / '.join(round_half_up(100 * share, 0) for share in astuple(found))} %" for label, found in shares)
        sentences.append(f"Share of the variance of a run's {summary.score.label} that folds / seeds / the rest have: {each}.")
    if published.rows:
        sentences.append(f"Published figures: {published.source}.")
        sentences.extend(_beside_published(methods, published, folds))
        sentences.extend(published.notes)
        if published.columns and set(published.columns) != set(folds):
            sentences.append(
                f"The published means are over all {counted(len(published.columns), 'fold')} of the paper, ours over {len(folds)}."
            )
    sentences.extend(size_sentences(method.size for method in methods))
    return tuple(sentences)


def _details(summary: Summary, published: Published) -> tuple[str, ...]:
    """Settings, initial weights, device, code and packages of the runs."""
    return (
        *recipe_sentences(summary.recipes, published.labels),
        *training_sentences(summary.recipes, published.labels),
        *((f"Initial weights: {'; '.join(summary.code.weights)}.",) if summary.code.weights else ()),
        *summary.arithmetic.sentences,
        code_sentence(f"Experiment {summary.experiment}", summary.code, CAPTION_PACKAGES),
    )


def _beside_published(methods: Sequence[MethodSummary], published: Published, folds: Sequence[str]) -> tuple[str, ...]:
    """The published means beside our intervals over seeds: the folds are the same, and only the seeds differ."""
    if set(published.columns) != set(folds):
        return ()
    means = {row.method: row.mean_ua for row in published.rows}
    places = [
        f"{_label(method, published)} {position(means[method.method], method.interval)}"
        for method in methods
        if method.method in means and method.interval and len(method.folds) == len(folds)
    ]
    what = "The published mean lies inside, below or above our 95 % interval over seeds (no test: it has no spread)"
    return (f"{what}: {', '.join(places)}.",) if places else ()


def _differences_caption(folds: Sequence[str], summary: Summary) -> tuple[str, ...]:
    pairs, paired, both, corrected = DIFFERENCES_CAPTION
    pairs, paired = pairs.format(label=summary.score.label), paired.format(groups=summary.terms.groups)
    if len(folds) > 1:
        return pairs, paired, both, corrected
    return (pairs, paired, "One fold is held out: there is no interval and no test over folds and seeds.", corrected)


def _judged(summary: Summary) -> bool:
    return summary.outlier_rule != "none"


def _dropping_sentences(summary: Summary, methods: Sequence[MethodSummary], published: Published) -> tuple[str, ...]:
    """How many runs were dropped and are unresolved."""
    outliers, diverged = _total([method.outliers for method in methods]), _total([method.diverged for method in methods])
    unresolved = [method for method in methods if method.unresolved]
    sentences = [
        f"Dropped: {counted(outliers.runs, 'outlier')} ({outliers.rerun} rerun) and {counted(diverged.runs, 'diverged run')} "
        f"({diverged.rerun} rerun); {sum(method.unresolved for method in unresolved)} unresolved."
    ]
    if _judged(summary) and any(not method.complete for method in methods):
        sentences.append("The rule is applied to a method once all its runs are finished.")
    if unresolved:
        named = ", ".join(f"{_label(method, published)} {counted(method.unresolved, 'run')}" for method in unresolved)
        fate = "are kept in the mean" if summary.unreplaced is Unreplaced.keep else "are left out of the mean (--unreplaced drop)"
        sentences.append(f"‡ Unresolved: outliers that were not replaced and {fate} ({named}).")
    return tuple(sentences)


def _total(counts: Sequence[Dropped]) -> Dropped:
    return Dropped(sum(each.runs for each in counts), sum(each.rerun for each in counts))


def _label(method: MethodSummary, published: Published) -> str:
    return published.labels.get(method.method, method.method)
