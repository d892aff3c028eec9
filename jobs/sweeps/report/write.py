"""Writes the report of a sweep: tables, JSON, HTML, plot and commands to run next. Also for a sweep that is not finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jobs.errors import UsageError
from jobs.experiment.config import DEFAULT_RESOURCES, load_experiment
from jobs.experiment.graph import Graph
from jobs.experiment.stored_config import resolved_values
from jobs.store.records import Result, read_result, write_bytes, write_json
from jobs.sweeps.decisions import Trial
from jobs.sweeps.records import Sweep
from jobs.sweeps.report.as_json import to_json
from jobs.sweeps.report.choice import Choice, choice_of, lines_of, overrides_between
from jobs.sweeps.report.costs import read_effort
from jobs.sweeps.report.page import render_page
from jobs.sweeps.report.plots import plot
from jobs.sweeps.report.scores import TrialRecord, trial_records
from jobs.sweeps.report.summary import SweepSummary, summarise
from jobs.sweeps.report.tables import render, render_points_csv, render_runs_csv
from jobs.sweeps.space import text


@dataclass(frozen=True)
class SweepReport:
    """The files that were written, and their content."""

    paths: tuple[Path, ...]
    summary: SweepSummary
    choice: Choice
    choice_lines: tuple[str, ...]  # commands to run next, and comments


def write_report(sweep: Sweep, graph: Graph, trials: Sequence[Trial]) -> SweepReport:
    """Write the report of a sweep into the folder `sweep` of its experiment, replacing any former report."""
    records, results = records_of(sweep, graph, trials)
    efforts = {key: read_effort(sweep.layout.stage(found.stage, key), found) for key, found in results.items()}
    summary = summarise(sweep, records, results, efforts)
    choice = choice_of(summary, (*folder_options(sweep), *changed_settings(sweep)))
    lines = lines_of(summary, choice)
    folder, picture = sweep.layout.sweep, plot(summary, "png")
    files = {
        "table.tex": render("sweep.tex", summary, choice).encode(),
        "table.md": render("sweep.md", summary, choice).encode(),
        "trials.csv": render_points_csv(summary).encode(),
        "runs.csv": render_runs_csv(summary).encode(),
        "plot.pdf": plot(summary, "pdf"),
        "plot.png": picture,
        "report.html": render_page(summary, choice, picture).encode(),
        "choice.txt": "".join(f"{line}\n" for line in lines).encode(),
    }
    for name, data in files.items():
        write_bytes(folder / name, data)
    write_json(folder / "summary.json", to_json(summary, choice))
    return SweepReport(tuple(folder / name for name in (*files, "summary.json")), summary, choice, lines)


def records_of(sweep: Sweep, graph: Graph, trials: Sequence[Trial]) -> tuple[tuple[TrialRecord, ...], dict[str, Result]]:
    """Trials with what their results report, and the results of all finished stages by key."""
    results = {key: found for key, node in graph.nodes.items() if (found := read_result(sweep.layout.stage(node.stage, key), key))}
    return trial_records(sweep, graph, trials, results), results


def changed_settings(sweep: Sweep) -> tuple[str, ...]:
    """`KEY=VALUE` arguments by which the experiment of a sweep differs from its file, for the command of a grid."""
    stages = [stage for stage in sweep.experiment.resources if stage != DEFAULT_RESOURCES]
    load = partial(
        load_experiment,
        sweep.file or sweep.experiment.name,
        configs=sweep.code / "configs",
        recipe_schema=type(sweep.experiment.recipe),
        stages=stages,
        teams=sweep.registry.teams,
    )
    try:
        stated, site = load(overrides=[]), f"site={text(sweep.experiment.site)}"
        beside = stated if stated.site == sweep.experiment.site else load(overrides=[site])  # without the keys of the site's profile
    except UsageError:  # the file was moved or edited since; the report does not depend on it
        return ()
    return (*([] if beside is stated else [site]), *overrides_between(resolved_values(beside), resolved_values(sweep.experiment)))


def folder_options(sweep: Sweep) -> tuple[str, ...]:
    """Options for the folders of data and results of a sweep, if they are not the default of a grid."""
    code, results, corpus = sweep.code, sweep.layout.root, Path(sweep.corpus.folder)
    home = results.parent if code.resolve().is_relative_to(results.resolve()) else code  # a snapshot is below the results

    def same(one: Path, other: Path) -> bool:
        return one.resolve() == other.resolve()

    at_home = (home / "launch.py").is_file()
    data_there = at_home and same(corpus, home / "data" / corpus.name)
    data = [] if data_there or corpus.name != sweep.experiment.corpus else ["--data", str(corpus.parent)]
    return (*data, *([] if at_home and same(results, home / "results") else ["--results", str(results)]))
