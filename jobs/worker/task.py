"""What a worker is told: one JSON description that holds everything a task needs, so that a worker plans nothing.

A description serves one batch. Its `nodes` are the stages to compute and those directly upstream of them; its `tasks` are the array
elements, each a list of keys. Names of Python objects are given as `module:attribute`, because this package imports no other.
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

SCHEMA = 1


@dataclass(frozen=True)
class Workplace:
    """What all stages of an experiment have in common where they are executed; folders are absolute."""

    registry: str  # `module:attribute` that satisfies jobs.experiment.registry.Registry
    results: str
    experiment: str
    corpus: str
    corpus_folder: str
    corpus_digest: str
    digest_of: str = ""  # `module:function`: corpus folder -> digest, or an object with a `digest`; "": not verified
    code: Mapping[str, Any] = field(default_factory=dict)  # commit, dirty diff, snapshot: provenance that only the launcher knows
    packages: tuple[str, ...] = ()  # distributions whose versions are recorded
    launched: float = 0.0  # seconds since the epoch: what was cancelled after it is not begun; 0: cancellations are not asked for


@dataclass(frozen=True)
class Description:
    """One batch as its workers see it."""

    place: Workplace
    nodes: Mapping[str, Node]
    tasks: tuple[tuple[str, ...], ...]
    relief: int = 0  # how often memory ran out for these stages: the work of a pass is halved that many times
    gone: tuple[str, ...] = ()  # Slurm jobs that held one of these stages and are known to be gone
    at_once: int = 1  # stages of a task computed at the same time; 0: as many as the memory measured before allows (jobs.worker.packing)
    team: int = 1  # processes that compute each stage together (jobs.worker.team_follower)


def describe(place: Workplace, graph: Graph, tasks: Iterable[Iterable[str]], relief: int = 0, gone: tuple[str, ...] = ()) -> Description:
    """The description of tasks, each an iterable of keys of the graph."""
    listed = tuple(tuple(keys) for keys in tasks)
    wanted = {key: None for keys in listed for key in keys}
    for key in tuple(wanted):
        wanted.update(dict.fromkeys(graph.nodes[key].upstream.values()))
    return Description(place, {key: graph.nodes[key] for key in wanted}, listed, relief, gone)


def description_to_json(description: Description) -> dict[str, Any]:
    """JSON value of a description."""
    nodes = {key: asdict(node) for key, node in description.nodes.items()}
    tasks = [list(keys) for keys in description.tasks]
    return {
        "schema": SCHEMA,
        "place": asdict(description.place),
        "nodes": nodes,
        "tasks": tasks,
        "relief": description.relief,
        "gone": list(description.gone),
        "at_once": description.at_once,
        "team": description.team,
    }


def description_from_json(value: Mapping[str, Any]) -> Description:
    """Raises UsageError if the value is not a description of this schema."""
    if value.get("schema") != SCHEMA:
        raise UsageError(f"task description of schema {value.get('schema')}, expected {SCHEMA}: written by another version of the program")
    try:
        place = Workplace(**{**value["place"], "packages": tuple(value["place"]["packages"])})
        nodes = {key: Node(**node) for key, node in value["nodes"].items()}
        tasks = tuple(tuple(keys) for keys in value["tasks"])
        counts = {key: int(value.get(key, default)) for key, default in (("relief", 0), ("at_once", 1), ("team", 1))}
        return Description(place, nodes, tasks, gone=tuple(value.get("gone", ())), **counts)
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


def load_registry(place: Workplace) -> Registry:
    """The registry that computes this workplace's stages."""
    return cast(Registry, load_object(place.registry))


def read_corpus_digest(place: Workplace) -> str:
    """Digest of the corpus as it lies there now; the stated one where nothing is named that could read it."""
    if not place.digest_of:
        return place.corpus_digest
    reader = cast("Callable[[Path], Any]", load_object(place.digest_of))
    found = reader(Path(place.corpus_folder))
    return str(getattr(found, "digest", found))


def order_of(node: Node, place: Workplace, *, upstream: Mapping[str, Path], output: Path, checkpoint: Path, relief: int) -> dict[str, Any]:
    """Everything that determines how a stage is computed, as a JSON value."""
    folders = {"upstream": {role: str(path) for role, path in upstream.items()}, "output": str(output), "checkpoint": str(checkpoint)}
    return {"node": asdict(node), "place": asdict(place), "relief": relief, **folders}


def compute(order: Mapping[str, Any], team: Team | None, stop: StopSignal, tell: Callable[[str], None]) -> Mapping[str, Any]:
    """What the registry returns for a stage, in any process that computes it; `team` None: it computes alone."""
    node = Node(**order["node"])
    place = Workplace(**{**order["place"], "packages": tuple(order["place"]["packages"])})
    return load_registry(place).run(
        node.stage,
        settings=node.settings,
        runtime=node.runtime,
        corpus=Path(place.corpus_folder),
        fold=node.fold,
        seed=node.seed,
        upstream={role: Path(folder) for role, folder in order["upstream"].items()},
        output=Path(order["output"]),
        checkpoint=Path(order["checkpoint"]),
        should_stop=stop,
        report=lambda line: tell(f"{node.name}: {line}"),
        relief=int(order["relief"]),
        team=team,
        shared=Layout(Path(place.results), place.experiment).cache,
    )
