"""Stages on the relatives of wav2vec 2.0: fine-tuning with stored features, P-TAPT, and the length of parts of WavLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ser_core.models.model_types import MODEL_TYPES
from ser_core.registry import REGISTRY
from ser_core.settings.recipe import Recipe
from ser_core.stages.context import StageContext
from ser_core.training.device import AUTO_PART_SECONDS
from tests.ser_core.stages.conftest import Bench

PRETRAINING = ("num_codevectors_per_group", "codevector_dim", "proj_codevector_dim")


def of_kind(recipe: Recipe, model_type: str) -> Recipe:
    config = {key: value for key, value in recipe.backbone.config.items() if key not in PRETRAINING}
    recipe.backbone.config = {**config, "model_type": model_type}
    recipe.finetune.epochs = 1
    recipe.ptapt.steps = 2
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name != "wav2vec2"])
def test_fine_tuning_with_and_without_stored_features(bench: Bench, recipe: Recipe, model_type: str, tmp_path: Path) -> None:
    """The feature store serves every kind of model: the same metrics to the bit as without it, and all utterances scored."""
    call = REGISTRY.call("vft", of_kind(recipe, model_type), fold="1", seed=0)
    without, _ = bench.run(call)
    bench.shared = tmp_path / "shared"
    stored, _ = bench.run(call)
    assert stored["metrics"] == without["metrics"]
    assert any((tmp_path / "shared").rglob("*.block"))
    assert sum(map(sum, stored["confusion"])) == 8


@pytest.mark.slow
def test_pseudo_labels_on_hubert(bench: Bench, recipe: Recipe) -> None:
    """P-TAPT of a model that has no pretraining loss of its own in transformers; fine-tuning starts from its encoder."""
    call = REGISTRY.call("ptapt", of_kind(recipe, "hubert"), fold="1", seed=0)
    result, _ = bench.run(call)
    assert sum(map(sum, result["confusion"])) == 8


def test_parts_of_wavlm_are_half_as_long(tmp_path: Path) -> None:
    """Its attention bias takes memory for every pair of frames; the parts of other models are as before."""
    context = StageContext(
        stage="finetune",
        settings={},
        runtime={"execution": {"device": "cpu"}},
        training=Any,  # type: ignore[arg-type]  # not read
        corpus_digest="",
        fold="1",
        seed=0,
        upstream={},
        output=tmp_path,
        checkpoint=tmp_path,
        relief=0,
        should_stop=lambda: False,
        report=print,
    )
    seconds = int(AUTO_PART_SECONDS["cpu"])
    rows = [16_000] * seconds
    assert [len(range(seconds)[part]) for part in context.row_parts(rows, "wavlm")] == [seconds // 2] * 2
    for model_type in ("wav2vec2", "hubert", "data2vec-audio"):
        assert len(context.row_parts(rows, model_type)) == 1
