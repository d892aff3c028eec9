"""P-TAPT stage 1 (section 2.3): emotion states, wav2vec v1 trained on the labels of the utterances.

The emotion states (frames) of the training folds are computed once here and saved: every k of the ensemble and every sweep over k reads
them, on nodes without a GPU, without the corpus and the network. They are float32 (1.2 million frames of 512: 2.4 GiB) and are written
utterance by utterance, so memory is needed for a few utterances only.

Artifacts: `frames.npy` (all frames, channels), `frames.json` (ids and numbers of frames), `model.safetensors` (weights with the lowest
validation loss).
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import write_array_header_1_0
from numpy.typing import NDArray
from torch import Tensor

from ser_core.disk import os_errors
from ser_core.errors import Diverged, InputError, Interrupted
from ser_core.models.classifier import class_weights, label_weight
from ser_core.models.fairseq_checkpoint import build_wav2vec
from ser_core.models.shapes import extractor_frames, minimum_samples, state_count
from ser_core.models.states import EmotionStates, states_loss
from ser_core.preflight import held_out_for_validation
from ser_core.settings.pretraining import StatesSettings
from ser_core.stages.context import StageContext, parse_settings, stage_result
from ser_core.training.augmentation import row_generators, spans
from ser_core.training.batches import Batch, StepPlan, shares, shuffled_epoch
from ser_core.training.loop import Objective, PartLoss, StepParts
from ser_core.training.randomness import generator
from ser_core.training.schedule import warmup_flat_linear
from ser_core.training.splits import Split

FRAMES = "frames.npy"
FRAMES_INDEX = "frames.json"
MODEL = "model.safetensors"
FRAMES_AT_ONCE = 8  # utterances per process computed before they are written


@dataclass(frozen=True)
class Part:
    """A micro-batch, cropped to the `samples` of the step's shortest utterance, with its rows of the masks.

    `total_weight` is that of the whole step's labels.
    """

    step: int
    positions: Batch
    samples: int
    labels: Tensor
    time_mask: Tensor
    feature_mask: Tensor
    total_weight: float | None  # None: the step is a single micro-batch
    waves: Tensor | None = None  # (B, samples), loaded by the process that computes the micro-batch


class StateTraining(Objective):
    """Utterance and frame classification (section 2.3); keeps the weights with the lowest validation loss."""

    model: EmotionStates

    def __init__(self, context: StageContext, settings: StatesSettings, model: EmotionStates) -> None:
        self.model = model
        self._context = context
        self._settings = settings
        train_positions, validation_positions = validation_split(len(context.training), settings.validation_fraction, context.seed)
        self._split = context.training.subset(train_positions)
        self._validation = context.training.subset(validation_positions)
        self._class_weights = class_weights([max(1, count) for count in self._split.class_counts()])
        self._weights = self._class_weights.to(context.device)
        self._shortest = minimum_samples(model.wav2vec.config)
        self._plan = StepPlan(lambda epoch: shuffled_epoch(len(self._split), settings.batch_size, context.seed, epoch))
        epoch_steps = len(shuffled_epoch(len(self._split), settings.batch_size, context.seed, 0))
        self._validate_every = settings.validate_every or epoch_steps
        self._best_loss = math.inf
        self._best_step = 0
        self._best: dict[str, Tensor] = {}

    def plan(self, step: int) -> StepParts:
        batch = self._plan.batch(step)
        samples = max(self._shortest, min(self._split.samples[position] for position in batch))
        labels = torch.tensor([self._split.labels[position] for position in batch])
        slices = self._context.row_parts([samples] * len(batch))
        total = float(label_weight(labels, self._class_weights)) if len(slices) > 1 else None
        frames = extractor_frames(self.model.wav2vec.config, samples)
        spec_augment = self._settings.spec_augment
        rngs = row_generators(self._context.seed, step, [self._split.utterances[each].id for each in batch], spec_augment.spans_per)
        # Drawn for the whole step: its rows may share one generator.
        time_mask, feature_mask = spans(spec_augment, [frames] * len(batch), frames, self.model.wav2vec.channels, rngs)
        parts = [Part(step, batch[rows], samples, labels[rows], time_mask[rows], feature_mask[rows], total) for rows in slices]
        return StepParts(parts, [len(part.positions) for part in parts], len(batch))

    def load(self, part: Part) -> Part:
        return replace(part, waves=self._crops(self._split, part.positions, part.samples, "crop", part.step))

    def _crops(self, split: Split, positions: Batch, samples: int, purpose: str, step: int) -> Tensor:
        """Random crops (B, samples) of utterances; a shorter utterance is padded with zeros."""
        waves = []
        for position in positions:
            wave = split.wave(position)
            spare = len(wave) - samples
            start = int(generator(self._context.seed, purpose, step, position).integers(0, spare + 1)) if spare > 0 else 0
            waves.append(torch.nn.functional.pad(wave[start : start + samples], (0, max(0, samples - len(wave)))))
        return torch.stack(waves)

    def loss(self, part: Part) -> PartLoss:
        if part.waves is None:
            raise ValueError("a part must be loaded first")
        device = self._context.device
        waves, labels, time_mask, feature_mask = (
            each.to(device, non_blocking=True) for each in (part.waves, part.labels, part.time_mask, part.feature_mask)
        )
        utterance, frame = self.model(waves, time_mask, feature_mask)
        found = states_loss(utterance, frame, labels, self._weights, part.total_weight)
        return PartLoss(found.loss, found.loss, found.correct, len(labels))

    def after_step(self, step: int) -> Mapping[str, float]:
        """Validate periodically and after the last step; keep the best weights. Raises Diverged for a NaN or infinite loss."""
        if step % self._validate_every and step != self._settings.steps:
            return {}
        loss, accuracy = self.validate(step)
        if not math.isfinite(loss):
            raise Diverged(f"states: the validation loss is {loss} at step {step} (seed {self._context.seed})")
        if loss < self._best_loss:
            self._best_loss, self._best_step = loss, step
            self._best = {name: parameter.detach().cpu().clone() for name, parameter in self.parameters().items()}
        return {"loss": loss, "accuracy": accuracy}

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self._best, {"best_loss": self._best_loss if self._best else None, "best_step": self._best_step}

    def load_extra_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self._best = dict(tensors)
        self._best_loss = math.inf if facts["best_loss"] is None else float(facts["best_loss"])
        self._best_step = int(facts["best_step"])

    @torch.no_grad()
    def validate(self, step: int) -> tuple[float, float]:
        """Return weighted mean loss and accuracy on the validation utterances after `step` steps.

        Their batches have a random order, the same at every validation, and random crops to the batch's shortest utterance, as in the
        authors' code. The processes share the batches; results are summed in a fixed order, so they are bit-identical in all processes.
        """
        self.model.eval()
        group, split = self._context.group, self._validation
        order = generator(self._context.seed, "validation order").permutation(len(split)).tolist()
        batches = [order[start : start + self._settings.batch_size] for start in range(0, len(order), self._settings.batch_size)]
        lengths = [max(self._shortest, min(split.samples[position] for position in batch)) for batch in batches]
        found = np.zeros((len(batches), 3))
        costs = [len(batch) * length for batch, length in zip(batches, lengths, strict=True)]
        for number in shares(costs, group.size)[group.rank]:
            group.expect_progress()
            found[number] = self._validated(batches[number], lengths[number], step)
        loss, weight, correct = group.all_reduce(found).sum(axis=0).tolist()
        return loss / weight, correct / len(order)

    def _validated(self, batch: Batch, length: int, step: int) -> tuple[float, float, float]:
        """Weighted loss, weight and correct utterances of a batch of validation, in crops of `length` samples."""
        device = self._context.device
        stacked = self._crops(self._validation, batch, length, "validation crop", step)
        labels = torch.tensor([self._validation.labels[position] for position in batch], device=device)
        weight = float(label_weight(labels, self._weights))
        slices = self._context.row_parts([length] * len(batch))
        loss = correct = 0.0
        for rows in slices:
            utterance, frame = self.model(stacked[rows].to(device))
            found = states_loss(utterance, frame, labels[rows], self._weights, weight if len(slices) > 1 else None)
            loss += float(found.loss) * weight
            correct += float(found.correct)
        return loss, weight, correct

    def use_best(self) -> tuple[float, int]:
        """Load the best weights into the model; return their validation loss and step."""
        state = self.model.state_dict()
        self.model.load_state_dict({**state, **{name: tensor.to(self._context.device) for name, tensor in self._best.items()}})
        return self._best_loss, self._best_step


def run(context: StageContext) -> dict[str, Any]:
    """Train, load the best weights, and save the emotion states of every training utterance."""
    from safetensors.torch import save_file

    settings = parse_settings(StatesSettings, context.settings["states"])
    wav2vec = build_wav2vec(context.wav2vec())
    context.seed_initialisation()
    model = EmotionStates(wav2vec, len(context.training.classes), settings.rnn_units, settings.head_units).to(context.device)
    objective = StateTraining(context, settings, model)
    warmup, flat = int(settings.warmup_fraction * settings.steps), int(settings.flat_fraction * settings.steps)
    trained = context.train(
        objective,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        schedule=warmup_flat_linear(settings.steps, warmup, flat),
        precision=settings.precision,
        save_last=True,  # computing the frames takes a while
    )
    best_loss, best_step = objective.use_best()
    if context.group.is_leader:
        with os_errors(context.output / MODEL):
            save_file({name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}, context.output / MODEL)
    started = time.monotonic()
    frames = write_frames(context, model)
    result = stage_result(trained, {"best_validation_loss": best_loss, "best_step": best_step, "frames": frames})
    result["durations"]["frames"] = time.monotonic() - started
    return result


def validation_split(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return positions to train on and to validate on (`fraction`), at least one each. Raises InputError for fewer than two utterances."""
    if count < 2:
        raise InputError("states: one training utterance cannot be split into training and validation")
    held = held_out_for_validation(count, fraction)
    order = generator(seed, "validation split").permutation(count).tolist()
    return sorted(order[held:]), sorted(order[:held])


def write_frames(context: StageContext, model: EmotionStates) -> int:
    """Compute and save the emotion states of all training utterances, each whole and alone; return the number of frames.

    Written as a stream: with a memory map a full disk would raise SIGBUS, which kills the process without an error message. The processes
    compute a few utterances each and send them to the leader, which alone writes.
    """
    model.eval()
    split, group = context.training, context.group
    config = model.wav2vec.config
    counts = [max(1, state_count(config, samples)) for samples in split.samples]
    progress = context.progress()
    at_once = FRAMES_AT_ONCE * group.size
    with (context.output / FRAMES).open("wb") if group.is_leader else contextlib.nullcontext() as file:
        if file is not None:
            write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (sum(counts), model.wav2vec.outputs)})
        for start in range(0, len(counts), at_once):
            if group.any(context.should_stop()):
                raise Interrupted(f"states: stopped at the frames of utterance {start} of {len(counts)}; training is in the checkpoint")
            group.expect_progress()
            some = counts[start : start + at_once]
            taken = shares(some, group.size)
            own = [_states(model, split, start + number, some[number]) for number in taken[group.rank]]
            found = group.gather(torch.cat([*own, torch.zeros(0, model.wav2vec.outputs)]), [_rows(some, share) for share in taken])
            if file is not None:
                for rows in _in_order(found, taken, some):
                    file.write(rows.numpy().astype("<f4", copy=False).tobytes())
            progress.update(start + len(some), len(counts), "states: frames of utterance")
    if group.is_leader:
        index = {"utterances": [utterance.id for utterance in split.utterances], "frames": counts}
        (context.output / FRAMES_INDEX).write_text(json.dumps(index), encoding="utf-8")
    return sum(counts)


def _rows(counts: Sequence[int], share: Sequence[int]) -> int:
    return sum(counts[number] for number in share)


def _in_order(found: Sequence[Tensor], taken: Sequence[Sequence[int]], counts: Sequence[int]) -> list[Tensor]:
    """Split the frames of each process into utterances and return them in order."""
    ordered: list[Tensor] = [torch.zeros(0)] * len(counts)
    for rows, share in zip(found, taken, strict=True):
        for number, states in zip(share, torch.split(rows, [counts[number] for number in share]), strict=True):
            ordered[number] = states
    return ordered


def _states(model: EmotionStates, split: Split, position: int, count: int) -> Tensor:
    """Emotion states (frames, channels) of an utterance on the CPU. Raises ValueError if their number is not `count`."""
    states = model.frames(split.wave(position, keep=False)).cpu()
    if len(states) != count:
        raise ValueError(f"{split.utterances[position].id}: {len(states)} emotion states where its length gives {count}")
    return states


def read_frames(folder: Path, ids: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return all frames (N, channels), memory-mapped, and the number of frames of each utterance (utterances,).

    Raises InputError if the artifact holds other utterances than `ids`.
    """
    index = json.loads((folder / FRAMES_INDEX).read_text(encoding="utf-8"))
    if index["utterances"] != list(ids):
        raise InputError(f"{folder}: emotion states of other utterances than the training folds")
    frames: NDArray[np.float32] = np.load(folder / FRAMES, mmap_mode="r", allow_pickle=False)
    return frames, np.asarray(index["frames"], dtype=np.int64)
