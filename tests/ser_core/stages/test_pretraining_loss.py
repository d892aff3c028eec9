"""The pretraining loss of a corpus: equal to a computation by hand, independent of other utterances and padding, a sum over frames."""

from __future__ import annotations

import csv
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch.nn import functional as F

from ser_core.corpora.manifest import Manifest, Utterance, write_manifest
from ser_core.errors import InputError, Interrupted
from ser_core.models.backbone import build_backbone
from ser_core.models.masking import time_mask
from ser_core.models.tapt import TaptDraw, draw_tapt, tapt_loss
from ser_core.registry import REGISTRY
from ser_core.settings.pretraining import NegativeFrames, PretrainingLossSettings
from ser_core.settings.recipe import Recipe
from ser_core.stages.pretraining_loss import EVALUATION, LOSS, TRAINING, metrics_of, utterance_loss
from ser_core.training.randomness import generator, torch_seed
from ser_core.training.splits import Split
from tests.ser_core.stages.conftest import Bench, artifacts


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The small networks are faster with one thread than with several that wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def call_of(recipe: Recipe, fold: str = "all", seed: int = 0) -> Any:
    return REGISTRY.calls("pretraining_loss", recipe)(fold, seed)


def rows(output: Path) -> dict[str, dict[str, str]]:
    with (output / "pretraining_loss.csv").open() as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def test_it_is_one_stage_of_the_checkpoint_alone(recipe: Recipe) -> None:
    """The same for every fold and seed; what the methods train is not part of it, and it is part of nothing else."""
    before = REGISTRY.call("vft", recipe, fold="1", seed=0)
    assert call_of(recipe, "1", 3) == call_of(recipe, "2", 4)
    recipe.pretraining_loss.draws = 5
    assert REGISTRY.call("vft", recipe, fold="1", seed=0) == before
    changed = call_of(recipe)
    recipe.finetune.epochs, recipe.tapt.negatives = 99, 7
    assert call_of(recipe) == changed
    assert set(changed.settings) == {"pretraining_loss", "backbone"}


@pytest.mark.parametrize("training", [False, True])
def test_one_utterance_equals_brute_force(training: bool, corpus: Manifest, recipe: Recipe) -> None:
    """Mask, negatives and cosines written out frame by frame, with the modules of transformers' model alone."""
    settings = PretrainingLossSettings(negatives=7, diversity_weight=0.5)
    model: Any = build_backbone(recipe.backbone)
    split = Split(corpus, corpus.utterances[:1])
    name = split.utterances[0].id
    values, masked = utterance_loss(model, split, 0, settings, 3, 2)

    frames = model._get_feat_extract_output_lengths(split.samples[0]).item()
    rng = generator(3, "mask", 2, name)
    mask = time_mask(
        np.array([frames]), frames, probability=model.config.mask_time_prob, span=model.config.mask_time_length, minimum=2, rng=rng
    )[0]
    own = np.flatnonzero(mask)
    chosen = rng.integers(0, frames - 1, size=(len(own), 7))
    chosen += chosen >= own[:, None]
    torch.manual_seed(torch_seed(3, "pretraining loss", 2, name))
    model.train(training)
    with torch.no_grad():
        encoder = model.wav2vec2
        hidden, normalised = encoder.feature_projection(encoder.feature_extractor(split.wave(0)[None]).transpose(1, 2))
        noise = torch.get_rng_state()
        hidden[0, torch.from_numpy(mask)] = encoder.masked_spec_embed
        quantizer = model.quantizer
        if not training:
            context = model.project_hid(encoder.encoder(hidden).last_hidden_state)[0]
            codes = quantizer.weight_proj(normalised[0]).view(frames, quantizer.num_groups, -1)
            best = codes.argmax(-1)
            books = quantizer.codevectors.view(quantizer.num_groups, quantizer.num_vars, -1)
            target = model.project_q(torch.cat([books[group][best[:, group]] for group in range(quantizer.num_groups)], dim=1))
            expected = 0.0
            for place, frame in enumerate(own):
                logits = [F.cosine_similarity(context[frame], target[frame], dim=0) / 0.1]
                for other in chosen[place]:
                    same = bool((best[other] == best[frame]).all())
                    logits.append(torch.tensor(-torch.inf) if same else F.cosine_similarity(context[frame], target[other], dim=0) / 0.1)
                expected -= float(torch.stack(logits).log_softmax(0)[0])
            shares = F.one_hot(best[own], quantizer.num_vars).float().mean(0)
            perplexity = float(torch.exp(-(shares * torch.log(shares + 1e-7)).sum(-1)).sum())
            diversity = 1 - perplexity / (quantizer.num_groups * quantizer.num_vars)
            assert values[EVALUATION] == pytest.approx([expected + 0.5 * diversity, expected], rel=1e-4)
        else:  # dropout and Gumbel noise are torch's: the loss of the model's own code with the same seed
            torch.set_rng_state(noise)
            torch.manual_seed(torch_seed(3, "pretraining loss", 2, name))
            found = tapt_loss(model, [split.wave(0)], TaptDraw(mask[None], chosen), diversity_weight=0.5)
            assert values[TRAINING] == pytest.approx([float(found.loss), float(found.contrastive)], rel=1e-6)
            assert abs(values[TRAINING][LOSS] / values[EVALUATION][LOSS] - 1) > 1e-3
    assert masked == len(own) >= 2


@pytest.mark.slow
def test_other_utterances_and_padding_change_nothing(corpus: Manifest, recipe: Recipe, bench: Bench, tmp_path: Path) -> None:
    """Half of the corpus gives the same losses; so does a padded batch of all, in evaluation mode."""
    _, output = bench.run(call_of(recipe))
    every = rows(output)
    assert list(every) == [utterance.id for utterance in corpus.utterances]
    folder = tmp_path / "half"
    shutil.copytree(corpus.folder, folder)
    write_manifest(folder, "half", corpus.folds, corpus.utterances[::2])
    _, output = Bench(folder, tmp_path / "bench").run(call_of(recipe))
    assert rows(output) == {name: row for place, (name, row) in enumerate(every.items()) if place % 2 == 0}

    model: Any = build_backbone(recipe.backbone)
    split = Split(corpus, corpus.utterances)
    frames = np.array([max(1, int(model._get_feat_extract_output_lengths(samples))) for samples in split.samples])
    contrastive = np.zeros(3)
    for draw in range(3):
        rngs = [generator(0, "mask", draw, utterance.id) for utterance in split.utterances]
        drawn = draw_tapt(model.config, frames, minimum=2, negatives=100, negative_frames=NegativeFrames.valid, rngs=rngs)
        with torch.no_grad():
            contrastive[draw] = float(tapt_loss(model, [split.wave(place) for place in range(len(split))], drawn).contrastive)
    found = sum(float(row["contrastive_evaluation"]) for row in every.values())
    assert found == pytest.approx(contrastive.mean(), rel=1e-4)


@pytest.mark.slow
def test_doubled_lengths_change_the_sum_and_not_the_loss_per_frame(recipe: Recipe, tmp_path: Path) -> None:
    """Noise of one and of two seconds: twice the masked frames, twice the loss, the same loss a frame."""
    recipe.pretraining_loss.negatives = 10
    found = {}
    for seconds in (1, 2):
        folder = tmp_path / str(seconds)
        (folder / "audio").mkdir(parents=True)
        rng, utterances = np.random.default_rng(0), []
        for number in range(8):
            wave, path = 0.1 * rng.standard_normal(seconds * 16_000), f"audio/{number}.flac"
            soundfile.write(folder / path, wave, 16_000, subtype="PCM_16")
            utterances.append(Utterance(str(number), path, len(wave), "unlabelled", "", "all"))
        write_manifest(folder, "noise", ("all",), utterances)
        found[seconds] = Bench(folder, tmp_path / f"bench{seconds}").run(call_of(recipe))[0]["metrics"]
    ratios = {name: found[2][name] / found[1][name] for name in ("loss", "masked_frames", "loss_per_frame", "loss_per_frame_evaluation")}
    assert ratios["masked_frames"] == pytest.approx(2, abs=0.15)
    assert ratios["loss"] == pytest.approx(2, abs=0.25)
    assert ratios["loss_per_frame"] == pytest.approx(1, abs=0.05)
    assert ratios["loss_per_frame_evaluation"] == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_a_stopped_stage_resumes_with_the_same_numbers(recipe: Recipe, bench: Bench, tmp_path: Path) -> None:
    """A checkpoint in the second draw; the rest gives what an uninterrupted stage does, and nothing is drawn again."""
    recipe.pretraining_loss.draws = 2
    whole, output = bench.run(call_of(recipe))
    asked = iter(range(1000))
    with pytest.raises(Interrupted, match="stopped after 20 of 32"):
        bench.run(call_of(recipe), checkpoint=tmp_path / "saved", should_stop=lambda: next(asked) >= 20)
    resumed, other = bench.run(call_of(recipe), checkpoint=tmp_path / "saved")
    assert resumed["durations"]["resumed_at_step"] == 20
    assert (resumed["metrics"], artifacts(other)) == (whole["metrics"], artifacts(output))
    assert whole["arithmetic"] == {"device": "cpu", "precision": "float32"}


def test_metrics() -> None:
    """Two draws of two utterances, with 10 and 30 masked frames: means over utterances, and one ratio for the frames of all."""
    losses = np.zeros((2, 2, 2, 2))
    losses[0, :, TRAINING] = [[20.0, 19.0], [63.0, 61.0]]
    losses[1, :, TRAINING] = [[22.0, 21.0], [65.0, 59.0]]
    losses[:, :, EVALUATION] = [[10.0, 8.0], [30.0, 32.0]]
    found = metrics_of(losses, np.array([[10, 30], [10, 30]]), [16_000, 48_000])
    assert found == {
        "loss": 42.5,
        "loss_draws_sd": pytest.approx(2**0.5),
        "loss_standard_error": pytest.approx(21.5),
        "loss_per_frame": 2.0,
        "loss_evaluation": 20.0,
        "loss_per_frame_evaluation": 1.0,
        "masked_frames": 20.0,
        "seconds": 2.0,
        "utterances": 2,
        "draws": 2,
    }


def test_settings_out_of_range_are_refused(recipe: Recipe) -> None:
    for key in ("draws", "negatives", "mask_minimum", "temperature"):
        changed: dict[str, Any] = {key: 0}
        wrong = dataclasses.replace(recipe, pretraining_loss=dataclasses.replace(recipe.pretraining_loss, **changed))
        with pytest.raises(InputError, match=rf"recipe\.pretraining_loss\.{key}=0: must be"):
            REGISTRY.check(wrong)
