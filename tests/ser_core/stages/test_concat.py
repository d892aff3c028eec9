"""The method `concat`: a linear layer on the pooled vectors of two finished runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from ser_core.corpora.manifest import Manifest, write_manifest
from ser_core.errors import InputError, Interrupted
from ser_core.registry import POOLED as NAMED
from ser_core.registry import REGISTRY, StageCall
from ser_core.settings.recipe import Recipe
from ser_core.settings.text import AudioMethod
from ser_core.training.pooled import POOLED, TEST, TRAINING, read_pooled, write_pooled
from ser_core.training.splits import Split
from tests.ser_core.stages.conftest import FOLDS, Bench, artifacts
from tests.ser_core.stages.test_stages import stop_after

NONE: dict[str, tuple[str, ...]] = {"1": (), "2": ()}


def splits(manifest: Manifest) -> tuple[Split, Split]:
    """Training and test of the first fold."""
    return Split(manifest, manifest.training("1")), Split(manifest, manifest.test("1"))


def vectors(split: Split, seed: int, *, told: bool = False) -> NDArray[np.float32]:
    """Noise of 4 units; `told`: the first tells the class."""
    found = np.random.default_rng(seed).standard_normal((len(split), 4)).astype(np.float32)
    if told:
        found[:, 0] += 4 * np.array(split.labels)
    return found


@pytest.fixture
def runs(corpus: Manifest, tmp_path: Path) -> dict[str, Path]:
    """Folders of an audio run, whose vectors are noise, and a text run, whose vectors tell the class; both predict at chance."""
    training, test = splits(corpus)
    header = f"id,{','.join(f'p_{name}' for name in corpus.classes)}\n"
    for role in ("audio", "text"):
        folder = tmp_path / role
        folder.mkdir()
        told = role == "text"
        write_pooled(folder, (training, vectors(training, 1, told=told)), (test, vectors(test, 2, told=told)))
        (folder / "predictions.csv").write_text(header + "".join(f"{each.id},0.6,0.4\n" for each in test.utterances))
    return {role: tmp_path / role for role in ("audio", "text")}


@pytest.mark.slow
def test_the_layer_reads_both_runs_and_no_test_vector_in_training(
    corpus: Manifest, bench: Bench, runs: dict[str, Path], tmp_path: Path
) -> None:
    """It learns what one run tells; resumed it writes the same bytes; other test vectors change predictions and no loss."""
    settings = {"concat": {"epochs": 40, "batch_size": 4, "learning_rate": 0.05}}
    call = StageCall("concat", 1, settings, {"execution": {"device": "cpu"}}, "1", 3)
    whole, output = bench.run(call, upstream=runs)
    metrics = whole["metrics"]
    assert (metrics["ua"], metrics["ua_audio"], metrics["ua_text"]) == (1.0, 0.5, 0.5)
    assert (metrics["trained_parameters"], metrics["steps"], whole["diverged"]) == (2 * (8 + 1), 80, "")
    with pytest.raises(Interrupted):
        bench.run(call, upstream=runs, checkpoint=tmp_path / "kept", should_stop=stop_after(30))
    resumed, again = bench.run(call, upstream=runs, checkpoint=tmp_path / "kept")
    assert (resumed["durations"]["resumed_at_step"], resumed["metrics"], artifacts(again)) == (30, metrics, artifacts(output))
    training, test = splits(corpus)
    write_pooled(runs["text"], (training, vectors(training, 1, told=True)), (test, -vectors(test, 2, told=True)))
    turned, other = bench.run(call, upstream=runs)
    assert turned["metrics"]["training_loss"] == metrics["training_loss"]
    assert (other / "curves.json").read_bytes() == (output / "curves.json").read_bytes()
    assert (other / "predictions.csv").read_bytes() != (output / "predictions.csv").read_bytes()
    assert turned["metrics"]["ua"] < 1
    write_pooled(runs["text"], (training, vectors(training, 1) * 0), (test, vectors(test, 2)))
    write_pooled(runs["audio"], (training, vectors(training, 1) * 0), (test, vectors(test, 2)))
    assert bench.run(call, upstream=runs)[0]["diverged"].startswith("final training loss 0.69")


def test_vectors_of_a_run(corpus: Manifest, runs: dict[str, Path], tmp_path: Path) -> None:
    """In the order of the split that asks; the same vectors are the same bytes; others than its utterances, or none, are one line."""
    training, test = splits(corpus)
    turned = training.subset(range(len(training) - 1, -1, -1))
    assert np.array_equal(read_pooled(runs["audio"], TRAINING, turned), vectors(training, 1)[::-1])
    first = (runs["audio"] / POOLED).read_bytes()
    write_pooled(tmp_path, (training, vectors(training, 1)), (test, vectors(test, 2)))
    assert (tmp_path / POOLED).read_bytes() == first
    assert NAMED == POOLED
    with pytest.raises(InputError, match=r"its utterances of the test split are not those of this stage; launch again"):
        read_pooled(tmp_path, TEST, training)
    (tmp_path / POOLED).write_bytes(first[:-8])
    with pytest.raises(InputError, match=r"pooled\.safetensors: cannot be read"):
        read_pooled(tmp_path, TEST, test)
    (tmp_path / POOLED).unlink()
    with pytest.raises(InputError, match=r"not there, as an earlier version computed this run; compute it again"):
        read_pooled(tmp_path, TEST, test)


@pytest.mark.slow
def test_planted_words_from_finished_runs(fused: Recipe, spoken: Manifest, tmp_path: Path) -> None:
    """Both runs leave the vectors of all utterances; the fusion is at least the best run but for one utterance of eight."""
    bench = Bench(spoken.folder, tmp_path / "bench")
    fused.fusion.layer.batch_size, fused.fusion.layer.learning_rate = 4, 5e-3
    call = REGISTRY.call("concat", fused, fold="1", seed=0)
    upstream = {role: bench.run(parent)[1] for role, parent in call.upstream.items()}
    for role, units in (("audio", 16), ("text", 32)):
        kept = load_file(upstream[role] / POOLED)
        assert {name: each.shape for name, each in kept.items()} == {TRAINING: (8, units), TEST: (8, units)}
    metrics = bench.run(call, upstream=upstream)[0]["metrics"]
    assert metrics["ua_text"] > 0.8
    assert metrics["ua"] >= max(metrics["ua_audio"], metrics["ua_text"]) - 0.13


def test_a_sweep_keeps_no_vectors(fused: Recipe, spoken: Manifest, tmp_path: Path) -> None:
    """Its runs are many, and no fusion reads them."""
    folds = (*FOLDS, "3")
    moved = [
        replace(each, fold="3", speaker="speaker3") if number % 2 and number > 8 else each for number, each in enumerate(spoken.utterances)
    ]
    manifest = write_manifest(spoken.folder, "spoken", folds, moved)
    fused.text.transcripts, fused.text.epochs, fused.text.batch_size = manifest.text_digest, 1, 2
    call = REGISTRY.call("text", fused, fold="1", seed=0, validation=("speaker3",))
    assert POOLED not in artifacts(Bench(manifest.folder, tmp_path / "bench").run(call)[1])


def test_the_runs_are_those_of_the_single_methods(fused: Recipe) -> None:
    """As for `score`; the settings of the layer are part of the fusion alone, and what it reads is no part of a key."""
    call = REGISTRY.calls("concat", fused)("2", 7)
    assert call.upstream == REGISTRY.calls("score", fused)("2", 7).upstream
    assert dict(call.settings) == {"concat": {"epochs": 100, "batch_size": 64, "learning_rate": 5e-4}}
    assert call.runtime["reads"] == {"audio": [POOLED], "text": [POOLED]}
    fused.fusion.audio = AudioMethod.ptapt
    assert REGISTRY.calls("concat", fused)("2", 7).upstream["audio"] == REGISTRY.calls("ptapt", fused)("2", 7)
    assert REGISTRY.calls("concat", fused)("2", 7).settings == call.settings


def test_what_is_refused_at_planning(fused: Recipe, spoken: Manifest, corpus: Manifest) -> None:
    """A corpus without transcripts, a batch of the layer that is too large, values out of range, and stages that text does not have."""
    fused.fusion.layer.batch_size = 8
    REGISTRY.check_corpus(spoken.folder, [("concat", fused)], NONE)
    with pytest.raises(InputError, match="noise: has no transcripts"):
        REGISTRY.check_corpus(corpus.folder, [("concat", fused)], NONE)
    fused.fusion.layer.batch_size = 9
    with pytest.raises(InputError, match=r"recipe\.fusion\.layer\.batch_size=9: more than the 8 training utterances"):
        REGISTRY.check_corpus(spoken.folder, [("concat", fused)], NONE)
    REGISTRY.check_corpus(spoken.folder, [("score", fused)], NONE)
    fused.two_stage.target = "utterance"
    for method in ("score", "concat"):
        with pytest.raises(InputError, match=f"recipe.two_stage.target=utterance: not together with {method}"):
            REGISTRY.check_corpus(spoken.folder, [(method, fused)], NONE)
    fused.fusion.layer.epochs, fused.fusion.layer.learning_rate = 0, 0.0
    with pytest.raises(InputError) as caught:
        REGISTRY.check(fused)
    assert [line.partition("=")[0] for line in caught.value.problems] == ["recipe.fusion.layer.epochs", "recipe.fusion.layer.learning_rate"]
