"""Fine-tuning in two stages: what each trains on and opens, where the second starts, what is scored and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ser_core.corpora.manifest import Manifest, write_manifest
from ser_core.errors import InputError
from ser_core.models.adaptor_files import load_adaptors
from ser_core.models.backbone import load_encoder
from ser_core.models.classifier import EmotionClassifier
from ser_core.registry import REGISTRY
from ser_core.settings.finetune import Adaptor, AdaptorSettings
from ser_core.settings.recipe import Recipe
from ser_core.settings.two_stage import TwoStageSettings
from ser_core.stages.finetune import adaptors_of
from ser_core.training.evaluate import predict, score, write_predictions
from ser_core.training.splits import Split
from tests.ser_core.stages.conftest import Bench, artifacts

FOLDS = ("1", "2")


@pytest.fixture(scope="module")
def acted(corpus: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The corpus of noise, its first four utterances of each fold acted (`script`), the others natural (`impro`)."""
    folder = tmp_path_factory.mktemp("acted")
    (folder / "audio").symlink_to(corpus.folder / "audio")
    named = [
        replace(each, id=f"{each.speaker}_{'script' if place // 2 < 4 else 'impro'}_{place:02d}")
        for place, each in enumerate(corpus.utterances)
    ]
    return write_manifest(folder, "acted", FOLDS, named)


def two_stage(recipe: Recipe, kinds: tuple[Adaptor, ...] = ()) -> Recipe:
    recipe.two_stage = TwoStageSettings(source="script", target="impro")
    recipe.finetune.adaptors = AdaptorSettings(kinds=list(kinds), bottleneck_units=4, lora_rank=2)
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [(), (Adaptor.ba, Adaptor.lora, Adaptor.ws, Adaptor.wg)], ids=["whole", "adaptors"])
def test_the_second_stage_starts_from_all_of_the_first(
    kinds: tuple[Adaptor, ...], recipe: Recipe, acted: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a rate that changes no weight it gives the first stage's predictions bit for bit; no stage trains on the held-out speaker."""
    bench = Bench(acted.folder, tmp_path)
    first = REGISTRY.call("vft", two_stage(recipe, kinds), fold="1", seed=0).upstream["start"]
    opened: list[str] = []
    read = Split.wave

    def noted(self: Split, position: int, *, keep: bool = True) -> torch.Tensor:
        opened.append(self.utterances[position].id)
        return read(self, position, keep=keep)

    monkeypatch.setattr(Split, "wave", noted)
    _, source = bench.run(first)
    assert {name.split("_")[0] for name in opened} == {"speaker2"}
    assert all("script" in name for name in opened)
    opened.clear()
    recipe.finetune.learning_rate = 1e-30
    second = REGISTRY.call("vft", recipe, fold="1", seed=3)
    result, output = bench.run(second, upstream={"start": source})
    assert all(name.startswith("speaker1") or "impro" in name for name in opened)
    metrics = result["metrics"]
    assert (metrics["ua_source"], metrics["ua"]) == (metrics["ua_source_before"], metrics["ua_target_before"])
    assert (metrics["test_utterances"], metrics["source_utterances"], metrics["training_utterances"]) == (4, 4, 4)

    torch.manual_seed(9)
    model = EmotionClassifier(load_encoder(recipe.backbone), 2, recipe.finetune.head.pooling, adaptors_of(recipe.finetune.adaptors))
    load_adaptors(model, source / "classifier")
    test = Split(acted, [each for each in acted.test("1") if "impro" in each.id])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    write_predictions(tmp_path / "predictions.csv", predict(model, test, 8), test)
    torch.set_num_threads(threads)
    assert (tmp_path / "predictions.csv").read_bytes() == (output / "predictions.csv").read_bytes()


@pytest.mark.slow
def test_both_parts_are_scored_after_either_stage(recipe: Recipe, acted: Manifest, tmp_path: Path) -> None:
    """The weights after the first stage are those in its artifact, after the second those that were trained further."""
    bench = Bench(acted.folder, tmp_path)
    call = REGISTRY.call("vft", two_stage(recipe, (Adaptor.lora,)), fold="2", seed=0)
    source = bench.run(call.upstream["start"])[1]
    result, output = bench.run(call, upstream={"start": source})
    for folder, names in ((source / "classifier", ("ua_source_before", "ua_target_before")), (output / "adaptors", ("ua_source", "ua"))):
        model = EmotionClassifier(load_encoder(recipe.backbone), 2, recipe.finetune.head.pooling, adaptors_of(recipe.finetune.adaptors))
        load_adaptors(model, folder)
        for pattern, name in zip(("script", "impro"), names, strict=True):
            test = Split(acted, [each for each in acted.test("2") if pattern in each.id])
            assert score(predict(model, test, 8), test).ua == result["metrics"][name]
    assert artifacts(source)["classifier/adaptors.safetensors"] != artifacts(output)["adaptors/adaptors.safetensors"]


def test_keys(recipe: Recipe) -> None:
    """The first stage is shared by the seeds of a fold; without parts every key is that of before; a target alone is one stage."""
    before = REGISTRY.call("tapt", recipe, fold="1", seed=0)
    calls = [REGISTRY.call("tapt", two_stage(recipe), fold="1", seed=seed) for seed in (0, 1)]
    assert "two_stage" not in before.settings
    assert calls[0].upstream == calls[1].upstream
    assert calls[0].upstream["backbone"] == calls[0].upstream["start"].upstream["backbone"] == before.upstream["backbone"]
    recipe.two_stage.learning_rate = 1e-5
    slower = REGISTRY.call("tapt", recipe, fold="1", seed=0)
    assert slower.upstream == calls[0].upstream
    rates = {"finetune": {**calls[0].settings["finetune"], "learning_rate": 1e-5}}
    assert slower.settings == {**calls[0].settings, **rates}
    recipe.two_stage.source, recipe.two_stage.learning_rate = "", None
    alone = REGISTRY.call("tapt", recipe, fold="1", seed=0)
    assert set(alone.upstream) == {"backbone"}
    assert alone.settings["two_stage"] == {"source": "", "target": "impro"}


def test_what_is_refused(recipe: Recipe, acted: Manifest) -> None:
    """At planning: source without target, a second rate of 0 or without a first stage, no regular expression, parts that do not fit."""
    recipe.two_stage = TwoStageSettings(source="script")
    with pytest.raises(InputError, match=r"recipe.two_stage.source=script: name the part of the second stage too"):
        REGISTRY.check(recipe)
    for source, rate, message in (("script", 0.0, "must be above 0"), ("", 1e-5, "there is no first stage; leave it out, or name")):
        recipe.two_stage = TwoStageSettings(source=source, target="impro", learning_rate=rate)
        with pytest.raises(InputError, match=rf"recipe\.two_stage\.learning_rate={rate}: {message}"):
            REGISTRY.check(recipe)
    recipe.two_stage = TwoStageSettings(target="(")
    with pytest.raises(InputError, match=r"recipe.two_stage.target=\(: not a regular expression"):
        REGISTRY.check(recipe)
    for source, target, batch, message in (
        ("script", "impro", 4, ""),
        ("script", "speaker", 4, "utterance speaker2_script_01 of acted is in both parts"),
        ("script_0[0145]", "impro", 1, "no utterance of class 'sad' to train on"),
        ("script", "impro", 5, "batch_size=5 is more than the number of its utterances, 4"),
    ):
        recipe.two_stage, recipe.finetune.batch_size = TwoStageSettings(source, target), batch
        if not message:
            REGISTRY.check_corpus(acted.folder, [("vft", recipe)], {"1": ()})
            continue
        with pytest.raises(InputError, match=message) as caught:
            REGISTRY.check_corpus(acted.folder, [("vft", recipe)], {"1": ()})
        assert len(caught.value.problems) == 1
