"""TAPT (section 2.2): continued wav2vec 2.0 pretraining on the training folds; all parameters are trained.

Artifact: `encoder/`, the model without its pretraining heads, from which fine-tuning starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ser_core.corpora.manifest import SAMPLE_RATE
from ser_core.models.backbone import build_backbone, frame_count, save_encoder
from ser_core.models.front_end import Extracted, extract
from ser_core.models.tapt import TaptDraw, WholeBatch, code_sums, draw_tapt, tapt_loss
from ser_core.models.trained import train_only
from ser_core.settings.backbone import Padding
from ser_core.settings.pretraining import NegativeFrames, TaptSettings
from ser_core.stages.codebook import Codebook
from ser_core.stages.context import ENCODER, StageContext, parse_settings, stage_result
from ser_core.training.augmentation import row_generators
from ser_core.training.batches import Batch, Bucketing, StepPlan, bucketed_epoch, longest_first
from ser_core.training.curves import Row
from ser_core.training.loop import LocalParts, Objective, PartLoss, StepParts
from ser_core.training.randomness import generator, torch_seed
from ser_core.training.schedule import warmup_flat_linear

if TYPE_CHECKING:
    from transformers import Wav2Vec2ForPreTraining

KEPT_SECONDS = 300.0  # audio per step up to which the convolutions' activations are kept: 6.5 MB per second in float32 (wav2vec2-base)


@dataclass(frozen=True)
class Part:
    """A micro-batch, number `number` of `count`: utterances, the first sample of each crop, and their rows of the step's random draws.

    `samples` (longest crop) and `masked` (masked frames) are those of the whole step.
    """

    step: int
    number: int
    count: int
    positions: Batch
    starts: list[int]
    draw: TaptDraw
    samples: int
    masked: int
    waves: Sequence[Tensor] = ()  # loaded by the process that computes the micro-batch


class Pretraining(Objective):
    """Contrastive and diversity loss on random crops, batched by length."""

    def __init__(self, context: StageContext, settings: TaptSettings, model: Wav2Vec2ForPreTraining) -> None:
        self.model: Any = model
        self._context = context
        self._settings = settings
        self.codebook = Codebook(model.config.num_codevector_groups, model.config.num_codevectors_per_group)
        self.curve_sums = self.codebook.sums
        self._limit = round(settings.max_seconds * SAMPLE_RATE)
        self._lengths = [min(samples, self._limit) for samples in context.training.samples]
        budget = round(settings.batch_seconds * SAMPLE_RATE)
        self._code_sums = torch.zeros(0)  # of the current step, if it has several micro-batches
        self._extracted: dict[int, Extracted] = {}  # by number of the micro-batch
        batches = Bucketing(budget, settings.buckets, settings.batches_per_bucket, settings.drop_last)
        self._plan = StepPlan(lambda epoch: bucketed_epoch(self._lengths, batches, context.seed, epoch))
        self._epoch_steps = len(bucketed_epoch(self._lengths, batches, context.seed, 0))
        # With padded features, or where padding is used, all rows have the length of the step; else a micro-batch is cut to its longest.
        independent = context.features.padding is Padding.independent
        self._cut = independent and settings.attention_mask and settings.negative_frames is NegativeFrames.valid

    def plan(self, step: int) -> StepParts:
        context, seed = self._context, self._context.seed
        batch = longest_first(self._plan.batch(step), self._lengths)
        starts = [self._start(step, position) for position in batch]
        samples = [self._lengths[position] for position in batch]
        frames = np.asarray([max(1, frame_count(self.model.config, each)) for each in samples])
        draw = draw_tapt(
            self.model.config,
            frames,
            minimum=self._settings.mask_minimum,
            negatives=self._settings.negatives,
            negative_frames=self._settings.negative_frames,
            rngs=row_generators(seed, step, [context.training.utterances[each].id for each in batch], self._settings.mask_spans_per),
        )
        slices = context.row_parts(samples if self._cut else samples[:1] * len(samples))
        masked, length = len(draw.negatives), int(frames.max())
        parts = [
            Part(
                step=step,
                number=number,
                count=len(slices),
                positions=batch[rows],
                starts=starts[rows],
                draw=draw.part(rows, int(frames[rows].max()) if self._cut else length),
                samples=samples[0],
                masked=masked,
            )
            for number, rows in enumerate(slices)
        ]
        return StepParts(parts, [samples[rows.start] * len(samples[rows]) for rows in slices], len(batch))

    def load(self, part: Part) -> Part:
        split = self._context.training
        waves = [split.wave(position)[start : start + self._limit] for position, start in zip(part.positions, part.starts, strict=True)]
        return replace(part, waves=waves)

    def before_step(self, parts: LocalParts) -> None:
        """Sum the code probabilities over all micro-batches of the step, which the diversity term needs.

        If memory allows, the convolutions' output is kept for the loss together with its autograd graph; otherwise `loss` recomputes it.
        """
        self._extracted = {}
        if parts.count == 1:
            return
        padding = self._context.features.padding
        seconds = sum(len(wave) for part in parts.loaded.values() for wave in part.waves) / SAMPLE_RATE
        keeps = padding is Padding.independent and self._context.relief == 0 and seconds <= KEPT_SECONDS
        sums = torch.zeros(self.codebook.groups, self.codebook.entries, device=self._context.device)
        for part in parts.loaded.values():
            torch.manual_seed(torch_seed(self._context.seed, "code sums", part.step, part.number))
            with torch.set_grad_enabled(keeps):
                extracted = extract(self.model, part.waves, padding, part.samples)
            sums += code_sums(self.model, extracted, part.draw.mask)
            if keeps:
                self._extracted[part.number] = extracted
        self._context.group.all_reduce_([sums])
        self._code_sums = sums

    def loss(self, part: Part) -> PartLoss:
        whole = WholeBatch(self._code_sums, part.masked) if part.count > 1 else None
        found = tapt_loss(
            self.model,
            self._extracted.pop(part.number, part.waves),
            part.draw,
            temperature=self._settings.temperature,
            diversity_weight=self._settings.diversity_weight,
            padding=self._context.features.padding,
            attention_mask=self._settings.attention_mask,
            samples=part.samples,
            whole=whole,
        )
        codes = torch.stack([found.code_counts, found.code_sums.detach()]).flatten()
        return PartLoss(found.loss, found.loss / max(part.masked, 1), found.correct, found.masked, codes)

    def curve_values(self, sums: Tensor) -> Mapping[str, float]:
        """The perplexities of each group of the codebook over the masked frames since the last entry, as fairseq names them."""
        return self.codebook.perplexities(sums)

    def warning(self, rows: Sequence[Row]) -> str:
        """Whether the codebook has collapsed."""
        return self.codebook.collapse(rows, self._epoch_steps, self._settings.diversity_weight)

    def _start(self, step: int, position: int) -> int:
        """First sample of an utterance's random crop."""
        spare = self._context.training.samples[position] - self._limit
        return int(generator(self._context.seed, "crop", step, position).integers(0, spare + 1)) if spare > 0 else 0


def run(context: StageContext) -> dict[str, Any]:
    """Train and save the encoder."""
    settings = parse_settings(TaptSettings, context.settings["tapt"])
    model = build_backbone(context.backbone(), attention=context.execution.attention)
    train_only(model, [name for name, _ in model.named_parameters()])
    objective = Pretraining(context, settings, model)
    trained = context.train(
        objective,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        schedule=warmup_flat_linear(settings.steps, settings.warmup_steps, int(settings.flat_fraction * settings.steps)),
        precision=settings.precision,
        references=objective.codebook.references(),
    )
    if context.group.is_leader:
        save_encoder(model.wav2vec2, context.output / ENCODER)
    return stage_result(trained, {})
