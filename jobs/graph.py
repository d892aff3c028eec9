"""The stage graph: what has to exist for an experiment's runs, each stage once, known by content key. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.stages import Registry, StageCall

KEY_LENGTH = 20  # hex digits, 80 bits: a collision among 10^6 stages has odds below 10^-12


@dataclass(frozen=True)
class Run:
    """One entry of a table cell: the fine-tuning of a method on a fold with one seed, in a slot."""

    method: str
    fold: str
    slot: int
    seed: int
    key: str  # of its last stage

    @property
    def name(self) -> str:
        return f"{self.method}/{self.fold}/{self.slot}"


@dataclass(frozen=True)
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
    """Nodes in an order where every upstream stage comes first, and the runs that need them."""

    nodes: Mapping[str, Node]
    runs: tuple[Run, ...]
    corpus: str
    corpus_digest: str
    children: Mapping[str, tuple[str, ...]] = field(repr=False)


def canonical_json(value: object) -> str:
    """One text per value: sorted keys, no spaces; NaN and types outside JSON are refused with ValueError/TypeError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def content_key(call: StageCall, corpus_digest: str, upstream: Mapping[str, str]) -> str:
    """Hash of what determines a stage's output: stage, version, settings, fold, seed, corpus digest, upstream keys."""
    identity = {
        "stage": call.stage,
        "version": call.version,
        "settings": dict(call.settings),
        "fold": call.fold,
        "seed": call.seed,
        "corpus": corpus_digest,
        "upstream": dict(upstream),
    }
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:KEY_LENGTH]


def build_graph(
    registry: Registry,
    recipe: Any,
    *,
    corpus: str,
    corpus_digest: str,
    methods: Sequence[str],
    folds: Sequence[str],
    seeds: Mapping[tuple[str, str, int], int],
) -> Graph:
    """The graph of an experiment.

    `seeds` maps (method, fold, slot) to the seed that fills the slot now. Runs come out ordered by method, fold, slot.
    """
    nodes: dict[str, Node] = {}
    runs: list[Run] = []

    def add(call: StageCall, method: str) -> str:
        upstream = {role: add(parent, method) for role, parent in call.upstream.items()}
        key = content_key(call, corpus_digest, upstream)
        if key not in nodes:
            nodes[key] = Node(
                key=key,
                stage=call.stage,
                version=call.version,
                settings=dict(call.settings),
                runtime=dict(call.runtime),
                upstream=upstream,
                fold=call.fold,
                seed=call.seed,
                method=method,
            )
        return key

    slots: dict[tuple[str, str], list[int]] = {}
    for method, fold, slot in seeds:
        slots.setdefault((method, fold), []).append(slot)
    for method in methods:
        for fold in folds:
            for slot in sorted(slots.get((method, fold), ())):
                seed = seeds[method, fold, slot]
                key = add(registry.call(method, recipe, fold=fold, seed=seed), method)
                runs.append(Run(method, fold, slot, seed, key))
    children: dict[str, list[str]] = {key: [] for key in nodes}
    for node in nodes.values():
        for parent in node.upstream.values():
            children[parent].append(node.key)
    return Graph(nodes, tuple(runs), corpus, corpus_digest, {key: tuple(found) for key, found in children.items()})
