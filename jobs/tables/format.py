"""Formatting shared by the tables of grids and sweeps: numbers, CSV, templates, escaping for LaTeX and Markdown. Pure."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import PACKAGE
from jobs.statistics import Interval, p_text, round_half_up
from jobs.text import one_line

if TYPE_CHECKING:
    from jobs.tables.summary import CodeFacts, Comparison

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # first characters of a cell that spreadsheets execute
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")
_PRINTED = re.compile(r"([+−]?\d+(?:\.\d+)?)")  # a number of a table's cell
# Commands are those of OT1 and the math fonts, which every LaTeX has; braces keep them apart from what follows.
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\ensuremath{<}",
    ">": r"\ensuremath{>}",
    "|": r"\ensuremath{|}",
    "`": "{`}",
    '"': '{"}',
    "[": "{[}",  # after the end of a row it would open an argument, and `*` change the command
    "*": "{*}",
    "±": r"\ensuremath{\pm}",
    "×": r"\ensuremath{\times}",
    "−": r"\ensuremath{-}",
    "†": r"\ensuremath{\dagger}",
    "‡": r"\ensuremath{\ddagger}",
    "–": r"\textendash{}",
    "—": r"\textemdash{}",
    "ß": r"\ss{}",
    "ø": r"\o{}",
    "Ø": r"\O{}",
    "ł": r"\l{}",
    "Ł": r"\L{}",
    "æ": r"\ae{}",
    "Æ": r"\AE{}",
    "œ": r"\oe{}",
    "Œ": r"\OE{}",
}
_ACCENTS = {
    "\u0300": r"\`",
    "\u0301": r"\'",
    "\u0302": r"\^",
    "\u0303": r"\~",
    "\u0304": r"\=",
    "\u0306": r"\u",
    "\u0307": r"\.",
    "\u0308": r"\"",
    "\u030a": r"\r",
    "\u030b": r"\H",
    "\u030c": r"\v",
    "\u0323": r"\d",
    "\u0327": r"\c",
}
_LIGATURE = re.compile(r"(?<=-)(?=-)|(?<=')(?=')")  # `--` would print as one dash
_MARKDOWN = frozenset("\\`*_{}[]<>#|~&$!^")
DASH = "–"


def negative(text: str) -> str:
    """A printed number with a minus sign in place of a hyphen."""
    return text.replace("-", "−")


def signed(value: float) -> str:
    """A difference: with its sign, unless it prints as zero."""
    text = round_half_up(value)
    return negative(text if text.startswith("-") or not float(text) else f"+{text}")


def interval_text(interval: Interval | None, digits: int = 1) -> str:
    """`1.0 to 2.0`, a dash where there is none."""
    return DASH if interval is None else negative(f"{round_half_up(interval.low, digits)} to {round_half_up(interval.high, digits)}")


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A CSV file with a header. Floats are written with all their digits, None as an empty cell; text that is a formula is quoted."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in (columns, *rows):
        writer.writerow([quoted_formula(cell) if isinstance(cell, str) else cell for cell in row])
    return text.getvalue()


def quoted_formula(text: str) -> str:
    """The text of a cell after an apostrophe, if a spreadsheet would execute it (OWASP, "CSV Injection"); numbers stay as they are."""
    return f"'{text}" if _is_formula(text) else text


def unquoted_formula(text: str) -> str:
    """The inverse of `quoted_formula`."""
    return text[1:] if text.startswith("'") and _is_formula(text[1:]) else text


def _is_formula(text: str) -> bool:
    return text.lstrip("'").startswith(_FORMULA) and not _NUMBER.fullmatch(text)


def code_sentence(whose: str, code: CodeFacts, packages: Sequence[str]) -> str:
    """Commits and package versions that computed an experiment or a sweep. `whose`: `Experiment demo`; `packages`: those to name.

    The code of an installed package has a version instead of a commit.
    """
    of_checkouts = f"at commit {', '.join(commit[:10] for commit in code.commits)}" if code.commits else ""
    installed = f"of {PACKAGE} {'/'.join(code.packages[PACKAGE])}" if PACKAGE in code.packages else ""
    which = " and ".join(filter(None, (of_checkouts, installed))) or "at commit unknown"
    versions = [f"{name} {'/'.join(code.packages[name])}" for name in packages if name in code.packages]
    changed = " with uncommitted changes" if code.modified else ""
    return f"{whose}; {'; '.join([f'code {which}{changed}', *versions])}."


def rendered(template: Path, **values: Any) -> str:
    """A filled-in Jinja template `*.tex.j2` or `*.md.j2`. The filter `e`, which it applies to every value, escapes for its format."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Delimiters that neither LaTeX nor Markdown uses; autoescape is for HTML, here every value passes through `escape`.
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
        comment_start_string="<#",
        comment_end_string="#>",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["e"] = latex if template.name.endswith(".tex.j2") else markdown
    return environment.get_template(template.name).render(**values)


def latex(text: str) -> str:
    """LaTeX source that prints `text` on one line; what its fonts lack is printed as its code point."""
    return _escaped(_printable(text))


def siunitx(text: str, options: str = "") -> str:
    """As `latex`, with each number as the argument of a `\\num` of the package siunitx. `options`: of each `\\num`."""
    parts = _PRINTED.split(_printable(text))  # text and numbers in turn
    return "".join(_num(part, options) if place % 2 else _escaped(part) for place, part in enumerate(parts))


def _num(number: str, options: str) -> str:
    given = ",".join(filter(None, [options, "retain-explicit-plus" if number.startswith("+") else ""]))
    return rf"\num{f'[{given}]' if given else ''}{{{number.replace('−', '-')}}}"


def markdown(text: str) -> str:
    """Markdown source that prints `text` on one line, inside a table cell too."""
    return "".join(f"\\{character}" if character in _MARKDOWN else character for character in _printable(text))


def _printable(text: str) -> str:
    """White space of any kind becomes one space, other control characters and lone surrogates become U+FFFD."""
    return "".join("\ufffd" if unicodedata.category(character) in ("Cc", "Cs") else character for character in one_line(text))


def _escaped(text: str) -> str:
    return _LIGATURE.sub("{}", "".join(map(_latex_character, text)))


def _latex_character(character: str) -> str:
    if character in _LATEX:
        return _LATEX[character]
    if character.isascii():
        return character
    parts = unicodedata.normalize("NFD", character)
    if len(parts) == 2 and parts[0].isascii() and parts[0].isalpha() and parts[1] in _ACCENTS:
        letter = f"\\{parts[0]}" if parts[0] in "ij" and parts[1] not in "\u0323\u0327" else parts[0]
        return f"{_ACCENTS[parts[1]]}{{{letter}}}"
    return f"{{[}}U+{ord(character):04X}]"


def difference_cells(found: Comparison) -> tuple[str, ...]:
    """The cells of a row of paired differences, without its label: mean, interval, pairs, tests over pairs, over folds and seeds."""
    pairs, crossed, corrected = found.over_pairs, found.crossed, found.corrected
    mean = DASH if pairs.mean is None else signed(pairs.mean)
    tests = map(p_text, (pairs.t_p, corrected.pairs_t, pairs.wilcoxon_p, corrected.pairs_wilcoxon))
    both = (
        (interval_text(crossed.interval), p_text(crossed.p), p_text(corrected.crossed), round_half_up(crossed.detectable))
        if crossed
        else (DASH,) * 4
    )
    return (mean, interval_text(pairs.interval), str(pairs.pairs), *tests, *both)
