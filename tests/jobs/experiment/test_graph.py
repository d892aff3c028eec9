"""The stage graph: identity by content, sharing between runs, order."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from jobs.experiment.graph import Node, build_graph, canonical_json, content_key, seeds_of_slots
from ser_core.registry import REGISTRY as SPEECH
from ser_core.settings.backbone import BackboneSettings, Wav2vecSettings
from ser_core.settings.recipe import Recipe
from tests.jobs.fake_registry import REGISTRY, FakeCall, make_graph

SMALL = Recipe(backbone=BackboneSettings(checkpoint=None, config={"hidden_size": 8}))
SMALL.states.wav2vec = Wav2vecSettings(config={"conv_feature_layers": [[8, 10, 5], [8, 8, 4]]})
# Results lie on users' disks under their keys: a change here means that nothing of theirs is found again.
KEYS = {
    "finetune vft": "758d3ca779be62d729cb",
    "tapt tapt": "e689de55035b9370cc37",
    "finetune tapt": "123f3e1ecb3bd81e1c12",
    "states ptapt": "c57519a9c0ab6e7e0f03",
    "cluster ptapt": "91644cb8ad52fa427d4c",
    "ptapt ptapt": "3d03ea5667dd38ded88f",
    "finetune ptapt": "f0265a90952404a4ec61",
}
SPEECH_KEYS = {"tapt": "e69b2eb443c6fed7d19c", "states": "fceed29bda9e285aa59b", "ptapt": "bbac01080dbb07b53296"}


def _plainly(call: FakeCall | Node, corpus_digest: str, upstream: Mapping[str, str]) -> str:
    """A key by its definition: hash of one canonical JSON text of what determines the output."""
    names = ("stage", "version", "settings", "fold", "seed")
    identity = {**{name: getattr(call, name) for name in names}, "corpus": corpus_digest, "upstream": upstream}
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def test_keys_are_unchanged() -> None:
    """Keys of a small graph, and of pretraining stages of a fixed recipe, equal those under which earlier results are stored."""
    graph = make_graph(folds=("1",), seeds=1)
    assert {f"{node.stage} {node.method}": key for key, node in graph.nodes.items()} == KEYS
    call = FakeCall("tapt", {"a": [1, 2.5, None, True, 'é"'], "b": {"z": 1, "a": {}}}, "Bärbel", 3, version=4)
    assert content_key(call, "d1", {"z": "k2", "a": "k1"}) == "d201f8a8dbb767be11e2"
    slots = seeds_of_slots(SPEECH.methods, ("1",), seeds=1, first_seed=7)
    speech = build_graph(SPEECH, SMALL, corpus="c", corpus_digest="d1", methods=SPEECH.methods, folds=("1",), seeds=slots)
    found = {node.stage: node.key for node in speech.nodes.values()}
    assert {stage: found[stage] for stage in SPEECH_KEYS} == SPEECH_KEYS


def test_a_key_is_the_hash_of_the_canonical_text() -> None:
    """The faster assembly in `content_key` and in `build_graph` gives the same hash as the definition."""
    methods, folds = SPEECH.methods, ("1", 'fold "2"', "\\é\n", "")
    slots = seeds_of_slots(methods, folds, seeds=3, first_seed=10**12)
    graph = build_graph(SPEECH, SMALL, corpus="c", corpus_digest='d"1', methods=methods, folds=folds, seeds=slots)
    shared = {"finetune": 36, "tapt": 4, "states": 4, "cluster": 12, "ptapt": 4}
    fused = {"text": 12, "score": 12, "concat": 12, "cross": 12}  # which read runs of the others
    assert Counter(node.stage for node in graph.nodes.values()) == {**shared, **fused}
    for key, node in graph.nodes.items():
        assert key == node.key == _plainly(node, 'd"1', node.upstream)


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
    """Another corpus digest or upstream key is another stage; other paths and runtime options are not."""
    call = FakeCall("tapt", {"a": 1, "b": 2}, "1", 0)
    key = content_key(call, "d1", {"backbone": "k"})
    assert key != content_key(call, "d2", {"backbone": "k"})
    assert key != content_key(call, "d1", {"backbone": "l"})
    assert key == content_key(replace(call, runtime={"path": "/elsewhere"}, settings={"b": 2, "a": 1}), "d1", {"backbone": "k"})


def test_one_more_seed_keeps_all_keys() -> None:
    """The graph of more seeds contains the graph of fewer, so existing results are reused."""
    few, more = make_graph(seeds=2), make_graph(seeds=3)
    assert set(few.nodes) < set(more.nodes)
    assert {graph.nodes[key].stage for graph in (more,) for key in set(more.nodes) - set(few.nodes)} == {"finetune"}


def test_methods_with_the_same_stage_share_it() -> None:
    """Two methods whose calls are equal in content get one node, listed under the first of them."""
    registry = REGISTRY
    slots = seeds_of_slots(("vft",), ("1",), seeds=1, first_seed=7)
    graph = build_graph(registry, {}, corpus="fake", corpus_digest="d1", methods=("vft", "vft"), folds=("1",), seeds=slots)
    assert len(graph.nodes) == 1
    assert [run.seed for run in graph.runs] == [7, 7]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object()])
def test_values_outside_json_cannot_enter_a_key(value: object) -> None:
    """ValueError or TypeError for a setting without a canonical JSON text."""
    with pytest.raises((ValueError, TypeError)):
        canonical_json({"setting": value})


def test_a_graph_built_on_a_base_equals_one_built_from_scratch() -> None:
    """With reserve seeds, one seed more or fewer: the same nodes in the same order, runs and children."""
    grid: dict[str, Any] = {"corpus": "c", "corpus_digest": "d1", "methods": SPEECH.methods, "folds": ("1", "2")}
    few = seeds_of_slots(SPEECH.methods, ("1", "2"), seeds=2, first_seed=0)
    more = seeds_of_slots(SPEECH.methods, ("1", "2"), seeds=3, first_seed=0, generations={("tapt", "2", 1): 2, ("vft", "1", 0): 1})
    for first, second in ((few, more), (more, few)):
        grown = build_graph(SPEECH, SMALL, **grid, seeds=second, base=build_graph(SPEECH, SMALL, **grid, seeds=first))
        anew = build_graph(SPEECH, SMALL, **grid, seeds=second)
        assert grown == anew
        assert list(grown.nodes) == list(anew.nodes)
