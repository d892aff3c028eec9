"""Writes what a sweep hands back: tables, the JSON of its numbers, the picture, and what to run next. At any time, also on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jobs.errors import UsageError
from jobs.experiment.config import DEFAULT_RESOURCES, load_experiment, resolved_values
from jobs.store.layout import Layout
from jobs.store.records import Result, read_result, write_bytes, write_json, write_text
from jobs.sweeps.records import Sweep, TrialRecord, read_trials
from jobs.sweeps.report.as_json import to_json
from jobs.sweeps.report.choice import Choice, choice_of, lines_of, overrides_between
from jobs.sweeps.report.costs import Effort, read_effort
from jobs.sweeps.report.plots import plot_pdf, plot_png
from jobs.sweeps.report.summary import SweepSummary, summarise
from jobs.sweeps.report.tables import render_latex, render_markdown, render_points_csv, render_runs_csv
from jobs.sweeps.space import text
from jobs.worker.task import load_object, load_registry


@dataclass(frozen=True)
class SweepReport:
    """What was written, and what it says."""

    paths: tuple[Path, ...]
    summary: SweepSummary
    choice: Choice
    choice_lines: tuple[str, ...]  # what to run next: commands of a shell, and comments


def write_report(sweep: Sweep) -> SweepReport:
    """Read records and results of a sweep, and write its report into the folder `sweep` of its experiment, over that of any other."""
    trials = read_trials(sweep.folder)
    results, efforts = _read(sweep.layout, trials)
    summary = summarise(sweep, trials, results, efforts)
    choice = choice_of(summary, (*folder_options(sweep), *changed_settings(sweep)))
    lines = lines_of(summary, choice)
    folder = sweep.layout.sweep
    pictures = {"plot.pdf": plot_pdf(summary), "plot.png": plot_png(summary)}
    texts = {
        "table.tex": render_latex(summary, choice),
        "table.md": render_markdown(summary, choice),
        "trials.csv": render_points_csv(summary),
        "runs.csv": render_runs_csv(summary),
        "choice.txt": "".join(f"{line}\n" for line in lines),
    }
    for name, data in pictures.items():
        write_bytes(folder / name, data)
    for name, written in texts.items():
        write_text(folder / name, written)
    write_json(folder / "summary.json", to_json(summary, choice))
    names = ("table.tex", "table.md", "summary.json", "trials.csv", "runs.csv", "plot.pdf", "plot.png", "choice.txt")
    return SweepReport(tuple(folder / name for name in names), summary, choice, lines)


def changed_settings(sweep: Sweep) -> tuple[str, ...]:
    """`KEY=VALUE` by which the experiment of a sweep differs from what its file says, so that a grid of it can be asked for."""
    stages = [stage for stage in sweep.experiment.resources if stage != DEFAULT_RESOURCES]
    load = partial(
        load_experiment,
        sweep.config or sweep.experiment.name,
        configs=Path(sweep.code) / "configs",
        recipe_schema=load_object(sweep.recipe_schema),
        stages=stages,
        teams=load_registry(sweep.place).teams,
    )
    try:
        stated, site = load(overrides=[]), f"site={text(sweep.experiment.site)}"
        beside = stated if stated.site == sweep.experiment.site else load(overrides=[site])  # its profile need not be repeated key by key
    except UsageError:  # a file that was moved or edited since: the report is of what was computed
        return ()
    return (*([] if beside is stated else [site]), *overrides_between(resolved_values(beside), resolved_values(sweep.experiment)))


def folder_options(sweep: Sweep) -> tuple[str, ...]:
    """Options that name the data and the results of a sweep, where a grid would not look for them by itself."""
    code, results, corpus = Path(sweep.code), sweep.layout.root, Path(sweep.corpus.folder)
    home = results.parent if code.is_relative_to(results) else code  # a snapshot, which lies among the results
    at_home = (home / "launch.py").is_file()
    data_there = at_home and corpus == (home / "data" / corpus.name).resolve()
    data = [] if data_there or corpus.name != sweep.experiment.corpus else ["--data", str(corpus.parent)]
    return (*data, *([] if at_home and results == (home / "results").resolve() else ["--results", str(results)]))


def _read(layout: Layout, trials: Sequence[TrialRecord]) -> tuple[Mapping[str, Result], Mapping[str, Effort]]:
    """Results of all stages that the trials name, and what went into them."""
    results: dict[str, Result] = {}
    efforts: dict[str, Effort] = {}
    for key, stage in {key: stage for trial in trials for fold in trial.folds for key, stage in fold.stages.items()}.items():
        folder = layout.stage(stage, key)
        result = read_result(folder, key)
        if result is not None:
            results[key], efforts[key] = result, read_effort(folder, result)
    return results, efforts
