"""A corpus of noise and a recipe of a few steps: every stage in a second."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ser_core.corpora.manifest import Manifest, Utterance, write_manifest
from ser_core.registry import REGISTRY, StageCall
from ser_core.settings.backbone import BackboneSettings, SpecAugmentSettings, Wav2vecSettings
from ser_core.settings.execution import ExecutionSettings, Precision
from ser_core.settings.finetune import FinetuneSettings
from ser_core.settings.pretraining import ClusterSettings, PtaptSettings, StatesSettings, TaptSettings
from ser_core.settings.recipe import Recipe
from tests.ser_core.text_cases import by_mood, text_recipe, tokenizer_folder

SHORTEST = 945  # samples: one frame of every network, and what `prepare` lets through
FOLDS = ("1", "2")
CLASSES = ("angry", "sad")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """16 utterances of 2 speakers, each its own fold; the second of each is one frame long, far below a mask span."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "audio").mkdir()
    rng = np.random.default_rng(0)
    utterances = []
    for number in range(16):
        fold = FOLDS[number % 2]
        label = CLASSES[number // 2 % 2]
        samples = SHORTEST if number // 2 == 1 else int(rng.integers(6_000, 14_000))
        pitch = {"angry": 300, "sad": 120}[label]
        wave = 0.1 * np.sin(2 * np.pi * pitch * np.arange(samples) / 16_000) + 0.02 * rng.standard_normal(samples)
        path = f"audio/utterance{number:02d}.flac"
        soundfile.write(folder / path, wave, 16_000, subtype="PCM_16")
        utterances.append(Utterance(f"utterance{number:02d}", path, samples, label, f"speaker{fold}", fold))
    return write_manifest(folder, "noise", FOLDS, utterances)


@pytest.fixture
def recipe() -> Recipe:
    """Two layers of 16 channels, a handful of steps, in the same precision on every machine."""
    full = Precision.float32
    spec_augment = SpecAugmentSettings(time_length=15, feature_length=4)
    backbone = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "conv_dim": [16, 16],
        "conv_kernel": [40, 16],
        "conv_stride": [20, 16],
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "num_codevectors_per_group": 8,
        "codevector_dim": 8,
        "proj_codevector_dim": 8,
        "mask_time_length": 5,
        "mask_time_prob": 0.4,
    }
    wav2vec = {"conv_feature_layers": [[16, 40, 20], [16, 8, 8]], "conv_aggregator_layers": [[16, 2, 1]]}
    return Recipe(
        backbone=BackboneSettings(checkpoint=None, config=backbone),
        finetune=FinetuneSettings(epochs=3, batch_size=4, learning_rate=1e-3, max_seconds=0.6, spec_augment=spec_augment, precision=full),
        tapt=TaptSettings(steps=5, learning_rate=1e-3, warmup_steps=1, batch_seconds=2.0, max_seconds=0.5, negatives=5, precision=full),
        states=StatesSettings(
            wav2vec=Wav2vecSettings(config=wav2vec),
            steps=5,
            batch_size=3,
            rnn_units=4,
            head_units=4,
            spec_augment=spec_augment,
            precision=full,
        ),
        cluster=ClusterSettings(counts=[2, 5]),
        ptapt=PtaptSettings(steps=5, learning_rate=1e-3, warmup_steps=1, batch_seconds=2.0, max_seconds=0.5, head_units=8, precision=full),
        execution=ExecutionSettings(device="cpu", log_every=2),
    )


@dataclass
class Bench:
    """Runs stages as a worker does, each in a folder of its own."""

    corpus: Path
    root: Path
    runs: int = 0
    lines: list[str] = field(default_factory=list)
    shared: Path | None = None

    def run(
        self,
        call: StageCall,
        *,
        upstream: Mapping[str, Path] | None = None,
        checkpoint: Path | None = None,
        relief: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
        **runtime: Any,
    ) -> tuple[dict[str, Any], Path]:
        """The result and the output folder; upstream stages that are not given run first."""
        known = dict(upstream) if upstream is not None else {role: self.run(parent)[1] for role, parent in call.upstream.items()}
        self.runs += 1
        output = self.root / f"{self.runs:03d}-{call.stage}"
        outcome = REGISTRY.run(
            call.stage,
            settings=json.loads(json.dumps(call.settings)),  # as it comes back from a file
            runtime=json.loads(json.dumps({**call.runtime, "threads": 1, **runtime})),
            corpus=self.corpus,
            fold=call.fold,
            seed=call.seed,
            upstream=known,
            output=output,
            checkpoint=checkpoint or self.root / f"{self.runs:03d}-checkpoint",
            relief=relief,
            should_stop=should_stop,
            report=self.lines.append,
            shared=self.shared,
        )
        return json.loads(json.dumps(outcome)), output


@pytest.fixture
def bench(corpus: Manifest, tmp_path: Path) -> Bench:
    return Bench(corpus.folder, tmp_path)


@pytest.fixture
def spoken(corpus: Manifest, tmp_path: Path) -> Manifest:
    """The corpus of tones with transcripts that tell the class."""
    folder = tmp_path / "spoken"
    shutil.copytree(corpus.folder, folder)
    rng = np.random.default_rng(1)
    utterances = [replace(each, text=by_mood(each.label, "", rng)) for each in corpus.utterances]
    return write_manifest(folder, "spoken", FOLDS, utterances)


@pytest.fixture
def fused(recipe: Recipe, spoken: Manifest, tmp_path: Path) -> Recipe:
    """A recipe of both runs of a fusion on these transcripts."""
    recipe.text = text_recipe(tokenizer_folder(tmp_path / "tokenizer"), epochs=12, batch_size=4).text
    REGISTRY.pin_corpus("score", recipe, spoken.folder)
    return recipe


def artifacts(folder: Path) -> dict[str, bytes]:
    """Relative name -> content of all artifacts but the event files, which hold times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "tensorboard" not in path.parts
    }


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) of every training curve in an output folder."""
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


def stage_calls(recipe: Recipe, fold: str = "1", seed: int = 0) -> dict[str, StageCall]:
    """A call of every stage."""
    finetune = REGISTRY.call("ptapt", recipe, fold=fold, seed=seed)
    ptapt = finetune.upstream["backbone"]
    cluster = next(iter(ptapt.upstream.values()))
    return {
        "states": cluster.upstream["states"],
        "cluster": cluster,
        "ptapt": ptapt,
        "tapt": REGISTRY.call("tapt", recipe, fold=fold, seed=seed).upstream["backbone"],
        "finetune": REGISTRY.call("vft", recipe, fold=fold, seed=seed),
    }


STAGES = ("states", "cluster", "tapt", "ptapt", "finetune")
