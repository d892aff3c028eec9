"""A sweep over models of the Hugging Face hub: each name is resolved to a commit at launch, so that no trial loads what its node has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import launch
from jobs.commands.launching import words_of
from jobs.commands.opener import Opener, Place
from jobs.store.records import damaged_records
from jobs.sweeps.records import store_sweep
from jobs.sweeps.space import grid_points
from jobs.sweeps.stages import point_graph
from ser_core.models.hub import pinned_revision
from ser_core.settings.backbone import BackboneSettings

COMMITS = {"own/small@v1": "1" * 40, "own/other@v1": "2" * 40, "own/small@v2": "3" * 40, "own/other@v2": "4" * 40}
CONFIG = {"model_type": "wav2vec2", "hidden_size": 8, "num_attention_heads": 2, "conv_dim": [8], "conv_kernel": [10], "conv_stride": [5]}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with two models, two revisions each."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for reference, commit in COMMITS.items():
        put(tmp_path / "hub", reference, commit)
    return tmp_path / "hub"


def put(cache: Path, reference: str, commit: str) -> None:
    name, _, revision = reference.partition("@")
    model = cache / f"models--{name.replace('/', '--')}"
    (model / "snapshots" / commit).mkdir(parents=True)
    (model / "snapshots" / commit / "config.json").write_text(json.dumps(CONFIG))
    (model / "refs").mkdir(exist_ok=True)
    (model / "refs" / revision).write_text(commit)


def launched(results: Path, data: Path, *settings: str) -> dict[tuple[str, str | None], str | None]:
    """(checkpoint, revision) -> what the stages of its points load, as a launch states it for the workers."""
    words = ["demo", "sweep.sets=[[4]]", *settings]
    typed = words_of("sweep", words, None, "demo")
    sweep = Opener(launch.PROGRAM).launch_sweep(typed, Place(data, results), (), dry_run=False).sweep
    store_sweep(sweep)
    found = {}
    for point in grid_points(sweep.space):
        graph = point_graph(sweep.experiment, sweep.corpus, point, sweep.folds[:1], sweep.validation, sweep.registry)
        for node in graph.nodes.values():
            backbone = {**node.settings, **node.runtime}.get("backbone")
            if backbone:
                settings_of_stage = BackboneSettings(**backbone)
                found[str(settings_of_stage.checkpoint), settings_of_stage.revision] = pinned_revision(settings_of_stage)
    return found


@pytest.mark.slow
def test_every_name_of_the_space_is_resolved(tmp_path: Path, demo_data: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In each combination with the searched revisions, once for all launches. A name that the cache lacks is named, not the recipe's."""
    both = "sweep.settings={backbone.checkpoint: [own/small, own/other, own/missing], backbone.revision: [v1, v2]}"
    found = launched(tmp_path / "results", demo_data, both)
    missing = {("own/missing", "v1"): "v1", ("own/missing", "v2"): "v2"}  # what the node has under this name
    assert found == missing | {(name, revision): COMMITS[f"{name}@{revision}"] for name, revision in found if name != "own/missing"}
    assert len(found) == 6
    lines = [line for line in capsys.readouterr().err.splitlines() if "local cache" in line]
    assert [line.split(": ")[0] for line in lines] == ["backbone own/missing@v1", "backbone own/missing@v2"]
    put(cache, "own/small@v1", "5" * 40)
    assert launched(tmp_path / "results", demo_data, both) == found, "a later launch continues with the former commit"
    assert not damaged_records(tmp_path)
