"""What tables are made of beside results: runs and stages, states, outlier rule, recipes, published figures and style, as one record.

The record stands in for the registry and the configuration, so that tables are rendered again without the packages, weights and corpus
of the experiment, whatever version of the program renders them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from jobs.control.outliers import rule_in_words
from jobs.control.result_index import facts_of
from jobs.control.rounds import Judgements, replay
from jobs.experiment.config import OutlierRule, Policy
from jobs.experiment.graph import Graph, Node, Run, children_of, content_key
from jobs.experiment.recipes import MethodRecipe
from jobs.report.material import Source, material_of
from jobs.report.write import write_report
from jobs.store.layout import Layout, valid_experiment_name
from jobs.store.records import Decoder, Result, read_result
from jobs.store.scores import RECORDED, UNWEIGHTED, Score, Terms
from jobs.tables.collect import CollectReport, collect
from jobs.tables.latex import Style
from jobs.tables.published import Published
from jobs.tables.summary import Status, Unreplaced

SCHEMA = 1
_KEY = re.compile(r"[0-9a-f]+")


@dataclass(frozen=True)
class Stage:
    """One stage of the graph; its settings are in its result."""

    key: str
    stage: str
    version: int
    fold: str
    seed: int
    method: str
    upstream: Mapping[str, str]  # role -> key

    def __post_init__(self) -> None:
        if not (valid_experiment_name(self.stage) and _KEY.fullmatch(self.key)):  # it names a folder
            raise ValueError(f"stage {self.stage!r} with key {self.key!r} cannot be")


@dataclass(frozen=True)
class Inputs:
    """The inputs of the tables of one experiment."""

    experiment: str
    corpus: str
    corpus_digest: str
    stages: tuple[Stage, ...]  # upstream first
    runs: tuple[Run, ...]
    superseded: tuple[Run, ...]
    states: Mapping[str, Status]  # key of each run without a result -> its state
    rule: OutlierRule
    sigmas: float
    rounds: int
    max_seeds: int
    recipes: tuple[MethodRecipe, ...]
    published: Published
    unreplaced: Unreplaced
    style: Style
    measurements: tuple[str, ...] = ()  # methods without a score
    score: Score = UNWEIGHTED  # of the runs; bundles of earlier versions have no other
    corpus_caption: tuple[str, ...] = ()  # sentences that captions state of the corpus
    terms: Terms = RECORDED  # of the registry

    def __post_init__(self) -> None:
        if not valid_experiment_name(self.experiment):
            raise ValueError(f"experiment {self.experiment!r} cannot be")

    @property
    def policy(self) -> Policy:
        """What the judgement of runs depends on."""
        return Policy(outliers=self.rule, sigmas=self.sigmas, rounds=self.rounds, max_seeds=self.max_seeds)

    def graph(self, results: Mapping[str, Result]) -> Graph:
        """The graph, with the settings of the stages that have a result."""
        nodes = {
            each.key: Node(
                each.key,
                each.stage,
                each.version,
                results[each.key].settings if each.key in results else {},
                {},
                each.upstream,
                each.fold,
                each.seed,
                each.method,
            )
            for each in self.stages
        }
        measurements = frozenset(self.measurements)
        return Graph(
            nodes, self.runs, self.corpus, self.corpus_digest, children_of(nodes), self.superseded, measurements, self.score, self.terms
        )


RECORDS = Decoder(Inputs, SCHEMA)


def stages_of(graph: Graph) -> tuple[Stage, ...]:
    """The stages of a graph as they are recorded."""
    return tuple(
        Stage(node.key, node.stage, node.version, node.fold, node.seed, node.method, dict(node.upstream)) for node in graph.nodes.values()
    )


def to_json(record: Any, schema: int = SCHEMA) -> dict[str, Any]:
    """JSON values of a record, a dataclass: enums by value."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(record), default=attrgetter("value")))
    return {"schema": schema, **values}


def results_of(root: Path, inputs: Inputs) -> dict[str, Result]:
    """Key -> result of each stage that has a valid one below `root`, a folder of results."""
    layout = Layout(root, inputs.experiment)
    found = ((each.key, read_result(layout.stage(each.stage, each.key), each.key)) for each in inputs.stages)
    return {key: result for key, result in found if result is not None}


def unlike_their_keys(inputs: Inputs, results: Mapping[str, Result]) -> Iterator[str]:
    """Keys of the results whose corpus, fold, seed, settings, upstream stages or version are not those that the key is a hash of."""
    for key, result in results.items():
        call: Any = result  # has what a key is made of
        if content_key(call, inputs.corpus_digest, result.upstream) != key or result.corpus_digest != inputs.corpus_digest:
            yield key


def judged(inputs: Inputs, results: Mapping[str, Result]) -> Judgements:
    """The decisions of the outlier rule on the runs."""
    return replay(inputs.graph(results), {key: facts_of(result, 0, inputs.score) for key, result in results.items()}, inputs.policy)


def render(root: Path, inputs: Inputs, out: Path) -> CollectReport:
    """Judge the runs, and write tables and report into `out`, from the results below `root` alone. Raises UsageError as `collect`."""
    results, layout = results_of(root, inputs), Layout(root, inputs.experiment)
    graph = inputs.graph(results)
    written = collect(
        layout,
        graph,
        results,
        {key: state.value for key, state in inputs.states.items()},
        inputs.published,
        out=out,
        outlier_rule=rule_in_words(inputs.rule, inputs.sigmas, inputs.rounds),
        judgements=judged(inputs, results),
        recipes=inputs.recipes,
        unreplaced=inputs.unreplaced,
        corpus_caption=inputs.corpus_caption,
        style=inputs.style,
    )
    write_report(out, material_of(written.summary, inputs.published, [Source(graph, results, layout)]))
    return written
