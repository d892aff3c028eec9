"""Export of runs: what other libraries load, and `predict`, give the predictions of the run; what a format cannot hold is refused."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from ser_core.corpora.manifest import Manifest
from ser_core.corpora.recordings import WHOLE
from ser_core.errors import InputError, NotReproduced
from ser_core.models.onnx_model import INSTALL
from ser_core.preflight import export_problem
from ser_core.registry import REGISTRY, StageCall
from ser_core.settings.backbone import Normalise
from ser_core.settings.finetune import Adaptor, AdaptorSettings, Keep, Pooling
from ser_core.settings.recipe import Recipe
from ser_core.stages import predict
from ser_core.stages.export_whole import largest_difference
from ser_core.stages.model_card import model_card
from ser_core.training.splits import Split
from tests.ser_core.stages.conftest import Bench

# What results state of a run: two folds, one of them with two runs; a metric that one run lacks has no estimate.
FACTS: dict[str, Any] = {
    **{"experiment": "exp", "run": "vft/1/0", "corpus": "noise", "method": "vft", "label": "V-FT", "fold": "1", "seed": 0},
    "metrics": {"ua": 0.5, "wa": 0.75},
    "cells": {"1": [{"ua": 0.5, "wa": 0.75, "macro_f1": 0.25}, {"ua": 0.25, "wa": 0.25}], "2": [{"ua": 0.625, "wa": 0.5, "macro_f1": 0.5}]},
    **{"planned": 4, "interval": [31.25, 68.75], "licence": "cc-by-4.0", "commit": "abc", "packages": {"torch": "2.13.0"}},
}
# Executed where neither the project nor a package beyond those of transformers and torch can be imported.
ELSEWHERE = """
import json, sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = ("ser_core", "jobs", "tests", "soundfile", "scipy", "sklearn", "omegaconf", "peft", "soxr", "tensorboard", "pandas")
        return None if name.partition(".")[0] in hidden else PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
import numpy
from transformers import pipeline
folder, waves = sys.argv[1:]
classify = pipeline("audio-classification", model=folder, trust_remote_code=True, top_k=None)
with numpy.load(waves) as stored:
    inputs = [stored[name] for name in stored.files]
print(json.dumps([[{each["label"]: each["score"] for each in found} for found in classify(inputs, batch_size=size)] for size in (1, 3)]))
"""


def with_lora(recipe: Recipe, kinds: list[Adaptor]) -> Recipe:
    recipe.finetune.adaptors = AdaptorSettings(kinds=kinds, lora_rank=2, lora_alpha=4.0, lora_targets=["q_proj", "v_proj", "output_dense"])
    recipe.finetune.learning_rate = 5e-2
    return recipe


def never(changed: Mapping[str, Any]) -> Path:
    raise AssertionError(f"trained again with {changed}")


def described(call: StageCall) -> dict[str, Any]:
    return {"settings": json.loads(json.dumps(call.settings)), "runtime": json.loads(json.dumps(call.runtime))}


def export(
    call: StageCall,
    output: Path,
    folder: Path,
    *,
    merged: bool,
    upstream: dict[str, Path] | None = None,
    again: Callable[[Mapping[str, Any]], Path] = never,
    onnx: bool = False,
) -> tuple[str, ...]:
    folders: dict[str, Any] = {"upstream": upstream or {}, "output": output, "folder": folder}
    return REGISTRY.export(call.stage, **described(call), **folders, merged=merged, facts=FACTS, train_again=again, onnx=onnx)


def probabilities(encoder: Any, head: Path, waves: list[Tensor]) -> Tensor:
    """Class probabilities by the description in `head.json`, with the encoder of another library."""
    weights, facts = load_file(head / "head.safetensors"), json.loads((head / "head.json").read_text())
    assert facts["pooling"] == "paper"
    rows = []
    with torch.no_grad():
        for wave in waves:
            pooled = F.relu(encoder(wave[None]).last_hidden_state[0].mean(0))
            rows.append(torch.softmax(F.linear(pooled, weights["head.weight"], weights["head.bias"]), -1))
    return torch.stack(rows)


def predicted(output: Path, classes: tuple[str, ...]) -> Tensor:
    with (output / "predictions.csv").open() as file:
        return torch.tensor([[float(row[f"p_{name}"]) for name in classes] for row in csv.DictReader(file)])


@pytest.mark.slow
def test_what_is_exported_gives_the_predictions_of_the_run(bench: Bench, recipe: Recipe, corpus: Manifest, tmp_path: Path) -> None:
    """Merged by transformers alone, LoRA by peft on the base beside it; the base without LoRA gives others. Twice: the same bytes."""
    from transformers import AutoFeatureExtractor, AutoModel

    call = REGISTRY.call("vft", with_lora(recipe, [Adaptor.lora]), fold="1", seed=0)
    _, output = bench.run(call)
    test = Split(corpus, corpus.test("1"))
    waves, expected = [test.wave(place) for place in range(len(test))], predicted(output, corpus.classes)
    merged, lora = tmp_path / "merged", tmp_path / "lora"
    assert "LoRA merged: Wav2Vec2Model.from_pretrained" in export(call, output, merged, merged=True)[0]
    assert "PeftModel.from_pretrained(Wav2Vec2Model.from_pretrained(" in export(call, output, lora, merged=False)[0]
    torch.testing.assert_close(probabilities(AutoModel.from_pretrained(merged), merged, waves), expected, rtol=1e-4, atol=1e-5)
    assert float((probabilities(AutoModel.from_pretrained(lora / "base"), lora, waves) - expected).abs().max()) > 1e-3
    files = [str(corpus.audio_path(each)) for each in test.utterances]
    _, rows = REGISTRY.predict({"stage": call.stage, **described(call), "upstream": {}, "output": output}, files)
    named = torch.tensor([[row[f"p_{name}"] for name in corpus.classes] for row, _ in rows])
    torch.testing.assert_close(named, expected, rtol=0, atol=2e-6)
    assert not AutoFeatureExtractor.from_pretrained(merged).do_normalize
    export(call, output, tmp_path / "again", merged=True)
    for path in merged.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    peft = pytest.importorskip("peft")
    found = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(lora / "base"), lora)
    torch.testing.assert_close(probabilities(found, lora, waves), expected, rtol=1e-4, atol=1e-5)
    assert json.loads((lora / "adapter_config.json").read_text())["base_model_name_or_path"] == str(lora / "base")


@pytest.mark.slow
def test_a_run_on_a_pretrained_encoder(bench: Bench, recipe: Recipe, corpus: Manifest, tmp_path: Path) -> None:
    """The base is the encoder of the upstream stage. The weighted sum is part of the head file."""
    recipe.tapt.steps = 1
    call = REGISTRY.call("tapt", with_lora(recipe, [Adaptor.lora, Adaptor.ws]), fold="1", seed=0)
    _, encoder = bench.run(call.upstream["backbone"])
    _, output = bench.run(call, upstream={"backbone": encoder})
    export(call, output, tmp_path / "lora", merged=False, upstream={"backbone": encoder})
    assert (tmp_path / "lora" / "base" / "model.safetensors").read_bytes() == (encoder / "encoder" / "model.safetensors").read_bytes()
    assert set(load_file(tmp_path / "lora" / "head.safetensors")) == {"head.weight", "head.bias", "layer_sum.weights"}
    facts = json.loads((tmp_path / "lora" / "head.json").read_text())
    assert facts["classes"] == list(corpus.classes)
    assert facts["adaptors"]["kinds"] == ["lora", "ws"]
    (output / "adaptors" / "adaptors.json").write_text("{")
    with pytest.raises(InputError, match=r"adaptors\.json: cannot be read"):
        export(call, output, tmp_path / "damaged", merged=True, upstream={"backbone": encoder})


@pytest.mark.parametrize(
    ("kinds", "model_type", "merged", "problem"),
    [
        ([Adaptor.head], "wav2vec2", True, "trained head and no LoRA"),
        ([Adaptor.ba, Adaptor.ws], "wav2vec2", False, "trained ba, ws and no LoRA"),
        ([Adaptor.lora, Adaptor.ba, Adaptor.wg], "hubert", True, "has ba and wg beside LoRA"),
        ([Adaptor.lora], "wavlm", False, "LoRA on q_proj, k_proj, v_proj of WavLM has no effect in peft.*use --merge"),
        ([Adaptor.lora], "wavlm", True, "^$"),
        ([Adaptor.lora, Adaptor.ws], "hubert", False, "^$"),
    ],
)
def test_what_cannot_be_exported(kinds: list[Adaptor], model_type: str, merged: bool, problem: str) -> None:
    """No file is written that computes something else than the run."""
    assert re.search(problem, export_problem(AdaptorSettings(kinds=kinds), model_type, merged=merged))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_model(bench: Bench, recipe: Recipe, corpus: Manifest, tmp_path: Path) -> None:
    """transformers' pipeline, without the project, predicts what the run did, alone and in padded batches; so does `predict`.

    The authors' pooling and a normalised model are the harder case. Trained again, a run that kept nothing gives the same model.
    """
    recipe.backbone.config |= {"feat_extract_norm": "layer", "conv_bias": True}
    recipe.backbone.normalise = Normalise.always
    recipe.finetune.head.pooling = Pooling.reference
    recipe.finetune.learning_rate = 5e-2
    call = REGISTRY.call("vft", recipe, fold="1", seed=0)
    recipe.finetune.keep = Keep.all
    _, kept = bench.run(REGISTRY.call("vft", recipe, fold="1", seed=0))
    _, output = bench.run(call)
    assert not (output / "model").exists()

    def again(changed: Mapping[str, Any]) -> Path:
        assert changed == {"keep": "all"}
        return kept

    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    export(call, kept, first, merged=False)
    assert (
        export(call, output, second, merged=False, again=again)[0] == "trained again: the predictions are those of the run, byte for byte"
    )
    assert {path.name: path.read_bytes() for path in first.iterdir()} == {path.name: path.read_bytes() for path in second.iterdir()}

    test = Split(corpus, corpus.test("1"))
    names, expected = [each.id for each in test.utterances], predicted(output, corpus.classes)
    assert float((expected - expected.mean(0)).abs().max()) > 1e-3
    waves: dict[str, Any] = {name: test.wave(place).numpy() for place, name in enumerate(names)}
    np.savez(tmp_path / "waves.npz", **waves)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", ELSEWHERE, str(first), str(tmp_path / "waves.npz")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for rows in json.loads(done.stdout.splitlines()[-1]):
        found = torch.tensor([[row[name] for name in corpus.classes] for row in rows])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    files = [str(corpus.audio_path(each)) for each in test.utterances]
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF")
    names_of_columns, rows = REGISTRY.predict(first, [*files, str(broken), str(tmp_path / "none.wav")])
    listed = list(rows)
    assert [problem.partition(":")[0] for _, problem in listed] == [""] * len(files) + ["unreadable", "no such file"]
    assert all(tuple(row) == names_of_columns == ("path", "emotion", "p_angry", "p_sad") for row, problem in listed if not problem)
    found = torch.tensor([[row[f"p_{name}"] for name in corpus.classes] for row, problem in listed if not problem])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    _, of_run = REGISTRY.predict({"stage": call.stage, **described(call), "upstream": {}, "output": kept}, files[-1:])
    assert next(of_run) == listed[len(files) - 1]
    with pytest.raises(InputError, match=r"weights of this run were not kept \(recipe.finetune.keep\)"):
        REGISTRY.predict({"stage": call.stage, **described(call), "upstream": {}, "output": output}, files)
    check_windows(first, tmp_path)
    check_differences(call, output, kept, tmp_path)


def check_windows(model: Path, folder: Path) -> None:
    """A long recording has the mean probabilities of its windows, in stereo and at another rate as well."""
    rng = np.random.default_rng(1)
    wave = (0.1 * rng.standard_normal(100_000)).clip(-1, 1)
    whole, halves, stereo = folder / "whole.flac", [folder / "0.flac", folder / "1.flac"], folder / "stereo.wav"
    soundfile.write(whole, wave, 1_000 * 16, subtype="PCM_16")
    for half, path in zip((wave[:50_000], wave[50_000:]), halves, strict=True):
        soundfile.write(path, half, 16_000, subtype="PCM_16")
    times = np.arange(88_200) / 44_100
    soundfile.write(stereo, np.stack([0.2 * np.sin(440 * 2 * np.pi * times), np.zeros(88_200)], 1), 44_100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "WINDOW_SECONDS", 4.0)
        _, rows = REGISTRY.predict(model, [str(each) for each in (whole, *halves, stereo)])
        found = [row for row, problem in rows if not problem]
    assert len(found) == 4
    assert found[0]["p_sad"] == pytest.approx((found[1]["p_sad"] + found[2]["p_sad"]) / 2, abs=2e-6)
    assert found[1]["p_sad"] != found[2]["p_sad"]


def check_differences(call: StageCall, output: Path, kept: Path, folder: Path) -> None:
    """A model that predicts otherwise is not exported, unless the difference is within the tolerance, which is printed."""
    text = (output / "predictions.csv").read_text().splitlines()
    row = text[1].split(",")

    def changed(by: float) -> Path:
        run = folder / f"run-{by}"
        shutil.copytree(output, run)
        (run / "predictions.csv").write_text("\n".join([text[0], ",".join([*row[:-1], f"{float(row[-1]) + by:.6f}"]), *text[2:]]) + "\n")
        return run

    for name in ("near", "far"):
        (folder / name).mkdir()
    assert "0.005000, tolerance 0.01" in export(call, changed(0.005), folder / "near", merged=False, again=lambda _: kept)[0]
    with pytest.raises(NotReproduced, match=r"largest difference .* 0\.020000, tolerance 0\.01; nothing is exported"):
        export(call, changed(0.02), folder / "far", merged=False, again=lambda _: kept)
    assert list((folder / "far").iterdir()) == []
    with pytest.raises(InputError, match="--merge: this run trained the whole transformer"):
        export(call, kept, folder / "far", merged=True)
    (folder / "other.csv").write_text("\n".join(text[:-1]))
    with pytest.raises(InputError, match="of other utterances or classes"):
        largest_difference(output / "predictions.csv", folder / "other.csv")


def test_windows() -> None:
    """As few as possible, of equal length, without a gap; whole if it is no longer than a window."""
    assert predict.windows(40 * 8_000, 8_000) == [WHOLE]
    parts = predict.windows(101 * 8_000, 8_000)
    assert [part.start for part in parts] == [0, *(part.end for part in parts[:-1])]
    assert parts[-1].end == 101
    assert {round((part.end or 0) - (part.start or 0), 3) for part in parts} == {33.667}


def test_model_card() -> None:
    """The hub's fields, with means over folds of means over runs that all runs have; a licence only if one is given."""
    card = model_card(FACTS, ("angry", "sad"), "random weights")
    _, front, text = card.split("---\n", 2)
    header = yaml.safe_load(front)
    assert (header["license"], header["library_name"], header["pipeline_tag"]) == ("cc-by-4.0", "transformers", "audio-classification")
    metrics = header["model-index"][0]["results"][0]["metrics"]
    assert [(each["type"], each["value"], each.get("args")) for each in metrics] == [
        ("recall", 0.5, {"average": "macro"}),
        ("accuracy", 0.5, None),
    ]
    assert all("cross-validated estimate of the method: mean over 2 folds of 3" in each["name"] for each in metrics)
    assert "3 of 4 runs have a result so far." in text
    assert "31.25 to 68.75 %" in text
    assert "| 50.00 % | 75.00 % |" in text
    assert "license" not in model_card({**FACTS, "licence": ""}, ("angry", "sad"), "").split("---\n")[1]
    assert "onnx" not in text
    assert 'InferenceSession("model.onnx")' in model_card(FACTS, ("angry", "sad"), "", onnx=True)


def test_only_runs_are_exported(recipe: Recipe, tmp_path: Path) -> None:
    """Another stage has no adaptors."""
    call = REGISTRY.call("tapt", recipe, fold="1", seed=0).upstream["backbone"]
    with pytest.raises(InputError, match="stage tapt: only runs"):
        export(call, tmp_path, tmp_path / "out", merged=True)


def test_onnx_is_refused_before_anything_is_computed(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its packages, and for adaptors: nothing is trained again (`never`), nothing written."""
    with pytest.raises(InputError, match="--onnx: this run trained adaptors"):
        export(REGISTRY.call("vft", with_lora(recipe, [Adaptor.lora]), fold="1", seed=0), tmp_path, tmp_path, merged=True, onnx=True)
    recipe.finetune.adaptors = AdaptorSettings()
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    with pytest.raises(InputError) as refused:
        export(REGISTRY.call("vft", recipe, fold="1", seed=0), tmp_path, tmp_path, merged=False, onnx=True)
    assert str(refused.value) == f"--onnx: not installed: onnxscript; the export needs the extra `onnx`: {INSTALL}"
    assert list(tmp_path.iterdir()) == []
