"""Writes what an experiment hands back: tables in every format asked for, the JSON of its numbers, confusion matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs import published as published_figures
from jobs.confusion import write_confusions
from jobs.errors import UsageError
from jobs.graph import Graph
from jobs.layout import Layout
from jobs.published import Published
from jobs.records import Result, write_json, write_text
from jobs.summary import Summary, code_facts, entries_of, summarise, to_json
from jobs.tables import render_csv, render_latex, render_markdown

FORMATS = {"latex": "table.tex", "markdown": "table.md", "csv": "runs.csv", "json": "summary.json"}


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


def summary_of(
    experiment: str, graph: Graph, results: Mapping[str, Result], states: Mapping[str, str], outlier_rule: str = "none"
) -> Summary:
    """The numbers of an experiment from its graph, the results by stage key, and the states of runs without one."""
    entries = entries_of(graph, results, states)
    code = code_facts(results[key] for key in graph.nodes if key in results)
    return summarise(entries, experiment=experiment, outlier_rule=outlier_rule, code=code)


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
) -> CollectReport:
    """Write the tables into `tables/` of the experiment and the confusion matrices into `confusion/`, or all below `out`.

    `results` and `states` are as for `jobs.summary.entries_of`; `formats` are keys of `FORMATS`; `outlier_rule` is the one
    that was applied, not the one that was asked for. An incomplete experiment is written too, marked as such: refusing it
    is the caller's. Raises UsageError for results without usable scores and for an unknown format.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise UsageError(f"format {unknown[0]!r}: known are {', '.join(FORMATS)}")
    summary = summary_of(layout.experiment, graph, results, states, outlier_rule)
    tables = layout.tables if out is None else out
    confusion = (layout.folder if out is None else out) / "confusion"
    paths: list[Path] = []
    for name in formats:
        path = tables / FORMATS[name]
        if name == "latex":
            write_text(path, render_latex(summary, published))
        elif name == "markdown":
            write_text(path, render_markdown(summary, published))
        elif name == "csv":
            write_text(path, render_csv(summary))
        else:
            write_json(path, to_json(summary, published_figures.to_json(published)))
        paths.append(path)
    paths.extend(write_confusions(confusion, graph, results, published.labels))
    return CollectReport(tuple(paths), summary.complete, summary)
