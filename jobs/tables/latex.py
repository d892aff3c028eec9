"""The tables as LaTeX: one fragment per table that a paper can `\\input`, and a document that inputs them all. Pure.

A fragment is a floating environment with a caption of two sentences, a label, a tabular (booktabs) that is scaled down where it is wider
than the column or page (graphicx), and a note below it. What the runs were computed with (settings, weights, code) is a paragraph of its
own, for an appendix, since a float cannot be longer than a page.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from jobs.errors import UsageError
from jobs.statistics import ALPHA
from jobs.tables.display import BOLD, Row, Table, tables_of
from jobs.tables.format import DASH, latex, rendered, siunitx
from jobs.tables.plain import PlainTable, plain_tables
from jobs.tables.published import Published
from jobs.tables.summary import Summary

TEMPLATES = Path(__file__).parent / "templates"
DOCUMENT = "tables.tex"
NARROW = 4  # columns of numbers that one column of a page has room for
LONG = 20  # comparisons that are set in both columns in any case: in one they take two rows each


class Width(Enum):
    """What a table fits into."""

    column = "column"  # one column of a two-column paper; intervals and numbers of runs are in the note
    page = "page"  # both columns


class Numbers(Enum):
    """How numbers are set."""

    plain = "plain"
    siunitx = "siunitx"  # by \\num, in all tables, so that the settings of the paper apply


@dataclass(frozen=True)
class Style:
    """How tables look in LaTeX."""

    width: Width = Width.page
    numbers: Numbers = Numbers.plain
    bold: bool = True  # the best mean of a column
    marks: bool = False  # a star at the mean of a method that differs from the first one


PLAIN = Style()


def style_of(width: str | None, numbers: str | None, *, bold: bool, marks: bool) -> Style:
    """The style that is asked for by name, None: the default. UsageError for an unknown name."""
    for option, value, known in (("--width", width, Width), ("--numbers", numbers, Numbers)):
        if value is not None and value not in known.__members__:
            raise UsageError(f"{option} {value!r}: known are {', '.join(known.__members__)}")
    chosen = Width[width] if width is not None else PLAIN.width, Numbers[numbers] if numbers is not None else PLAIN.numbers
    return Style(*chosen, bold, marks)


def fragments(summary: Summary, published: Published, style: Style) -> dict[str, str]:
    """File name -> text: `table1.tex` for the first corpus, `-differences` for its comparisons, `-details` for settings; plain tables."""
    found: dict[str, str] = {}
    details: dict[str, str] = {}
    set_up = _set_up(style)
    tables = tables_of(summary, published)
    for number, (corpus, table) in enumerate(zip(dict.fromkeys(each.corpus for each in summary.methods), tables, strict=True), start=1):
        label = _label(summary.experiment if len(tables) == 1 else f"{summary.experiment}-{corpus}")
        starred = _starred(summary, corpus) if style.marks else frozenset()
        values = {"table": table, "style": style, **set_up}
        note = _note(table, style, starred)
        found[f"table{number}.tex"] = rendered(TEMPLATES / "fragment.tex.j2", **values, label=label, note=note, starred=starred)
        if table.differences:
            values["wide"] = values["wide"] or len(table.differences) > LONG
            found[f"table{number}-differences.tex"] = rendered(TEMPLATES / "differences.tex.j2", **values, label=f"{label}-differences")
        details[f"table{number}-details.tex"] = rendered(TEMPLATES / "details.tex.j2", table=table)
    for plain in plain_tables(summary, published):
        label = f"{_label(summary.experiment)}-{plain.name}"
        parts = [plain] if style.width is Width.page else _narrow(plain)
        found[f"{plain.name}.tex"] = rendered(TEMPLATES / "plain.tex.j2", table=plain, parts=parts, label=label, **set_up)
    return {**found, **details}


def document(parts: Mapping[str, str], style: Style, *, inline: bool = False) -> str:
    """A document that pdflatex compiles beside the fragments; `inline`: with their text in place of `\\input`, so that it stands alone."""
    body = [text if inline else f"\\input{{{name.removesuffix('.tex')}}}\n" for name, text in parts.items()]
    return rendered(TEMPLATES / "tables.tex.j2", parts=body, siunitx=style.numbers is Numbers.siunitx)


def _narrow(table: PlainTable) -> list[PlainTable]:
    """A table in parts with few columns of numbers, to be set one below the other; published rows are where they have a number."""
    parts = []
    numbers = len(table.columns) - table.texts
    size = math.ceil(numbers / max(1, math.ceil(numbers / NARROW)))  # parts of about equal width
    for first in range(table.texts, len(table.columns), size):
        columns = [*range(table.texts), *range(first, min(first + size, len(table.columns)))]
        blocks = [[tuple(row[column] for column in columns) for row in rows] for rows in table.blocks]
        with_numbers = [rows if rows is blocks[0] else [row for row in rows if set(row[table.texts :]) != {DASH}] for rows in blocks]
        parts.append(replace(table, columns=tuple(table.columns[column] for column in columns), blocks=tuple(map(tuple, with_numbers))))
    return [replace(part, blocks=tuple(filter(None, part.blocks))) for part in parts]


def _set_up(style: Style) -> dict[str, Any]:
    """What all templates of tables are filled in with."""
    by_num = style.numbers is Numbers.siunitx
    # siunitx ignores the weight of the surrounding text unless detect-weight is set
    num, bold_num = (siunitx, partial(siunitx, options="detect-weight")) if by_num else (latex, latex)
    return {"wide": style.width is Width.page, "siunitx": by_num, "num": num, "bold_num": bold_num}


def _note(table: Table, style: Style, starred: frozenset[int]) -> tuple[str, ...]:
    """The sentences below the table, as LaTeX source."""
    sentences = [latex(sentence) for sentence in table.caption[2:] if style.bold or sentence != BOLD]
    if style.width is Width.column:
        num: Callable[[str], str] = _set_up(style)["num"]
        sentences = [*(f"{latex(row.label)}: {num(_runs_in_words(row, table))}" for row in table.blocks[0].rows), *sentences]
    if starred:
        first = table.blocks[0].rows[0].label
        sentences.insert(0, latex(f"* Differs from {first} (p < {ALPHA:g} over folds and seeds, Holm's correction)."))
    return tuple(sentences)


def _runs_in_words(row: Row, table: Table) -> str:
    """What a page has in columns of its own."""
    spread = f" ± {row.every.sd}" if row.every.sd else ""
    both = f", over folds and seeds {row.both}" if row.both != DASH else ""
    trained = f", trained {row.trained}" if table.sized else ""
    means = f"n = {row.n}, {row.dropped} dropped, {row.every.mean}{spread} over all runs"
    return f"{means}, 95 % interval over seeds {row.interval}{both}{trained}."


def _starred(summary: Summary, corpus: str) -> frozenset[int]:
    """Places of the methods that differ from the first method of a corpus."""
    methods = [method.method for method in summary.methods if method.corpus == corpus]
    return frozenset(
        methods.index(each.second)
        for each in summary.comparisons
        if each.corpus == corpus and each.first == methods[0] and (each.corrected.crossed or 1.0) < ALPHA
    )


def _label(name: str) -> str:
    """`tab:NAME` of letters, digits and hyphens, which any LaTeX label may have."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return "tab:" + (re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "results")
