"""Writes the tables of an experiment in every requested format, the JSON of its numbers, and its confusion matrices."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.control.outliers import rule_in_words
from jobs.errors import UsageError
from jobs.experiment.graph import Graph
from jobs.experiment.recipes import MethodRecipe
from jobs.store.layout import Layout
from jobs.store.records import Decoder, Result, json_text, write_text
from jobs.store.scores import UNWEIGHTED
from jobs.tables import published as published_figures
from jobs.tables.adaptation import adaptations_of, render_adaptation_csv
from jobs.tables.arithmetic import arithmetic_of
from jobs.tables.as_json import to_json
from jobs.tables.confusion import write_confusions
from jobs.tables.display import render_csv, render_markdown, render_measured_csv, render_methods_csv
from jobs.tables.entries import entries_of
from jobs.tables.from_csv import Judged, judge_runs, read_runs
from jobs.tables.further import further_of, metrics_of, render_metrics_csv
from jobs.tables.joined import write_joined
from jobs.tables.latex import PLAIN, Style, document, fragments
from jobs.tables.measured import measured_of
from jobs.tables.paired import paired_json, render_paired_csv
from jobs.tables.plain import settings_json
from jobs.tables.published import Published
from jobs.tables.summary import Entry, Status, Summary, Unreplaced, code_facts, summarise
from jobs.text import counted

if TYPE_CHECKING:
    from jobs.control.rounds import Judgements
    from jobs.experiment.config import OutlierRule


FORMATS = {"latex": "tables.tex", "markdown": "table.md", "csv": "runs.csv", "json": "summary.json"}
METHODS_CSV = "methods.csv"  # beside `runs.csv`
MEASURED_CSV = "measured.csv"  # beside `runs.csv`, if corpora were measured
ADAPTATION_CSV = "adaptation.csv"  # beside `runs.csv`, if methods are adapted from a source
METRICS_CSV = "metrics.csv"  # beside `runs.csv`, if runs have further metrics
PAIRED_CSV = "paired.csv"  # beside `runs.csv`, if the table names pairs of methods
_FRAGMENT = re.compile(r"table\d*(?:-differences|-details)?\.tex")


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
        measured = (f"{each.name} ({each.status})" for each in self.summary.measured if each.metrics is None)
        return (*(f"{entry.name} ({entry.status.value})" for entry in self.summary.missing), *measured)


@dataclass(frozen=True)
class CsvReport(CollectReport):
    """The same for runs from a CSV file, with the decisions of the outlier rule."""

    judged: Judged

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the user: slots that need a run with another seed, and unused rows."""
        wanted = [
            f"rerun with another seed, and add the row below: {_named(entry)} "
            + (f"is out with {UNWEIGHTED.label} {entry.scores.ua:g}" if entry.scores and entry.status is Status.accepted else "diverged")
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
    corpus_caption: Sequence[str] = (),
) -> Summary:
    """The numbers of an experiment. `results`, `states` and `judgements` as for `entries_of`; the others as for `summarise`.

    `corpus_caption`: sentences that captions state of the corpus.
    """
    entries = entries_of(graph, results, states, judgements)
    code = code_facts(results[key] for key in graph.nodes if key in results)
    found = summarise(
        entries, experiment=experiment, planned=True, outlier_rule=outlier_rule, unreplaced=unreplaced, code=code, recipes=recipes
    )
    return replace(
        found,
        arithmetic=arithmetic_of(graph, results),
        measured=measured_of(graph, results, states),
        further=further_of(found, metrics_of(graph, results)),
        corpus_captions={graph.corpus: tuple(corpus_caption)} if corpus_caption else {},
        score=graph.score,
        terms=graph.terms,
    )


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
    corpus_caption: Sequence[str] = (),
    style: Style = PLAIN,
    force: bool = False,
) -> CollectReport:
    """Write the tables into `tables/` of the experiment and the confusion matrices into `confusion/`, or all below `out`.

    `results` and `states` are as for `jobs.tables.entries.entries_of`; `formats` are keys of `FORMATS`; `outlier_rule` describes the
    rule that was applied, as `jobs.control.outliers.rule_in_words` does; `judgements` are its verdicts, and `unreplaced` is what becomes
    of the outliers that no run replaces; `recipes` and `corpus_caption` are stated in the captions. Formats that the folder has already
    are written too, and matrices of other runs are removed, so that all files have the same runs. An incomplete experiment is written
    too and marked as such, but does not replace complete tables of more runs without `force`. Raises UsageError for results without
    usable scores and for an unknown format.
    """
    check_formats(formats)
    summary = summary_of(layout.experiment, graph, results, states, outlier_rule, judgements, recipes, unreplaced, corpus_caption)
    folder = layout.tables if out is None else out
    kept = "" if force else reason_to_keep(_EARLIER.read(folder / FORMATS["json"]), summary)
    if kept:
        return CollectReport((), summary.complete, summary, kept=f"{folder}: {kept}")
    formats = (*formats, *(name for name, file in FORMATS.items() if name not in formats and (folder / file).is_file()))
    paths = _write_tables(folder, summary, published, formats, style)
    if out is None:
        _remove_other_fragments(folder, paths)
    confusion = (layout.folder if out is None else out) / "confusion"
    paths.extend(write_confusions(confusion, graph, results, published.labels))
    joined, gaps = (
        write_joined(
            folder, layout, graph, results, (*FORMATS.values(), METHODS_CSV, MEASURED_CSV, METRICS_CSV, ADAPTATION_CSV, PAIRED_CSV)
        )
        if "csv" in formats
        else ([], [])
    )
    return CollectReport((*paths, *joined), summary.complete, summary, gaps=tuple(gaps))


def collect_several(summary: Summary, published: Published, out: Path, formats: Sequence[str], style: Style = PLAIN) -> CollectReport:
    """Write the tables of several experiments (jobs.tables.several) into `out`. UsageError for an unknown format.

    Confusion matrices and predictions are written for single experiments only.
    """
    check_formats(formats)
    return CollectReport(tuple(_write_tables(out, summary, published, formats, style)), summary.complete, summary)


@dataclass(frozen=True)
class EarlierMethod:
    """The part of a method of an earlier `summary.json` that is read again."""

    n: int  # finished runs


@dataclass(frozen=True)
class EarlierMeasured:
    """The part of a measured corpus of an earlier `summary.json` that is read again."""

    metrics: dict[str, float] | None


@dataclass(frozen=True)
class Earlier:
    """The part of an earlier `summary.json` that is read again."""

    complete: bool
    methods: tuple[EarlierMethod, ...]
    measured: tuple[EarlierMeasured, ...] = ()


_EARLIER = Decoder(Earlier)


def reason_to_keep(earlier: Earlier | None, summary: Summary) -> str:
    """Why tables are not overwritten: they are complete, the new ones are not and have fewer runs; "" if they may be. Pure.

    `earlier`: their `summary.json`, None without one. This happens if the code or the settings have changed and other stages are needed.
    """
    if summary.complete or earlier is None or not earlier.complete:
        return ""
    before = sum(method.n for method in earlier.methods) + sum(each.metrics is not None for each in earlier.measured)
    now = summary.finished
    return f"complete tables of {counted(before, 'run')} are not overwritten with incomplete ones of {now}" if now < before else ""


def collect_csv(
    path: Path,
    published: Published,
    *,
    rule: OutlierRule | str,
    sigmas: float,
    rounds: int,
    unreplaced: Unreplaced = Unreplaced.keep,
    style: Style = PLAIN,
    formats: Sequence[str] = tuple(FORMATS),
    out: Path | None = None,
) -> CsvReport:
    """Apply the outlier rule to the runs of a CSV file and write the same tables into `out` (default: `NAME-tables/` beside it).

    Raises UsageError for a file that `jobs.tables.from_csv` cannot read, a rule that can never drop a run, and an unknown format.
    """
    check_formats(formats)
    summary, judged = summary_of_csv(path, rule=rule, sigmas=sigmas, rounds=rounds, unreplaced=unreplaced)
    paths = _write_tables(csv_folder(path) if out is None else out, summary, published, formats, style)
    return CsvReport(tuple(paths), summary.complete, summary, judged)


def summary_of_csv(
    path: Path, *, rule: OutlierRule | str, sigmas: float, rounds: int, unreplaced: Unreplaced = Unreplaced.keep
) -> tuple[Summary, Judged]:
    """The numbers of the runs in a CSV file, and the decisions of the outlier rule. Raises UsageError as `collect_csv`."""
    judged = judge_runs(read_runs(path), rule, sigmas, rounds)
    words = rule_in_words(rule, sigmas, rounds)
    if judged.unused:
        words += f"; runs of the file that are not used, since the rule keeps an earlier one of their slot: {len(judged.unused)}"
    return summarise(judged.entries, experiment=path.stem, outlier_rule=words, unreplaced=unreplaced), judged


def csv_folder(path: Path) -> Path:
    """Where the tables of a CSV file are written by default."""
    return path.with_name(f"{path.stem}-tables")


def check_formats(formats: Sequence[str], also: Sequence[str] = ()) -> None:
    """UsageError for a format that is neither one of `FORMATS` nor of `also`."""
    known = (*FORMATS, *also)
    unknown = [name for name in formats if name not in known]
    if unknown:
        raise UsageError(f"format {unknown[0]!r}: known are {', '.join(known)}")


def text_of(format_name: str, summary: Summary, published: Published, style: Style) -> str:
    """One format as one text: LaTeX with its fragments in the document, CSV with a row per run, or per metric where no run has a score."""
    if format_name == "latex":
        return document(fragments(summary, published, style), style, inline=True)
    if format_name == "markdown":
        return render_markdown(summary, published)
    if format_name == "csv":
        return render_csv(summary) if summary.methods or not summary.measured else render_measured_csv(summary)
    paired = paired_json(summary, published.paired)
    further = {"settings_table": settings_json(summary, published), **({} if paired is None else {"paired_table": paired})}
    return json_text({**to_json(summary, published_figures.to_json(published)), **further})


def _write_tables(folder: Path, summary: Summary, published: Published, formats: Sequence[str], style: Style) -> list[Path]:
    paths: list[Path] = []

    def write(name: str, text: str) -> None:
        paths.append(folder / name)
        write_text(folder / name, text)

    for name in formats:
        if name == "latex":
            parts = fragments(summary, published, style)
            for file, text in {**parts, FORMATS[name]: document(parts, style)}.items():
                write(file, text)
        else:
            write(FORMATS[name], render_csv(summary) if name == "csv" else text_of(name, summary, published, style))
        if name == "csv":
            write(METHODS_CSV, render_methods_csv(summary))
            if summary.measured:
                write(MEASURED_CSV, render_measured_csv(summary))
            if summary.further:
                write(METRICS_CSV, render_metrics_csv(summary))
            if published.paired is not None:
                write(PAIRED_CSV, render_paired_csv(summary, published.paired))
            if adaptations_of(summary):
                write(ADAPTATION_CSV, render_adaptation_csv(summary))
    return paths


def _remove_other_fragments(folder: Path, written: Sequence[Path]) -> None:
    """Remove LaTeX fragments of corpora that are not in the tables any more, and the `table.tex` of versions until 0.4."""
    for path in folder.glob("table*.tex"):
        if _FRAGMENT.fullmatch(path.name) and path not in written:
            path.unlink(missing_ok=True)


def _named(entry: Entry) -> str:
    return f"{entry.corpus} {entry.name} seed {entry.seed}"
