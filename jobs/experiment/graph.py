"""The stage graph: what has to exist for an experiment's runs, each stage once, known by content key. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.experiment.registry import Registry, StageCall

MAX_SLOTS = 1000  # per cell; the distance between a slot's seed and its reserve seeds
Slot = tuple[str, str, int]  # method, fold, number
KEY_LENGTH = 20  # hex digits, 80 bits: a collision among 10^6 stages has odds below 10^-12
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


@dataclass(frozen=True, slots=True)
class Run:
    """One entry of a table cell: the fine-tuning of a method on a fold with one seed, in a slot."""

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
    """One stage to compute once."""

    key: str
    stage: str
    version: int
    settings: Mapping[str, Any]
    runtime: Mapping[str, Any]
    upstream: Mapping[str, str]  # role -> key
    fold: str
    seed: int
    method: str  # the first method that asks for it; arrays are made per stage and method

    @property
    def name(self) -> str:
        """What a person reads in tables and logs."""
        return f"{self.stage} {self.method} fold {self.fold} seed {self.seed} [{self.key[:8]}]"


@dataclass(frozen=True)
class Graph:
    """Nodes in an order where every upstream stage comes first, and the runs that need them.

    `runs` fill the slots now; `superseded` did before they were dropped, and are computed no more.
    """

    nodes: Mapping[str, Node]
    runs: tuple[Run, ...]
    corpus: str
    corpus_digest: str
    children: Mapping[str, tuple[str, ...]] = field(repr=False)
    superseded: tuple[Run, ...] = ()


def canonical_json(value: object) -> str:
    """One text per value: sorted keys, no spaces; NaN and types outside JSON are refused with ValueError/TypeError."""
    return _CANONICAL.encode(value)


def content_key(call: StageCall, corpus_digest: str, upstream: Mapping[str, str], settings: str = "") -> str:
    """Hash of what determines a stage's output: corpus digest, fold, seed, settings, stage, upstream keys and version, as canonical JSON.

    `settings` is the text of the call's settings where it was made before. The rest is put together by hand, as `canonical_json` would.
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
) -> Graph:
    """The graph of an experiment.

    `seeds` maps (method, fold, slot) to the seeds that the slot has had; the last one fills it now. Runs come out ordered by method,
    fold, slot, generation. `base` is a graph of the same experiment with other seeds: what it holds is not hashed again.
    """
    known = {(run.method, run.fold, run.seed): run.key for run in (*base.runs, *base.superseded)} if base else {}
    nodes: dict[str, Node] = {}
    runs: list[Run] = []
    superseded: list[Run] = []
    # By the identity of an object that runs have in common, and with that object, so that no other can come by its identity.
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
        stage_of = registry.calls(method, recipe)
        for fold in folds:
            for slot in sorted(slots.get((method, fold), ())):
                tried = seeds[method, fold, slot]
                for generation, seed in enumerate(tried):
                    found = known.get((method, fold, seed))
                    key = adopt(found, base.nodes) if base and found else add(stage_of(fold, seed), method)
                    run = Run(method, fold, slot, seed, key, generation)
                    (runs if generation == len(tried) - 1 else superseded).append(run)
    children: dict[str, list[str]] = {}
    for node in nodes.values():
        for parent in node.upstream.values():
            children.setdefault(parent, []).append(node.key)
    return Graph(nodes, tuple(runs), corpus, corpus_digest, {key: tuple(children.get(key, ())) for key in nodes}, tuple(superseded))


def seeds_of(slot: int, generation: int, *, first_seed: int) -> tuple[int, ...]:
    """The seeds that a slot has had when its run is of this generation (0: the first), oldest first."""
    return tuple(first_seed + slot + MAX_SLOTS * each for each in range(generation + 1))


def seeds_of_slots(
    methods: Sequence[str], folds: Sequence[str], *, seeds: int, first_seed: int, generations: Mapping[Slot, int] | None = None
) -> dict[Slot, tuple[int, ...]]:
    """(method, fold, slot) -> its seeds, the last one filling it now, for `seeds` slots a cell in the order of methods, folds and slots.

    `generations`: of the slots that have had reserve seeds.
    """
    given = generations or {}
    slots = [(method, fold, slot) for method in methods for fold in folds for slot in range(seeds)]
    return {name: seeds_of(name[2], given.get(name, 0), first_seed=first_seed) for name in slots}
