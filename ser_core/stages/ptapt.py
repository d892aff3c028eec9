"""P-TAPT stage 3 (section 2.3): predict the pseudo-labels of masked frames, on a frozen front end.

Artifact: `encoder/`, the model without its heads, from which fine-tuning starts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ser_core.clustering.pseudo_labels import read_labels
from ser_core.corpora.manifest import SAMPLE_RATE
from ser_core.errors import InputError
from ser_core.features.features import Crop, FrozenFeatures
from ser_core.models.backbone import frame_count, hop_samples, load_encoder, save_encoder
from ser_core.models.front_end import project_padded
from ser_core.models.ptapt import PseudoLabelModel, align_labels, crop_labels, labelled_frames, ptapt_loss
from ser_core.parallel.group import stop_together
from ser_core.settings.backbone import Padding
from ser_core.settings.pretraining import PtaptSettings
from ser_core.stages.context import ENCODER, StageContext, parse_settings, stage_result
from ser_core.training.augmentation import row_generators, time_spans
from ser_core.training.batches import Batch, Bucketing, StepPlan, bucketed_epoch, longest_first
from ser_core.training.loop import Objective, PartLoss, StepParts
from ser_core.training.randomness import generator
from ser_core.training.schedule import warmup_flat_linear
from ser_core.training.splits import Split

ROLE = "clusters."  # prefix of the upstream roles: "clusters.64"
GRID_TOLERANCE = 2  # frames by which wav2vec v1 and 2.0 may differ at an utterance's end


@dataclass(frozen=True)
class Part:
    """A micro-batch: utterances, their crops, masked frames (B, T) bool, and pseudo-labels (B, heads, T).

    `labelled` (masked frames with a label) and `samples` (longest crop) are those of the whole step.
    """

    positions: Batch
    crops: list[Crop]
    mask: Tensor
    targets: Tensor
    labelled: int
    samples: int


class PseudoLabelling(Objective):
    """Cross-entropy of masked frames against the pseudo-labels of every k, on random crops, batched by length."""

    model: PseudoLabelModel

    def __init__(self, context: StageContext, settings: PtaptSettings, model: PseudoLabelModel, labels: list[NDArray[np.int64]]) -> None:
        self.model = model
        self._context = context
        self._settings = settings
        self._counts = [head[-1].out_features for head in model.heads]  # type: ignore[index]
        self.curve_sums = len(self._counts) + 1
        self._labels = labels  # (heads, frames) of each utterance
        self._config = model.wav2vec2.config
        self._hop = hop_samples(self._config)
        self._as_waves = context.features.padding is Padding.reference
        split = context.training
        limit = round(settings.max_seconds * SAMPLE_RATE)
        self._limit = limit
        self._frames = [max(1, frame_count(self._config, samples)) for samples in split.samples]
        self._crop_frames = max(1, frame_count(self._config, limit))
        self._lengths = lengths = [min(samples, limit) for samples in split.samples]
        budget = round(settings.batch_seconds * SAMPLE_RATE)
        batches = Bucketing(budget, settings.buckets, settings.batches_per_bucket, settings.drop_last)
        self._plan = StepPlan(lambda epoch: bucketed_epoch(lengths, batches, context.seed, epoch))
        arithmetic = context.arithmetic(settings.precision)
        padding, cache = context.features.padding, context.execution.feature_cache
        self.features = FrozenFeatures(model.wav2vec2, split, None, padding, cache, arithmetic, context.shared)

    def plan(self, step: int) -> StepParts:
        context, split = self._context, self._context.training
        batch = longest_first(self._plan.batch(step), self._lengths)
        crops = [self._crop(step, position) for position in batch]
        samples = [self._crop_samples(position, first) for position, (first, _) in zip(batch, crops, strict=True)]
        frames = [max(1, frame_count(self._config, each)) for each in samples] if self._as_waves else [count for _, count in crops]
        length = max(frames)
        labels = [
            self._cropped_labels(position, first, count, wave) for position, (first, count), wave in zip(batch, crops, samples, strict=True)
        ]
        targets = torch.from_numpy(np.stack([align_labels(each, length) for each in labels]))
        # Drawn for the whole step: its rows may share one generator.
        mask = time_spans(
            frames,
            length,
            row_generators(context.seed, step, [split.utterances[position].id for position in batch], self._settings.mask_spans_per),
            span=self._settings.mask_length,
            probability=self._settings.mask_probability,
            minimum=self._settings.mask_minimum,
        )
        labelled = labelled_frames(targets, mask)
        slices = context.row_parts([max(samples)] * len(batch) if self._as_waves else samples, self._config.model_type)
        parts = [Part(batch[rows], crops[rows], mask[rows], targets[rows], labelled, max(samples)) for rows in slices]
        return StepParts(parts, [max(samples[rows]) * len(samples[rows]) for rows in slices], len(batch))

    def loss(self, part: Part) -> PartLoss:
        features, frames = self._cropped_waves(part) if self._as_waves else self.features.padded(part.positions, part.crops)
        length = features.shape[1]
        frames, mask, targets = (
            each.to(features.device, non_blocking=True) for each in (frames, part.mask[:, :length], part.targets[:, :, :length])
        )
        found = ptapt_loss(self.model(features, frames, mask), targets, mask, part.labelled)
        correct = found.correct.float()
        by_count = torch.cat([correct, correct.new_full((1,), found.labelled)])
        return PartLoss(found.loss, found.loss, correct.mean(), found.labelled, by_count)

    def curve_values(self, sums: Tensor) -> Mapping[str, float]:
        """The accuracy at labelled masked frames for each number of clusters."""
        *correct, labelled = sums.tolist()
        return {f"masked_accuracy/k_{count}": each / max(labelled, 1) for count, each in zip(self._counts, correct, strict=True)}

    def _crop(self, step: int, position: int) -> Crop:
        """First frame and number of frames: a whole short utterance, or a random crop of a longer one."""
        spare = self._frames[position] - self._crop_frames
        if spare <= 0:
            return 0, self._frames[position]
        return int(generator(self._context.seed, "crop", step, position).integers(0, spare + 1)), self._crop_frames

    def _crop_samples(self, position: int, first: int) -> int:
        """Number of samples of the crop that starts at frame `first`."""
        return min(self._context.training.samples[position] - first * self._hop, self._limit)

    def _cropped_labels(self, position: int, first: int, count: int, samples: int) -> NDArray[np.int64]:
        """Labels (heads, frames) of the same crop as the features."""
        labels = self._labels[position]
        if self._as_waves:
            return crop_labels(labels, self._config, first * self._hop, samples)
        return align_labels(labels[:, first:], count)

    def _cropped_waves(self, part: Part) -> tuple[Tensor, Tensor]:
        """Features (B, T, hidden) and valid frames of cropped, zero-padded waves, as in the authors' code."""
        waves = [
            self._context.training.wave(position)[first * self._hop : first * self._hop + self._limit]
            for position, (first, _) in zip(part.positions, part.crops, strict=True)
        ]
        features, frames = project_padded(self.model.wav2vec2, waves, part.samples)
        return features, frames.cpu()


def run(context: StageContext) -> dict[str, Any]:
    """Train and save the encoder."""
    settings = parse_settings(PtaptSettings, context.settings["ptapt"])
    counts = [int(count) for count in context.settings["counts"]]
    encoder = load_encoder(context.backbone(), attention=context.execution.attention)
    labels = pseudo_labels(context, counts, encoder.config)
    context.seed_initialisation()
    model = PseudoLabelModel(encoder, counts, settings.head_units).to(context.device)
    objective = PseudoLabelling(context, settings, model, labels)
    started = time.monotonic()
    with stop_together(context.group):
        objective.features.fill(context.should_stop, context.progress())
    front_end = time.monotonic() - started
    trained = context.train(
        objective,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        schedule=warmup_flat_linear(settings.steps, settings.warmup_steps, int(settings.flat_fraction * settings.steps)),
        precision=settings.precision,
    )
    if context.group.is_leader:
        save_encoder(model.wav2vec2, context.output / ENCODER)
    result = stage_result(trained, {})
    result["durations"]["front_end"] = front_end
    return result


def pseudo_labels(context: StageContext, counts: Sequence[int], config: Any) -> list[NDArray[np.int64]]:
    """Return the labels (heads, frames) of every training utterance.

    Raises InputError if an artifact holds other utterances, or another number of frames than the backbone computes.
    """
    split: Split = context.training
    ids = [utterance.id for utterance in split.utterances]
    by_count = [read_labels(context.upstream[f"{ROLE}{count}"], ids) for count in counts]
    stacked = [np.stack(rows) for rows in zip(*by_count, strict=True)]
    for identifier, samples, labels in zip(ids, split.samples, stacked, strict=True):
        frames = max(1, frame_count(config, samples))
        if abs(labels.shape[1] - frames) > GRID_TOLERANCE:
            raise InputError(
                f"{identifier}: {labels.shape[1]} pseudo-labels for {frames} frames of the backbone: the strides of recipe.states.wav2vec "
                "multiplied by 2 must give the backbone's"
            )
    return stacked
