"""The parts of a report (tables, figures, sections) as plain text, and the HTML page of them. Pure."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jobs.statistics import round_half_up
from jobs.tables.format import DASH, negative

TEMPLATES = Path(__file__).parent / "templates"
SCORE = "ua"  # the score of the registry, under whatever name
METRICS = {SCORE: "UA", "wa": "WA", "macro_f1": "macro F1"}  # name in a run's scores -> heading
RUNS = {"kept": "kept runs", "all": "all runs, dropped ones included"}


@dataclass(frozen=True)
class View:
    """Under which choice of the reader a part is shown: a key of `METRICS` and one of `RUNS`; "": under any."""

    metric: str = ""
    runs: str = ""


ALWAYS = View()


@dataclass(frozen=True)
class Cell:
    """A cell of a table. `key`: what its column is sorted by, a number or a text; None: its text."""

    text: str
    key: float | str | None = None
    strong: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table. `dropped`: of a sortable table, shown with all runs only."""

    cells: tuple[Cell | str, ...]
    dropped: bool = False


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows. Cells from column `numbers` on are numbers, but for the last `texts` columns."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    view: View = ALWAYS
    sortable: bool = False  # its columns can be sorted, its rows filtered
    numbers: int = 1
    texts: int = 0
    note: tuple[str, ...] = ()  # sentences below the table

    def is_number(self, column: int) -> bool:
        """Whether a column is aligned to the right."""
        return self.numbers <= column < len(self.columns) - self.texts


@dataclass(frozen=True)
class Figure:
    """A drawing with what it shows in words. `svg` is markup (or an embedded picture), everything else is text."""

    name: str  # unique in the page; begins the ids in the drawing
    title: str
    description: str
    svg: str
    tables: tuple[Table, ...] = ()  # the same numbers
    view: View = ALWAYS


@dataclass(frozen=True)
class Download:
    """A file embedded in the page."""

    name: str
    kind: str  # its media type
    text: str

    @property
    def address(self) -> str:
        return f"data:{self.kind};charset=utf-8;base64,{base64.b64encode(self.text.encode()).decode()}"


@dataclass(frozen=True)
class Section:
    """The answer to one question."""

    name: str  # its anchor
    question: str
    sentences: tuple[str, ...] = ()
    parts: tuple[Table | Figure, ...] = ()
    downloads: tuple[Download, ...] = ()


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    sections: tuple[Section, ...]
    metrics: Mapping[str, str] = field(default_factory=dict)  # those that can be chosen, of `METRICS`; empty: there is no choice
    runs: Mapping[str, str] = field(default_factory=dict)  # the same of `RUNS`


def render(page: Page) -> str:
    """The page as HTML. All text is escaped; the policy of the page allows no request, and no script but its own."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["table"] = lambda part: isinstance(part, Table)
    environment.filters["key"] = sort_key
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        page=page,
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),  # noqa: S704 - files of this package
        script=Markup(script),  # noqa: S704
        script_digest=digest,
        markup=Markup,
    )


def sort_key(cell: Cell | str) -> str:
    """What a cell is sorted by, for the page's script: numbers with all digits."""
    if isinstance(cell, str):
        return cell
    return cell.text if cell.key is None else repr(cell.key) if isinstance(cell.key, float) else str(cell.key)


def number(value: float | None, digits: int = 1) -> str:
    """A number as printed, a dash for None."""
    return DASH if value is None else negative(round_half_up(value, digits))
