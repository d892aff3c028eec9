"""The method `score`: two finished runs of the same fold and seed, fused without training."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ser_core.corpora.manifest import Manifest
from ser_core.errors import InputError
from ser_core.registry import REGISTRY
from ser_core.settings.recipe import Recipe
from ser_core.settings.text import AudioMethod
from ser_core.stages.late_fusion import curve_divergence
from tests.ser_core.stages.conftest import Bench


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open() as file:
        return list(csv.DictReader(file))


def probabilities(folder: Path) -> NDArray[np.float64]:
    return np.array([[float(row[f"p_{name}"]) for name in ("angry", "sad")] for row in rows_of(folder)])


@pytest.mark.slow
def test_the_mean_of_log_probabilities(fused: Recipe, spoken: Manifest, tmp_path: Path) -> None:
    """By its definition, at the weights of the recipe; at 0 and 1 the classes of one run; planted words make it at least the best run."""
    bench = Bench(spoken.folder, tmp_path / "bench")
    call = REGISTRY.call("score", fused, fold="1", seed=0)
    upstream = {role: bench.run(parent)[1] for role, parent in call.upstream.items()}
    audio, text = (np.log(np.maximum(probabilities(upstream[role]), 1e-7)) for role in ("audio", "text"))
    for weight in (0.5, 0.25, 0.0, 1.0):
        fused.fusion.text_weight = weight
        result, output = bench.run(REGISTRY.call("score", fused, fold="1", seed=0), upstream=upstream)
        expected = np.exp((1 - weight) * audio + weight * text)
        assert probabilities(output) == pytest.approx(expected / expected.sum(axis=1, keepdims=True), abs=2e-6)
        metrics = result["metrics"]
        assert metrics["wa"] == np.mean([row["label"] == row["predicted"] for row in rows_of(output)])
        if weight == 0.5:
            assert metrics["ua_text"] > 0.8
            assert metrics["ua"] >= max(metrics["ua_audio"], metrics["ua_text"]) - 0.13  # one of eight utterances
    assert metrics["ua"] == metrics["ua_text"]
    shown = [column.name for column in fused.further_metrics("score") if column.name in metrics]
    assert shown == [column.name for column in fused.further_metrics("concat")][:2] == ["ua_audio", "ua_text"]
    assert (result["diverged"], result["metrics"]["test_utterances"]) == ("", 8)
    flat = json.loads((upstream["audio"] / "curves.json").read_text())
    flat["curves"]["train/loss"] = [[step, 0.6931] for step, _ in flat["curves"]["train/loss"]]
    (upstream["audio"] / "curves.json").write_text(json.dumps(flat))
    assert bench.run(call, upstream=upstream)[0]["diverged"].startswith("audio run: final training loss 0.693 is still at")
    rows = upstream["text"] / "predictions.csv"
    rows.write_text(rows.read_text().replace("utterance00", "other"))
    with pytest.raises(InputError, match="predictions of other utterances or classes"):
        bench.run(call, upstream=upstream)


def test_the_runs_are_those_of_the_single_methods(fused: Recipe) -> None:
    """Of the same fold and seed, so that their stages are shared by content; the weight is part of the fusion alone."""
    call = REGISTRY.calls("score", fused)("2", 7)
    assert call.upstream == {"audio": REGISTRY.calls("vft", fused)("2", 7), "text": REGISTRY.calls("text", fused)("2", 7)}
    assert (call.seed, dict(call.settings)) == (7, {"score": {"text_weight": 0.5}})
    fused.fusion.text_weight = 0.25
    other = REGISTRY.calls("score", fused)("2", 7)
    assert (other.upstream, dict(other.settings)) == (call.upstream, {"score": {"text_weight": 0.25}})
    fused.fusion.audio = AudioMethod.tapt
    assert REGISTRY.calls("score", fused)("2", 7).upstream["audio"] == REGISTRY.calls("tapt", fused)("2", 7)
    fused.fusion.text_weight = 1.5
    with pytest.raises(InputError, match=r"recipe.fusion.text_weight=1.5: must lie between 0 and 1"):
        REGISTRY.check(fused)


def test_both_parts_are_checked_against_the_corpus(fused: Recipe, spoken: Manifest, corpus: Manifest) -> None:
    """A corpus without transcripts, and a batch of audio that is too large."""
    own: dict[str, tuple[str, ...]] = {"1": (), "2": ()}
    REGISTRY.check_corpus(spoken.folder, [("score", fused)], own)
    with pytest.raises(InputError, match="noise: has no transcripts"):
        REGISTRY.check_corpus(corpus.folder, [("score", fused)], own)
    fused.finetune.batch_size = 9
    with pytest.raises(InputError, match=r"recipe\.finetune\.batch_size=9"):
        REGISTRY.check_corpus(spoken.folder, [("score", fused)], own)


@pytest.mark.parametrize(("loss", "diverged"), [(0.3, False), (0.69, True)])
def test_a_run_has_diverged_by_its_curve(loss: float, diverged: bool, tmp_path: Path) -> None:
    """By the last tenth of the curve; a run without a curve is not judged."""
    file = tmp_path / "curves.json"
    points = [[step, 1.0 if step < 90 else loss] for step in range(10, 101, 10)]
    file.write_text(json.dumps({"curves": {"train/loss": points}, "references": {"train/loss": [0.693, "loss of the class prior"]}}))
    assert bool(curve_divergence(file)) == diverged
    assert curve_divergence(tmp_path / "none.json") == ""
