"""The method `text`: planted words are learnt, scripts that leak are shown by the protocol, and nothing of the test fold is read."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ser_core.corpora.manifest import Manifest, load_manifest, write_manifest
from ser_core.errors import InputError, Interrupted
from ser_core.models.needed_weights import needed_weights
from ser_core.models.text_encoder import load_text_encoder, tokens_of
from ser_core.registry import REGISTRY, StageCall
from ser_core.settings.recipe import Protocol, Recipe
from ser_core.settings.text import TextEncoderSettings
from ser_core.training.evaluate import PREDICTIONS, write_predictions
from ser_core.training.pooled import write_pooled
from ser_core.training.splits import Split
from tests.ser_core.models.unsafe import RunsCode
from tests.ser_core.stages.conftest import Bench, artifacts, curves
from tests.ser_core.stages.test_stages import stop_after
from tests.ser_core.text_cases import SESSIONS, by_mood, by_nothing, by_script, corpus_of_texts, text_recipe, tokenizer_folder

NOISE = 0.1  # of a difference of UA over 128 utterances
FOLDS: dict[str, tuple[str, ...]] = dict.fromkeys(SESSIONS, ())


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def moods(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return corpus_of_texts(tmp_path_factory.mktemp("moods"), by_mood)


@pytest.fixture
def recipe(tokenizer: Path, moods: Manifest) -> Recipe:
    found = text_recipe(tokenizer)
    REGISTRY.pin_corpus("text", found, moods.folder)
    return found


@pytest.fixture
def bench(moods: Manifest, tmp_path: Path) -> Bench:
    return Bench(moods.folder, tmp_path)


def mean_ua(recipe: Recipe, manifest: Manifest, root: Path) -> float:
    """Mean UA over all folds."""
    REGISTRY.pin_corpus("text", recipe, manifest.folder)
    REGISTRY.check_corpus(manifest.folder, [("text", recipe)], FOLDS)
    bench = Bench(manifest.folder, root)
    return float(np.mean([bench.run(REGISTRY.call("text", recipe, fold=fold, seed=0))[0]["metrics"]["ua"] for fold in manifest.folds]))


@pytest.mark.slow
def test_planted_words_are_learnt_and_leaking_scripts_are_shown(recipe: Recipe, moods: Manifest, tmp_path: Path) -> None:
    """A word of the class is learnt under both protocols; a script that decides the class only where it is trained on too."""
    scripts = corpus_of_texts(tmp_path / "scripts", by_script)
    found = {}
    for protocol in Protocol:
        recipe.protocol = protocol
        for name, corpus in (("moods", moods), ("scripts", scripts)):
            found[name, protocol.name] = mean_ua(recipe, corpus, tmp_path / f"{name}-{protocol.name}")
    assert found["moods", "sessions"] > 0.9
    assert found["moods", "scripts_disjoint"] > 0.75
    assert found["scripts", "sessions"] > 0.9
    assert found["scripts", "scripts_disjoint"] < 0.7  # chance: 0.5


@pytest.mark.slow
def test_words_that_say_nothing_are_at_chance_and_change_no_fusion(recipe: Recipe, tmp_path: Path) -> None:
    """The negative control, over all folds: 128 utterances, of which chance gets half, with a standard deviation of 4.4 %.

    Fused with an audio run that is right in three of four, by scores and by a layer, they make it neither better nor worse beyond noise;
    an audio run that knows the class in place of the text makes it better than that.
    """
    corpus = corpus_of_texts(tmp_path / "nothing", by_nothing)
    REGISTRY.pin_corpus("text", recipe, corpus.folder)
    bench = Bench(corpus.folder, tmp_path / "runs")
    found: dict[str, list[float]] = {name: [] for name in ("text", "audio", "score", "concat", "told")}
    settings = {"score": {"text_weight": 0.5}, "concat": {"epochs": 8, "batch_size": 32, "learning_rate": 0.05}}
    for fold in corpus.folds:
        result, text = bench.run(REGISTRY.call("text", recipe, fold=fold, seed=0))
        found["text"].append(result["metrics"]["ua"])
        audio, told = (audio_run(tmp_path / f"{name}{fold}", corpus, fold, heard) for name, heard in (("audio", 0.7), ("told", 5.0)))
        for name, upstream in (("score", text), ("concat", text), ("told", told)):
            stage = "score" if name == "told" else name
            call = StageCall(stage, 1, {stage: settings[stage]}, {"execution": {"device": "cpu"}}, fold, 0)
            metrics = bench.run(call, upstream={"audio": audio, "text": upstream})[0]["metrics"]
            found[name].append(metrics["ua"])
        found["audio"].append(metrics["ua_audio"])
    means = {name: float(np.mean(values)) for name, values in found.items()}
    assert means["text"] == pytest.approx(0.5, abs=0.2)
    assert means["audio"] == pytest.approx(0.75, abs=0.1)
    assert means["score"] == pytest.approx(means["audio"], abs=NOISE)
    assert means["concat"] == pytest.approx(means["audio"], abs=NOISE)
    assert means["told"] > means["audio"] + NOISE


def audio_run(folder: Path, corpus: Manifest, fold: str, heard: float) -> Path:
    """What a run of audio leaves for a fusion; its score of a class is `heard` away from the middle, in standard deviations."""
    draw = np.random.default_rng(int(fold))
    splits = [Split(corpus, part) for part in (corpus.training(fold), corpus.test(fold))]
    training, test = ((split, heard * (2 * np.array(split.labels) - 1) + draw.standard_normal(len(split))) for split in splits)
    folder.mkdir()
    logits = np.stack([-test[1], test[1]], axis=1).astype(np.float32)
    write_predictions(folder / PREDICTIONS, logits, test[0])
    write_pooled(folder, *((split, scores[:, None].astype(np.float32)) for split, scores in (training, test)))
    return folder


def test_results_and_predictions(recipe: Recipe, bench: Bench, moods: Manifest) -> None:
    """As of the other methods, with the scores of scripted and improvised turns apart."""
    result, output = bench.run(REGISTRY.call("text", recipe, fold="1", seed=0))
    metrics = result["metrics"]
    with (output / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [each.id for each in moods.test("1")]
    assert metrics["wa"] == np.mean([row["label"] == row["predicted"] for row in rows])
    assert metrics["test_utterances"] == 32
    for kind, part in (("scripted", "_script"), ("improvised", "_impro")):
        chosen = [row for row in rows if part in row["id"]]
        recalls = [np.mean([row["predicted"] == label for row in chosen if row["label"] == label]) for label in moods.classes]
        assert metrics[f"ua_{kind}"] == pytest.approx(np.mean(recalls))
    assert result["arithmetic"] == {"device": "cpu", "precision": "float32"}
    assert result["diverged"] == ""
    assert len(dict(curves(output)["train/loss"])) == metrics["steps"] == 4 * 6


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_numbers_of_an_uninterrupted_one(recipe: Recipe, bench: Bench, tmp_path: Path) -> None:
    """With dropout, twice with one seed, and after a stop; another seed gives others."""
    recipe.text.epochs = 2
    call = REGISTRY.call("text", recipe, fold="1", seed=3)
    whole, output = bench.run(call)
    again, other = bench.run(call)
    assert (again["metrics"], artifacts(other)) == (whole["metrics"], artifacts(output))
    with pytest.raises(Interrupted):
        bench.run(call, checkpoint=tmp_path / "kept", should_stop=stop_after(5))
    resumed, third = bench.run(call, checkpoint=tmp_path / "kept")
    assert resumed["durations"]["resumed_at_step"] == 5
    assert resumed["metrics"] == whole["metrics"]
    assert (third / "predictions.csv").read_bytes() == (output / "predictions.csv").read_bytes()
    assert bench.run(replace(call, seed=4))[0]["metrics"]["training_loss"] != whole["metrics"]["training_loss"]


@pytest.mark.slow
def test_micro_batches_add_up_to_the_step(recipe: Recipe, bench: Bench) -> None:
    """After memory ran out the losses are the same up to the order of summation, without dropout."""
    recipe.text.encoder.config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    recipe.text.epochs, recipe.execution.micro_batch = 1, 5
    call = REGISTRY.call("text", recipe, fold="1", seed=0)
    losses = [dict(curves(bench.run(call, relief=relief)[1])["train/loss"]) for relief in (0, 2)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_no_transcript_of_the_test_fold_is_read_in_training(recipe: Recipe, bench: Bench, moods: Manifest, tmp_path: Path) -> None:
    """Other transcripts in the held-out fold: the same training, bit for bit, and other predictions."""
    recipe.text.epochs = 1
    changed = [replace(each, text=f"damn {each.text}") if each.fold == "1" else each for each in moods.utterances]
    other = write_manifest(tmp_path, "texts", moods.folds, changed)
    results = []
    for manifest in (moods, other):
        REGISTRY.pin_corpus("text", recipe, manifest.folder)
        results.append(Bench(manifest.folder, tmp_path / manifest.text_digest[:8]).run(REGISTRY.call("text", recipe, fold="1", seed=0)))
    (first, one), (second, two) = results
    assert first["metrics"]["training_loss"] == second["metrics"]["training_loss"]
    assert curves(one) == curves(two)
    assert (one / "predictions.csv").read_text() != (two / "predictions.csv").read_text()


def test_an_encoder_from_a_folder(recipe: Recipe, tokenizer: Path, tmp_path: Path) -> None:
    """The same weights and tokens as from the configuration; its identity is its content, tokenizer included; none that runs code."""
    encoder, words = load_text_encoder(recipe.text.encoder)
    folder = tmp_path / "encoder"
    encoder.save_pretrained(folder)
    words.save_pretrained(folder)
    loaded, own = load_text_encoder(TextEncoderSettings(checkpoint=str(folder)))
    assert all((loaded.state_dict()[name] == tensor).all() for name, tensor in encoder.state_dict().items())
    assert tokens_of(own, ["Damn the unheard bus", ""], 5) == [[2, 14, 4, 1, 3], [2, 3]]
    recipe.text.encoder = TextEncoderSettings(checkpoint=str(folder))
    call = REGISTRY.call("text", recipe, fold="1", seed=0)
    assert set(call.settings["text_encoder"]) == {"weights", "config", "tokenizer"}
    assert str(folder) not in str(call.settings)
    recipe.text.encoder.config = {}
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="no tokenizer here"):
        REGISTRY.call("text", recipe, fold="1", seed=0)
    (folder / "model.safetensors").unlink()
    torch.save({"x": RunsCode(tmp_path / "mark")}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="encoder: cannot be loaded as a text encoder: Weights only load failed"):
        load_text_encoder(TextEncoderSettings(checkpoint=str(folder), tokenizer=str(tokenizer)))
    assert not (tmp_path / "mark").exists()


def test_a_tokenizer_or_transcripts_that_have_changed_since_the_launch(recipe: Recipe, bench: Bench, tmp_path: Path) -> None:
    """A stage refuses them: its key states others."""
    recipe.text.encoder.tokenizer = str(tokenizer_folder(tmp_path / "own"))
    call = REGISTRY.call("text", recipe, fold="1", seed=0)
    changed = replace(call, settings={**call.settings, "text": {**call.settings["text"], "transcripts": "0" * 64}})
    with pytest.raises(InputError, match="other transcripts since the launch"):
        bench.run(changed)
    file = tmp_path / "own" / "tokenizer_config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(InputError, match="not the weights or the tokenizer this stage was planned with"):
        bench.run(call)


def test_what_is_refused_at_planning(recipe: Recipe, corpus: Manifest, moods: Manifest, tmp_path: Path) -> None:
    """One line each: a corpus without transcripts, with some, with others than planned; a large batch; scripts that names do not tell."""

    def refused(manifest: Manifest, folds: dict[str, tuple[str, ...]]) -> str:
        with pytest.raises(InputError) as caught:
            REGISTRY.check_corpus(manifest.folder, [("text", recipe)], folds)
        (line,) = caught.value.problems
        return line

    own: dict[str, tuple[str, ...]] = {"1": (), "2": ()}
    assert refused(corpus, own).startswith("noise: has no transcripts, which the method text reads; prepare it with them")
    some = [replace(each, text=None) if each.id.endswith("F003") else each for each in moods.utterances]
    assert "utterances without a transcript: 32 of 128, Ses01F_impro01_F003 first" in refused(
        write_manifest(tmp_path, "some", SESSIONS, some), FOLDS
    )
    recipe.text.batch_size = 97
    assert "recipe.text.batch_size=97: more than the 96 training utterances" in refused(moods, FOLDS)
    recipe.text.batch_size = 16
    REGISTRY.check_corpus(moods.folder, [("text", recipe)], FOLDS)
    recipe.text.transcripts = "0" * 64
    assert "prepared with other transcripts since the launch" in refused(moods, FOLDS)
    recipe.protocol = Protocol.scripts_disjoint
    with pytest.raises(InputError, match="the name of utterance utterance00 has no script"):
        REGISTRY.check_corpus(corpus.folder, [("vft", recipe)], {"1": ()})


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda each: setattr(each, "tokenizer", None), "recipe.text.encoder.tokenizer: not set"),
        (lambda each: setattr(each, "config", {}), "neither checkpoint nor config with a model_type is set"),
        (lambda each: setattr(each, "checkpoint", "./nowhere"), r"./nowhere: no such encoder folder; recipe.text.encoder.checkpoint is"),
        (lambda each: each.__dict__.update(checkpoint="x/y", revision="main"), "revision=main: name the commit of x/y"),
    ],
)
def test_encoders_that_are_refused(change: Callable[[TextEncoderSettings], object], line: str, recipe: Recipe) -> None:
    change(recipe.text.encoder)
    with pytest.raises(InputError, match=line):
        REGISTRY.call("text", recipe, fold="1", seed=0)


def test_a_name_of_the_hub_is_never_downloaded(recipe: Recipe, bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is not in the local cache is named with the command that fetches it, before a launch and in the stage."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    recipe.text.encoder = TextEncoderSettings()
    (needed,) = needed_weights("text", recipe)
    assert (needed.key, needed.downloadable) == ("recipe.text.encoder.checkpoint", False)
    assert f"run `hf download google-bert/bert-base-uncased --revision {recipe.text.encoder.revision}`" in needed.missing
    with pytest.raises(InputError, match="hf download google-bert/bert-base-uncased"):
        bench.run(REGISTRY.call("text", recipe, fold="1", seed=0))


def test_keys(recipe: Recipe, moods: Manifest) -> None:
    """Transcripts, encoder and protocol are part of the stage; of other methods the protocol only, if it is not `sessions`."""
    call = REGISTRY.call("text", recipe, fold="1", seed=0)
    assert call.settings["text"]["transcripts"] == load_manifest(moods.folder).text_digest
    assert set(call.settings) == {"text", "text_encoder"}
    assert (call.stage, dict(call.upstream)) == ("text", {})
    assert call.runtime["weights"] == "text encoder bert with random weights (seed 0)"
    assert "encoder" not in call.settings["text"]
    audio = Recipe()
    audio.backbone.checkpoint, audio.backbone.config = None, {"hidden_size": 8}
    before = REGISTRY.call("tapt", audio, fold="1", seed=0)
    audio.text = recipe.text
    assert REGISTRY.call("tapt", audio, fold="1", seed=0).settings == before.settings
    audio.protocol = Protocol.scripts_disjoint
    after = REGISTRY.call("tapt", audio, fold="1", seed=0)
    assert after.settings == {**before.settings, "protocol": "scripts_disjoint"}
    assert after.upstream["backbone"].settings["protocol"] == "scripts_disjoint"
