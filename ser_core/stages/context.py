"""What a stage is handed: resolved settings, the training split of its fold, upstream artifacts, folders. None gets the corpus itself."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ser_core.corpora.manifest import SAMPLE_RATE
from ser_core.errors import InputError
from ser_core.models.fairseq_checkpoint import wav2vec_identity
from ser_core.models.identity import backbone_identity
from ser_core.parallel.group import Group
from ser_core.parallel.team import Alone, Team
from ser_core.settings import BackboneSettings, ExecutionSettings, FeatureSettings, Precision, Wav2vecSettings
from ser_core.training.batches import length_parts
from ser_core.training.checkpoints import Checkpoints, identity_of
from ser_core.training.device import AUTO_PART_SECONDS, Arithmetic, choose_arithmetic, choose_device
from ser_core.training.loop import TrainingResult
from ser_core.training.progress import Progress
from ser_core.training.randomness import torch_seed
from ser_core.training.splits import Split

SettingsT = TypeVar("SettingsT")
ENCODER = "encoder"  # folder of a pretraining stage's output


@dataclass(frozen=True)
class StageContext:
    """One stage on one fold with one seed. `training` is all of the corpus that it can reach."""

    stage: str
    settings: Mapping[str, Any]
    runtime: Mapping[str, Any]
    training: Split
    corpus_digest: str
    fold: str
    seed: int
    upstream: Mapping[str, Path]
    output: Path
    checkpoint: Path
    relief: int  # how often memory ran out: rows of a pass are halved so often, in training and in evaluation
    should_stop: Callable[[], bool]
    report: Callable[[str], None]
    team: Team = field(default_factory=Alone)
    group: Group = field(default_factory=Group)  # of the team's processes
    shared: Path | None = None  # for what other stages can use too; None: nothing is kept

    @functools.cached_property
    def execution(self) -> ExecutionSettings:
        return parse_settings(ExecutionSettings, self.runtime.get("execution", {}))

    @functools.cached_property
    def features(self) -> FeatureSettings:
        return parse_settings(FeatureSettings, self.settings.get("features", {}))

    @functools.cached_property
    def device(self) -> torch.device:
        """In a team each process has a GPU of its own: the one of its number, or the only one that it was given to see."""
        device = choose_device(self.execution.device)
        if device.type != "cuda" or self.team.size == 1:
            return device
        visible = torch.cuda.device_count()
        if self.team.local_rank >= visible > 1:
            raise InputError(f"process {self.team.local_rank} of this machine has no GPU: torch sees {visible}; ask for as many processes")
        return torch.device("cuda", self.team.local_rank if visible > 1 else 0)

    def arithmetic(self, precision: Precision) -> Arithmetic:
        return choose_arithmetic(self.device, precision)

    def row_parts(self, lengths: Sequence[int]) -> list[slice]:
        """The rows of a step, of so many samples each, in the parts that are computed one after the other or by several processes."""
        budget = round(AUTO_PART_SECONDS[self.device.type] * SAMPLE_RATE)
        return length_parts(lengths, size=self.execution.micro_batch, budget=budget, relief=self.relief)

    def progress(self) -> Progress:
        return Progress(self.report)

    def checkpoints(self) -> Checkpoints:
        """The checkpoints of this stage, told from those of any other by settings, fold, seed and corpus.

        Not by `relief`: what ran out of memory goes on from its checkpoint in smaller parts.
        """
        identity = [self.stage, dict(self.settings), self.fold, self.seed, self.corpus_digest]
        return Checkpoints(self.checkpoint, identity_of(identity))

    def seed_initialisation(self) -> None:
        """Make torch draw the same new weights whenever the stage starts."""
        torch.manual_seed(torch_seed(self.seed, "initial weights"))

    def backbone(self) -> BackboneSettings | Path:
        """Where the wav2vec 2.0 weights come from: the stage upstream in the role `backbone`, else the recipe's.

        Raises InputError where a checkpoint is no longer the one this stage was planned with.
        """
        if "backbone" in self.upstream:
            return self.upstream["backbone"] / ENCODER
        settings = parse_settings(BackboneSettings, self.runtime["backbone"])
        if backbone_identity(settings) != self.settings["backbone"]:
            raise InputError(f"backbone {settings.checkpoint}: not the weights this stage was planned with; launch again")
        return settings

    def wav2vec(self) -> Wav2vecSettings:
        """The wav2vec v1 of the recipe; InputError as for `backbone`."""
        settings = parse_settings(Wav2vecSettings, self.runtime["wav2vec"])
        if wav2vec_identity(settings) != self.settings["wav2vec"]:
            raise InputError(f"wav2vec {settings.checkpoint}: not the weights this stage was planned with; launch again")
        return settings


def parse_settings(schema: type[SettingsT], values: Mapping[str, Any]) -> SettingsT:
    """Plain JSON values (enums by name) as a settings dataclass; a missing key has its default, an unknown one is an InputError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(dict(values))))
    except OmegaConfBaseException as error:
        raise InputError(f"{schema.__name__}.{error.full_key}: {str(error).splitlines()[0]}") from error
    if not isinstance(merged, schema):
        raise InputError(f"{schema.__name__}: not settings of this kind: {values!r}")
    return merged


def stage_result(trained: TrainingResult, metrics: Mapping[str, float], **more: Any) -> dict[str, Any]:
    """What a gradient stage returns: `metrics` are the same for the same seed, `durations` (seconds) are not."""
    return {
        "metrics": {"training_loss": trained.loss, "training_accuracy": trained.accuracy, "steps": trained.steps, **metrics},
        "durations": {
            "training": trained.seconds,
            "step": trained.seconds_per_step,
            "data_wait": trained.waited_seconds,
            "resumed_at_step": trained.resumed_at,
        },
        **more,
    }


def seed_global_generators(seed: int) -> None:
    """Seed the global generators that nothing of ours draws from, in case a library does."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
