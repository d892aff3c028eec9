"""Measures steps of one stage at base size: seconds a step without waiting for the device in between, memory, and the wait for data."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_check.corpora import noise
from benchmarks.gpu_check.parts import Plan
from benchmarks.gpu_check.recipes import FOLD, base_recipe, calls_of
from benchmarks.gpu_check.stage_runs import Bench, Watch
from benchmarks.gpu_check.timing import synchronise
from ser_core.clustering.pseudo_labels import write_labels
from ser_core.corpora.manifest import SAMPLE_RATE, Manifest
from ser_core.models.backbone import frame_count
from ser_core.models.shapes import expected_shape, state_count
from ser_core.settings.recipe import Recipe

EPOCHS = 15  # of the paper's fine-tuning: they share one pass of the front end


@dataclass
class StepClock(Watch):
    """Waits for the device before step `first` and before step `first + count` only, and takes the time there."""

    device: str = "cpu"
    first: int = 6
    count: int = 12
    times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.on_step = self._mark

    @property
    def steps(self) -> int:
        """Steps that the stage must take."""
        return self.first + self.count + 1

    @property
    def seconds(self) -> float:
        """Seconds a step. Raises ValueError if the training ended before."""
        if len(self.times) != 2:
            raise ValueError(f"the training took fewer than {self.steps} steps")
        return (self.times[1] - self.times[0]) / self.count

    @property
    def data_wait(self) -> float:
        """Share of the measured steps that the loop waited for data."""
        return sum(self.waits[self.first : self.first + self.count]) / (self.seconds * self.count)

    def _mark(self, step: int) -> None:
        if step in (self.first, self.first + self.count):
            synchronise(self.device)
            if self.device == "cuda" and step == self.first:
                torch.cuda.reset_peak_memory_stats()
            self.times.append(time.perf_counter())


@dataclass(frozen=True)
class Measured:
    """Of one stage in one setting. `frames`, `samples`: valid ones of each utterance of each measured step."""

    seconds: float  # a step
    front_end: float  # seconds, all training utterances once
    test_utterance: float  # seconds; 0 without a test
    data_wait: float  # share of the measured steps that the loop waited for data
    allocated: int  # bytes, peak in the measured steps
    reserved: int
    losses: list[float]
    frames: list[list[int]]
    samples: list[list[int]]
    corpus_frames: int  # of all training utterances, as the stage cuts them

    @property
    def frames_a_step(self) -> float:
        return sum(map(sum, self.frames)) / len(self.frames)

    @property
    def epoch_seconds(self) -> float:
        """Seconds of all training utterances once, and of this epoch's share of the front end's single pass."""
        return self.seconds * self.corpus_frames / self.frames_a_step + self.front_end / EPOCHS


class BaseBench:
    """Runs stages of the noise corpus at base size (`plan.small`: small models and batches)."""

    def __init__(self, plan: Plan, name: str) -> None:
        self.plan = plan
        self.corpus: Manifest = noise(plan.folder, small=plan.small)
        self.bench = Bench(self.corpus.folder, plan.folder / name, threads=1 if plan.small else None)
        self._shared = plan.folder / "shared"  # features, computed by the first part that needs them
        self._labels: dict[tuple[int, ...], dict[str, Path]] = {}

    def measure(self, stage: str, *, reference: bool = False, clock: StepClock | None = None, **execution: Any) -> Measured:
        """Run `stage` for the steps of `clock` and measure them; `execution` replaces settings."""
        clock = clock or self.clock(reference=reference)
        recipe = base_recipe(reference=reference, steps=clock.steps, small=self.plan.small)
        lengths = [utterance.samples for utterance in self.corpus.training(FOLD)]
        recipe.finetune.epochs = -(-clock.steps // max(1, len(lengths) // recipe.finetune.batch_size))
        call = calls_of(recipe)[stage]
        upstream = self.random_labels(recipe) if stage == "ptapt" else {}
        release()
        ran = self.bench.run(call, {"device": self.plan.device, **execution}, upstream=upstream, watch=clock, shared=self._shared)
        durations = ran.outcome["durations"]
        tested = ran.outcome["metrics"].get("test_utterances")
        on_gpu = self.plan.device == "cuda"
        limit = round((recipe.finetune.max_seconds if stage == "finetune" else recipe.tapt.max_seconds) * SAMPLE_RATE)
        samples = [step_samples(stage, parts, lengths, limit) for parts in clock.batches[clock.first : clock.first + clock.count]]
        config = transformer_config(recipe)
        return Measured(
            seconds=clock.seconds,
            front_end=float(durations.get("front_end", 0.0)),
            test_utterance=durations["test"] / tested if tested else 0.0,
            data_wait=clock.data_wait,
            allocated=torch.cuda.max_memory_allocated() if on_gpu else 0,
            reserved=torch.cuda.max_memory_reserved() if on_gpu else 0,
            losses=ran.losses,
            frames=[[int(frame_count(config, each)) for each in batch] for batch in samples],
            samples=samples,
            corpus_frames=sum(int(frame_count(config, min(length, limit))) for length in lengths),
        )

    def clock(self, *, reference: bool = False) -> StepClock:
        """Steps of a measurement: fewer for the reference, which is slow, and fewest at small size."""
        first, count = (1, 2) if self.plan.small else (1, 4) if reference else (6, 12)
        return StepClock(device=self.plan.device, first=first, count=count)

    def random_labels(self, recipe: Recipe) -> Mapping[str, Path]:
        """Upstream of P-TAPT's stage 3: random pseudo-labels for every frame, since their values cost nothing."""
        counts = tuple(recipe.cluster.counts)
        if counts not in self._labels:
            rng = np.random.default_rng(0)
            shape = expected_shape(recipe.states.wav2vec)
            utterances = self.corpus.training(FOLD)
            frames = np.array([max(1, state_count(shape, utterance.samples)) for utterance in utterances], dtype=np.int64)
            made = {}
            for k in counts:
                folder = self.bench.root / f"labels-{k}"
                folder.mkdir(parents=True, exist_ok=True)
                labels = rng.integers(0, k, size=int(frames.sum())).astype(np.int32)
                write_labels(folder, [each.id for each in utterances], labels, frames, np.zeros((k, 1), dtype=np.float32))
                made[f"clusters.{k}"] = folder
            self._labels[counts] = made
        return self._labels[counts]


def step_samples(stage: str, parts: Sequence[tuple[Sequence[int], int]], lengths: Sequence[int], limit: int) -> list[int]:
    """Return the samples of each utterance that a step computes, from the positions and `samples` of its parts.

    `states` cuts all to the same length; the others cut the utterances of `lengths` to `limit`.
    """
    if stage == "states":
        return [samples for positions, samples in parts for _ in positions]
    return [min(lengths[position], limit) for positions, _ in parts for position in positions]


def transformer_config(recipe: Recipe) -> Any:
    """Return the configuration of the recipe's backbone."""
    from transformers import Wav2Vec2Config

    return Wav2Vec2Config(**recipe.backbone.config)


def release() -> None:
    """Give memory of earlier work back, so that peaks are those of the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
