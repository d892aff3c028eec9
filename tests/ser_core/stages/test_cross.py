"""The method `cross`: a classifier of the states of two frozen encoders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ser_core.corpora.manifest import Manifest, write_manifest
from ser_core.errors import InputError, Interrupted
from ser_core.registry import REGISTRY
from ser_core.settings.execution import Precision
from ser_core.settings.recipe import Recipe
from ser_core.settings.text import AudioMethod, CrossSettings
from tests.ser_core.stages.conftest import Bench, artifacts
from tests.ser_core.stages.test_stages import stop_after


@pytest.fixture
def crossed(fused: Recipe) -> Recipe:
    fused.fusion.cross = CrossSettings(
        heads=2, units=16, epochs=8, batch_size=4, learning_rate=1e-2, precision=Precision.float32, dropout=0.1
    )
    return fused


@pytest.mark.slow
def test_a_run_and_what_its_training_reads(crossed: Recipe, spoken: Manifest, tmp_path: Path) -> None:
    """It learns; resumed it writes the same bytes; other transcripts of the test fold change predictions and no loss."""
    call = REGISTRY.call("cross", crossed, fold="1", seed=3)
    bench = Bench(spoken.folder, tmp_path / "bench")
    whole, output = bench.run(call)
    metrics = whole["metrics"]
    assert (metrics["steps"], metrics["test_utterances"], whole["diverged"]) == (16, 8, "")
    assert metrics["training_loss"] < 0.3
    with pytest.raises(Interrupted):
        bench.run(call, checkpoint=tmp_path / "kept", should_stop=stop_after(10))
    resumed, again = bench.run(call, checkpoint=tmp_path / "kept")
    assert 0 < resumed["durations"]["resumed_at_step"] < 16
    assert (resumed["metrics"], artifacts(again)) == (metrics, artifacts(output))
    changed = [replace(each, text="damn damn") if each.fold == "1" else each for each in spoken.utterances]
    other = write_manifest(spoken.folder, "spoken", spoken.folds, changed)
    REGISTRY.pin_corpus("cross", crossed, other.folder)
    second, turned = bench.run(REGISTRY.call("cross", crossed, fold="1", seed=3))
    assert second["metrics"]["training_loss"] == metrics["training_loss"]
    assert (turned / "curves.json").read_bytes() == (output / "curves.json").read_bytes()
    assert (turned / "predictions.csv").read_bytes() != (output / "predictions.csv").read_bytes()


def test_its_key_holds_the_encoders_and_no_fine_tuning(crossed: Recipe) -> None:
    """Of V-FT the backbone, of TAPT its pretraining, shared with the method; settings of fine-tuning change nothing."""
    call = REGISTRY.calls("cross", crossed)("2", 7)
    assert (call.seed, set(call.settings), dict(call.upstream)) == (7, {"cross", "text", "text_encoder", "backbone"}, {})
    assert call.runtime["weights"].count("random weights") == 2
    crossed.finetune.epochs, crossed.text.epochs = 1, 1
    assert REGISTRY.calls("cross", crossed)("2", 7).settings == call.settings
    crossed.fusion.audio = AudioMethod.tapt
    tapt = REGISTRY.calls("cross", crossed)("2", 7)
    assert tapt.upstream == REGISTRY.calls("tapt", crossed)("2", 7).upstream
    assert "backbone" not in tapt.settings


def test_what_is_refused(crossed: Recipe, spoken: Manifest, corpus: Manifest, bench: Bench) -> None:
    """At planning a corpus without transcripts and a large batch; in the stage, heads that do not divide a width."""
    with pytest.raises(InputError, match="noise: has no transcripts"):
        REGISTRY.check_corpus(corpus.folder, [("cross", crossed)], {"1": ()})
    crossed.fusion.cross.batch_size = 9
    with pytest.raises(InputError, match=r"recipe\.fusion\.cross\.batch_size=9: more than the 8 training utterances"):
        REGISTRY.check_corpus(spoken.folder, [("cross", crossed)], {"1": ()})
    crossed.fusion.cross.heads = 3
    with pytest.raises(InputError, match=r"recipe\.fusion\.cross\.heads=3: does not divide the widths of the encoders"):
        Bench(spoken.folder, bench.root).run(REGISTRY.call("cross", crossed, fold="1", seed=0))
