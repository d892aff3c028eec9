"""A grid with a variant that trains adaptors: its size in the table, and its export by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import CommandLine

SETTINGS = (
    *("corpus=small", "folds=[1]", "seeds=1", "methods=[vft,lora]", "recipe.finetune.epochs=1", "policy.outliers=none"),
    "variants.lora={method: vft, label: LoRA, recipe: {finetune: {adaptors: {kinds: [lora], lora_rank: 2}}}}",
)


@pytest.mark.slow
def test_adaptors_from_grid_to_export(small_data: Path, tmp_path: Path) -> None:
    """The table has the trained parameters of both; the run with LoRA is exported, the other one after it was trained again."""
    run = CommandLine(small_data, tmp_path / "results")
    made = run("grid", "demo", *SETTINGS)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "Trained" in made.stdout
    sizes = [method["size"] for method in json.loads((run.results / "demo" / "tables" / "summary.json").read_text())["methods"]]
    assert sizes[1]["trained"] < sizes[0]["trained"] / 10
    assert sizes[1]["parameters"] > sizes[0]["parameters"]

    out = tmp_path / "exported"
    done = run("export", "demo", "lora/1/0", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == str(out)
    assert f"PeftModel.from_pretrained(Wav2Vec2Model.from_pretrained('{out / 'base'}'), '{out}')" in done.stdout
    assert {"adapter_config.json", "adapter_model.safetensors", "head.safetensors", "head.json", "base"} == {
        each.name for each in out.iterdir()
    }

    whole = tmp_path / "whole"
    done = run("export", "demo", "vft/1/0", "--out", str(whole), "--licence", "mit", "--onnx")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (whole / "model.onnx").is_file()
    assert "trained again: the predictions are those of the run, byte for byte" in done.stdout
    card = (whole / "README.md").read_text()
    assert "license: mit" in card
    assert "Trained on all folds but 1" in card
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".whole")] == []
