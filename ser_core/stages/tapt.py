"""TAPT (section 3.2): the wav2vec 2.0 pretraining loss on the training folds, all parameters trained.

Artifact: `encoder/`, the model without its pretraining heads, from which fine-tuning starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ser_core.corpora.manifest import SAMPLE_RATE
from ser_core.models.backbone import build_backbone, frame_count, save_encoder
from ser_core.models.tapt import TaptDraw, WholeBatch, code_sums, draw_tapt, tapt_loss
from ser_core.settings import Padding, TaptSettings
from ser_core.stages.context import ENCODER, StageContext, outcome, parse
from ser_core.training.batches import StepPlan, bucketed_epoch, row_parts
from ser_core.training.loop import Objective, PartLoss, Plan, train
from ser_core.training.randomness import generator
from ser_core.training.schedule import warmup_flat_linear

if TYPE_CHECKING:
    from transformers import Wav2Vec2ForPreTraining


@dataclass(frozen=True)
class Rows:
    """Some utterances of a step, and their share of what was drawn for it."""

    waves: list[Tensor]
    draw: TaptDraw


@dataclass(frozen=True)
class Part:
    """The `own` of all `rows` of a step: the diversity of codes is a property of all its frames. `samples` is its longest wave."""

    step: int
    own: Rows
    rows: tuple[Rows, ...]
    samples: int


class Pretraining(Objective):
    """Contrastive and diversity loss on random crops, batched by length."""

    def __init__(self, context: StageContext, settings: TaptSettings, model: Wav2Vec2ForPreTraining) -> None:
        self.model: Any = model
        self._context = context
        self._settings = settings
        self._limit = round(settings.max_seconds * SAMPLE_RATE)
        self._lengths = [min(samples, self._limit) for samples in context.training.samples]
        budget = round(settings.batch_seconds * SAMPLE_RATE)
        self._whole: tuple[int, WholeBatch] | None = None  # of the step that was last computed in parts
        self._plan = StepPlan(lambda epoch: bucketed_epoch(self._lengths, budget, settings.buckets, context.seed, epoch))

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def parts(self, step: int) -> Sequence[Part]:
        seed = self._context.seed
        waves = []
        for position in self._plan.batch(step):
            wave = self._context.training.wave(position)
            spare = len(wave) - self._limit
            start = int(generator(seed, "crop", step, position).integers(0, spare + 1)) if spare > 0 else 0
            waves.append(wave[start : start + self._limit])
        frames = np.asarray([max(1, frame_count(self.model.config, len(wave))) for wave in waves])
        draw = draw_tapt(
            self.model.config,
            frames,
            minimum=self._settings.mask_minimum,
            negatives=self._settings.negatives,
            padding=self._context.features.padding,
            rng=generator(seed, "mask and negatives", step),
        )
        length = int(frames.max())
        cut = self._context.features.padding is Padding.independent  # else the rows of a part stay as long as those of the step
        rows = tuple(
            Rows(waves[each], draw.part(each, int(frames[each].max()) if cut else length))
            for each in row_parts(len(waves), relief=self._context.relief)
        )
        return [Part(step, own, rows, max(len(wave) for wave in waves)) for own in rows]

    def loss(self, part: Part) -> PartLoss:
        whole = self._whole_batch(part) if len(part.rows) > 1 else None
        found = tapt_loss(
            self.model,
            part.own.waves,
            part.own.draw,
            temperature=self._settings.temperature,
            diversity_weight=self._settings.diversity_weight,
            padding=self._context.features.padding,
            samples=part.samples,
            whole=whole,
        )
        masked = found.masked if whole is None else whole.masked
        return PartLoss(found.loss, found.loss / max(masked, 1), found.correct, found.masked)

    def _whole_batch(self, part: Part) -> WholeBatch:
        """The sums over all parts of a step, from a pass through the front end without gradient before the first of them."""
        if self._whole is None or self._whole[0] != part.step:
            padding = self._context.features.padding
            sums = [code_sums(self.model, rows.waves, rows.draw.mask, padding=padding, samples=part.samples) for rows in part.rows]
            self._whole = part.step, WholeBatch(torch.stack(sums).sum(0), sum(len(rows.draw.negatives) for rows in part.rows))
        return self._whole[1]


def run(context: StageContext) -> dict[str, Any]:
    """Train and save the encoder."""
    settings = parse(TaptSettings, context.settings["tapt"])
    model = build_backbone(context.backbone(), attention=context.execution.attention)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    objective = Pretraining(context, settings, model)
    plan = Plan(
        name="tapt",
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        schedule=warmup_flat_linear(settings.steps, settings.warmup_steps, int(settings.flat_fraction * settings.steps)),
        seed=context.seed,
        arithmetic=context.arithmetic(settings.precision),
        checkpoint_seconds=context.execution.checkpoint_minutes * 60,
        log_every=context.execution.log_every,
    )
    trained = train(objective, plan, context.checkpoints(), context.output, context.should_stop, context.report)
    save_encoder(model.wav2vec2, context.output / ENCODER)
    return outcome(trained, {})
