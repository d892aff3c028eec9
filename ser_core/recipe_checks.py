"""Checks of a recipe that need no corpus: every value within its range, models that can be built. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ser_core.corpora.parts import pattern_problem
from ser_core.models.backbone_config import config_problems
from ser_core.models.model_types import backbone_problems
from ser_core.preflight import adaptor_problems
from ser_core.settings.recipe import Protocol, Recipe
from ser_core.two_stages import second_stage_problems

AT_LEAST: Mapping[str, float] = {
    "upstream_seed": 0,
    "backbone.init_seed": 0,
    "finetune.epochs": 1,
    "finetune.batch_size": 1,
    "finetune.clip_norm": 0,
    "finetune.adaptors.bottleneck_units": 1,
    "finetune.adaptors.lora_rank": 1,
    "finetune.head.projector_units": 1,
    "tapt.steps": 1,
    "pretraining_loss.draws": 1,
    "pretraining_loss.negatives": 1,
    "pretraining_loss.diversity_weight": 0,
    "pretraining_loss.mask_minimum": 1,
    "tapt.warmup_steps": 0,
    "tapt.buckets": 1,
    "tapt.batches_per_bucket": 0,
    "tapt.negatives": 1,
    "tapt.diversity_weight": 0,
    "tapt.mask_minimum": 1,
    "states.wav2vec.init_seed": 0,
    "text.encoder.init_seed": 0,
    "text.epochs": 1,
    "text.batch_size": 1,
    "text.max_tokens": 4,
    "fusion.layer.epochs": 1,
    "fusion.layer.batch_size": 1,
    **{f"fusion.cross.{key}": 1 for key in ("epochs", "batch_size", "heads", "units")},
    "states.steps": 1,
    "states.batch_size": 1,
    "states.validate_every": 0,
    "states.rnn_units": 1,
    "states.head_units": 1,
    "cluster.iterations": 1,
    "ptapt.steps": 1,
    "ptapt.warmup_steps": 0,
    "ptapt.buckets": 1,
    "ptapt.batches_per_bucket": 0,
    "ptapt.mask_length": 1,
    "ptapt.mask_minimum": 1,
    "ptapt.head_units": 1,
    "execution.micro_batch": 0,
    "execution.evaluation_batch": 1,
    "execution.checkpoint_minutes": 0,
    "execution.log_every": 1,
    **{
        f"{stage}.spec_augment.{key}": least
        for stage in ("finetune", "states")
        for key, least in (("time_length", 1), ("time_minimum", 0), ("feature_length", 1), ("feature_minimum", 0))
    },
}
POSITIVE = (
    *(f"{stage}.learning_rate" for stage in ("finetune", "tapt", "states", "ptapt", "text", "fusion.layer", "fusion.cross")),
    *(f"{stage}.max_seconds" for stage in ("finetune", "tapt", "ptapt")),
    *(f"{stage}.batch_seconds" for stage in ("tapt", "ptapt")),
    "tapt.temperature",
    "pretraining_loss.temperature",
    "finetune.adaptors.lora_alpha",
    "execution.communication_minutes",
)
FRACTIONS = (
    *(f"{stage}.spec_augment.{kind}_probability" for stage in ("finetune", "states") for kind in ("time", "feature")),
    "tapt.flat_fraction",
    "ptapt.flat_fraction",
    "states.warmup_fraction",
    "states.flat_fraction",
    "ptapt.mask_probability",
    "finetune.attributes.weight",
    "fusion.text_weight",
    "fusion.cross.dropout",
)
DEVICES = ("auto", "cpu", "cuda")


def recipe_problems(recipe: Recipe) -> Iterator[str]:
    """Yield one line per value of a recipe that is out of its range."""

    def value(key: str) -> Any:
        found: Any = recipe
        for part in key.split("."):
            found = getattr(found, part)
        return found

    for key, least in AT_LEAST.items():
        if value(key) < least:
            yield f"recipe.{key}={value(key)}: must be at least {least:g}"
    for key in POSITIVE:
        if not value(key) > 0:
            yield f"recipe.{key}={value(key)}: must be above 0"
    for key in FRACTIONS:
        if not 0 <= value(key) <= 1:
            yield f"recipe.{key}={value(key)}: must lie between 0 and 1"
    if not 0 < recipe.states.validation_fraction < 1:
        yield f"recipe.states.validation_fraction={recipe.states.validation_fraction}: must lie between 0 and 1, both excluded"
    if not 0 < recipe.training_fraction <= 1:
        yield f"recipe.training_fraction={recipe.training_fraction}: must be above 0 and at most 1"
    if recipe.ptapt.mask_probability == 0:
        yield "recipe.ptapt.mask_probability=0: without a masked frame there is nothing to predict"
    counts = recipe.cluster.counts
    if not counts:
        yield "recipe.cluster.counts=[]: name at least one number of clusters"
    if len(set(counts)) != len(counts):
        yield f"recipe.cluster.counts={counts}: name each number of clusters once"
    for count in sorted(set(counts)):
        if count < 2:
            yield f"recipe.cluster.counts={counts}: {count} is not a number of clusters; at least 2"
    if recipe.execution.device not in DEVICES:
        yield f"recipe.execution.device={recipe.execution.device}: unknown; known are {', '.join(DEVICES)}"
    yield from config_problems(recipe.backbone.config if recipe.backbone.checkpoint is None else {})
    if recipe.backbone.checkpoint is not None:
        yield from backbone_problems(recipe.backbone)
    yield from adaptor_problems(recipe.finetune.adaptors)
    for key, pattern in (("source", recipe.two_stage.source), ("target", recipe.two_stage.target)):
        if problem := pattern_problem(f"recipe.two_stage.{key}", pattern):
            yield problem
    if recipe.two_stage.source and not (recipe.two_stage.target or recipe.two_stage.corpus):
        yield f"recipe.two_stage.source={recipe.two_stage.source}: name the part of the second stage too, as recipe.two_stage.target"
    if recipe.two_stage.active and recipe.protocol is not Protocol.sessions:
        yield f"recipe.protocol={recipe.protocol.name}: not together with recipe.two_stage, whose parts are scripts too; leave one out"
    if recipe.two_stage.source_labels and not recipe.two_stage.corpus:
        yield "recipe.two_stage.source_labels: without recipe.two_stage.corpus no label is mapped; name the corpus, or leave them out"
    yield from second_stage_problems(recipe.two_stage, recipe.finetune)
    yield from _grid_problems(recipe)


def _grid_problems(recipe: Recipe) -> Iterator[str]:
    """Check that emotion states (wav2vec v1) and backbone frames (wav2vec 2.0) have the same frame rate, as P-TAPT needs.

    Only if both models are given as configurations; with a checkpoint the `ptapt` stage checks it.
    """
    strides = recipe.backbone.config.get("conv_stride") if recipe.backbone.checkpoint is None else None
    layers = recipe.states.wav2vec.config.get("conv_feature_layers") if recipe.states.wav2vec.checkpoint is None else None
    if not strides or not layers:
        return
    hop, states_hop = 1, 2  # the states' own convolution has stride 2
    try:
        for stride in strides:
            hop *= int(stride)
        for _, _, stride in [*layers, *recipe.states.wav2vec.config.get("conv_aggregator_layers", [])]:
            states_hop *= int(stride)
    except (TypeError, ValueError):
        yield "recipe.backbone.config.conv_stride, recipe.states.wav2vec.config: strides are whole numbers, layers [channels, kernel, step]"
        return
    if hop != states_hop:
        yield (
            f"recipe.states.wav2vec.config: an emotion state every {states_hop} samples, but the backbone has a frame every {hop}; "
            "twice the product of wav2vec's strides must be the product of recipe.backbone.config.conv_stride"
        )
