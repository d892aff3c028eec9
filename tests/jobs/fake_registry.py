"""A small registry with real work for tests of the job system: stages add up numbers and write them to files.

Every start of a stage leaves a line in the corpus folder's `starts/KEY-LIKE-NAME`, every end in `ends/`, so that tests count executions
on disk. A recipe is {"failing": {"STAGE FOLD SEED": BEHAVIOUR}, "work": COUNT, "seconds": PAUSE}; behaviours are `fail:N`, `refuse`, `nan`,
`sleep:SECONDS` (stops when asked, after a checkpoint), `deaf:SECONDS` (does not hear), `kill:N`, `exit:N` (the first N times), `garbage`.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.graph import Graph, build_graph
from jobs.slots import seeds_of_slots

METHODS = ("vft", "tapt", "ptapt")
NAME = "tests.jobs.fake_registry:REGISTRY"
DIGEST_OF = "tests.jobs.fake_registry:read_digest"
PRELOADED: list[int] = []


@dataclass(frozen=True)
class FakeCall:
    stage: str
    settings: Mapping[str, Any]
    fold: str
    seed: int
    runtime: Mapping[str, Any] = field(default_factory=dict)
    upstream: Mapping[str, FakeCall] = field(default_factory=dict)
    version: int = 1


class FakeStopError(Exception):
    interrupted = True


class FakeInputError(Exception):
    def __init__(self, problems: tuple[str, ...]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class FakeRegistry:
    @property
    def methods(self) -> tuple[str, ...]:
        return METHODS

    def call(self, method: str, recipe: Any, *, fold: str, seed: int) -> FakeCall:
        def stage(name: str, seed: int, **upstream: FakeCall) -> FakeCall:
            behaviour = recipe.get("failing", {}).get(f"{name} {method} {fold} {seed}", "")
            runtime = {"behaviour": behaviour, "seconds": recipe.get("seconds", 0.0)}
            return FakeCall(name, {"work": recipe.get("work", 10)}, fold, seed, runtime, upstream)

        if method == "vft":
            return stage("finetune", seed)
        if method == "tapt":
            return stage("finetune", seed, backbone=stage("tapt", 0))
        states = stage("states", 0)
        return stage("finetune", seed, backbone=stage("ptapt", 0, labels=stage("cluster", 0, states=states)))

    def run(
        self,
        stage: str,
        *,
        settings: Mapping[str, Any],
        runtime: Mapping[str, Any],
        corpus: Path,
        fold: str,
        seed: int,
        upstream: Mapping[str, Path],
        output: Path,
        checkpoint: Path,
        should_stop: Callable[[], bool],
        report: Callable[[str], None],
    ) -> Mapping[str, Any]:
        key = output.parents[2].name
        begun = _note(corpus / "starts" / key)
        report(f"start {begun} with {os.environ.get('OMP_NUM_THREADS')} threads, preloaded {bool(PRELOADED)}")
        _behave(runtime["behaviour"], begun, checkpoint, should_stop)
        time.sleep(runtime["seconds"])
        total = seed + sum(range(settings["work"]))
        for folder in upstream.values():
            total += json.loads((folder / "sum.json").read_text())["sum"]
        (output / "sum.json").write_text(json.dumps({"sum": total}))
        (output / "parts").mkdir()
        (output / "parts" / "note.txt").write_text(stage)
        _note(corpus / "ends" / key)
        ua = float("nan") if runtime["behaviour"] == "nan" else 50.0 + total % 50
        return {"metrics": {"ua": ua, "nested": {"parts": [total, 1.5]}}, "confusion": [[3, 1], [0, 4]], "classes": ["angry", "sad"]}


REGISTRY = FakeRegistry()


def preload() -> None:
    """Called once in the fork server."""
    PRELOADED.append(os.getpid())


def read_digest(folder: Path) -> str:
    """Digest of a fake corpus: the text of its one file."""
    return (folder / "digest").read_text()


def make_corpus(folder: Path, digest: str = "d1") -> Path:
    """A corpus folder as this registry reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "digest").write_text(digest)
    return folder


def make_graph(
    recipe: Mapping[str, Any] | None = None, *, methods: tuple[str, ...] = METHODS, folds: tuple[str, ...] = ("1", "2"), seeds: int = 2
) -> Graph:
    """The graph of a small experiment."""
    slots = seeds_of_slots(methods, folds, seeds=seeds, first_seed=0)
    return build_graph(REGISTRY, recipe or {}, corpus="fake", corpus_digest="d1", methods=methods, folds=folds, seeds=slots)


def count(corpus: Path, what: str) -> dict[str, int]:
    """Key -> how often a stage has started (`starts`) or ended well (`ends`)."""
    folder = corpus / what
    return {path.name: len(path.read_text().splitlines()) for path in folder.iterdir()} if folder.is_dir() else {}


def _behave(behaviour: str, begun: int, checkpoint: Path, should_stop: Callable[[], bool]) -> None:
    name, _, argument = behaviour.partition(":")
    if name == "fail" and begun <= int(argument):
        raise ValueError(f"made to fail, start {begun}\nwith a second line")
    if name == "refuse":
        raise FakeInputError(("no such checkpoint: name another", "and a second problem"))
    if name == "kill" and begun <= int(argument):
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "exit" and begun <= int(argument):
        os._exit(7)
    if name in ("sleep", "deaf"):
        end = time.monotonic() + float(argument)
        while time.monotonic() < end and not (checkpoint / "state.json").exists():
            time.sleep(0.02)
            if name == "sleep" and should_stop():
                (checkpoint / "state.json").write_text("{}")
                raise FakeStopError("asked to stop at step 3")


def _note(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(f"{os.getpid()}\n")
    return len(path.read_text().splitlines())
