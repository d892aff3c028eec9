"""The recipe: the settings of all stages, and what each method reads, trains and measures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, ClassVar

from ser_core.metric_columns import ATTRIBUTE_METRICS, FUSION_METRICS, KIND_METRICS, STAGE_METRICS, TARGET_METRICS, Adaptation, MetricColumn
from ser_core.settings.backbone import BackboneSettings, FeatureSettings
from ser_core.settings.execution import ExecutionSettings
from ser_core.settings.finetune import FinetuneSettings
from ser_core.settings.pretraining import ClusterSettings, PretrainingLossSettings, PtaptSettings, StatesSettings, TaptSettings
from ser_core.settings.text import FusionSettings, TextSettings
from ser_core.settings.two_stage import TwoStageSettings
from ser_core.sweep import P_TAPT, SweptMethod


class Protocol(Enum):
    """Which utterances a fold of a corpus of acted dialogs is trained and tested on (ser_core/corpora/scripts.py)."""

    sessions = "sessions"  # all of the other folds, all of the held-out fold
    scripts_disjoint = "scripts_disjoint"  # no script is on both sides; the scripts that folds are tested on are divided among them


@dataclass
class Recipe:
    """The settings of the stages of all methods."""

    swept: ClassVar[SweptMethod] = P_TAPT  # the method whose settings `sweep` searches

    # No departures from a preset; tables state revision and digest of the weights that were used.
    not_of_preset: ClassVar[tuple[str, ...]] = (
        *("preset", "execution", "finetune.keep", "backbone.revision", "backbone.commits", "states.wav2vec.checkpoint"),
        *("text.encoder", "text.transcripts"),
        *("two_stage.folder", "two_stage.digest", "two_stage.left_out"),
    )

    # only methods with the same values are compared by tests
    compared_within: ClassVar[tuple[str, ...]] = ("training_fraction", "protocol", "two_stage.target", "two_stage.target_labels")

    preset: str = "paper"  # configs/recipe/NAME.yaml, which the other settings override; not part of a stage's key
    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    features: FeatureSettings = field(default_factory=FeatureSettings)
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    tapt: TaptSettings = field(default_factory=TaptSettings)
    states: StatesSettings = field(default_factory=StatesSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    ptapt: PtaptSettings = field(default_factory=PtaptSettings)
    pretraining_loss: PretrainingLossSettings = field(default_factory=PretrainingLossSettings)
    two_stage: TwoStageSettings = field(default_factory=TwoStageSettings)
    text: TextSettings = field(default_factory=TextSettings)
    fusion: FusionSettings = field(default_factory=FusionSettings)
    execution: ExecutionSettings = field(default_factory=ExecutionSettings)
    protocol: Protocol = Protocol.sessions  # which utterances of a fold are trained and tested on
    training_fraction: float = 1.0  # of the training utterances that every stage trains on (ser_core.corpora.subsets)
    upstream_seed: int = 0  # of states, cluster, tapt and ptapt, computed once per fold for all seeds, and of pretraining_loss

    def trained(self, method: str) -> tuple[str, ...]:
        """What a method of the registry trains, for the captions of tables: the model and the length of each training."""
        from ser_core.models.model_types import label_of

        if method in ("score", "concat"):
            parts = (*self.trained(self.fusion.audio.name), *self.trained("text"))
            if method == "score":
                return (*parts, f"fused by the mean of log-probabilities, weight of text {self.fusion.text_weight:g}")
            return (*parts, f"fused by a linear layer on both pooled vectors, trained for {_times(self.fusion.layer.epochs, 'epoch')}")
        if method == "cross":
            frozen = (*self.trained(self.fusion.audio.name)[:-1], self.trained("text")[0])  # without their fine-tuning
            return (*frozen, f"both frozen, cross-attention on them trained for {_times(self.fusion.cross.epochs, 'epoch')}")
        if method == "text":
            read = f"{self.text.encoder_name()} on reference transcripts"
            return (read, f"fine-tuning of {_times(self.text.epochs, 'epoch')}, protocol {self.protocol.name}")
        model = self.backbone.checkpoint or f"{label_of(self.backbone)} with random weights (init_seed {self.backbone.init_seed})"
        found = [f"backbone {PurePath(model).name if model.startswith('/') else model}"]
        if method == "pretraining_loss":
            return ()
        if method == "tapt":
            found.append(f"TAPT of {_times(self.tapt.steps, 'step')}")
        if method == "ptapt":
            found.append(f"P-TAPT of {_times(self.ptapt.steps, 'step')} on k = {', '.join(map(str, self.cluster.counts))}")
        found += self.two_stage.sentences()
        kinds = " + ".join(kind.name for kind in self.finetune.adaptors.kinds)
        what = f" ({kinds} only)" if kinds else ""
        return (*found, f"fine-tuning{what} of {_times(self.finetune.epochs, 'epoch')}{self._targets()}")

    def reads(self, method: str) -> tuple[str, ...]:
        """The keys of the recipe that the stages of a method may read: all but those that only other methods read."""
        audio = ("backbone", "features", "finetune", "two_stage", *(("upstream_seed",) if self.two_stage.source else ()))
        own = {
            "vft": audio,
            "tapt": (*audio, "tapt", "upstream_seed"),
            "ptapt": (*audio, "states", "cluster", "ptapt", "upstream_seed"),
            "text": ("text",),
            "pretraining_loss": ("backbone", "pretraining_loss", "upstream_seed"),
        }
        own["score"] = own["concat"] = (*own[self.fusion.audio.name], "text", "fusion")
        pretraining = [key for key in own[self.fusion.audio.name] if key not in audio]
        own["cross"] = ("backbone", *(("features", "upstream_seed", *pretraining) if pretraining else ()), "text", "fusion")
        some = {key for keys in own.values() for key in keys}
        return tuple(each.name for each in fields(self) if each.name not in some or each.name in own.get(method, some))

    def further_metrics(self, method: str) -> tuple[MetricColumn, ...]:
        """The metrics of a method's results that tables show beside the accuracies, where a run has any of them."""
        audio = method not in ("text", "score", "concat", "cross")
        attributes = ATTRIBUTE_METRICS if audio and self.finetune.attributes.weight else ()
        tested_source = not self.two_stage.corpus or bool(self.two_stage.left_out)
        stages = () if not (audio and self.two_stage.first) else STAGE_METRICS if tested_source else TARGET_METRICS
        fused = FUSION_METRICS if method in ("score", "concat") else ()
        return (*attributes, *stages, *fused, *KIND_METRICS)

    def adaptation(self, method: str) -> Adaptation | None:
        """What the first of two stages is trained on, and the metric of results with the UA before the second; None for one stage."""
        if (method != "vft" and self.two_stage.corpus) or method in ("text", "score") or not self.two_stage.first:
            return None
        return Adaptation(self.two_stage.first)

    def _targets(self) -> str:
        """What fine-tuning is trained to predict, if not the classes alone."""
        weight = self.finetune.attributes.weight
        if not weight:
            return ""
        return " on attributes (1 - CCC)" if weight == 1 else f" on classes and attributes (1 - CCC, weight {weight:g})"


def commits_of(recipes: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the commits of hub models in stored recipes (JSON values); a recipe of an earlier version has none."""
    found: dict[str, str] = {}
    for recipe in recipes:
        backbone = recipe.get("backbone")
        commits = backbone.get("commits") if isinstance(backbone, Mapping) else None
        found |= {str(name): str(commit) for name, commit in commits.items()} if isinstance(commits, Mapping) else {}
    return found


def resolve_checkpoints(recipe: Recipe, folders: Iterable[Path]) -> None:
    """Replace checkpoint names that are a file or folder below one of `folders` by absolute paths: jobs run in other folders."""
    named: tuple[tuple[Any, str], ...] = (
        *((settings, "checkpoint") for settings in (recipe.backbone, recipe.states.wav2vec, recipe.text.encoder)),
        (recipe.text.encoder, "tokenizer"),
    )
    for settings, key in named:
        for folder in folders:
            name = getattr(settings, key)
            if name and (folder / name).exists():
                setattr(settings, key, str((folder / name).absolute()))


def _times(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
