"""The input of a worker: one JSON description that holds everything a task needs, so that a worker plans nothing.

A description serves one batch. Its `nodes` are the stages to compute and those directly upstream of them; its `tasks` are the array
tasks, each a list of keys. Python objects are named as `module:attribute`, because this package imports no other.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from jobs.errors import UsageError
from jobs.experiment.graph import Graph, Node
from jobs.experiment.registry import Registry, StopSignal, Team
from jobs.store.layout import Layout
from jobs.store.records import read_json, write_json
from jobs.store.snapshot import check_snapshot

SCHEMA = 1


@dataclass(frozen=True)
class Workplace:
    """What all stages of an experiment have in common on the machine that executes them; folders are absolute."""

    registry: str  # `module:attribute` that satisfies jobs.experiment.registry.Registry
    results: str
    experiment: str
    corpus: str
    corpus_folder: str
    corpus_digest: str
    digest_of: str = ""  # `module:function`: corpus folder -> digest, or an object with a `digest`; "": the corpus is not verified
    code: Mapping[str, Any] = field(default_factory=dict)  # commit, dirty diff, snapshot: provenance known to the launcher only
    packages: tuple[str, ...] = ()  # distributions whose versions are recorded
    launched: float = 0.0  # seconds since the epoch: stages cancelled after it are not started; 0: cancellations are not checked

    @property
    def layout(self) -> Layout:
        return Layout(Path(self.results), self.experiment)


@dataclass(frozen=True)
class Description:
    """One batch of tasks, as its workers read it."""

    place: Workplace
    nodes: Mapping[str, Node]
    tasks: tuple[tuple[str, ...], ...]
    relief: int = 0  # how often these stages ran out of memory: the micro-batch is halved that many times
    gone: tuple[str, ...] = ()  # Slurm jobs that had claimed one of these stages and have left the queue
    at_once: int = 1  # stages of a task computed concurrently; 0: as many as fit by measured memory (jobs.worker.packing)
    team: int = 1  # processes that compute each stage together (jobs.worker.team_start)
    requested: Mapping[str, float] = field(default_factory=dict)  # of Slurm for each task, and when (`ArrayJob.requested`); empty: nothing


def describe(place: Workplace, graph: Graph, tasks: Iterable[Iterable[str]], relief: int = 0, gone: tuple[str, ...] = ()) -> Description:
    """The description of tasks, each an iterable of keys of the graph."""
    listed = tuple(tuple(keys) for keys in tasks)
    wanted = {key: None for keys in listed for key in keys}
    for key in tuple(wanted):
        wanted.update(dict.fromkeys(graph.nodes[key].upstream.values()))
    return Description(place, {key: graph.nodes[key] for key in wanted}, listed, relief, gone)


def description_to_json(description: Description) -> dict[str, Any]:
    """JSON value of a description."""
    return {"schema": SCHEMA, **asdict(description)}


def description_from_json(value: Mapping[str, Any]) -> Description:
    """Raises UsageError if the value is not a description of this schema."""
    if value.get("schema") != SCHEMA:
        raise UsageError(f"task description of schema {value.get('schema')}, expected {SCHEMA}: written by another version of the program")
    try:
        place = workplace_from_json(value["place"])
        nodes = {key: Node(**node) for key, node in value["nodes"].items()}
        tasks = tuple(tuple(keys) for keys in value["tasks"])
        counts = {key: int(value.get(key, default)) for key, default in (("relief", 0), ("at_once", 1), ("team", 1))}
        requested = {str(name): float(number) for name, number in value.get("requested", {}).items()}
        return Description(place, nodes, tasks, gone=tuple(value.get("gone", ())), requested=requested, **counts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"task description lacks or does not know {error}: written by another version of the program") from error


def write_description(path: Path, description: Description) -> None:
    """Write a description for workers to read, atomically."""
    write_json(path, description_to_json(description))


def read_description(path: Path) -> Description:
    """Raises UsageError if there is no complete description."""
    value = read_json(path)
    if value is None:
        raise UsageError(f"{path}: no complete task description there")
    return description_from_json(value)


def load_object(name: str) -> Any:
    """The object named `module:attribute` (or the module, where no attribute is named)."""
    module, _, attribute = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in filter(None, attribute.split(".")):
        found = getattr(found, part)
    return found


def workplace_from_json(value: Mapping[str, Any]) -> Workplace:
    """Raises KeyError or TypeError for the value of another version."""
    return Workplace(**{**value, "packages": tuple(value["packages"])})


def load_registry(place: Workplace) -> Registry:
    """The registry that computes this workplace's stages."""
    return cast(Registry, load_object(place.registry))


def check_code(place: Workplace) -> None:
    """UsageError if the snapshot that this process runs was changed since the launch. Its files are read once per process.

    Stages on the machine of the launch run its code without a snapshot.
    """
    if place.code.get("snapshot"):
        check_snapshot(Path(place.code["folder"]), place.code["snapshot"])


def read_corpus_digest(place: Workplace) -> str:
    """Digest of the corpus folder as it is now; the expected digest where no function is named that computes it."""
    if not place.digest_of:
        return place.corpus_digest
    reader = cast("Callable[[Path], Any]", load_object(place.digest_of))
    found = reader(Path(place.corpus_folder))
    return str(getattr(found, "digest", found))


def stage_request(
    node: Node, place: Workplace, *, upstream: Mapping[str, Path], output: Path, checkpoint: Path, relief: int, attempt: int
) -> dict[str, Any]:
    """What every process of a team needs to compute a stage, as a JSON value."""
    folders = {"upstream": {role: str(path) for role, path in upstream.items()}, "output": str(output), "checkpoint": str(checkpoint)}
    return {"node": asdict(node), "place": asdict(place), "relief": relief, "attempt": attempt, **folders}


def compute(
    request: Mapping[str, Any],
    team: Team | None,
    stop: StopSignal,
    report: Callable[[str], None],
    superseded: Callable[[], bool] = lambda: False,
) -> Mapping[str, Any]:
    """What the registry returns for a stage, in any process that computes it; `team` None: it computes alone.

    `superseded`: whether a later attempt of the stage was claimed; only the process that writes checkpoints has to know.
    """
    node, place = Node(**request["node"]), workplace_from_json(request["place"])
    return load_registry(place).run(
        node.stage,
        settings=node.settings,
        runtime=node.runtime,
        corpus=Path(place.corpus_folder),
        fold=node.fold,
        seed=node.seed,
        upstream={role: Path(folder) for role, folder in request["upstream"].items()},
        output=Path(request["output"]),
        checkpoint=Path(request["checkpoint"]),
        should_stop=stop,
        report=lambda line: report(f"{node.name}: {line}"),
        relief=int(request["relief"]),
        attempt=int(request["attempt"]),
        superseded=superseded,
        team=team,
        shared=place.layout.cache,
    )
