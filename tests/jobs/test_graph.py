"""The stage graph: identity by content, sharing between runs, order."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from jobs.graph import build_graph, canonical_json, content_key
from jobs.slots import seeds_of_slots
from tests.jobs.fake_registry import REGISTRY, FakeCall, make_graph


def test_upstream_stages_are_shared_by_all_seeds_of_a_fold() -> None:
    """Pretraining stages exist once per fold however many seeds there are; fine-tunings once per run."""
    graph = make_graph(folds=("1", "2", "3"), seeds=4)
    stages = Counter(node.stage for node in graph.nodes.values())
    assert stages == {"finetune": 3 * 3 * 4, "tapt": 3, "states": 3, "cluster": 3, "ptapt": 3}
    assert len(graph.runs) == 36
    assert len({run.key for run in graph.runs}) == 36


def test_upstream_comes_first() -> None:
    """Nodes are ordered so that every stage follows what it reads, and children mirror upstream."""
    graph = make_graph()
    seen: set[str] = set()
    for key, node in graph.nodes.items():
        assert seen.issuperset(node.upstream.values())
        assert all(key in graph.children[parent] for parent in node.upstream.values())
        seen.add(key)


@pytest.mark.parametrize(
    "other",
    [
        replace(FakeCall("tapt", {"steps": 5}, "1", 0), settings={"steps": 6}),
        replace(FakeCall("tapt", {"steps": 5}, "1", 0), fold="2"),
        replace(FakeCall("tapt", {"steps": 5}, "1", 0), seed=1),
        replace(FakeCall("tapt", {"steps": 5}, "1", 0), version=2),
        replace(FakeCall("tapt", {"steps": 5}, "1", 0), stage="ptapt"),
    ],
)
def test_what_determines_the_output_changes_the_key(other: FakeCall) -> None:
    """Settings, fold, seed, version and stage are part of the identity."""
    assert content_key(FakeCall("tapt", {"steps": 5}, "1", 0), "d1", {}) != content_key(other, "d1", {})


def test_corpus_and_upstream_change_the_key_and_runtime_does_not() -> None:
    """Another corpus digest or upstream key is another stage; another path or way of computing is the same."""
    call = FakeCall("tapt", {"a": 1, "b": 2}, "1", 0)
    key = content_key(call, "d1", {"backbone": "k"})
    assert key != content_key(call, "d2", {"backbone": "k"})
    assert key != content_key(call, "d1", {"backbone": "l"})
    assert key == content_key(replace(call, runtime={"path": "/elsewhere"}, settings={"b": 2, "a": 1}), "d1", {"backbone": "k"})


def test_one_more_seed_keeps_all_keys() -> None:
    """The graph of more seeds contains the graph of fewer: what was computed is found again."""
    few, more = make_graph(seeds=2), make_graph(seeds=3)
    assert set(few.nodes) < set(more.nodes)
    assert {graph.nodes[key].stage for graph in (more,) for key in set(more.nodes) - set(few.nodes)} == {"finetune"}


def test_methods_with_the_same_stage_share_it() -> None:
    """Two methods whose calls are equal in content get one node, listed under the method that asked first."""
    registry = REGISTRY
    slots = seeds_of_slots(("vft",), ("1",), seeds=1, first_seed=7)
    graph = build_graph(registry, {}, corpus="fake", corpus_digest="d1", methods=("vft", "vft"), folds=("1",), seeds=slots)
    assert len(graph.nodes) == 1
    assert [run.seed for run in graph.runs] == [7, 7]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object()])
def test_identity_refuses_what_json_cannot_say(value: object) -> None:
    """A setting without one canonical text cannot enter a key."""
    with pytest.raises((ValueError, TypeError)):
        canonical_json({"setting": value})
