"""Stages of a sweep never read the held-out fold: they give the same results with its recordings deleted and its labels wrong."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from ser_core.corpora.manifest import VALIDATION, Manifest, Utterance, load_manifest, write_manifest
from ser_core.corpora.validation import FIXED_PART
from ser_core.errors import InputError
from ser_core.registry import REGISTRY, StageCall
from ser_core.settings.execution import FeatureCache
from ser_core.settings.recipe import Recipe
from tests.ser_core.stages.conftest import CLASSES, Bench, artifacts, curves

FOLDS = ("1", "2", "3", "4")
EACH = 4  # utterances of a speaker, two of each class
VALIDATED = {"1": ("F2", "M2"), "2": ("F3", "M3"), "3": ("F4", "M4"), "4": ("F1", "M1")}


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Four folds of a woman and a man, recordings on disk."""
    return recorded(tmp_path_factory.mktemp("sessions"), {fold: (f"F{fold}", f"M{fold}") for fold in FOLDS}, FOLDS)


def recorded(folder: Path, speakers: Mapping[str, tuple[str, ...]], folds: tuple[str, ...]) -> Manifest:
    (folder / "audio").mkdir()
    rng = np.random.default_rng(0)
    utterances = []
    for fold, names in speakers.items():
        for speaker in names:
            for number in range(EACH):
                # Some too short for an emotion state; they have one all the same.
                samples = 600 if (speaker[0], number) == ("M", 3) else int(rng.integers(4_000, 12_000))
                identifier = f"{speaker}-{number}"
                path = f"audio/{identifier}.flac"
                soundfile.write(folder / path, 0.1 * rng.standard_normal(samples), 16_000, subtype="PCM_16")
                utterances.append(Utterance(identifier, path, samples, CLASSES[number % 2], speaker, fold))
    return write_manifest(folder, "sessions", folds, utterances)


def without(corpus: Manifest, speakers: tuple[str, ...], folder: Path, *, swapped: bool = False) -> Path:
    """A copy in which the recordings of some speakers are deleted; `swapped`: with wrong labels too."""
    shutil.copytree(corpus.folder, folder)
    copied = load_manifest(folder)
    for utterance in copied.utterances:
        if utterance.speaker in speakers:
            copied.audio_path(utterance).unlink()
    if swapped:
        false = dict(zip(CLASSES, reversed(CLASSES), strict=True))
        changed = [dataclasses.replace(u, label=false[u.label]) if u.speaker in speakers else u for u in copied.utterances]
        write_manifest(folder, copied.corpus, copied.folds, changed)
    return folder


def swept(recipe: Recipe, fold: str, corpus: Manifest) -> StageCall:
    """The fine-tuning of a sweep's run."""
    validation = {fold: REGISTRY.validation_speakers(corpus.folder, fold)}
    return REGISTRY.calls("ptapt", recipe, validation)(fold, 0)


def chain(bench: Bench, call: StageCall) -> dict[str, tuple[dict[str, Any], Path]]:
    """Result and output folder of a run and of all its stages upstream, each computed once."""
    states = next(iter(call.upstream["backbone"].upstream.values())).upstream["states"]
    found = {"states": bench.run(states, upstream={})}
    ptapt = call.upstream["backbone"]
    for role, cluster in ptapt.upstream.items():
        found[role] = bench.run(cluster, upstream={"states": found["states"][1]})
    found["ptapt"] = bench.run(ptapt, upstream={role: found[role][1] for role in ptapt.upstream})
    found["finetune"] = bench.run(call, upstream={"backbone": found["ptapt"][1]})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("cache", [FeatureCache.store, FeatureCache.none])
def test_a_sweep_runs_without_the_held_out_fold(cache: FeatureCache, sessions: Manifest, recipe: Recipe, tmp_path: Path) -> None:
    """The whole chain runs where the held-out recordings do not exist, scored on the validation speakers; a grid's test fails."""
    recipe.execution.feature_cache = cache
    fold = "2"
    validating = {u.id for u in sessions.utterances if u.speaker in VALIDATED[fold]}
    trained = [u.id for u in sessions.training(fold) if u.id not in validating]
    folder = without(sessions, ("F2", "M2"), tmp_path / "without")
    bench = Bench(folder, tmp_path, shared=tmp_path / "cache")
    found = chain(bench, swept(recipe, fold, sessions))

    result, output = found["finetune"]
    assert sum(map(sum, result["confusion"])) == len(validating) == result["metrics"]["test_utterances"]
    assert result["metrics"]["training_utterances"] == len(trained)
    with (output / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["id"] for row in rows} == validating
    assert {row["speaker"] for row in rows} == set(VALIDATED[fold])
    assert json.loads((found["states"][1] / "frames.json").read_text())["utterances"] == trained
    for role in ("clusters.2", "clusters.5"):
        assert json.loads((found[role][1] / "utterances.json").read_text()) == trained

    frames = REGISTRY.training_frames(folder, recipe, fold, VALIDATED[fold])
    assert frames == found["states"][0]["metrics"]["frames"] == found["clusters.2"][0]["metrics"]["frames"]
    proxies = REGISTRY.proxies(folder, fold, VALIDATED[fold], {k: found[f"clusters.{k}"][1] for k in (5, 2)})
    assert list(proxies["k"]) == ["2", "5"]
    assert all(0.5 <= each["purity"] <= 1 and 0 <= each["nmi"] <= 1 for each in proxies["k"].values())
    with pytest.raises(InputError, match="other utterances"):
        REGISTRY.proxies(folder, fold, VALIDATED["3"], {2: found["clusters.2"][1]})

    with pytest.raises(InputError, match=r"audio/[FM]2-\d\.flac"):  # so the recordings are gone indeed
        bench.run(REGISTRY.call("ptapt", recipe, fold=fold, seed=0), upstream={"backbone": found["ptapt"][1]})


@pytest.mark.slow
def test_the_held_out_fold_affects_no_number(sessions: Manifest, recipe: Recipe, tmp_path: Path) -> None:
    """With its recordings present and its features in the store, or deleted and with wrong labels: the same bytes and metrics."""
    call = swept(recipe, "1", sessions)
    bench = Bench(sessions.folder, tmp_path / "whole", shared=tmp_path / "cache")
    bench.run(REGISTRY.call("vft", recipe, fold="3", seed=0))  # puts the features of fold 1 into the store
    whole = chain(bench, call)
    folder = without(sessions, ("F1", "M1"), tmp_path / "corpus", swapped=True)
    other = chain(Bench(folder, tmp_path / "other"), call)
    for name, (result, output) in whole.items():
        assert result["metrics"] == other[name][0]["metrics"], name
        assert result.get("confusion") == other[name][0].get("confusion")
        assert artifacts(output) == artifacts(other[name][1]), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vft", "tapt", "ptapt"])
def test_no_recording_of_validation_is_opened_before_the_test(method: str, sessions: Manifest, recipe: Recipe, tmp_path: Path) -> None:
    """Upstream stages of every method run without them; fine-tuning needs them, and only them beside those it trains on."""
    folder = without(sessions, ("F1", "M1", *VALIDATED["1"]), tmp_path / "corpus")
    call = REGISTRY.call(method, recipe, fold="1", seed=0, validation=VALIDATED["1"])
    bench = Bench(folder, tmp_path)
    upstream = {role: bench.run(parent)[1] for role, parent in call.upstream.items()}
    with pytest.raises(InputError, match=r"audio/[FM]2-\d\.flac"):
        bench.run(call, upstream=upstream)
    steps = [step for values in curves(bench.root / f"{bench.runs:03d}-finetune").values() for step, _ in values]
    assert max(steps) == recipe.finetune.epochs * EACH  # training was over: 16 utterances in batches of 4


def test_the_validation_part_of_a_fixed_split_leaves_training_unchanged(recipe: Recipe, tmp_path: Path) -> None:
    """Its upstream stages are the grid's; the fine-tuning trains on what the grid's does and is scored on the part."""
    folder = tmp_path / "fixed"
    folder.mkdir()
    corpus = recorded(folder, {"train": ("a", "b"), VALIDATION: ("c",), "test": ("d",)}, ("test",))
    call, grid = swept(recipe, "test", corpus), REGISTRY.call("ptapt", recipe, fold="test", seed=0)
    assert call.upstream == grid.upstream
    assert call.settings == {**grid.settings, "validation": list(FIXED_PART)}
    stripped = without(corpus, ("d",), tmp_path / "corpus")
    found = chain(Bench(stripped, tmp_path), call)
    result, output = found["finetune"]
    assert (result["metrics"]["training_utterances"], result["metrics"]["test_utterances"]) == (2 * EACH, EACH)
    assert {line.split(",")[1] for line in (output / "predictions.csv").read_text().splitlines()[1:]} == {"c"}
    clusters = {k: found[f"clusters.{k}"][1] for k in (2, 5)}
    assert set(REGISTRY.proxies(stripped, "test", FIXED_PART, clusters)["k"]) == {"2", "5"}
    assert REGISTRY.training_frames(stripped, recipe, "test", FIXED_PART) == REGISTRY.training_frames(stripped, recipe, "test")


@pytest.mark.parametrize(
    ("validation", "line"),
    [
        (["F2", "M2", "F3", "M3", "F4", "M4"], "no utterances to train on"),
        (["F1"], "no utterances to validate on"),  # of the held-out fold
        ([], "no utterances to validate on"),  # never: then test on the held-out fold
        (list(FIXED_PART), "no utterances to validate on"),
    ],
)
def test_impossible_validation_is_an_error_before_training(
    validation: list[str], line: str, sessions: Manifest, recipe: Recipe, tmp_path: Path
) -> None:
    call = REGISTRY.call("vft", recipe, fold="1", seed=0)
    call = dataclasses.replace(call, settings={**call.settings, "validation": validation})
    with pytest.raises(InputError, match=line):
        Bench(sessions.folder, tmp_path).run(call)
