"""Export of runs with adaptors: what transformers and peft load gives the predictions of the run; what a format cannot hold is refused."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from ser_core.corpora.manifest import Manifest
from ser_core.errors import InputError
from ser_core.preflight import export_problem
from ser_core.registry import REGISTRY, StageCall
from ser_core.settings import Adaptor, AdaptorSettings, Recipe
from ser_core.training.splits import Split
from tests.ser_core.stages.conftest import Bench


def with_lora(recipe: Recipe, kinds: list[Adaptor]) -> Recipe:
    recipe.finetune.adaptors = AdaptorSettings(kinds=kinds, lora_rank=2, lora_alpha=4.0, lora_targets=["q_proj", "v_proj", "output_dense"])
    recipe.finetune.learning_rate = 5e-2
    return recipe


def export(call: StageCall, output: Path, folder: Path, *, merged: bool, upstream: dict[str, Path] | None = None) -> tuple[str, ...]:
    values = {"settings": json.loads(json.dumps(call.settings)), "runtime": json.loads(json.dumps(call.runtime))}
    return REGISTRY.export(call.stage, **values, upstream=upstream or {}, output=output, folder=folder, merged=merged)


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
        ([], "wav2vec2", False, "trained the whole transformer"),
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


def test_only_runs_are_exported(recipe: Recipe, tmp_path: Path) -> None:
    """Another stage has no adaptors."""
    call = REGISTRY.call("tapt", recipe, fold="1", seed=0).upstream["backbone"]
    with pytest.raises(InputError, match="stage tapt: only runs"):
        export(call, tmp_path, tmp_path / "out", merged=True)
