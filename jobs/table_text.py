"""What the tables of a grid and of a sweep have in common: how numbers are written, and how a template is filled. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jobs.statistics import Interval, round_half_up
from jobs.summary import CodeFacts

DASH = "–"


def negative(text: str) -> str:
    """A printed number with a minus sign in place of a hyphen."""
    return text.replace("-", "−")


def signed(value: float) -> str:
    """A difference: with its sign, unless it prints as zero."""
    text = round_half_up(value)
    return negative(text if text.startswith("-") or not float(text) else f"+{text}")


def interval_text(interval: Interval | None) -> str:
    """`1.0 to 2.0`, a dash where there is none."""
    return DASH if interval is None else negative(f"{round_half_up(interval.low)} to {round_half_up(interval.high)}")


def counted(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def code_sentence(whose: str, code: CodeFacts, packages: Sequence[str]) -> str:
    """Which code, and which versions of some packages, the numbers of an experiment or a sweep come of."""
    commits = ", ".join(commit[:10] for commit in code.commits) or "unknown"
    versions = [f"{name} {'/'.join(code.packages[name])}" for name in packages if name in code.packages]
    changed = " with uncommitted changes" if code.modified else ""
    return f"{whose}; {'; '.join([f'code at commit {commits}{changed}', *versions])}."


def rendered(template: Path, escape: Callable[[str], str], **values: Any) -> str:
    """A template filled in; it passes every value through the filter `e`."""
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
    environment.filters["e"] = escape
    return environment.get_template(template.name).render(**values)
