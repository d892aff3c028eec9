"""What a report is made of: the numbers of the tables, and what the results of the stages behind them hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jobs.experiment.graph import Graph, Run
from jobs.report.page import METRICS, SCORE
from jobs.store.layout import Layout
from jobs.store.records import Result
from jobs.tables.published import Published
from jobs.tables.summary import Entry, MethodSummary, Summary, summarise

MANY_RUNS = 1500  # with more, a report is bounded (`Material.large`): a mark takes about 200 bytes, a row of a table 300


@dataclass(frozen=True)
class Source:
    """One experiment of a report: its graph, the results of finished stages by key, and its folders."""

    graph: Graph
    results: Mapping[str, Result]
    layout: Layout
    names: Mapping[str, str] = field(default_factory=dict)  # method of the graph -> method of the summary, where they differ

    def method(self, run: Run) -> str:
        """The method of a run as the summary names it."""
        return self.names.get(run.method, run.method)

    def runs(self) -> Iterator[tuple[Run, Result]]:
        """The runs that fill the slots and have a result."""
        return ((run, self.results[run.key]) for run in self.graph.runs if run.key in self.results)

    def artifact(self, key: str, name: str) -> Path | None:
        """An artifact of a finished stage, whether its file is still there or not; None if its result names none."""
        result = self.results[key]
        if name not in result.artifacts:
            return None
        return self.layout.stage(result.stage, key).attempt(result.attempt).output / name


@dataclass(frozen=True)
class Material:
    """What a report is made of. `sources`: none for runs from a CSV file."""

    summary: Summary
    published: Published
    sources: Sequence[Source] = ()
    by_metric: Mapping[str, Summary] = field(default_factory=dict)  # the numbers of `summary` for each of `METRICS` that all runs have

    @property
    def large(self) -> bool:
        """Whether there are so many runs that figures show UA alone, marks have no tooltips, and not every run has a row."""
        return sum(len(cell.runs) for method in self.summary.methods for cell in method.cells) > MANY_RUNS

    @property
    def labels(self) -> Mapping[str, str]:
        return self.published.labels

    def label(self, method: str) -> str:
        return self.labels.get(method, method)

    def heading(self, metric: str) -> str:
        """Heading of a key of `METRICS`; that of the score is the registry's."""
        return self.summary.score.label if metric == SCORE else METRICS[metric]

    def axis(self, metric: str) -> str:
        """Heading and unit: `UA (%)`."""
        return self.summary.score.axis if metric == SCORE else f"{METRICS[metric]} (%)"

    @property
    def corpora(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(method.corpus for method in self.summary.methods))

    def methods(self, corpus: str, metric: str = SCORE) -> list[MethodSummary]:
        """The methods of a corpus, in the order of the tables."""
        return [method for method in self.by_metric[metric].methods if method.corpus == corpus]


def material_of(summary: Summary, published: Published, sources: Sequence[Source] = ()) -> Material:
    """The material of a report. Metrics beside the score are left out where a run lacks them, and of a very large experiment."""
    entries = list(entries_of_summary(summary))
    scored = [entry.scores for entry in entries if entry.scores is not None]
    found = {SCORE: summary}
    if len(entries) <= MANY_RUNS:  # as `Material.large`
        same = (summary.score.of_confusion,)  # the score itself, under the name of a registry
        others = [name for name in METRICS if name not in (SCORE, *same)]
        offered = [name for name in others if scored and all(getattr(scores, name) is not None for scores in scored)]
        found |= {name: _by_metric(summary, entries, name) for name in offered}
    return Material(summary, published, sources, found)


def entries_of_summary(summary: Summary) -> Iterator[Entry]:
    """All runs, in the order of `runs.csv`."""
    return (entry for method in summary.methods for cell in method.cells for entry in cell.runs)


def _by_metric(summary: Summary, entries: Sequence[Entry], name: str) -> Summary:
    """The same summary with another metric in the place of the score. The score was judged: the same runs are dropped."""
    moved = [
        entry if entry.scores is None else replace(entry, scores=replace(entry.scores, ua=getattr(entry.scores, name))) for entry in entries
    ]
    return summarise(
        moved,
        experiment=summary.experiment,
        planned=any(not cell.slots for method in summary.methods for cell in method.cells),
        outlier_rule=summary.outlier_rule,
        unreplaced=summary.unreplaced,
        recipes=summary.recipes,
    )
