"""Fusion of a finished audio run and a finished text run by one linear layer on both pooled vectors; both encoders stay frozen.

The graph of the repository aris-ai/Audio-and-text-based-emotion-recognition, with the network of this run's audio method in place of its
AlexNet. Reads the artifacts `pooled.safetensors` of both runs, which have the same fold and seed, and their curves; no audio and no
transcript. Training reads the vectors of the training split only. Artifact: `predictions.csv`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ser_core.models.classifier import class_weights, weighted_cross_entropy
from ser_core.models.trained import parameter_counts
from ser_core.settings.execution import Precision
from ser_core.stages.context import StageContext
from ser_core.stages.late_fusion import ROLES, audio_divergence, role_scores
from ser_core.stages.tested import tested_result
from ser_core.training.batches import Batch, StepPlan, shuffled_epoch
from ser_core.training.divergence import divergence_reason, prior_loss
from ser_core.training.evaluate import PREDICTIONS, write_predictions
from ser_core.training.loop import Objective, PartLoss, StepParts
from ser_core.training.pooled import TEST, TRAINING, read_pooled
from ser_core.training.schedule import constant
from ser_core.training.splits import Split


class LayerTraining(Objective):
    """Weighted cross-entropy of one linear layer. `vectors`: (training utterances, units) float32, on the device."""

    model: nn.Linear

    def __init__(self, context: StageContext, batch_size: int, vectors: Tensor) -> None:
        split, seed = context.training, context.seed
        self.model = nn.Linear(vectors.shape[1], len(split.classes)).to(context.device)
        self._vectors = vectors
        self._labels = torch.tensor(split.labels, device=context.device)
        self._weights = class_weights(split.class_counts()).to(context.device)
        self.epoch_steps = len(shuffled_epoch(len(split), batch_size, seed, 0))
        self._plan = StepPlan(lambda epoch: shuffled_epoch(len(split), batch_size, seed, epoch))

    def plan(self, step: int) -> StepParts:
        batch = self._plan.batch(step)
        return StepParts([batch], [1.0], len(batch))

    def loss(self, part: Batch) -> PartLoss:
        labels = self._labels[part]
        logits = self.model(self._vectors[part])
        loss = weighted_cross_entropy(logits, labels, self._weights)
        return PartLoss(loss, loss, (logits.argmax(-1) == labels).sum(), len(labels))


def run(context: StageContext, open_test: Callable[[], Split]) -> dict[str, Any]:
    """Train the layer, then open the test split and score it. `diverged`: the reason of the audio run, or of this training."""
    settings, split = context.settings["concat"], context.training
    vectors = _vectors(context, TRAINING, split)
    context.seed_initialisation()
    objective = LayerTraining(context, settings["batch_size"], vectors)
    prior = prior_loss(split.class_counts(), class_weights(split.class_counts()).tolist())
    trained = context.train(
        objective,
        steps=settings["epochs"] * objective.epoch_steps,
        learning_rate=settings["learning_rate"],
        schedule=constant(),
        precision=Precision.float32,
        steps_per_epoch=objective.epoch_steps,
        references={"train/loss": (prior, "loss of the class prior")},
    )
    diverged = audio_divergence(context) or divergence_reason(trained.loss, prior)
    if diverged:
        context.report(f"concat: diverged: {diverged}")
    started = time.monotonic()
    test = open_test()
    with torch.no_grad():
        logits = objective.model(_vectors(context, TEST, test)).cpu().numpy()
    write_predictions(context.output / PREDICTIONS, logits, test)
    counts, further = parameter_counts(objective.model), role_scores(context, test)
    result = tested_result(trained, logits, split, test, parameters=counts, prior=prior, diverged=diverged, further=further)
    result["durations"] |= {"test": time.monotonic() - started}
    return result


def _vectors(context: StageContext, part: str, split: Split) -> Tensor:
    """The vectors of audio, then text, of each utterance of a split: (utterances, units of both), on the device."""
    both = [read_pooled(context.upstream[role], part, split) for role in ROLES]
    return torch.from_numpy(np.concatenate(both, axis=1)).to(context.device)
