"""The stage graph: every stage that an experiment's runs need, once each, identified by a content key. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jobs.experiment.registry import Registry, StageCall
from jobs.store.scores import RECORDED, UNWEIGHTED, Score, Terms, score_of, terms_of

MAX_SLOTS = 1000  # per cell; the distance between a slot's seed and its reserve seeds
Slot = tuple[str, str, int]  # method, fold, number
WHOLE = "all"  # fold of a run that measures the whole corpus
KEY_LENGTH = 20  # hex digits, 80 bits: among 10^6 stages a collision has probability below 10^-12
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


@dataclass(frozen=True, slots=True)
class Run:
    """One value of a table cell: a method trained on a fold with one seed; the seed belongs to a slot of the cell."""

    method: str
    fold: str
    slot: int
    seed: int
    key: str  # of its last stage
    generation: int = 0  # 0: the slot's first seed; g: its g-th reserve seed

    @property
    def name(self) -> str:
        return f"{self.method}/{self.fold}/{self.slot}"

    @property
    def slot_id(self) -> Slot:
        """The slot that the run fills, or filled."""
        return self.method, self.fold, self.slot


@dataclass(frozen=True, slots=True)
class Node:
    """One stage, computed once for all runs that need it."""

    key: str
    stage: str
    version: int
    settings: Mapping[str, Any]
    runtime: Mapping[str, Any]
    upstream: Mapping[str, str]  # role -> key
    fold: str
    seed: int
    method: str  # the first method that needs it; job arrays are per stage and method

    @property
    def name(self) -> str:
        """Name in tables and logs."""
        return f"{self.stage} {self.method} fold {self.fold} seed {self.seed} [{self.key[:8]}]"


@dataclass(frozen=True)
class Graph:
    """Stages in topological order, upstream first, and the runs that need them.

    `runs` fill the slots now; `superseded` did until they were dropped, and are not computed any more. `measurements`: methods whose runs
    measure the corpus and have no score.
    """

    nodes: Mapping[str, Node]
    runs: tuple[Run, ...]
    corpus: str
    corpus_digest: str
    children: Mapping[str, tuple[str, ...]] = field(repr=False)
    superseded: tuple[Run, ...] = ()
    measurements: frozenset[str] = frozenset()
    score: Score = UNWEIGHTED  # of its runs
    terms: Terms = RECORDED  # of the registry


Refill = Callable[[Mapping[Slot, int]], Graph]  # generation of each slot -> the graph
Extend = Callable[[Graph, Mapping[str, Any]], Refill | None]  # graph and facts of its stages -> a larger graph that follows; None: none


def canonical_json(value: object) -> str:
    """Unique JSON text of a value: sorted keys, no spaces. ValueError for NaN, TypeError for types outside JSON."""
    return _CANONICAL.encode(value)


def content_key(call: StageCall, corpus_digest: str, upstream: Mapping[str, str], settings: str = "") -> str:
    """Hash of what determines a stage's output: corpus digest, fold, seed, settings, stage, upstream keys and version, as canonical JSON.

    `settings`: canonical JSON of the call's settings, if already known. For speed the text is assembled here rather than by
    `canonical_json`, with the same result.
    """
    text = canonical_json
    parents = ",".join(f"{text(role)}:{text(key)}" for role, key in sorted(upstream.items()))
    identity = (
        f'{{"corpus":{text(corpus_digest)},"fold":{text(call.fold)},"seed":{call.seed:d},'
        f'"settings":{settings or text(dict(call.settings))},'
        f'"stage":{text(call.stage)},"upstream":{{{parents}}},"version":{call.version:d}}}'
    )
    return hashlib.sha256(identity.encode()).hexdigest()[:KEY_LENGTH]


def build_graph(
    registry: Registry,
    recipe: Any,
    *,
    corpus: str,
    corpus_digest: str,
    methods: Sequence[str],
    folds: Sequence[str],
    seeds: Mapping[tuple[str, str, int], Sequence[int]],
    base: Graph | None = None,
    variants: Mapping[str, tuple[str, Any]] | None = None,
    measurements: Collection[str] = (),
) -> Graph:
    """The graph of an experiment.

    `variants`: name in `methods` -> method of the registry and its recipe; other methods have `recipe`.
    `seeds`: (method, fold, slot) -> all seeds of the slot, of which the last fills it now. Runs are ordered by method, fold, slot and
    generation. `base`: a graph of the same experiment with other seeds, whose stages are reused instead of hashed again. `measurements`:
    the methods without a score.
    """
    known = {(run.method, run.fold, run.seed): run.key for run in (*base.runs, *base.superseded)} if base else {}
    nodes: dict[str, Node] = {}
    runs: list[Run] = []
    superseded: list[Run] = []
    # Keyed by id() of objects shared between runs; the object is kept too, so that its id is not reused.
    shared: dict[int, tuple[StageCall, str]] = {}
    texts: dict[int, tuple[Mapping[str, Any], str]] = {}

    def add(call: StageCall, method: str) -> str:
        upstream = {role: add_shared(parent, method) for role, parent in call.upstream.items()}
        settings = call.settings
        if id(settings) not in texts:
            texts[id(settings)] = settings, canonical_json(dict(settings))
        key = content_key(call, corpus_digest, upstream, texts[id(settings)][1])
        if key not in nodes:
            nodes[key] = Node(key, call.stage, call.version, settings, call.runtime, upstream, call.fold, call.seed, method)
        return key

    def add_shared(call: StageCall, method: str) -> str:
        if id(call) not in shared:
            shared[id(call)] = call, add(call, method)
        return shared[id(call)][1]

    def adopt(key: str, former: Mapping[str, Node]) -> str:
        if key not in nodes:
            for parent in former[key].upstream.values():
                adopt(parent, former)
            nodes[key] = former[key]
        return key

    slots: dict[tuple[str, str], list[int]] = {}
    for method, fold, slot in seeds:
        slots.setdefault((method, fold), []).append(slot)
    for method in methods:
        stage_of = registry.calls(*(variants or {}).get(method, (method, recipe)))
        for fold in folds:
            for slot in sorted(slots.get((method, fold), ())):
                tried = seeds[method, fold, slot]
                for generation, seed in enumerate(tried):
                    found = known.get((method, fold, seed))
                    key = adopt(found, base.nodes) if base and found else add(stage_of(fold, seed), method)
                    run = Run(method, fold, slot, seed, key, generation)
                    (runs if generation == len(tried) - 1 else superseded).append(run)
    return Graph(
        nodes,
        tuple(runs),
        corpus,
        corpus_digest,
        children_of(nodes),
        tuple(superseded),
        frozenset(measurements),
        score_of(registry),
        terms_of(registry),
    )


def united(graphs: Mapping[str, Graph]) -> Graph:
    """One graph of several on the same corpus, each stage once. A run's method becomes the name of its graph: slots stay distinct."""
    nodes = {key: node for graph in graphs.values() for key, node in graph.nodes.items()}
    runs = tuple(replace(run, method=name) for name, graph in graphs.items() for run in graph.runs)
    superseded = tuple(replace(run, method=name) for name, graph in graphs.items() for run in graph.superseded)
    first = next(iter(graphs.values()))
    return Graph(nodes, runs, first.corpus, first.corpus_digest, children_of(nodes), superseded, score=first.score, terms=first.terms)


def children_of(nodes: Mapping[str, Node]) -> dict[str, tuple[str, ...]]:
    """Key of each stage -> the stages that read its artifacts."""
    found: dict[str, list[str]] = {key: [] for key in nodes}
    for node in nodes.values():
        for parent in node.upstream.values():
            found[parent].append(node.key)
    return {key: tuple(keys) for key, keys in found.items()}


def with_upstream(graph: Graph, keys: Iterable[str], enter: Callable[[str], bool] = lambda key: True) -> tuple[str, ...]:
    """Keys of stages and of those upstream of them, in the order of the graph. A stage's own upstream is left out unless `enter(key)`."""
    found: set[str] = set()
    stack = list(keys)
    while stack:
        key = stack.pop()
        if key not in found:
            found.add(key)
            if enter(key):
                stack.extend(graph.nodes[key].upstream.values())
    return tuple(key for key in graph.nodes if key in found)


def seeds_of(slot: int, generation: int, *, first_seed: int) -> tuple[int, ...]:
    """Seeds of a slot whose run has this generation (0: the first seed), oldest first."""
    return tuple(first_seed + slot + MAX_SLOTS * each for each in range(generation + 1))


def seeds_of_slots(
    methods: Sequence[str], folds: Sequence[str], *, seeds: int, first_seed: int, generations: Mapping[Slot, int] | None = None
) -> dict[Slot, tuple[int, ...]]:
    """(method, fold, slot) -> seeds, the last of which fills the slot now; `seeds` slots per cell, ordered by method, fold, slot.

    `generations`: of slots that use reserve seeds; every other slot has generation 0.
    """
    given = generations or {}
    slots = [(method, fold, slot) for method in methods for fold in folds for slot in range(seeds)]
    return {name: seeds_of(name[2], given.get(name, 0), first_seed=first_seed) for name in slots}
