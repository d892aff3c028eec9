"""Writes the tables of an experiment in every requested format, the JSON of its numbers, and its confusion matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.control.outliers import rule_in_words
from jobs.errors import UsageError
from jobs.experiment.graph import Graph
from jobs.experiment.recipes import MethodRecipe
from jobs.store.layout import Layout
from jobs.store.records import Decoder, Result, write_json, write_text
from jobs.tables import published as published_figures
from jobs.tables.as_json import to_json
from jobs.tables.confusion import write_confusions
from jobs.tables.display import render, render_csv, render_methods_csv
from jobs.tables.from_csv import Judged, judge_runs, read_runs
from jobs.tables.joined import write_joined
from jobs.tables.published import Published
from jobs.tables.several import Part, joint_published, joint_summary
from jobs.tables.summary import Entry, Status, Summary, Unreplaced, code_facts, entries_of, summarise
from jobs.text import counted

if TYPE_CHECKING:
    from jobs.control.rounds import Judgements
    from jobs.experiment.config import OutlierRule


FORMATS = {"latex": "table.tex", "markdown": "table.md", "csv": "runs.csv", "json": "summary.json"}
METHODS_CSV = "methods.csv"  # beside `runs.csv`


@dataclass(frozen=True)
class CollectReport:
    """Files that were written, and whether every run is finished."""

    paths: tuple[Path, ...]
    complete: bool
    summary: Summary
    kept: str = field(default="", kw_only=True)  # why nothing was written: the folder has better tables; "": the tables were written
    gaps: tuple[str, ...] = field(default=(), kw_only=True)  # a line for each file that lacks runs

    @property
    def missing(self) -> tuple[str, ...]:
        """One item per run that is not finished: `vft/1/3 (failed)`."""
        return tuple(f"{entry.name} ({entry.status.value})" for entry in self.summary.missing)


@dataclass(frozen=True)
class CsvReport(CollectReport):
    """The same for runs from a CSV file, with the decisions of the outlier rule."""

    judged: Judged

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the user: slots that need a run with another seed, and unused rows."""
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
    judgements: Judgements | None = None,
    recipes: Sequence[MethodRecipe] = (),
    unreplaced: Unreplaced = Unreplaced.keep,
) -> Summary:
    """The numbers of an experiment. `results`, `states` and `judgements` as for `entries_of`; the others as for `summarise`."""
    entries = entries_of(graph, results, states, judgements)
    code = code_facts(results[key] for key in graph.nodes if key in results)
    return summarise(entries, experiment=experiment, outlier_rule=outlier_rule, unreplaced=unreplaced, code=code, recipes=recipes)


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
    judgements: Judgements | None = None,
    recipes: Sequence[MethodRecipe] = (),
    unreplaced: Unreplaced = Unreplaced.keep,
    force: bool = False,
) -> CollectReport:
    """Write the tables into `tables/` of the experiment and the confusion matrices into `confusion/`, or all below `out`.

    `results` and `states` are as for `jobs.tables.summary.entries_of`; `formats` are keys of `FORMATS`; `outlier_rule` describes the
    rule that was applied, as `jobs.control.outliers.rule_in_words` does; `judgements` are its verdicts, and `unreplaced` is what becomes
    of the outliers that no run replaces; `recipes` are named in the captions. Formats that the folder has already are written too, and
    matrices of other runs are removed, so that all files have the same runs. An incomplete experiment is written too and marked as such,
    but does not replace complete tables of more runs without `force`. Raises UsageError for results without usable scores and for an
    unknown format.
    """
    check_formats(formats)
    summary = summary_of(layout.experiment, graph, results, states, outlier_rule, judgements, recipes, unreplaced)
    folder = layout.tables if out is None else out
    kept = "" if force else reason_to_keep(_EARLIER.read(folder / FORMATS["json"]), summary)
    if kept:
        return CollectReport((), summary.complete, summary, kept=f"{folder}: {kept}")
    formats = (*formats, *(name for name, file in FORMATS.items() if name not in formats and (folder / file).is_file()))
    paths = _write_tables(folder, summary, published, formats)
    confusion = (layout.folder if out is None else out) / "confusion"
    paths.extend(write_confusions(confusion, graph, results, published.labels))
    joined, gaps = write_joined(folder, layout, graph, results, (*FORMATS.values(), METHODS_CSV)) if "csv" in formats else ([], [])
    return CollectReport((*paths, *joined), summary.complete, summary, gaps=tuple(gaps))


def collect_several(
    parts: Sequence[Part],
    published: Sequence[Published],
    out: Path,
    formats: Sequence[str] = tuple(FORMATS),
    unreplaced: Unreplaced = Unreplaced.keep,
) -> tuple[CollectReport, Published]:
    """Write the tables of several experiments as one into `out`; `published`: of each. Returns the files and what is printed beside ours.

    Confusion matrices and predictions are written for single experiments only. Raises UsageError as `collect`.
    """
    check_formats(formats)
    summary, labels = joint_summary(parts, unreplaced)
    beside = joint_published(published, labels)
    return CollectReport(tuple(_write_tables(out, summary, beside, formats)), summary.complete, summary), beside


@dataclass(frozen=True)
class EarlierMethod:
    """The part of a method of an earlier `summary.json` that is read again."""

    n: int  # finished runs


@dataclass(frozen=True)
class Earlier:
    """The part of an earlier `summary.json` that is read again."""

    complete: bool
    methods: tuple[EarlierMethod, ...]


_EARLIER = Decoder(Earlier)


def reason_to_keep(earlier: Earlier | None, summary: Summary) -> str:
    """Why tables are not overwritten: they are complete, the new ones are not and have fewer runs; "" if they may be. Pure.

    `earlier`: their `summary.json`, None without one. This happens if the code or the settings have changed and other stages are needed.
    """
    if summary.complete or earlier is None or not earlier.complete:
        return ""
    before = sum(method.n for method in earlier.methods)
    now = sum(method.n for method in summary.methods)
    return f"complete tables of {counted(before, 'run')} are not overwritten with incomplete ones of {now}" if now < before else ""


def collect_csv(
    path: Path,
    published: Published,
    *,
    rule: OutlierRule | str,
    sigmas: float,
    rounds: int,
    unreplaced: Unreplaced = Unreplaced.keep,
    formats: Sequence[str] = tuple(FORMATS),
    out: Path | None = None,
) -> CsvReport:
    """Apply the outlier rule to the runs of a CSV file and write the same tables into `out` (default: `NAME-tables/` beside it).

    Raises UsageError for a file that `jobs.tables.from_csv` cannot read, a rule that can never drop a run, and an unknown format.
    """
    check_formats(formats)
    judged = judge_runs(read_runs(path), rule, sigmas, rounds)
    words = rule_in_words(rule, sigmas, rounds)
    if judged.unused:
        words += f"; runs of the file that are not used, since the rule keeps an earlier one of their slot: {len(judged.unused)}"
    summary = summarise(judged.entries, experiment=path.stem, outlier_rule=words, unreplaced=unreplaced)
    paths = _write_tables(path.with_name(f"{path.stem}-tables") if out is None else out, summary, published, formats)
    return CsvReport(tuple(paths), summary.complete, summary, judged)


def check_formats(formats: Sequence[str]) -> None:
    """UsageError for an unknown format."""
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise UsageError(f"format {unknown[0]!r}: known are {', '.join(FORMATS)}")


def _write_tables(folder: Path, summary: Summary, published: Published, formats: Sequence[str]) -> list[Path]:
    paths: list[Path] = []

    def write(name: str, text: str) -> None:
        paths.append(folder / name)
        write_text(folder / name, text)

    for name in formats:
        if name in ("latex", "markdown"):
            write(FORMATS[name], render(FORMATS[name], summary, published))
        elif name == "csv":
            write(FORMATS[name], render_csv(summary))
            write(METHODS_CSV, render_methods_csv(summary))
        else:
            paths.append(folder / FORMATS[name])
            write_json(paths[-1], to_json(summary, published_figures.to_json(published)))
    return paths


def _named(entry: Entry) -> str:
    return f"{entry.corpus} {entry.name} seed {entry.seed}"
