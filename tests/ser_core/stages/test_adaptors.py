"""Fine-tuning of adaptors as a stage: what is counted, kept and refused; keys of full fine-tuning stay; resumed is uninterrupted."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ser_core.corpora.manifest import Manifest
from ser_core.errors import InputError, Interrupted
from ser_core.keyed import keyed
from ser_core.models.adaptor_files import load_adaptors
from ser_core.models.backbone import load_encoder
from ser_core.models.classifier import EmotionClassifier
from ser_core.registry import REGISTRY
from ser_core.settings.execution import FeatureCache
from ser_core.settings.finetune import Adaptor, AdaptorSettings, FinetuneSettings
from ser_core.settings.recipe import Recipe
from ser_core.settings.two_stage import TwoStageSettings
from ser_core.stages.finetune import adaptors_of
from ser_core.training.evaluate import predict, write_predictions
from ser_core.training.splits import Split
from tests.ser_core.stages.conftest import Bench, artifacts, curves
from tests.ser_core.stages.test_relief import DROPOUTS
from tests.ser_core.stages.test_stages import stop_after
from tests.ser_core.stages.test_teams import Teams, close, predictions

ALL = [Adaptor.ba, Adaptor.lora, Adaptor.ws, Adaptor.wg]
HIDDEN, LAYERS, UNITS, RANK = 16, 2, 4, 2
COUNTS = {
    "head": 0,
    "ba": LAYERS * (2 * HIDDEN * UNITS + UNITS + HIDDEN),
    "lora": LAYERS * 3 * 2 * HIDDEN * RANK,
    "ws": LAYERS + 1,
    "wg": LAYERS * HIDDEN,
}
HEAD = 2 * HIDDEN + 2


def with_adaptors(recipe: Recipe, kinds: list[Adaptor]) -> Recipe:
    recipe.finetune.adaptors = AdaptorSettings(kinds=kinds, bottleneck_units=UNITS, lora_rank=RANK)
    recipe.finetune.clip_norm = 1.0
    recipe.finetune.learning_rate = 5e-3
    return recipe


@pytest.mark.slow
def test_what_is_counted_and_kept(bench: Bench, recipe: Recipe, corpus: Manifest, tmp_path: Path) -> None:
    """All adaptors, interrupted in the middle: the artifacts of an uninterrupted stage; base model and file give its predictions."""
    call = REGISTRY.call("vft", with_adaptors(recipe, ALL), fold="1", seed=0)
    result, output = bench.run(call)
    assert result["metrics"]["trained_parameters"] == sum(COUNTS.values()) + HEAD
    assert result["metrics"]["parameters"] > 5 * result["metrics"]["trained_parameters"]

    asked = itertools.count()  # once for each utterance of the front end, then once a step
    with pytest.raises(Interrupted):
        bench.run(call, checkpoint=tmp_path / "checkpoint", should_stop=lambda: next(asked) >= 11)
    resumed, again = bench.run(call, checkpoint=tmp_path / "checkpoint")
    assert any("resumed after step" in line for line in bench.lines)
    assert resumed["metrics"] == result["metrics"]
    kept = {name: content for name, content in artifacts(output).items() if name.startswith("adaptors/") or name == "predictions.csv"}
    assert len(kept) == 3
    assert kept.items() <= artifacts(again).items()

    model = EmotionClassifier(load_encoder(recipe.backbone), 2, recipe.finetune.head.pooling, adaptors_of(recipe.finetune.adaptors))
    load_adaptors(model, output / "adaptors")
    test = Split(corpus, corpus.test("1"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    write_predictions(tmp_path / "predictions.csv", predict(model, test, 8), test)
    torch.set_num_threads(threads)
    assert (tmp_path / "predictions.csv").read_bytes() == (output / "predictions.csv").read_bytes()


@pytest.mark.slow
def test_two_processes_train_the_same_adaptors_in_two_stages(bench: Bench, recipe: Recipe, tmp_path: Path) -> None:
    """All adaptors, dropout on, parts of two utterances: loss curves, metrics, predictions and every trained weight of one process."""
    recipe.backbone.config |= {"layerdrop": 0.3, "hidden_dropout": 0.2, "attention_dropout": 0.2, "activation_dropout": 0.2}
    recipe.execution.micro_batch, recipe.execution.log_every = 2, 1
    recipe.two_stage = TwoStageSettings(source="utterance0[0-7]", target="utterance(0[89]|1)")
    call = REGISTRY.call("vft", with_adaptors(recipe, ALL), fold="1", seed=0)
    second = Teams(bench, tmp_path / "second", call)
    first_alone = second.upstream["start"]
    expected, second_alone = second.alone()
    _, first_by_two = Teams(bench, tmp_path / "first", call.upstream["start"]).by(2)
    second.upstream = {"start": first_by_two}
    found, second_by_two = second.by(2)
    assert {"ua_source", "ua_source_before", "ua_target_before"} < expected["metrics"].keys()
    close(found["metrics"], expected["metrics"])
    assert predictions(second_by_two) == pytest.approx(predictions(second_alone), abs=2e-6)
    for two, one, folder in ((first_by_two, first_alone, "classifier"), (second_by_two, second_alone, "adaptors")):
        close(dict(curves(two)["train/loss"]), dict(curves(one)["train/loss"]))
        weights, reference = (load_file(each / folder / "adaptors.safetensors") for each in (two, one))
        assert weights.keys() == reference.keys()
        for name, weight in reference.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_adaptors_are_resumed_in_smaller_parts(bench: Bench, recipe: Recipe, tmp_path: Path) -> None:
    """After memory ran out at the third step: the numbers of the whole batch, up to the order of sums."""
    recipe.backbone.config |= dict.fromkeys(DROPOUTS, 0.0)
    recipe.execution.feature_cache = FeatureCache.none  # so that the stop comes at a step
    recipe.execution.log_every = 1
    call = REGISTRY.call("vft", with_adaptors(recipe, ALL), fold="1", seed=0)
    expected, whole = bench.run(call)
    with pytest.raises(Interrupted):
        bench.run(call, checkpoint=tmp_path / "resumable", should_stop=stop_after(2))
    found, output = bench.run(call, checkpoint=tmp_path / "resumable", relief=1)
    assert found["durations"]["resumed_at_step"] == 2
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-4)
    losses, reference = (dict(curves(folder)["train/loss"]) for folder in (output, whole))
    assert [losses[1], losses[2]] == [reference[1], reference[2]]
    assert losses == pytest.approx(reference, rel=1e-4)
    assert losses[3] != reference[3]  # sums in another order: the parts were smaller


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [[Adaptor.head], [Adaptor.lora], [Adaptor.ba]], ids=lambda kinds: kinds[0].name)
def test_each_adaptor_trains(bench: Bench, recipe: Recipe, kinds: list[Adaptor]) -> None:
    """Counted by the closed form; composable with a pretrained start."""
    recipe.tapt.steps = 1
    call = REGISTRY.call("tapt", with_adaptors(recipe, kinds), fold="1", seed=0)
    result, _ = bench.run(call)
    assert result["metrics"]["trained_parameters"] == sum(COUNTS[kind.name] for kind in kinds) + HEAD


def test_keys(recipe: Recipe) -> None:
    """Without adaptors the settings of the stage are those of before; with them they are part of the key, and only of `finetune`."""
    assert not {"adaptors", "clip_norm"} & set(keyed(FinetuneSettings()))
    before = REGISTRY.call("tapt", recipe, fold="1", seed=0)
    after = REGISTRY.call("tapt", with_adaptors(recipe, ALL), fold="1", seed=0)
    assert before.settings != after.settings
    assert after.settings["finetune"]["adaptors"]["kinds"] == ["ba", "lora", "ws", "wg"]
    assert before.upstream == after.upstream
    assert recipe.trained("vft")[-1] == "fine-tuning (ba + lora + ws + wg only) of 3 epochs"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (AdaptorSettings(kinds=[Adaptor.head, Adaptor.ba]), "kinds=.*head trains nothing but the head"),
        (AdaptorSettings(kinds=[Adaptor.ba, Adaptor.ba]), "name each adaptor once"),
        (AdaptorSettings(lora_targets=["query"]), "query unknown; known are q_proj"),
        (AdaptorSettings(lora_targets=[]), "at least one projection"),
        (AdaptorSettings(lora_rank=0), "lora_rank=0: must be at least 1"),
        (AdaptorSettings(lora_alpha=0), "lora_alpha=0: must be above 0"),
    ],
)
def test_what_is_refused(recipe: Recipe, settings: AdaptorSettings, message: str) -> None:
    """In one line that names the key, before a launch."""
    recipe.finetune.adaptors = settings
    with pytest.raises(InputError, match=message) as caught:
        REGISTRY.check(recipe)
    assert len(caught.value.problems) == 1
