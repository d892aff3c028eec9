"""The inputs of a stage: resolved settings, the training split of its fold, upstream artifacts, folders. No stage gets the whole corpus."""

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
from ser_core.errors import InputError, first_line
from ser_core.keyed import completed
from ser_core.models.fairseq_checkpoint import wav2vec_identity
from ser_core.models.identity import backbone_identity
from ser_core.models.model_types import MODEL_TYPES, WAV2VEC2
from ser_core.parallel.group import Group
from ser_core.parallel.team import Alone, Team
from ser_core.settings.backbone import BackboneSettings, FeatureSettings, Wav2vecSettings
from ser_core.settings.execution import ExecutionSettings, Precision
from ser_core.training.batches import length_parts
from ser_core.training.checkpoints import Checkpoints, identity_of
from ser_core.training.curves import References
from ser_core.training.device import AUTO_PART_SECONDS, Arithmetic, choose_arithmetic, choose_device
from ser_core.training.loop import Objective, TrainingPlan, TrainingResult, train
from ser_core.training.progress import Progress
from ser_core.training.randomness import torch_seed
from ser_core.training.schedule import Schedule
from ser_core.training.splits import Split

SettingsT = TypeVar("SettingsT")
ENCODER = "encoder"  # folder with the encoder in a pretraining stage's output


@dataclass(frozen=True)
class StageContext:
    """One stage on one fold with one seed. `training` is the only part of the corpus that it can read."""

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
    relief: int  # how often the stage ran out of memory; each time halves the utterances per forward pass, in training and test
    should_stop: Callable[[], bool]
    report: Callable[[str], None]
    attempt: int = 0  # number of this execution of the stage
    superseded: Callable[[], bool] = lambda: False  # whether a later execution has begun, which owns the checkpoints
    team: Team = field(default_factory=Alone)
    group: Group = field(default_factory=Group)  # process group of the team
    shared: Path | None = None  # cache folder shared by stages; None: no cache

    @functools.cached_property
    def execution(self) -> ExecutionSettings:
        return parse_settings(ExecutionSettings, self.runtime.get("execution", {}))

    @functools.cached_property
    def features(self) -> FeatureSettings:
        return parse_settings(FeatureSettings, self.settings.get("features", {}))

    @functools.cached_property
    def device(self) -> torch.device:
        """The device. In a team each process has its own GPU: that of its local rank, or the only one visible to it."""
        device = choose_device(self.execution.device)
        if device.type != "cuda" or self.team.size == 1:
            return device
        visible = torch.cuda.device_count()
        if self.team.local_rank >= visible > 1:
            raise InputError(f"process {self.team.local_rank} of this node has no GPU: torch sees {visible}; request one process per GPU")
        return torch.device("cuda", self.team.local_rank if visible > 1 else 0)

    def arithmetic(self, precision: Precision) -> Arithmetic:
        return choose_arithmetic(self.device, precision)

    def row_parts(self, lengths: Sequence[int], model_type: str = WAV2VEC2) -> list[slice]:
        """Divide the rows of a step, of `lengths` samples each, into micro-batches, computed in turn or by several processes."""
        budget = round(AUTO_PART_SECONDS[self.device.type] * MODEL_TYPES[model_type].part_share * SAMPLE_RATE)
        return length_parts(lengths, size=self.execution.micro_batch, budget=budget, relief=self.relief)

    def progress(self) -> Progress:
        return Progress(self.report)

    def checkpoints(self) -> Checkpoints:
        """The checkpoints of this stage, identified by stage, settings, fold, seed and corpus.

        Not by `relief`: a stage that ran out of memory resumes from its checkpoint with smaller micro-batches.
        """
        identity = [self.stage, dict(self.settings), self.fold, self.seed, self.corpus_digest]
        return Checkpoints(self.checkpoint, identity_of(identity), self.attempt, self.superseded)

    def train(
        self,
        objective: Objective,
        *,
        steps: int,
        learning_rate: float,
        schedule: Schedule,
        precision: Precision,
        steps_per_epoch: int = 0,
        clip_norm: float = 0.0,
        save_last: bool = False,
        references: References | None = None,
    ) -> TrainingResult:
        """Run the training loop with this stage's seed, device, checkpoints and process group; see `training.loop.train`."""
        plan = TrainingPlan(
            name=self.stage,
            steps=steps,
            learning_rate=learning_rate,
            schedule=schedule,
            seed=self.seed,
            arithmetic=self.arithmetic(precision),
            checkpoint_seconds=self.execution.checkpoint_minutes * 60,
            log_every=self.execution.log_every,
            steps_per_epoch=steps_per_epoch,
            clip_norm=clip_norm,
            save_last=save_last,
            references=references or {},
        )
        return train(objective, plan, self.checkpoints(), self.output, self.should_stop, self.report, self.group)

    def seed_initialisation(self) -> None:
        """Seed torch's default generator, so that new weights are the same whenever the stage starts."""
        torch.manual_seed(torch_seed(self.seed, "initial weights"))

    def backbone(self) -> BackboneSettings | Path:
        """Source of the wav2vec 2.0 weights: the upstream stage in the role `backbone` if there is one, else the recipe's.

        Raises InputError if the checkpoint has changed since the stage was planned.
        """
        return planned_backbone(self.settings, self.runtime, self.upstream)

    def wav2vec(self) -> Wav2vecSettings:
        """The recipe's wav2vec v1. Raises InputError as `backbone` does."""
        settings = parse_settings(Wav2vecSettings, self.runtime["wav2vec"])
        if wav2vec_identity(settings) != self.settings["wav2vec"]:
            raise InputError(f"wav2vec {settings.checkpoint}: not the weights this stage was planned with; launch again")
        return settings


def planned_backbone(settings: Mapping[str, Any], runtime: Mapping[str, Any], upstream: Mapping[str, Path]) -> BackboneSettings | Path:
    """As `StageContext.backbone`, for a stage with these settings, runtime and folders of upstream artifacts."""
    if "backbone" in upstream:
        return upstream["backbone"] / ENCODER
    found = parse_settings(BackboneSettings, runtime["backbone"])
    if backbone_identity(found) != settings["backbone"]:
        raise InputError(f"backbone {found.checkpoint}: not the weights this stage was planned with; launch again")
    return found


def parse_settings(schema: type[SettingsT], values: Mapping[str, Any]) -> SettingsT:
    """Convert JSON values (enums by name), such as the result of `keyed`, to a settings dataclass. Raises InputError for an unknown key."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(completed(schema, values))))
    except OmegaConfBaseException as error:
        raise InputError(f"{schema.__name__}.{error.full_key}: {first_line(error)}") from error
    if not isinstance(merged, schema):
        raise InputError(f"{schema.__name__}: not settings of this kind: {values!r}")
    return merged


def stage_result(trained: TrainingResult, metrics: Mapping[str, float], **more: Any) -> dict[str, Any]:
    """Return the result of a stage trained by gradient descent: `metrics` are reproducible for a seed, `durations` (seconds) are not.

    `warnings` is there if the training ended with one.
    """
    return {
        "metrics": {"training_loss": trained.loss, "training_accuracy": trained.accuracy, "steps": trained.steps, **metrics},
        "durations": {
            "training": trained.seconds,
            "step": trained.seconds_per_step,
            "data_wait": trained.waited_seconds,
            "resumed_at_step": trained.resumed_at,
        },
        **({"warnings": [trained.warning]} if trained.warning else {}),
        **more,
    }


def seed_global_generators(seed: int) -> None:
    """Seed the global generators of Python and numpy. This package does not use them, but a library might."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
