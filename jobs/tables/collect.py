"""Writes what an experiment hands back: tables in every format asked for, the JSON of its numbers, confusion matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.control.outliers import rule_in_words
from jobs.errors import UsageError
from jobs.experiment.graph import Graph
from jobs.store.layout import Layout
from jobs.store.records import Result, write_json, write_text
from jobs.tables import published as published_figures
from jobs.tables.confusion import write_confusions
from jobs.tables.display import render_csv, render_latex, render_markdown, render_methods_csv
from jobs.tables.from_csv import Judged, judge_foreign, read_foreign
from jobs.tables.published import Published
from jobs.tables.summary import Entry, Status, Summary, code_facts, entries_of, summarise, to_json

if TYPE_CHECKING:
    from jobs.experiment.config import OutlierRule


FORMATS = {"latex": "table.tex", "markdown": "table.md", "csv": "runs.csv", "json": "summary.json"}
METHODS_CSV = "methods.csv"  # beside `runs.csv`


@dataclass(frozen=True)
class CollectReport:
    """What was written, and whether every run is in."""

    paths: tuple[Path, ...]
    complete: bool
    summary: Summary

    @property
    def missing(self) -> tuple[str, ...]:
        """One phrase per run that is not in: `vft/1/3 (failed)`."""
        return tuple(f"{entry.name} ({entry.status.value})" for entry in self.summary.missing)


@dataclass(frozen=True)
class ForeignReport(CollectReport):
    """The same of results from elsewhere, and what the rule asks for."""

    judged: Judged

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the user: which slots need a run with another seed, which rows the rule has no use for."""
        wanted = [
            f"rerun with another seed, and add the row below: {_named(entry)} "
            + (f"is out with UA {entry.scores.ua:g}" if entry.scores and entry.status is Status.accepted else "diverged")
            for entry in self.judged.rerun
        ]
        return (*wanted, *(f"not used, the rule keeps the run above it: {_named(entry)}" for entry in self.judged.unused))


def summary_of(
    experiment: str,
    graph: Graph,
    results: Mapping[str, Result],
    states: Mapping[str, str],
    outlier_rule: str = "none",
    unresolved: Mapping[tuple[str, str], int] | None = None,
) -> Summary:
    """The numbers of an experiment from its graph, the results by stage key, and the states of runs without one."""
    entries = entries_of(graph, results, states)
    code = code_facts(results[key] for key in graph.nodes if key in results)
    return summarise(entries, experiment=experiment, outlier_rule=outlier_rule, unresolved=unresolved, code=code)


def collect(
    layout: Layout,
    graph: Graph,
    results: Mapping[str, Result],
    states: Mapping[str, str],
    published: Published,
    *,
    formats: Sequence[str] = tuple(FORMATS),
    out: Path | None = None,
    outlier_rule: str = "none",
    unresolved: Mapping[tuple[str, str], int] | None = None,
) -> CollectReport:
    """Write the tables into `tables/` of the experiment and the confusion matrices into `confusion/`, or all below `out`.

    `results` and `states` are as for `jobs.tables.summary.entries_of`; `formats` are keys of `FORMATS`; `outlier_rule` is the one
    that was applied, not the one that was asked for, in the words of `jobs.control.outliers.rule_in_words`; `unresolved` counts by
    (corpus, method) the runs that are out and stay in the mean. An incomplete experiment is written too, marked as such:
    refusing it is the caller's. Raises UsageError for results without usable scores and for an unknown format.
    """
    check_formats(formats)
    summary = summary_of(layout.experiment, graph, results, states, outlier_rule, unresolved)
    paths = _write_tables(layout.tables if out is None else out, summary, published, formats)
    confusion = (layout.folder if out is None else out) / "confusion"
    paths.extend(write_confusions(confusion, graph, results, published.labels))
    return CollectReport(tuple(paths), summary.complete, summary)


def collect_foreign(
    path: Path,
    published: Published,
    *,
    rule: OutlierRule | str,
    sigmas: float,
    rounds: int,
    formats: Sequence[str] = tuple(FORMATS),
    out: Path | None = None,
) -> ForeignReport:
    """Judge the runs of a CSV file and write the same tables, into `NAME-tables/` beside it or into `out`.

    Raises UsageError for what `jobs.tables.from_csv` cannot read, a rule that cannot fire, and an unknown format.
    """
    check_formats(formats)
    judged = judge_foreign(read_foreign(path), rule, sigmas, rounds)
    words = rule_in_words(rule, sigmas, rounds)
    if judged.unused:
        words += f"; runs of the file that are not used, since the rule keeps an earlier one of their slot: {len(judged.unused)}"
    summary = summarise(judged.entries, experiment=path.stem, outlier_rule=words, unresolved=judged.unresolved)
    paths = _write_tables(path.with_name(f"{path.stem}-tables") if out is None else out, summary, published, formats)
    return ForeignReport(tuple(paths), summary.complete, summary, judged)


def check_formats(formats: Sequence[str]) -> None:
    """UsageError for a format that is not known."""
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise UsageError(f"format {unknown[0]!r}: known are {', '.join(FORMATS)}")


def _write_tables(folder: Path, summary: Summary, published: Published, formats: Sequence[str]) -> list[Path]:
    paths: list[Path] = []
    for name in formats:
        path = folder / FORMATS[name]
        if name == "latex":
            write_text(path, render_latex(summary, published))
        elif name == "markdown":
            write_text(path, render_markdown(summary, published))
        elif name == "csv":
            write_text(path, render_csv(summary))
            write_text(folder / METHODS_CSV, render_methods_csv(summary))
        else:
            write_json(path, to_json(summary, published_figures.to_json(published)))
        paths.append(path)
        if name == "csv":
            paths.append(folder / METHODS_CSV)
    return paths


def _named(entry: Entry) -> str:
    return f"{entry.corpus} {entry.name} seed {entry.seed}"
