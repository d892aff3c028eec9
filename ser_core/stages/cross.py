"""Fusion by cross-attention on frozen encoders: a classifier of the last hidden states of a speech model and of a text encoder.

As in arXiv 2406.08353 both encoders are frozen and not fine-tuned: the recipe's text encoder, and the backbone (of TAPT and P-TAPT: the one
that their pretraining has left). The states of all utterances are computed once and held in memory. Artifact: `predictions.csv`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ser_core.errors import Diverged, InputError, Interrupted
from ser_core.features.features import FrozenFeatures
from ser_core.models.backbone import load_encoder
from ser_core.models.classifier import class_weights, encode, label_weight, weighted_cross_entropy
from ser_core.models.cross_attention import CrossAttention
from ser_core.models.text_encoder import padded, tokens_of
from ser_core.models.trained import parameter_counts
from ser_core.settings.backbone import Padding
from ser_core.settings.execution import Precision
from ser_core.settings.text import CrossSettings
from ser_core.stages.context import StageContext, parse_settings
from ser_core.stages.tested import tested_result
from ser_core.stages.text import planned_text_encoder, texts_of
from ser_core.training.batches import Batch, StepPlan, halved, length_parts, longest_first, shuffled_epoch
from ser_core.training.divergence import divergence_reason, prior_loss
from ser_core.training.evaluate import PREDICTIONS, write_predictions
from ser_core.training.loop import Objective, PartLoss, StepParts
from ser_core.training.schedule import constant
from ser_core.training.splits import Split

# Padded frames per micro-batch if `execution.micro_batch` is 0. Independent of anything else: dropout is drawn per micro-batch.
AUTO_PART_FRAMES = {"cpu": 4096, "cuda": 32768}


@dataclass(frozen=True)
class States:
    """Last hidden states of each utterance: audio (frames, width) and text (tokens, width), float32 on the CPU."""

    audio: Sequence[Tensor]
    text: Sequence[Tensor]

    def batch(self, positions: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the arguments of `CrossAttention.forward`."""
        found: list[Tensor] = []
        for states in (self.audio, self.text):
            chosen = [states[position] for position in positions]
            counts = torch.tensor([len(each) for each in chosen])
            found.extend((pad_sequence(chosen, batch_first=True).to(device), counts.to(device)))
        audio, frames, text, tokens = found
        return audio, frames, text, tokens


class Encoders:
    """The frozen speech model and text encoder of a stage, in evaluation mode."""

    def __init__(self, context: StageContext, max_tokens: int) -> None:
        self._context = context
        self._max_tokens = max_tokens
        self._audio: Any = load_encoder(context.backbone(), attention=context.execution.attention).to(context.device).eval()
        text, self._tokenizer = planned_text_encoder(context, max_tokens)
        self._text: Any = text.to(context.device)
        self.widths: tuple[int, int] = self._audio.config.hidden_size, text.config.hidden_size

    @torch.no_grad()
    def states(self, split: Split) -> States:
        """Return the states of whole utterances, which do not depend on a batch but for rounding. Raises Interrupted on request."""
        context, device = self._context, self._context.device
        arithmetic, cache = context.arithmetic(Precision.float32), context.execution.feature_cache
        features = FrozenFeatures(self._audio, split, None, Padding.independent, cache, arithmetic, context.shared, once=True)
        features.fill(context.should_stop, context.progress())
        tokens = tokens_of(self._tokenizer, texts_of(split), self._max_tokens)
        audio, text = [torch.empty(0)] * len(split), [torch.empty(0)] * len(split)
        size, pad = halved(context.execution.evaluation_batch, context.relief), self._tokenizer.pad_token_id or 0
        for chosen in _batches(split.samples, size):
            if context.should_stop():
                raise Interrupted("stopped while the states of utterances were computed; nothing to resume")
            batch, frames = features.padded(chosen)
            hidden = encode(self._audio, batch, frames.to(device)).float().cpu()
            for position, states, count in zip(chosen, hidden, frames.tolist(), strict=True):
                audio[position] = states[:count].clone()
        for chosen in _batches([len(each) for each in tokens], size):
            ids, mask = padded([tokens[position] for position in chosen], pad)
            hidden = self._text(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state.float().cpu()
            for position, states in zip(chosen, hidden, strict=True):
                text[position] = states[: len(tokens[position])].clone()
        return States(audio, text)


@dataclass(frozen=True)
class Part:
    """A micro-batch of a step. `total_weight`: of the labels of the whole step."""

    positions: Batch
    labels: Tensor
    total_weight: Tensor


class CrossTraining(Objective):
    """Weighted cross-entropy of a classifier of the states of the training utterances."""

    model: CrossAttention

    def __init__(self, context: StageContext, settings: CrossSettings, model: CrossAttention, states: States) -> None:
        self.model = model
        self._context = context
        self._states = states
        self._labels = context.training.labels
        self._lengths = [len(each) for each in states.audio]
        self._weights = class_weights(context.training.class_counts()).to(context.device)
        count, size, seed = len(self._labels), settings.batch_size, context.seed
        self.epoch_steps = len(shuffled_epoch(count, size, seed, 0))
        self._plan = StepPlan(lambda epoch: shuffled_epoch(count, size, seed, epoch))

    def plan(self, step: int) -> StepParts:
        context = self._context
        batch = longest_first(self._plan.batch(step), self._lengths)
        labels = torch.tensor([self._labels[position] for position in batch])
        total = label_weight(labels.to(context.device), self._weights)
        lengths = [self._lengths[position] for position in batch]
        budget = AUTO_PART_FRAMES[context.device.type]
        slices = length_parts(lengths, size=context.execution.micro_batch, budget=budget, relief=context.relief)
        parts = [Part(batch[rows], labels[rows], total) for rows in slices]
        return StepParts(parts, [len(part.positions) * self._lengths[part.positions[0]] for part in parts], len(batch))

    def loss(self, part: Part) -> PartLoss:
        logits = self.model(*self._states.batch(part.positions, self._context.device))
        labels = part.labels.to(logits.device)
        loss = weighted_cross_entropy(logits, labels, self._weights, part.total_weight)
        return PartLoss(loss, loss, (logits.argmax(-1) == labels).sum(), len(labels))


@torch.no_grad()
def predict_states(model: CrossAttention, states: States, batch_size: int, device: torch.device) -> NDArray[np.float32]:
    """Return logits (utterances, classes) of batches of similar length. Raises Diverged for one that is not finite."""
    model.eval()
    logits = np.zeros((len(states.audio), model.head.out_features), dtype=np.float32)
    for chosen in _batches([len(each) for each in states.audio], batch_size):
        logits[chosen] = model(*states.batch(chosen, device)).float().cpu().numpy()
    if not np.isfinite(logits).all():
        raise Diverged("the trained model gives outputs that are not finite")
    return logits


def run(context: StageContext, open_test: Callable[[], Split]) -> dict[str, Any]:
    """Train on the states of the training split, then open the test split and score it. `diverged` states the reason."""
    settings, split = parse_settings(CrossSettings, context.settings["cross"]), context.training
    started = time.monotonic()
    encoders = Encoders(context, context.settings["text"]["max_tokens"])
    if any(width % settings.heads for width in encoders.widths):
        raise InputError(f"recipe.fusion.cross.heads={settings.heads}: does not divide the widths of the encoders, {encoders.widths}")
    states = encoders.states(split)
    seconds = time.monotonic() - started
    context.seed_initialisation()
    audio, text = encoders.widths
    model = CrossAttention(audio, text, len(split.classes), heads=settings.heads, units=settings.units, dropout=settings.dropout)
    objective = CrossTraining(context, settings, model.to(context.device), states)
    prior = prior_loss(split.class_counts(), class_weights(split.class_counts()).tolist())
    trained = context.train(
        objective,
        steps=settings.epochs * objective.epoch_steps,
        learning_rate=settings.learning_rate,
        schedule=constant(),
        precision=settings.precision,
        steps_per_epoch=objective.epoch_steps,
        references={"train/loss": (prior, "loss of the class prior")},
    )
    diverged = divergence_reason(trained.loss, prior)
    if diverged:
        context.report(f"cross: diverged: {diverged}")
    started = time.monotonic()
    test = open_test()
    logits = predict_states(model, encoders.states(test), halved(context.execution.evaluation_batch, context.relief), context.device)
    write_predictions(context.output / PREDICTIONS, logits, test)
    counts = parameter_counts(model)
    result = tested_result(trained, logits, split, test, parameters=counts, prior=prior, diverged=diverged, further={})
    result["durations"] |= {"states": seconds, "test": time.monotonic() - started}
    return result


def _batches(lengths: Sequence[int], size: int) -> list[Batch]:
    """All positions, longest first, in batches."""
    order = longest_first(list(range(len(lengths))), lengths)
    return [order[start : start + size] for start in range(0, len(order), size)]
