"""Fine-tuning of a text encoder on transcripts: a classifier trained and tested like that of audio (`ser_core.stages.finetune`).

Reads the transcripts in the manifest and no audio. Training reads those of the training split only. Artifacts: `predictions.csv`, the
training curves and, outside of sweeps, `pooled.safetensors` (`ser_core.training.pooled`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ser_core.errors import Diverged, InputError
from ser_core.models.classifier import class_weights, label_weight, weighted_cross_entropy
from ser_core.models.text_encoder import TextClassifier, Tokens, load_text_encoder, most_tokens, padded, tokens_of
from ser_core.models.text_identity import KEY, text_identity
from ser_core.models.trained import parameter_counts
from ser_core.settings.text import TextEncoderSettings, TextSettings
from ser_core.stages.context import StageContext, parse_settings
from ser_core.stages.tested import tested_result
from ser_core.training.batches import Batch, StepPlan, halved, length_parts, longest_first, shuffled_epoch
from ser_core.training.divergence import divergence_reason, prior_loss
from ser_core.training.evaluate import PREDICTIONS, write_predictions
from ser_core.training.loop import Objective, PartLoss, StepParts
from ser_core.training.pooled import write_pooled
from ser_core.training.schedule import constant
from ser_core.training.splits import Split

# Padded tokens per micro-batch if `execution.micro_batch` is 0. Independent of anything else: dropout is drawn per micro-batch.
AUTO_PART_TOKENS = {"cpu": 4096, "cuda": 16384}


@dataclass(frozen=True)
class Part:
    """A micro-batch of a step. `total_weight`: of the labels of the whole step."""

    positions: Batch
    labels: Tensor
    total_weight: Tensor


class TextFinetuning(Objective):
    """Weighted cross-entropy of a text classifier. `tokens`: of each training utterance; `pad`: id of the padding token."""

    model: TextClassifier

    def __init__(self, context: StageContext, settings: TextSettings, model: TextClassifier, tokens: Tokens, pad: int) -> None:
        self.model = model
        self._context = context
        self._labels = context.training.labels
        self._tokens, self._pad = tokens, pad
        self._lengths = [len(each) for each in tokens]
        self._weights = class_weights(context.training.class_counts()).to(context.device)
        count, size, seed = len(tokens), settings.batch_size, context.seed
        self.epoch_steps = len(shuffled_epoch(count, size, seed, 0))
        self._plan = StepPlan(lambda epoch: shuffled_epoch(count, size, seed, epoch))

    def plan(self, step: int) -> StepParts:
        batch = longest_first(self._plan.batch(step), self._lengths)
        labels = torch.tensor([self._labels[position] for position in batch])
        total = label_weight(labels.to(self._context.device), self._weights)
        lengths = [self._lengths[position] for position in batch]
        budget = AUTO_PART_TOKENS[self._context.device.type]
        slices = length_parts(lengths, size=self._context.execution.micro_batch, budget=budget, relief=self._context.relief)
        parts = [Part(batch[rows], labels[rows], total) for rows in slices]
        return StepParts(parts, [len(part.positions) * self._lengths[part.positions[0]] for part in parts], len(batch))

    def loss(self, part: Part) -> PartLoss:
        device = self._context.device
        ids, mask = padded([self._tokens[position] for position in part.positions], self._pad)
        logits = self.model(ids.to(device), mask.to(device))
        labels = part.labels.to(device)
        loss = weighted_cross_entropy(logits, labels, self._weights, part.total_weight)
        return PartLoss(loss, loss, (logits.argmax(-1) == labels).sum(), len(labels))


@torch.no_grad()
def evaluate_texts(model: TextClassifier, tokens: Tokens, pad: int, batch_size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return logits (utterances, classes) and inputs of the last layer (utterances, units), in float32, of batches of similar length.

    Raises Diverged for a logit that is not finite.
    """
    model.eval()
    device = model.head.weight.device
    logits = np.zeros((len(tokens), model.head.out_features), dtype=np.float32)
    pooled = np.zeros((len(tokens), model.head.in_features), dtype=np.float32)
    order = longest_first(list(range(len(tokens))), [len(each) for each in tokens])
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = padded([tokens[position] for position in chosen], pad)
        found = model.pooled(ids.to(device), mask.to(device))
        logits[chosen], pooled[chosen] = (each.float().cpu().numpy() for each in (model.head(found), found))
    if not np.isfinite(logits).all():
        raise Diverged("the trained model gives outputs that are not finite")
    return logits, pooled


def run(context: StageContext, open_test: Callable[[], Split]) -> dict[str, Any]:
    """Train, then open the test split and score it. A diverged model is tested too; `diverged` states the reason."""
    settings = parse_settings(TextSettings, context.settings["text"])
    encoder, tokenizer = planned_text_encoder(context, settings.max_tokens)
    split = context.training
    context.seed_initialisation()
    model = TextClassifier(encoder, len(split.classes)).to(context.device)
    pad = tokenizer.pad_token_id or 0
    tokens = tokens_of(tokenizer, texts_of(split), settings.max_tokens)
    objective = TextFinetuning(context, settings, model, tokens, pad)
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
        context.report(f"text: diverged: {diverged}")
    started = time.monotonic()
    size = halved(context.execution.evaluation_batch, context.relief)
    vectors = None if "validation" in context.settings else evaluate_texts(model, tokens, pad, size)[1]
    pooling, started = time.monotonic() - started, time.monotonic()
    test = open_test()
    logits, pooled = evaluate_texts(model, tokens_of(tokenizer, texts_of(test), settings.max_tokens), pad, size)
    write_predictions(context.output / PREDICTIONS, logits, test)
    if vectors is not None:
        write_pooled(context.output, (split, vectors), (test, pooled))
    counts = parameter_counts(model)
    result = tested_result(trained, logits, split, test, parameters=counts, prior=prior, diverged=diverged, further={})
    result["durations"] |= {"pooling": pooling, "test": time.monotonic() - started}
    return result


def planned_text_encoder(context: StageContext, max_tokens: int) -> tuple[Any, Any]:
    """Encoder and tokenizer that the stage was planned with. Raises InputError if they have changed since."""
    chosen = parse_settings(TextEncoderSettings, context.runtime["text_encoder"])
    if text_identity(chosen) != context.settings["text_encoder"]:
        raise InputError(f"{KEY}: not the weights or the tokenizer this stage was planned with; launch again")
    encoder, tokenizer = load_text_encoder(chosen)
    most = most_tokens(encoder)
    if most is not None and max_tokens > most:
        raise InputError(f"recipe.text.max_tokens={max_tokens}: the encoder has positions for {most} tokens")
    return encoder, tokenizer


def texts_of(split: Split) -> list[str]:
    """The transcripts of a split. Raises InputError for an utterance without one."""
    missing = [utterance.id for utterance in split.utterances if utterance.text is None]
    if missing:
        raise InputError(f"utterance {missing[0]} has no transcript; prepare the corpus with its transcripts (docs/text.md)")
    return [utterance.text or "" for utterance in split.utterances]
