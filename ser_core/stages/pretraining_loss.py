"""The pretraining loss of the untouched checkpoint on a whole corpus (Table 3, "domain shift"). Nothing is trained.

An utterance's loss is that of `ser_core.models.tapt`: the contrastive loss summed over its masked frames, plus the weighted diversity of
its codes, added once. Each utterance is computed alone, whole, with masks, negatives and noise drawn from its id: its loss depends on no
other utterance and on no padding. docs/statistics.md states which published figures this reproduces, and why.

Artifact: `pretraining_loss.csv`, one row per utterance.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ser_core.corpora.manifest import SAMPLE_RATE
from ser_core.errors import InputError, Interrupted
from ser_core.models.backbone import build_backbone, frame_count
from ser_core.models.tapt import draw_tapt, tapt_loss
from ser_core.settings.backbone import SpansPer
from ser_core.settings.pretraining import NegativeFrames, PretrainingLossSettings
from ser_core.stages.context import StageContext, parse_settings
from ser_core.training.augmentation import row_generators
from ser_core.training.randomness import torch_seed
from ser_core.training.splits import Split

if TYPE_CHECKING:
    from transformers import Wav2Vec2ForPreTraining

UTTERANCES = "pretraining_loss.csv"
TRAINING, EVALUATION = 0, 1  # modes of the model, an axis of `Measured`
LOSS, CONTRASTIVE = 0, 1  # values of an utterance, an axis of `Measured`
Losses = NDArray[np.float64]  # (draws, utterances, modes, values), nats


def run(context: StageContext) -> dict[str, Any]:
    """Measure every utterance, write the artifact and return metrics (`metrics_of`). Raises InputError for a loss that is not finite."""
    settings = parse_settings(PretrainingLossSettings, context.settings["pretraining_loss"])
    split = context.training
    arithmetic = context.arithmetic(settings.precision)
    model = build_backbone(context.backbone(), attention=context.execution.attention).to(context.device)
    losses = np.zeros((settings.draws, len(split), 2, 2))
    masked = np.zeros((settings.draws, len(split)), dtype=np.int64)
    checkpoints, progress, started = context.checkpoints(), context.progress(), time.monotonic()
    saved = checkpoints.load()
    done, saved_at = saved.step if saved else 0, started
    if saved:
        losses = saved.tensors["losses"]["losses"].numpy().copy()
        masked = saved.tensors["losses"]["masked"].numpy().copy()
        context.report(f"pretraining loss: resumed after {done} of {masked.size} draws of an utterance")

    def save(number: int) -> None:
        checkpoints.save(number, {"losses": {"losses": torch.from_numpy(losses), "masked": torch.from_numpy(masked)}}, {})

    for number in range(done, masked.size):
        if context.should_stop():
            save(number)
            raise Interrupted(f"pretraining loss: stopped after {number} of {masked.size} draws of an utterance; a checkpoint was written")
        draw, position = divmod(number, len(split))
        with arithmetic.autocast():
            losses[draw, position], masked[draw, position] = utterance_loss(model, split, position, settings, context.seed, draw)
        if time.monotonic() - saved_at > context.execution.checkpoint_minutes * 60:
            save(number + 1)
            saved_at = time.monotonic()
        if (number + 1) % context.execution.log_every == 0:
            progress.update(number + 1, masked.size, "pretraining loss: utterance", f", loss {losses[draw, position, TRAINING, LOSS]:.4g}")
    if not np.isfinite(losses).all():
        worst = split.utterances[int(np.argwhere(~np.isfinite(losses))[0][1])].id
        raise InputError(f"pretraining loss: not finite for utterance {worst}; check recipe.backbone and recipe.pretraining_loss.precision")
    write_utterances(context.output / UTTERANCES, split, losses, masked)
    return {
        "metrics": metrics_of(losses, masked, split.samples),
        "durations": {"measuring": time.monotonic() - started, "resumed_at_step": done},
    }


@torch.no_grad()
def utterance_loss(
    model: Wav2Vec2ForPreTraining, split: Split, position: int, settings: PretrainingLossSettings, seed: int, draw: int
) -> tuple[list[list[float]], int]:
    """Return the loss and the contrastive part of it (nats), in training and in evaluation mode, and the number of masked frames.

    Both modes have the same mask and negatives. The noise of training mode (dropout, layer drop, Gumbel) is drawn for the utterance.
    """
    utterance = split.utterances[position]
    frames = np.asarray([max(1, frame_count(model.config, utterance.samples))])
    drawn = draw_tapt(
        model.config,
        frames,
        minimum=settings.mask_minimum,
        negatives=settings.negatives,
        negative_frames=NegativeFrames.valid,
        rngs=row_generators(seed, draw, [utterance.id], SpansPer.utterance),
    )
    values = []
    for training in (True, False):
        torch.manual_seed(torch_seed(seed, "pretraining loss", draw, utterance.id))
        found = tapt_loss(
            model.train(training),
            [split.wave(position, keep=False)],
            drawn,
            temperature=settings.temperature,
            diversity_weight=settings.diversity_weight,
        )
        values.append([float(found.loss), float(found.contrastive)])
    model.eval()
    return values, len(drawn.negatives)


def metrics_of(losses: Losses, masked: NDArray[np.int64], samples: Sequence[int]) -> dict[str, float]:
    """Return the numbers of a corpus from the losses of its utterances, nats, and their masked frames (draws, utterances).

    `loss`: mean over utterances and draws of the loss, in training mode; `loss_draws_sd` and `loss_standard_error`: sample standard
    deviation of the draws' means, and standard error of the mean over utterances (taken as independent); 0 for a single one.
    `loss_per_frame`: contrastive loss of all masked frames divided by their number; chance is ln(1 + negatives). `..._evaluation`: in
    evaluation mode.
    """
    draws, utterances = masked.shape
    per_draw, per_utterance = (losses[:, :, TRAINING, LOSS].mean(axis) for axis in (1, 0))
    return {
        "loss": float(per_draw.mean()),
        "loss_draws_sd": float(per_draw.std(ddof=1)) if draws > 1 else 0.0,
        "loss_standard_error": float(per_utterance.std(ddof=1) / np.sqrt(utterances)) if utterances > 1 else 0.0,
        "loss_per_frame": float(losses[:, :, TRAINING, CONTRASTIVE].sum() / masked.sum()),
        "loss_evaluation": float(losses[:, :, EVALUATION, LOSS].mean()),
        "loss_per_frame_evaluation": float(losses[:, :, EVALUATION, CONTRASTIVE].sum() / masked.sum()),
        "masked_frames": float(masked.mean()),
        "seconds": sum(samples) / SAMPLE_RATE / utterances,
        "utterances": utterances,
        "draws": draws,
    }


def write_utterances(path: Path, split: Split, losses: Losses, masked: NDArray[np.int64]) -> None:
    """Write one CSV row per utterance: id, speaker, seconds, and means over the draws of masked frames and losses."""
    columns = ["id", "speaker", "seconds", "masked_frames", "loss", "contrastive", "loss_evaluation", "contrastive_evaluation"]
    rows = losses.mean(axis=0).reshape(len(split), 4)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for utterance, frames, row in zip(split.utterances, masked.mean(axis=0), rows, strict=True):
            seconds = f"{utterance.samples / SAMPLE_RATE:.3f}"
            writer.writerow([utterance.id, utterance.speaker, seconds, f"{frames:.3f}", *(f"{value:.6f}" for value in row)])
