"""Fine-tuning first on another corpus: label maps, what either stage opens, keys, frozen parts, and what is refused before a launch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ser_core.corpora.manifest import Manifest, load_manifest, write_manifest
from ser_core.corpora.two_corpora import recording_problems, relabelled
from ser_core.errors import InputError
from ser_core.registry import REGISTRY
from ser_core.settings.finetune import Adaptor, AdaptorSettings
from ser_core.settings.recipe import Protocol, Recipe
from ser_core.settings.two_stage import SharedSpeakers, TrainedPart, TwoStageSettings
from ser_core.training.splits import Split
from tests.ser_core.stages.conftest import FOLDS, Bench
from tests.ser_core.stages.test_teams import Teams, close

GERMAN = {"angry": "wut", "sad": "trauer"}
LABELS = {"wut": "angry", "trauer": "sad", "rest": None}


@pytest.fixture(scope="module")
def data(corpus: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora of the same noise beside one another: `target`, and `source` with German labels and one utterance of a third."""
    folder = tmp_path_factory.mktemp("two corpora")
    for name in ("target", "source"):
        (folder / name).mkdir()
        (folder / name / "audio").symlink_to(corpus.folder / "audio")
    write_manifest(folder / "target", "target", FOLDS, corpus.utterances)
    acted = [
        replace(each, id=f"acted{place:02d}", label=GERMAN[each.label] if place else "rest") for place, each in enumerate(corpus.utterances)
    ]
    write_manifest(folder / "source", "source", ("1", "2"), acted)
    return folder


def two_corpora(recipe: Recipe, data: Path, shared: SharedSpeakers, **more: Any) -> Recipe:
    recipe.two_stage = TwoStageSettings(**{"corpus": "source", "source_labels": dict(LABELS), "shared_speakers": shared, **more})
    REGISTRY.pin_corpus("vft", recipe, data / "target")
    return recipe


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the utterances whose audio is read, as `CORPUS ID SPEAKER`."""
    found: list[str] = []
    read = Split.wave

    def noted(self: Split, position: int, *, keep: bool = True) -> torch.Tensor:
        each = self.utterances[position]
        found.append(f"{each.id} {each.speaker}")
        return read(self, position, keep=keep)

    monkeypatch.setattr(Split, "wave", noted)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("shared", [SharedSpeakers.same, SharedSpeakers.different])
def test_the_second_stage_starts_from_a_classifier_of_the_source_corpus(
    shared: SharedSpeakers, recipe: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a rate that changes no weight, after is before. The first stage opens the source corpus alone, without a held-out speaker.

    Nor does it open an utterance whose label is left out. The second stage opens that speaker's utterances of the source in the test only.
    """
    bench, names = Bench(data / "target", tmp_path), opened(monkeypatch)
    same = shared is SharedSpeakers.same
    call = REGISTRY.call("vft", two_corpora(recipe, data, shared), fold="1", seed=0)
    result, source = bench.run(call.upstream["start"])
    read = {name for name in names if name.startswith("acted")}
    assert set(names) == read
    assert {name.split()[1] for name in read} == ({"speaker2"} if same else {"speaker1", "speaker2"})
    assert not any(name.startswith("acted00") for name in read)
    assert result["metrics"]["training_utterances"] == (8 if same else 15)
    recipe.finetune.learning_rate = 1e-30
    names.clear()
    found, _ = bench.run(REGISTRY.call("vft", recipe, fold="1", seed=3), upstream={"start": source})
    metrics = found["metrics"]
    assert (found["classes"], metrics["ua"]) == (["angry", "sad"], metrics["ua_target_before"])
    assert {name for name in names if name.startswith("acted")} == ({f"acted{n:02d} speaker1" for n in range(2, 16, 2)} if same else set())
    assert metrics.get("source_utterances") == (7 if same else None)
    assert metrics.get("ua_source") == metrics.get("ua_source_before")


@pytest.mark.slow
def test_frozen_parts_stay_as_the_first_stage_left_them(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    """Head and LoRA are trained by the first stage; the second changes LoRA alone, counts it alone, and saves both.

    Layer drop leaves out both blocks in one of the steps: nothing that trains is in its loss then.
    """
    recipe.finetune.adaptors = AdaptorSettings(kinds=[Adaptor.lora], lora_rank=2)
    two_corpora(recipe, data, SharedSpeakers.different, freeze=[TrainedPart.head])
    call = REGISTRY.call("vft", recipe, fold="1", seed=0)
    bench = Bench(data / "target", tmp_path)
    source = bench.run(call.upstream["start"])[1]
    result, output = bench.run(call, upstream={"start": source})
    before = load_file(source / "classifier" / "adaptors.safetensors")
    after = load_file(output / "adaptors" / "adaptors.safetensors")
    assert before.keys() == after.keys()
    changed = {name.partition(".")[0] for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {"wav2vec2"}
    assert result["metrics"]["trained_parameters"] == sum(each.numel() for name, each in after.items() if not name.startswith("head"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_team_has_the_numbers_of_one_process_in_both_stages(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    """Two processes, with parts of two utterances."""
    recipe.execution.micro_batch, recipe.finetune.epochs = 2, 1
    call = REGISTRY.call("vft", two_corpora(recipe, data, SharedSpeakers.same), fold="2", seed=0)
    bench = Bench(data / "target", tmp_path)
    first = Teams(bench, tmp_path / "first", call.upstream["start"])
    alone, (team, output) = first.alone(), first.by(2)
    close(team["metrics"], alone[0]["metrics"])
    one, three = (load_file(folder / "classifier" / "adaptors.safetensors") for folder in (alone[1], output))
    assert all(torch.allclose(one[name], three[name], atol=1e-5) for name in one)
    second = Teams(bench, tmp_path / "second", call)
    close(second.by(2)[0]["metrics"], second.alone()[0]["metrics"])


def test_a_label_is_the_same_output_in_both_stages(data: Path) -> None:
    """Although the source's own labels are in another order, with one more before them."""
    source, target = load_manifest(data / "source"), load_manifest(data / "target")
    assert [LABELS[label] for label in source.classes] == [None, "sad", "angry"]
    outputs = []
    for manifest in (relabelled(source, LABELS), target):
        split = Split(manifest, manifest.utterances)
        outputs.append((split.classes, {(each.label, label) for each, label in zip(split.utterances, split.labels, strict=True)}))
    assert outputs[0] == outputs[1] == (("angry", "sad"), {("angry", 0), ("sad", 1)})


def test_keys(recipe: Recipe, data: Path) -> None:
    """One first stage for all folds if no speaker is shared, one per fold otherwise.

    The source corpus' digest and both maps are in the keys of what reads them, names and folders are not.
    """
    before = REGISTRY.call("vft", recipe, fold="1", seed=0)
    assert "two_stage" not in before.settings

    def calls(shared: SharedSpeakers, **more: Any) -> list[Any]:
        two_corpora(recipe, data, shared, **more)
        return [REGISTRY.call("vft", recipe, fold=fold, seed=0) for fold in FOLDS]

    different, same = calls(SharedSpeakers.different), calls(SharedSpeakers.same)
    assert different[0].upstream["start"] == different[1].upstream["start"]
    assert different[0].upstream["start"].fold == "all"
    assert [each.upstream["start"].settings["corpus"]["left_out"] for each in same] == [["speaker1"], ["speaker2"]]
    assert recipe.two_stage.left_out == {"1": ["speaker1"], "2": ["speaker2"]}
    digest = recipe.two_stage.digest
    for settings in (same[0].settings["two_stage"]["corpus"], same[0].upstream["start"].settings["corpus"]):
        assert settings == {"digest": digest, "labels": LABELS, "part": "", "left_out": ["speaker1"]}
    assert same[0].runtime["source_corpus"] == str(data / "source")
    mapped = calls(SharedSpeakers.different, target_labels={"angry": "angry", "sad": "sad"})[0]
    assert mapped.upstream["start"] == different[0].upstream["start"]
    assert mapped.settings != different[0].settings
    recipe.two_stage = TwoStageSettings(target_labels={"angry": "angry", "sad": "sad"})
    direct = REGISTRY.call("vft", recipe, fold="1", seed=0)
    assert (direct.upstream, direct.settings["two_stage"]["labels"]) == ({}, {"angry": "angry", "sad": "sad"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, ""),
        ({"shared_speakers": SharedSpeakers.refuse}, "source and target both have a speaker 'speaker1'; set it to same"),
        ({"source_labels": {**LABELS, "freude": "happy"}}, "source_labels: source has no label 'freude'; it has rest, trauer, wut"),
        ({"source_labels": {"wut": "angry", "trauer": "sad"}}, "source_labels: label 'rest' of source is not in the map"),
        ({"source_labels": {**LABELS, "rest": "calm"}}, "no utterance of target has the common label 'calm', which source has"),
        ({"source_labels": {**LABELS, "wut": "sad"}}, "no utterance of source has the common label 'angry', which target has"),
        ({"target_labels": {"angry": "angry", "sad": None}}, "no utterance of target has the common label 'sad', which source has"),
        ({"target_labels": {"sad": "sad"}}, "target_labels: label 'angry' of target is not in the map"),
        ({"source": "acted0[0-3]"}, "batch_size=4 is more than the number of its utterances, 3"),
        ({"source": "acted0[2367]"}, "source: no utterance of class 'angry' to train on in the first stage"),
        ({"corpus": "target", "source_labels": {}}, "target and target are the same corpus; for two parts of one corpus use"),
        ({"corpus": "absent"}, "recipe.two_stage.corpus=absent: not prepared (no "),
        ({"digest": "0" * 64}, "was prepared again since the launch"),
    ],
)
def test_what_is_refused_before_a_launch(changes: dict[str, Any], message: str, recipe: Recipe, data: Path) -> None:
    """In one line that names the corpus and what to do."""

    def check() -> None:
        shared, digest = changes.get("shared_speakers", SharedSpeakers.different), changes.get("digest")
        more = {key: value for key, value in changes.items() if key not in ("shared_speakers", "digest")}
        two_corpora(recipe, data, shared, **more)
        recipe.two_stage.digest = digest or recipe.two_stage.digest
        REGISTRY.check(recipe)
        REGISTRY.check_corpus(data / "target", [("vft", recipe)], dict.fromkeys(FOLDS, ()))

    if not message:
        check()
        return
    with pytest.raises(InputError) as caught:
        check()
    assert len(caught.value.problems) == 1
    assert message in str(caught.value)


def test_attributes_need_a_source_corpus_that_has_them(recipe: Recipe, data: Path) -> None:
    """In one line about the first stage; the target's own line is another."""
    recipe.finetune.attributes.weight = 0.5
    two_corpora(recipe, data, SharedSpeakers.different)
    with pytest.raises(InputError) as caught:
        REGISTRY.check_corpus(data / "target", [("vft", recipe)], {"1": ()})
    assert caught.value.problems[0].startswith(
        "recipe.two_stage: source: recipe.finetune.attributes.weight is set, but its utterances have no"
    )


def test_recordings_in_common_are_refused(data: Path) -> None:
    """By their samples, whatever their names; recordings without a digest are not compared."""
    source, target = (load_manifest(data / name) for name in ("source", "target"))
    assert list(recording_problems(source, target)) == []
    both = [
        replace(found, utterances=(replace(found.utterances[3], audio_digest="same"), *found.utterances[4:])) for found in (source, target)
    ]
    [line] = recording_problems(*both)
    assert "source and target have the recording utterance03 in common" in line


def test_settings_that_do_not_go_together_are_refused(recipe: Recipe, data: Path) -> None:
    """Other methods, other protocols, a sweep, parts to freeze that are not trained or are all that is."""
    two_corpora(recipe, data, SharedSpeakers.same)
    with pytest.raises(InputError, match="are for the method vft only, not tapt"):
        REGISTRY.call("tapt", recipe, fold="1", seed=0)
    with pytest.raises(InputError, match="a sweep trains on one corpus"):
        REGISTRY.check_corpus(data / "target", [("vft", recipe)], {"1": ("speaker2",)})
    for kinds, freeze, message in (
        ((), ["transformer"], ""),
        ((), ["lora"], "lora is not trained by the first stage, which trains head, transformer"),
        ((Adaptor.lora,), ["transformer"], "transformer is not trained by the first stage, which trains head, lora"),
        ((Adaptor.head,), ["head"], "nothing is left to train in the second stage"),
    ):
        recipe.finetune.adaptors.kinds, recipe.two_stage.freeze = list(kinds), [TrainedPart[name] for name in freeze]
        if not message:
            REGISTRY.check(recipe)
            continue
        with pytest.raises(InputError, match=message):
            REGISTRY.check(recipe)
    recipe.two_stage.freeze, recipe.protocol = [], Protocol.scripts_disjoint
    with pytest.raises(InputError, match=r"not together with recipe\.two_stage"):
        REGISTRY.check(recipe)


def test_a_worker_refuses_a_source_corpus_that_was_prepared_again(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    """Before anything is computed."""
    call = REGISTRY.call("vft", two_corpora(recipe, data, SharedSpeakers.different), fold="1", seed=0).upstream["start"]
    other = replace(call, settings={**call.settings, "corpus": {**call.settings["corpus"], "digest": "0" * 64}})
    with pytest.raises(InputError, match=r"was prepared again since the launch .* launch again"):
        Bench(data / "target", tmp_path).run(other)
