"""The models and recipes of the check: small ones to compare devices, wav2vec2-base to measure. Weights are random."""

from __future__ import annotations

from typing import Any

from benchmarks.training import BASE_BACKBONE, BASE_WAV2VEC, PRESETS
from ser_core.registry import REGISTRY, StageCall
from ser_core.settings.backbone import BackboneSettings, SpecAugmentSettings, Wav2vecSettings
from ser_core.settings.execution import Attention, ExecutionSettings, FeatureCache, Precision
from ser_core.settings.finetune import FinetuneSettings
from ser_core.settings.pretraining import ClusterSettings, PtaptSettings, StatesSettings, TaptSettings
from ser_core.settings.recipe import Recipe

STAGES = ("finetune", "tapt", "states", "ptapt")  # those that train by gradient descent
FOLD = "1"  # held out in every stage of the check
WHOLE = 1 << 20  # utterances: a step is a single part

# The layers of wav2vec2-base (a frame every 320 samples, group norm, post-norm encoder), narrow.
SMALL_BACKBONE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_dim": [32] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_codevectors_per_group": 16,
    "codevector_dim": 32,
    "proj_codevector_dim": 32,
    "mask_time_prob": 0.65,
}
# wav2vec2-large's kind of norms: layer norm after every convolution, pre-norm encoder.
LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
SMALL_WAV2VEC: dict[str, Any] = {
    "conv_feature_layers": [[32, 10, 5], [32, 8, 4], [32, 4, 2], [32, 4, 2], [32, 4, 2]],
    "conv_aggregator_layers": [[32, 2, 1], [32, 3, 1]],
}
DROPOUTS = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout", "layerdrop")


def with_published_preset(recipe: Recipe) -> Recipe:
    """Return the recipe with the settings of the preset `published`, as the authors' code computes. Others stay."""
    from omegaconf import OmegaConf

    preset = OmegaConf.load(PRESETS / "published.yaml")
    chosen: Recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(recipe), preset))  # type: ignore[assignment]
    return chosen


def small_recipe(precision: Precision, *, reference: bool = False, steps: int = 20, backbone: dict[str, Any] | None = None) -> Recipe:
    """A recipe whose stages take `steps` steps (a multiple of 4) in about a second, without dropout: devices draw other random numbers."""
    spec_augment = SpecAugmentSettings(time_length=5, feature_length=8)
    config = {**SMALL_BACKBONE, **dict.fromkeys(DROPOUTS, 0.0), **(backbone or {})}
    pretraining: dict[str, Any] = {
        "steps": steps,
        "learning_rate": 5e-4,
        "warmup_steps": 2,
        "batch_seconds": 8.0,
        "max_seconds": 1.2,
        "precision": precision,
    }
    recipe = Recipe(
        backbone=BackboneSettings(checkpoint=None, config=config),
        finetune=FinetuneSettings(
            epochs=max(1, steps // 4), batch_size=6, learning_rate=5e-4, max_seconds=1.5, spec_augment=spec_augment, precision=precision
        ),
        tapt=TaptSettings(**pretraining, negatives=10),
        states=StatesSettings(
            wav2vec=Wav2vecSettings(config=SMALL_WAV2VEC),
            steps=steps,
            batch_size=6,
            learning_rate=5e-4,
            rnn_units=16,
            head_units=16,
            spec_augment=spec_augment,
            precision=precision,
        ),
        cluster=ClusterSettings(counts=[4, 16], iterations=5),
        ptapt=PtaptSettings(**pretraining, head_units=32, mask_length=5),
        execution=ExecutionSettings(log_every=1, micro_batch=3),
    )
    return with_published_preset(recipe) if reference else recipe


def base_recipe(*, reference: bool = False, steps: int, small: bool = False) -> Recipe:
    """The recipe of the measurements: wav2vec2-base and wav2vec large, the paper's batches; `small`: the small models and batches.

    `reference` computes as the authors' code does: float32, transformers' encoder with eager attention, zero-padded batches as single
    parts, front end at every step, test in batches of one.
    """
    precision = Precision.float32 if reference else Precision.auto
    spec_augment = SpecAugmentSettings(feature_length=8 if small else 64)
    pretraining: dict[str, Any] = {"steps": steps, "batch_seconds": 8.0 if small else 250.0, "precision": precision}
    batch = 6 if small else 64
    recipe = Recipe(
        backbone=BackboneSettings(checkpoint=None, config=SMALL_BACKBONE if small else BASE_BACKBONE),
        # The number of epochs is set by `with_steps`, which knows the corpus.
        finetune=FinetuneSettings(batch_size=batch, spec_augment=spec_augment, precision=precision),
        tapt=TaptSettings(**pretraining),
        states=StatesSettings(
            wav2vec=Wav2vecSettings(config=SMALL_WAV2VEC if small else BASE_WAV2VEC),
            steps=steps,
            batch_size=batch,
            validate_every=1 << 30,
            spec_augment=spec_augment,
            precision=precision,
        ),
        cluster=ClusterSettings(counts=[4, 16] if small else [64, 512, 4096]),
        ptapt=PtaptSettings(**pretraining),
        execution=ExecutionSettings(
            attention=Attention.eager if reference else Attention.sdpa,
            feature_cache=FeatureCache.none if reference else FeatureCache.store,
            micro_batch=WHOLE if reference else 0,
            evaluation_batch=1 if reference else 8,
        ),
    )
    return with_published_preset(recipe) if reference else recipe


def calls_of(recipe: Recipe) -> dict[str, StageCall]:
    """Return a call of each stage; `finetune` starts from the backbone."""
    ptapt = REGISTRY.call("ptapt", recipe, fold=FOLD, seed=0).upstream["backbone"]
    cluster = next(iter(ptapt.upstream.values()))
    return {
        "finetune": REGISTRY.call("vft", recipe, fold=FOLD, seed=0),
        "tapt": REGISTRY.call("tapt", recipe, fold=FOLD, seed=0).upstream["backbone"],
        "states": cluster.upstream["states"],
        "cluster": cluster,
        "ptapt": ptapt,
    }
