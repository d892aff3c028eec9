"""Where a worker of a test computes: corpus, store and graph of a small experiment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.experiment.graph import Graph, Node
from jobs.signals import StopRequest
from jobs.store.layout import Layout, StageFolder
from jobs.store.records import Outcome, Result, read_outcome, read_result
from jobs.worker.stage import Verdict, WorkerProcess, execute
from jobs.worker.task import Workplace, describe
from tests.jobs import fake_registry


class Place:
    """A corpus, a store and the graph of a small experiment."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any] | None = None) -> None:
        self.corpus = fake_registry.make_corpus(folder / "corpus")
        self.layout = Layout(folder / "results", "exp")
        self.graph: Graph = fake_registry.make_graph(recipe, methods=("tapt",), folds=("1",), seeds=3)
        self.place = Workplace(
            registry=fake_registry.NAME,
            results=str(self.layout.root),
            experiment="exp",
            corpus="fake",
            corpus_folder=str(self.corpus),
            corpus_digest="d1",
            digest_of=fake_registry.DIGEST_OF,
            code={"commit": "abc", "dirty": ""},
            packages=("pytest", "no-such-package"),
        )
        self.tapt = next(node for node in self.graph.nodes.values() if node.stage == "tapt")
        self.runs = [self.graph.nodes[run.key] for run in self.graph.runs]
        self.said: list[str] = []

    def process(self, *nodes: Node, lag_seconds: float = 0.0) -> WorkerProcess:
        description = describe(self.place, self.graph, [[node.key for node in nodes]])
        return WorkerProcess(description, 1, self.said.append, StopRequest(), lag_seconds=lag_seconds)

    def execute(self, node: Node) -> Verdict:
        return execute(self.process(node), node)

    def folder(self, node: Node) -> StageFolder:
        return self.layout.stage(node.stage, node.key)

    def result(self, node: Node) -> Result:
        result = read_result(self.folder(node), node.key)
        assert result is not None
        return result

    def outcome(self, node: Node, attempt: int = 1) -> Outcome:
        outcome = read_outcome(self.folder(node).attempt(attempt))
        assert outcome is not None
        return outcome

    def starts(self, node: Node) -> int:
        return fake_registry.count(self.corpus, "starts").get(node.key, 0)


def failing(tmp_path: Path, behaviour: str) -> Place:
    return Place(tmp_path, {"failing": {"tapt tapt 1 0": behaviour}})
