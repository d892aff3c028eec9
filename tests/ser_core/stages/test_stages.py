from __future__ import annotations

import csv
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.numpy import load_file

from ser_core.corpora.manifest import Manifest, load_manifest
from ser_core.errors import Diverged, InputError, Interrupted
from ser_core.models.backbone import load_encoder
from ser_core.registry import REGISTRY
from ser_core.settings.execution import FeatureCache, Precision
from ser_core.settings.recipe import Recipe
from ser_core.stages import context as stage_context
from ser_core.stages.states import StateTraining
from ser_core.training.device import cpu_multiplies_bfloat16
from ser_core.training.loop import Objective, TrainingResult, train
from tests.ser_core.presets import with_preset
from tests.ser_core.stages.conftest import FOLDS, STAGES, Bench, artifacts, curves, stage_calls


def stop_after(checks: int) -> Callable[[], bool]:
    """A `should_stop` that returns True after `checks` calls."""
    asked = iter(range(10**9))
    return lambda: next(asked) >= checks


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_same_seed_gives_the_same_artifacts_and_numbers(stage: str, recipe: Recipe, bench: Bench) -> None:
    """Two executions of a stage agree in every byte of their artifacts and in every metric."""
    call = stage_calls(recipe)[stage]
    upstream = {role: bench.run(parent)[1] for role, parent in call.upstream.items()}
    first, one = bench.run(call, upstream=upstream)
    second, other = bench.run(call, upstream=upstream)
    assert first["metrics"] == second["metrics"]
    assert first.get("confusion") == second.get("confusion")
    assert first["arithmetic"] == {"device": "cpu", "precision": "float32"}
    assert artifacts(one) == artifacts(other)
    assert artifacts(one)


def test_the_precision_that_was_chosen_is_stated(recipe: Recipe, bench: Bench) -> None:
    """`auto` depends on the processor; the result states what it was."""
    stated = []
    for precision in (Precision.bfloat16, Precision.auto):
        recipe.finetune.precision = precision
        stated.append(bench.run(stage_calls(recipe)["finetune"])[0]["arithmetic"]["precision"])
    assert stated == ["bfloat16", "bfloat16" if cpu_multiplies_bfloat16() else "float32"]


@pytest.mark.slow
def test_seeds_change_the_fine_tuning_and_nothing_upstream(recipe: Recipe, bench: Bench) -> None:
    """Another seed gives another fine-tuning from the same upstream call."""
    calls = [REGISTRY.call("tapt", recipe, fold="1", seed=seed) for seed in (0, 1)]
    assert calls[0].upstream == calls[1].upstream
    upstream = {"backbone": bench.run(calls[0].upstream["backbone"])[1]}
    outcomes = [bench.run(call, upstream=upstream)[0] for call in calls]
    assert outcomes[0]["metrics"]["training_loss"] != outcomes[1]["metrics"]["training_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fold", FOLDS)
def test_no_audio_of_the_held_out_fold_is_opened_before_the_test(
    stage: str, fold: str, recipe: Recipe, bench: Bench, corpus: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upstream stages open no file of the held-out fold; fine-tuning opens each once, after the last training file."""
    held_out = {str(corpus.audio_path(utterance)) for utterance in corpus.test(fold)}
    opened: list[str] = []
    read = soundfile.read

    def recorded(path: Path, *arguments: object, **options: object) -> object:
        opened.append(str(path))
        return read(path, *arguments, **options)

    monkeypatch.setattr(soundfile, "read", recorded)
    call = stage_calls(recipe, fold)[stage]
    bench.run(call)
    tested = [path in held_out for path in opened]
    assert any(not each for each in tested)  # training files were seen, so the recording works
    if stage == "finetune":
        first_test = tested.index(True)
        assert all(tested[first_test:])
        assert sorted(opened[first_test:]) == sorted(held_out)
    else:
        assert not any(tested)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["states", "cluster", "tapt", "ptapt"])
def test_upstream_stages_do_not_depend_on_the_held_out_fold(
    stage: str, recipe: Recipe, bench: Bench, corpus: Manifest, tmp_path: Path
) -> None:
    """With the held-out audio gone from the disk an upstream stage writes the same bytes."""
    stripped = tmp_path / "stripped"
    shutil.copytree(corpus.folder, stripped)
    manifest = load_manifest(stripped)
    for utterance in manifest.test("1"):
        manifest.audio_path(utterance).unlink()
    call = stage_calls(recipe)[stage]
    _, whole = bench.run(call)
    _, without = Bench(stripped, tmp_path / "without").run(call)
    assert artifacts(whole) == artifacts(without)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["finetune", "tapt", "ptapt", "states"])
@pytest.mark.parametrize("checks", [1, 2])
def test_an_interrupted_stage_ends_as_an_uninterrupted_one(stage: str, checks: int, recipe: Recipe, bench: Bench, tmp_path: Path) -> None:
    """Interrupted twice and resumed: artifacts and metrics are equal to the bit, and no step is done twice."""
    recipe.execution.feature_cache = FeatureCache.none  # so that the stop comes at a step
    call = stage_calls(recipe)[stage]
    upstream = {role: bench.run(parent)[1] for role, parent in call.upstream.items()}
    expected, uninterrupted = bench.run(call, upstream=upstream)
    checkpoint = tmp_path / "resumable"
    for _ in range(2):
        with pytest.raises(Interrupted) as ending:
            bench.run(call, upstream=upstream, checkpoint=checkpoint, should_stop=stop_after(checks))
        assert ending.value.interrupted
    found, output = bench.run(call, upstream=upstream, checkpoint=checkpoint)
    assert found["durations"]["resumed_at_step"] == 2 * checks
    assert found["metrics"] == expected["metrics"]
    assert artifacts(output) == artifacts(uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["finetune", "tapt"])
def test_interruptions_at_random_steps_change_no_number(
    stage: str, recipe: Recipe, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped four times, at other steps in every run of this test: weights, curves, artifacts and metrics are equal to the bit."""
    drawn = random.SystemRandom().randrange(1000)
    print(f"steps drawn with seed {drawn}")  # noqa: T201 - shown where the test fails
    rng = random.Random(drawn)
    recipe.execution.feature_cache = FeatureCache.none  # so that the stop comes at a step
    recipe.execution.log_every = rng.choice([1, 2, 3, 5])
    recipe.finetune.epochs, recipe.tapt.steps = 10, 20
    trained: list[dict[str, torch.Tensor]] = []

    def recorded(objective: Objective, *arguments: Any) -> TrainingResult:
        found = train(objective, *arguments)
        trained.append({name: tensor.clone() for name, tensor in objective.model.state_dict().items()})
        return found

    monkeypatch.setattr(stage_context, "train", recorded)
    call = stage_calls(recipe)[stage]
    expected, uninterrupted = bench.run(call)
    checkpoint = tmp_path / "resumable"
    steps = sorted(rng.choices(range(20), k=4))
    for before, step in zip([0, *steps], steps, strict=False):
        with pytest.raises(Interrupted):
            bench.run(call, checkpoint=checkpoint, should_stop=stop_after(step - before))
    found, output = bench.run(call, checkpoint=checkpoint)
    assert found["durations"]["resumed_at_step"] == steps[-1]
    assert found["metrics"] == expected["metrics"]
    assert artifacts(output) == artifacts(uninterrupted)
    assert curves(output) == curves(uninterrupted)
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vft", "tapt", "ptapt"])
@pytest.mark.parametrize("preset", ["paper", "published"])
def test_every_method_ends_in_scores_of_the_held_out_fold(method: str, preset: str, recipe: Recipe, bench: Bench, corpus: Manifest) -> None:
    """Metrics, confusion and predictions.csv describe the same test utterances, with both presets."""
    outcome, output = bench.run(REGISTRY.call(method, with_preset(recipe, preset), fold="2", seed=3))
    test = corpus.test("2")
    confusion = np.array(outcome["confusion"])
    assert outcome["classes"] == list(corpus.classes)
    assert confusion.sum() == len(test) == outcome["metrics"]["test_utterances"]
    assert outcome["metrics"]["ua"] == pytest.approx((np.diag(confusion) / confusion.sum(1)).mean())
    with (output / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [utterance.id for utterance in test]
    assert sum(row["label"] == row["predicted"] for row in rows) == np.trace(confusion)
    assert sum(float(rows[0][f"p_{name}"]) for name in corpus.classes) == pytest.approx(1, abs=1e-5)
    assert list((output / "tensorboard").glob("events.out.tfevents.*"))
    published = json.loads((output / "curves.json").read_text())
    assert published["references"]["train/loss"] == [outcome["metrics"]["prior_loss"], "loss of the class prior"]
    assert published["curves"]["train/loss"][-1][0] == outcome["metrics"]["steps"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["finetune", "ptapt"])
def test_kept_and_recomputed_features_train_alike(stage: str, recipe: Recipe, bench: Bench) -> None:
    """The cache of a frozen front end changes no number."""
    call = stage_calls(recipe)[stage]
    upstream = {role: bench.run(parent)[1] for role, parent in call.upstream.items()}
    outputs = []
    for cache in ("memory", "none"):
        execution = {**call.runtime["execution"], "feature_cache": cache}
        outputs.append(bench.run(call, upstream=upstream, execution=execution))
    assert outputs[0][0]["metrics"] == outputs[1][0]["metrics"]
    assert artifacts(outputs[0][1]) == artifacts(outputs[1][1])


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "published"])
def test_micro_batches_train_like_whole_batches(preset: str, recipe: Recipe, bench: Bench) -> None:
    """Without dropout a step in parts is the step in one, up to the order of sums; so it is where features depend on the whole batch."""
    recipe.backbone.config |= dict.fromkeys(
        ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop"), 0.0
    )
    call = stage_calls(with_preset(recipe, preset))["finetune"]
    whole, _ = bench.run(call)
    parts, _ = bench.run(call, execution={**call.runtime["execution"], "micro_batch": 1})
    assert parts["metrics"]["training_loss"] == pytest.approx(whole["metrics"]["training_loss"], rel=1e-4)


def test_fine_tuning_starts_from_the_upstream_encoder(recipe: Recipe, bench: Bench) -> None:
    """TAPT changes the encoder that fine-tuning loads, and fine-tuning reads no other."""
    call = REGISTRY.call("tapt", recipe, fold="1", seed=0)
    _, output = bench.run(call.upstream["backbone"])
    trained, start = load_encoder(output / "encoder"), load_encoder(recipe.backbone)
    name = "encoder.layers.0.attention.q_proj.weight"
    assert not np.array_equal(trained.state_dict()[name].numpy(), start.state_dict()[name].numpy())
    with pytest.raises(InputError):
        bench.run(call, upstream={"backbone": bench.root / "nowhere"})


def test_pseudo_label_pretraining_leaves_the_front_end_as_it_was(recipe: Recipe, bench: Bench) -> None:
    """Convolutions and projection are frozen in P-TAPT, so V-FT and P-TAPT share features."""
    _, output = bench.run(stage_calls(recipe)["ptapt"])
    trained, start = load_encoder(output / "encoder").state_dict(), load_encoder(recipe.backbone).state_dict()
    changed = {name for name in start if not np.array_equal(trained[name].numpy(), start[name].numpy())}
    assert changed
    assert all(name.startswith("encoder.") for name in changed)


def test_every_training_frame_gets_one_label(recipe: Recipe, bench: Bench, corpus: Manifest) -> None:
    """Labels, frames of each utterance and centroids of a cluster stage fit the frames of the states stage."""
    call = stage_calls(recipe)["cluster"]
    states, frames_folder = bench.run(call.upstream["states"])
    outcome, folder = bench.run(call, upstream={"states": frames_folder})
    stored = load_file(folder / "clusters.safetensors")
    index = json.loads((frames_folder / "frames.json").read_text())
    assert index["utterances"] == [utterance.id for utterance in corpus.training("1")]
    assert stored["counts"].tolist() == index["frames"]
    assert len(stored["labels"]) == sum(index["frames"]) == states["metrics"]["frames"]
    assert set(stored["labels"].tolist()) <= set(range(2))
    frames = np.load(frames_folder / "frames.npy")
    distances = ((frames[:, None] - stored["centroids"]) ** 2).sum(-1)
    chosen = distances[np.arange(len(frames)), stored["labels"]]
    assert np.allclose(chosen, distances.min(1), rtol=1e-4, atol=1e-6)
    assert outcome["metrics"]["inertia"] == pytest.approx(chosen.sum(), rel=1e-3)


def test_more_clusters_than_frames_is_refused_in_one_line(recipe: Recipe, bench: Bench) -> None:
    recipe.cluster.counts = [5000]
    with pytest.raises(InputError, match=r"k = 5000 is more than the .* frames"):
        bench.run(stage_calls(recipe)["cluster"])


def test_pseudo_labels_of_another_fold_are_refused(recipe: Recipe, bench: Bench) -> None:
    """An artifact of other utterances is never taken for one of this fold."""
    upstream = {role: bench.run(parent)[1] for role, parent in stage_calls(recipe, "2")["ptapt"].upstream.items()}
    with pytest.raises(InputError, match="other utterances"):
        bench.run(stage_calls(recipe, "1")["ptapt"], upstream=upstream)


def test_a_grid_of_other_frames_is_refused(recipe: Recipe, bench: Bench) -> None:
    """Pseudo-labels that do not lie on the backbone's frames are an error, not a crop."""
    recipe.states.wav2vec.config = {**recipe.states.wav2vec.config, "conv_feature_layers": [[16, 40, 40], [16, 8, 8]]}
    with pytest.raises(InputError, match="twice the product"):
        REGISTRY.check(recipe)
    with pytest.raises(InputError, match="pseudo-labels for"):
        bench.run(stage_calls(recipe)["ptapt"])


def test_weights_changed_since_the_launch_are_refused(recipe: Recipe, bench: Bench) -> None:
    call = stage_calls(recipe)["finetune"]
    other = {**call.runtime["backbone"], "init_seed": 7}
    with pytest.raises(InputError, match="planned with"):
        bench.run(call, backbone=other)


def test_fewer_utterances_than_a_batch_still_train(recipe: Recipe, bench: Bench) -> None:
    """One step an epoch, and a line that says so."""
    recipe.finetune.batch_size = 64
    outcome, _ = bench.run(stage_calls(recipe)["finetune"])
    assert outcome["metrics"]["steps"] == recipe.finetune.epochs
    assert any("fewer than a batch" in line for line in bench.lines)


def test_an_exploding_loss_is_told_apart_from_a_bug(recipe: Recipe, bench: Bench) -> None:
    recipe.finetune.learning_rate = 1e30
    with pytest.raises(Diverged) as ending:
        bench.run(stage_calls(recipe)["finetune"])
    assert ending.value.diverged


def test_an_unknown_stage_and_fold_name_the_known_ones(recipe: Recipe, bench: Bench) -> None:
    from dataclasses import replace

    call = stage_calls(recipe)["tapt"]
    with pytest.raises(InputError, match="known are"):
        bench.run(replace(call, stage="distil"))
    with pytest.raises(InputError, match="no fold '9'"):
        bench.run(replace(call, fold="9"))


@pytest.mark.parametrize(("rate", "collapsed"), [(1e-3, False), (10.0, True)])
def test_a_collapsed_training_is_reported_as_diverged(rate: float, collapsed: bool, recipe: Recipe, bench: Bench) -> None:
    """An absurd learning rate leads back to the class prior: the model is tested and returned all the same, with the reason."""
    recipe.finetune.learning_rate = rate
    recipe.finetune.epochs = 8
    outcome, _ = bench.run(stage_calls(recipe)["finetune"])
    assert outcome["metrics"]["prior_loss"] == pytest.approx(np.log(2))
    assert np.sum(outcome["confusion"]) == outcome["metrics"]["test_utterances"]
    assert bool(outcome["diverged"]) == collapsed
    if collapsed:
        assert outcome["diverged"].endswith("is still at that of the class prior, 0.693")
        assert any(outcome["diverged"] in line for line in bench.lines)


def test_a_nan_validation_loss_is_divergence(recipe: Recipe, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be compared with others, nor written as JSON."""
    monkeypatch.setattr(StateTraining, "validate", lambda self, step: (float("nan"), 0.0))
    with pytest.raises(Diverged, match="validation loss is nan"):
        bench.run(stage_calls(recipe)["states"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", ["vft", "tapt", "ptapt"])
def test_every_method_runs_on_a_gpu(method: str, precision: str, recipe: Recipe, bench: Bench) -> None:
    """No tensor stays on the wrong device; without dropout fine-tuning has the loss of a CPU."""
    recipe.backbone.config |= dict.fromkeys(
        ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop"), 0.0
    )
    for settings in (recipe.finetune, recipe.tapt, recipe.states, recipe.ptapt):
        settings.precision = Precision[precision]
    recipe.execution.device = "cuda"
    call = REGISTRY.call(method, recipe, fold="1", seed=0)
    upstream = {role: bench.run(parent)[1] for role, parent in call.upstream.items()}
    found, _ = bench.run(call, upstream=upstream)
    expected, _ = bench.run(call, upstream=upstream, execution={**call.runtime["execution"], "device": "cpu"})
    assert found["metrics"]["training_loss"] == pytest.approx(expected["metrics"]["training_loss"], rel=0.05)
