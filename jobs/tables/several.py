"""Several experiments in one table: their rows below one another, each with the name of its experiment where a method occurs twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from jobs.errors import UsageError
from jobs.experiment.graph import Graph
from jobs.experiment.recipes import MethodRecipe
from jobs.store.records import Result
from jobs.tables.entries import entries_of
from jobs.tables.further import RunName, further_of, metrics_of
from jobs.tables.measured import measured_of
from jobs.tables.published import Published
from jobs.tables.summary import Summary, Unreplaced, code_facts, summarise

if TYPE_CHECKING:
    from jobs.control.rounds import Judgements


@dataclass(frozen=True)
class Part:
    """One experiment of a joint table; see `jobs.tables.collect.collect`."""

    name: str
    graph: Graph
    results: Mapping[str, Result]
    states: Mapping[str, str]
    outlier_rule: str
    judgements: Judgements | None
    recipes: Sequence[MethodRecipe]
    labels: Mapping[str, str] = field(default_factory=dict)  # of its methods
    corpus_caption: tuple[str, ...] = ()  # sentences that captions state of its corpus


def joint_summary(parts: Sequence[Part], unreplaced: Unreplaced = Unreplaced.keep) -> tuple[Summary, dict[str, str]]:
    """The numbers of all experiments, and the labels of their methods.

    `unreplaced`: what becomes of outliers that no other run replaces. A method that several experiments have on the same corpus is named
    `METHOD@EXPERIMENT`. Rules that differ are listed by experiment. UsageError for experiments with different scores.
    """
    scores = {part.graph.score: part.name for part in parts}
    if len(scores) > 1:
        stated = ", ".join(f"{name} has {score.axis}" for score, name in scores.items())
        raise UsageError(f"collect: one table has one score, but {stated}: collect them one by one")
    names = {(part.name, method): name for part in parts for method, name in names_of(part, parts).items()}
    entries = [
        replace(entry, method=names[part.name, entry.method])
        for part in parts
        for entry in entries_of(part.graph, part.results, part.states, part.judgements)
    ]
    rules = {part.outlier_rule for part in parts}
    summary = summarise(
        entries,
        experiment=" and ".join(part.name for part in parts),
        planned=True,
        outlier_rule=rules.pop() if len(rules) == 1 else "; ".join(f"{part.name}: {part.outlier_rule}" for part in parts),
        unreplaced=unreplaced,
        code=code_facts(part.results[key] for part in parts for key in part.graph.nodes if key in part.results),
        recipes=[replace(recipe, method=names.get((part.name, recipe.method), recipe.method)) for part in parts for recipe in part.recipes],
    )
    measured = [
        replace(each, method=names[part.name, each.method]) for part in parts for each in measured_of(part.graph, part.results, part.states)
    ]
    labels = {}
    for part in parts:
        for method in _methods(part):
            label, name = part.labels.get(method, method), names[part.name, method]
            labels[name] = label if name == method else f"{label} ({part.name})"
    metrics: dict[RunName, Mapping[str, Any]] = {}
    for part in parts:
        metrics |= metrics_of(part.graph, part.results, names_of(part, parts))
    captions = {part.graph.corpus: part.corpus_caption for part in parts if part.corpus_caption}
    return (
        replace(
            summary,
            measured=tuple(measured),
            further=further_of(summary, metrics),
            corpus_captions=captions,
            score=parts[0].graph.score,
            terms=parts[0].graph.terms,
        ),
        labels,
    )


def names_of(part: Part, parts: Sequence[Part]) -> dict[str, str]:
    """Method of one of several experiments -> its name in their joint table."""
    twice = Counter((each.graph.corpus, method) for each in parts for method in _methods(each))
    return {method: f"{method}@{part.name}" if twice[part.graph.corpus, method] > 1 else method for method in _methods(part)}


def joint_published(published: Sequence[Published], labels: Mapping[str, str]) -> Published:
    """The published results of a joint table: those of the experiments if they all have the same, else none."""
    first = published[0]
    same = all(replace(each, labels={}) == replace(first, labels={}) for each in published)
    return replace(first if same else replace(first, title="", rows=(), columns={}), labels=dict(labels))


def _methods(part: Part) -> list[str]:
    return list(dict.fromkeys(run.method for run in part.graph.runs))
