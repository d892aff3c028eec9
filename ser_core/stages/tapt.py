"""TAPT (section 3.2): the wav2vec 2.0 pretraining loss on the training folds, all parameters trained.

Artifact: `encoder/`, the model without its pretraining heads, from which fine-tuning starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from ser_core.corpora.manifest import SAMPLE_RATE
from ser_core.models.backbone import build_backbone, frame_count, save_encoder
from ser_core.models.tapt import TaptDraw, draw_tapt, tapt_loss
from ser_core.settings import TaptSettings
from ser_core.stages.context import ENCODER, StageContext, outcome, parse
from ser_core.training.batches import StepPlan, bucketed_epoch
from ser_core.training.loop import Objective, PartLoss, Plan, train
from ser_core.training.randomness import generator
from ser_core.training.schedule import warmup_flat_linear

if TYPE_CHECKING:
    from transformers import Wav2Vec2ForPreTraining


@dataclass(frozen=True)
class Part:
    """A whole step: the diversity of codes is a property of all its frames, so a batch is not cut."""

    waves: list[Tensor]
    draw: TaptDraw


class Pretraining(Objective):
    """Contrastive and diversity loss on random crops, batched by length."""

    def __init__(self, context: StageContext, settings: TaptSettings, model: Wav2Vec2ForPreTraining) -> None:
        self.model: Any = model
        self._context = context
        self._settings = settings
        self._limit = round(settings.max_seconds * SAMPLE_RATE)
        self._lengths = [min(samples, self._limit) for samples in context.training.samples]
        budget = round(settings.batch_seconds * SAMPLE_RATE)
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
        return [Part(waves, draw)]

    def loss(self, part: Part) -> PartLoss:
        found = tapt_loss(
            self.model,
            part.waves,
            part.draw,
            temperature=self._settings.temperature,
            diversity_weight=self._settings.diversity_weight,
            padding=self._context.features.padding,
        )
        return PartLoss(found.loss, found.per_frame, found.correct, found.masked)


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
