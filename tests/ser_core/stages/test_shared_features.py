"""Stages that share a feature store: which of them use the same one, what each may read, and that no number changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import soundfile

from ser_core.corpora.manifest import Manifest
from ser_core.features import store as feature_store
from ser_core.features.features import STORE, FrozenFeatures
from ser_core.features.store import Block, FeatureStore
from ser_core.registry import REGISTRY
from ser_core.settings.execution import FeatureCache
from ser_core.settings.recipe import Recipe
from ser_core.stages import finetune
from ser_core.training import evaluate
from tests.ser_core.stages.conftest import Bench, artifacts, stage_calls

TEST = "the test"


@pytest.fixture
def sharing(bench: Bench, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Blocks of three or four utterances in a folder that all stages have."""
    monkeypatch.setattr(feature_store, "BLOCK_SAMPLES", 30_000)
    assert recipe.execution.feature_cache is FeatureCache.store
    bench.shared = tmp_path / "cache"
    return bench


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(utterance, samples) of all features computed for the store."""
    seen: list[tuple[str, int]] = []
    compute = FrozenFeatures._computed

    def noted(self: FrozenFeatures, position: int) -> Any:
        seen.append((self._split.utterances[position].id, len(self._wave(position, keep=True))))
        return compute(self, position)

    monkeypatch.setattr(FrozenFeatures, "_computed", noted)
    return seen


def stores(bench: Bench) -> int:
    assert bench.shared is not None
    return len(list((bench.shared / STORE).iterdir()))


@pytest.mark.slow
def test_stages_with_the_same_front_end_compute_its_features_once(
    sharing: Bench, recipe: Recipe, corpus: Manifest, computed: list[tuple[str, int]]
) -> None:
    """V-FT, P-TAPT and its fine-tuning share one store for all seeds; each TAPT checkpoint has its own; another fold adds none."""
    limit = round(recipe.finetune.max_seconds * 16_000)
    sharing.run(REGISTRY.call("vft", recipe, fold="1", seed=0))
    cut = [(utterance.id, min(utterance.samples, limit)) for utterance in corpus.training("1")]
    whole = [(utterance.id, utterance.samples) for utterance in corpus.test("1")]
    assert sorted(computed) == sorted(cut + whole)
    computed.clear()
    sharing.run(REGISTRY.call("vft", recipe, fold="1", seed=1))
    assert computed == []

    ptapt = REGISTRY.call("ptapt", recipe, fold="1", seed=0)
    _, pretrained = sharing.run(ptapt.upstream["backbone"])
    assert 0 < len(computed) < len(cut)  # whole utterances: those of blocks in which one is longer than the cut
    assert max(samples for _, samples in computed) > limit
    computed.clear()
    sharing.run(ptapt, upstream={"backbone": pretrained})
    assert computed == []
    assert stores(sharing) == 1

    tapt = REGISTRY.call("tapt", recipe, fold="1", seed=0)
    _, pretrained = sharing.run(tapt.upstream["backbone"])
    assert computed == []  # it trains the front end
    for seed in (0, 1):
        sharing.run(REGISTRY.call("tapt", recipe, fold="1", seed=seed), upstream={"backbone": pretrained})
        assert len(computed) == len(cut) + len(whole)
    assert stores(sharing) == 2

    computed.clear()
    sharing.run(REGISTRY.call("vft", recipe, fold="2", seed=0))  # finds what was tested, as far as it is not cut
    assert 0 < len(computed) < len(corpus.utterances)
    assert stores(sharing) == 2
    assert not any("cannot be shared" in line for line in sharing.lines)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["finetune", "ptapt"])
@pytest.mark.parametrize("norm", ["group", "layer"])
def test_the_store_changes_no_number(stage: str, norm: str, sharing: Bench, recipe: Recipe) -> None:
    """With an empty store, a filled one, a cache in memory, and no cache: the same metrics and the same bytes."""
    recipe.backbone.config["feat_extract_norm"] = norm
    call = stage_calls(recipe)[stage]
    upstream = {role: sharing.run(parent)[1] for role, parent in call.upstream.items()}
    found = []
    for cache in ("store", "store", "memory", "none"):
        execution = {**call.runtime["execution"], "feature_cache": cache}
        returned, output = sharing.run(call, upstream=upstream, execution=execution)
        found.append((returned["metrics"], artifacts(output)))
    assert all(each == found[0] for each in found)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["finetune", "ptapt"])
def test_no_features_of_the_held_out_fold_are_opened_before_the_test(
    stage: str, sharing: Bench, recipe: Recipe, corpus: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor any audio; although another fold's stages have put them there."""
    sharing.run(stage_calls(recipe, "2")[stage])
    call = stage_calls(recipe, "1")[stage]
    upstream = {role: sharing.run(parent)[1] for role, parent in call.upstream.items()}
    held_out = {utterance.id for utterance in corpus.test("1")}
    audio = {str(corpus.audio_path(utterance)): utterance.id for utterance in corpus.utterances}
    seen: list[str] = []
    read, open_, whole = soundfile.read, FeatureStore._open, evaluate.whole_features

    def reading(path: Path, *arguments: object, **options: object) -> object:
        seen.append(audio[str(path)])
        return read(path, *arguments, **options)

    def opening(self: FeatureStore, block: Block) -> object:
        seen.extend(identifier for identifier, _ in block.items)
        return open_(self, block)

    def testing(*arguments: Any) -> FrozenFeatures:
        seen.append(TEST)
        return whole(*arguments)

    monkeypatch.setattr(soundfile, "read", reading)
    monkeypatch.setattr(FeatureStore, "_open", opening)
    monkeypatch.setattr(finetune, "whole_features", testing)
    sharing.run(call, upstream=upstream)
    before, after = (seen[: seen.index(TEST)], seen[seen.index(TEST) :]) if stage == "finetune" else (seen, seen[:0])
    assert {utterance.id for utterance in corpus.training("1")} <= set(before)
    assert not held_out & set(before)
    assert set(after) == ({TEST} | held_out if stage == "finetune" else set())
