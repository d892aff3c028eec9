"""Random draws under the preset `published` have the authors' distribution: masks, pretraining batches, validation crops of `states`.

The authors' functions were run on the lengths of tests/ser_core/corpus_lengths.py; tests/ser_core/golden/README.md tells how. Both sides
are random, so means are compared within four standard errors of their difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from torch import Tensor

from ser_core.corpora.manifest import SAMPLE_RATE, Manifest, Utterance
from ser_core.models.backbone import build_backbone, frame_count
from ser_core.models.classifier import EmotionClassifier
from ser_core.models.fairseq_checkpoint import build_wav2vec
from ser_core.models.ptapt import PseudoLabelModel
from ser_core.models.shapes import extractor_frames, parse_config
from ser_core.models.states import EmotionStates
from ser_core.settings.backbone import BackboneSettings, Wav2vecSettings
from ser_core.settings.recipe import Recipe
from ser_core.stages.context import StageContext
from ser_core.stages.finetune import Finetuning
from ser_core.stages.ptapt import PseudoLabelling
from ser_core.stages.states import StateTraining
from ser_core.stages.tapt import Pretraining
from ser_core.training.loop import Objective
from ser_core.training.splits import Split
from tests.ser_core.corpus_lengths import NAMES, corpus_lengths

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "ser_core" / "golden"
SIGMAS = 4.0
EPOCHS = {"iemocap": 5, "savee": 50}  # of ours that are compared with those in the golden values

# The frames of wav2vec2-base and of wav2vec_large, computed by few channels: the masks depend on the frames alone.
BACKBONE: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
EXTRACTOR = ((10, 5), (8, 4), (4, 2), (4, 2), (4, 2), (1, 1), (1, 1), (1, 1))  # kernel, stride
WAV2VEC: dict[str, Any] = {"conv_feature_layers": [[72, *each] for each in EXTRACTOR], "conv_aggregator_layers": [[8, 2, 1]]}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors here are small: several threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def golden(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def recipe(corpus: str, preset: str = "published") -> Recipe:
    """The preset, with the batch size of the corpus' experiment."""
    loaded = [
        OmegaConf.load(ROOT / "configs" / "recipe" / f"{preset}.yaml"),
        {"finetune": {"batch_size": 64 if corpus == "iemocap" else 32}},
    ]
    found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), *loaded))
    assert isinstance(found, Recipe)
    return found


def context(corpus: str, used: Recipe, seed: int = 0) -> StageContext:
    utterances = [
        Utterance(f"{number:04d}", f"{number:04d}.wav", samples, "ab"[number % 2], "one", "1")
        for number, samples in enumerate(corpus_lengths(corpus))
    ]
    manifest = Manifest(corpus, "", ("a", "b"), ("1", "2"), tuple(utterances), ROOT)
    return StageContext(
        stage="",
        settings={"features": {"padding": used.features.padding.name}},
        runtime={"execution": {"device": "cpu"}},
        training=Split(manifest, utterances),
        corpus_digest="",
        fold="2",
        seed=seed,
        upstream={},
        output=ROOT,
        checkpoint=ROOT,
        relief=0,
        should_stop=lambda: False,
        report=lambda line: None,
    )


def objective(stage: str, corpus: str, preset: str = "published") -> Objective:
    used = recipe(corpus, preset)
    given = context(corpus, used)
    if stage == "states":
        return StateTraining(given, used.states, EmotionStates(build_wav2vec(Wav2vecSettings(config=WAV2VEC)), 2, 4, 4))
    backbone: Any = build_backbone(BackboneSettings(checkpoint=None, config=BACKBONE))
    if stage == "tapt":
        return Pretraining(given, used.tapt, backbone)
    if stage == "finetune":
        return Finetuning(given, used.finetune, EmotionClassifier(backbone.wav2vec2, 2, used.finetune.head.pooling))
    labels = [np.zeros((1, frame_count(backbone.config, samples)), dtype=np.int64) for samples in given.training.samples]
    return PseudoLabelling(given, used.ptapt, PseudoLabelModel(backbone.wav2vec2, [2], 4), labels)


def planned(stage: str, corpus: str, batches: int, preset: str = "published") -> Iterator[list[tuple[int, int]]]:
    """For each epoch of so many batches, (valid frames, masked frames) of every utterance, as the stage plans them."""
    found = objective(stage, corpus, preset)
    samples = corpus_lengths(corpus)
    config = build_backbone(BackboneSettings(checkpoint=None, config=BACKBONE)).config
    step = 0
    for _ in range(EPOCHS[corpus]):
        rows: list[tuple[int, int]] = []
        for _ in range(batches):
            for part in found.plan(step).parts:
                mask: Any = part.draw.mask if stage == "tapt" else part.mask if stage == "ptapt" else part.time_mask
                masked = np.asarray(mask).sum(1).tolist()
                if stage == "states":
                    frames = [extractor_frames(parse_config(WAV2VEC), part.samples)] * len(masked)
                else:
                    frames = [frame_count(config, min(samples[each], 10 * SAMPLE_RATE)) for each in part.positions]
                rows += zip(frames, masked, strict=True)
            step += 1
        yield rows


def shares(rows: NDArray[np.int64], low: int, high: int) -> tuple[float, float]:
    """Masked share of the valid frames, and share of utterances without a masked frame, in percent, of rows of `low` to `high` frames."""
    frames, masked = rows[(rows[:, 0] >= low) & (rows[:, 0] < high)].T
    return 100 * masked.sum() / frames.sum(), 100 * float((masked == 0).mean())


def distances(expected: Any, epochs: list[NDArray[np.int64]]) -> dict[str, float]:
    """Differences to the golden values in standard errors of the difference, for all utterances and for each bin of lengths.

    A standard error of less than 0.02 points counts as 0.02: a share that is 0 in every golden epoch has a spread of 0.
    """
    found = {}
    for each in (expected["all"], *expected["bins"]):
        low, high = each.get("frames", (0, 10**9))
        ours = np.array([shares(rows, low, high) for rows in epochs])
        for column, name in enumerate(("share", "unmasked")):
            sd = each["sd" if name == "share" else "unmasked_sd"]
            error = max(0.02, sd * sqrt(1 / expected["epochs"] + 1 / len(ours)))
            found[f"{name} of {low} to {high} frames"] = abs(ours[:, column].mean() - each[name]) / error
    return found


def batches_of(stage: str, corpus: str) -> int:
    """Batches of an epoch; of pretraining those of the authors' code."""
    utterances = len(corpus_lengths(corpus))
    if stage == "finetune":
        return utterances // recipe(corpus).finetune.batch_size
    if stage == "states":
        return int(utterances * 0.9) // recipe(corpus).states.batch_size
    return round(float(golden("batches")[corpus]["batches"]["mean"]))


@pytest.mark.parametrize("corpus", NAMES)
@pytest.mark.parametrize("stage", ["finetune", "tapt", "ptapt", "states"])
def test_masked_share_by_length(stage: str, corpus: str) -> None:
    """The share of masked frames, and of utterances without any, is that of the authors' masks for short and long utterances alike."""
    epochs = [np.array(rows) for rows in planned(stage, corpus, batches_of(stage, corpus))]
    found = distances(golden("masks")[corpus][stage], epochs)
    assert {name: round(distance, 1) for name, distance in found.items() if distance > SIGMAS} == {}


@pytest.mark.parametrize("stage", ["finetune", "tapt", "ptapt"])
def test_the_comparison_of_masks_detects_the_other_preset(stage: str) -> None:
    """Masks of `paper`, which differ by less than a point for most lengths in fine-tuning, are told from the authors'."""
    epochs = [np.array(rows) for rows in planned(stage, "iemocap", batches_of(stage, "iemocap"), "paper")]
    assert max(distances(golden("masks")["iemocap"][stage], epochs).values()) > 2 * SIGMAS


@pytest.mark.parametrize("corpus", NAMES)
@pytest.mark.parametrize("stage", ["tapt", "ptapt"])
def test_pretraining_batches(stage: str, corpus: str) -> None:
    """Batches of an epoch, their audio, their padding, and what is dropped, are those of the authors' sampler."""
    expected = golden("batches")[corpus]
    planner = objective(stage, corpus)
    count = round(expected["batches"]["mean"])
    lengths = np.minimum(corpus_lengths(corpus), 10 * SAMPLE_RATE) / SAMPLE_RATE
    found: dict[str, list[float]] = {name: [] for name in ("seconds", "padding", "dropped", "dropped_seconds", "shortest_dropped_seconds")}
    for epoch in range(EPOCHS[corpus]):
        steps = [
            [each for part in planner.plan(step).parts for each in part.positions] for step in range(epoch * count, (epoch + 1) * count)
        ]
        used = [each for step in steps for each in step]
        assert len(set(used)) == len(used)  # the epochs of both have equally many batches
        sums = [lengths[step].sum() for step in steps]
        padded = [lengths[step].max() * len(step) for step in steps]
        assert expected["shortest_seconds"] <= min(sums) + 0.5
        assert max(sums) <= expected["longest_seconds"] + 0.5
        assert expected["utterances"][0] - 3 <= min(map(len, steps)) <= max(map(len, steps)) <= expected["utterances"][1] + 3
        dropped = np.delete(lengths, used)
        for name, value in (
            ("seconds", float(np.mean(sums))),
            ("padding", sum(padded) / sum(sums) - 1),
            ("dropped", len(dropped)),
            ("dropped_seconds", dropped.sum()),
            ("shortest_dropped_seconds", dropped.min()),
        ):
            found[name].append(value)
    for name, values in found.items():
        theirs = expected[name]
        error = max(1e-4 * theirs["mean"], theirs["sd"] * sqrt(1 / expected["epochs"] + 1 / len(values)))
        assert abs(np.mean(values) - theirs["mean"]) <= SIGMAS * error, name


class Recorder(EmotionStates):
    """In place of wav2vec v1: records the first sample and the length of each crop instead of classifying it."""

    def __init__(self) -> None:
        super().__init__(build_wav2vec(Wav2vecSettings(config=WAV2VEC)), 2, 4, 4)
        self.crops: list[tuple[int, int]] = []

    def forward(self, waves: Tensor, time_mask: Tensor | None = None, feature_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.crops += [(int(first), waves.shape[1]) for first in waves[:, 0].tolist()]
        return torch.zeros(len(waves), 2), torch.zeros(len(waves), 1, 2)


@pytest.mark.parametrize(("corpus", "seeds"), [("iemocap", 10), ("savee", 30)])
def test_validation_crops_of_states(corpus: str, seeds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation in a random order that stays, in crops as long as the batch's shortest utterance, each time from new random places."""
    place = 10_000_000  # a sample's value is `place` times the utterance's position, plus the sample's index

    def wave(split: Split, position: int) -> Tensor:
        return torch.arange(split.samples[position], dtype=torch.float64) + place * position

    monkeypatch.setattr(Split, "wave", wave)
    expected = golden("crops")[corpus]
    used = recipe(corpus)
    model = Recorder()
    given = context(corpus, used)
    seconds, relative, orders = [], [], []
    for seed in range(seeds):
        training = StateTraining(replace(given, seed=seed), used.states, model)
        validations = []
        for step in (100, 200):
            model.crops = []
            training.validate(step)
            validations.append(model.crops)
        first, second = ([int(start) // place for start, _ in crops] for crops in validations)
        assert abs(len(first) - expected["validation_utterances"]) <= 1  # a tenth, rounded
        assert (first == second) is expected["same_order_every_time"]
        assert (validations[0] == validations[1]) is expected["same_crops_every_time"]
        orders.append(first)
        seconds.append(float(np.mean([samples for _, samples in validations[0]])) / SAMPLE_RATE)
        held = training._validation.samples
        spare = [(start % place, held[start // place] - samples) for start, samples in validations[0]]
        relative += [start / over for start, over in spare if over > 1000]
    theirs = expected["crop_seconds"]
    assert abs(np.mean(seconds) - theirs["mean"]) < SIGMAS * theirs["sd"] * sqrt(1 / expected["orders"] + 1 / seeds)
    theirs = expected["relative_start"]
    assert abs(np.mean(relative) - theirs["mean"]) < SIGMAS * theirs["sd"] * sqrt(1 / theirs["n"] + 1 / len(relative))
    # Standard error of a quartile of a uniform variable: at most 0.5 / sqrt(n).
    assert np.abs(np.quantile(relative, [0.25, 0.5, 0.75]) - [0.25, 0.5, 0.75]).max() < SIGMAS * 0.5 / sqrt(len(relative))
    assert orders[0] != orders[1]
