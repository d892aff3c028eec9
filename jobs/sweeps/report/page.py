"""The report of a sweep as one HTML file: its tables, its plot, and what to run next. Pure."""

from __future__ import annotations

from jobs.report.drawing import picture
from jobs.report.page import Cell, Download, Page, Section, Table, render
from jobs.report.page import Row as PageRow
from jobs.store.records import json_text
from jobs.sweeps.report.as_json import to_json
from jobs.sweeps.report.choice import Choice
from jobs.sweeps.report.summary import SweepSummary
from jobs.sweeps.report.tables import Lines, Row, render_points_csv, render_runs_csv, tables_of

COLUMNS = ("Set", "UA", "95 % interval", "Folds", "Runs", "Difference", "95 % interval", "Pairs", "p", "Remark")


def render_page(summary: SweepSummary, choice: Choice, plot: bytes) -> str:
    """The page. `plot`: the PNG of the sweep's plot."""
    tables = tables_of(summary, choice)
    points = Table(tables.caption[0], COLUMNS, tuple(map(_row, tables.rows)), sortable=True, texts=1, note=tables.caption[1:])
    drawn = picture("plot", "Validation UA against the number of clusters and the size of a set", tables.figure, plot)
    sections = [Section("result", "Which set is best?", tables.lead, (points, drawn) if tables.rows else ())]
    if tables.failures:
        sections.append(Section("failed", "What failed?", tables.failures))
    if tables.proxies.rows:
        sections.append(Section("proxies", "Do cheap proxies tell in advance?", (), (_lines(tables.proxies),)))
    if tables.folds.rows:
        sections.append(Section("folds", "Which set is best for each fold?", (), (_lines(tables.folds),)))
    if tables.rows:
        sections.append(Section("cost", "What did it cost?", (), (_lines(tables.cost),)))
    files = (
        Download("trials.csv", "text/csv", render_points_csv(summary)),
        Download("runs.csv", "text/csv", render_runs_csv(summary)),
        Download("summary.json", "application/json", json_text(to_json(summary, choice))),
    )
    sections.append(Section("next", "What to run next?", tables.commands, downloads=files))
    return render(Page(tables.title, tuple(sections)))


def _row(row: Row) -> PageRow:
    ua = f"{row.ua} ± {row.sd}" if row.sd else row.ua
    numbers = (row.interval, row.folds, row.runs, row.difference, row.difference_interval, row.pairs, row.p)
    return PageRow((row.label, Cell(ua, key=row.ua, strong=row.best), *numbers, row.remark))


def _lines(lines: Lines) -> Table:
    return Table(lines.caption[0], lines.headings, tuple(map(PageRow, lines.rows)), note=lines.caption[1:])
