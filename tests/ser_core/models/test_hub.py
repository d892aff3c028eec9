"""Hub names are resolved to commits at launch, and every stage loads that commit, whatever the cache of its node says of the branch."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ser_core.errors import InputError
from ser_core.models.backbone import build_backbone, load_encoder, save_backbone
from ser_core.models.hub import cache_folder, cached_commit, pinned_revision
from ser_core.models.identity import backbone_identity, backbone_origin, pin_commit
from ser_core.settings.backbone import BackboneSettings
from ser_core.settings.recipe import commits_of

FIRST, SECOND = "1" * 40, "2" * 40
NAME = "own/small"
CONFIG = {
    **{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
    **{"conv_dim": [8, 8], "conv_kernel": [10, 8], "conv_stride": [5, 8], "num_conv_pos_embeddings": 4},
    **{"num_conv_pos_embedding_groups": 2, "num_codevectors_per_group": 4, "codevector_dim": 8, "proj_codevector_dim": 8},
}


def put(cache: Path, commit: str, seed: int) -> None:
    """Add a commit of the model to the cache; it is then the newest of its branch."""
    model = cache / "models--own--small"
    save_backbone(build_backbone(BackboneSettings(checkpoint=None, config=CONFIG, init_seed=seed)), model / "snapshots" / commit)
    (model / "refs").mkdir(exist_ok=True)
    (model / "refs" / "main").write_text(commit)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    import huggingface_hub.constants

    folder = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


def weights(settings: BackboneSettings) -> torch.Tensor:
    found: torch.Tensor = load_encoder(settings).feature_projection.projection.weight.detach()
    return found


def test_a_stage_loads_the_commit_of_the_launch_after_the_branch_has_moved(cache: Path) -> None:
    """Its key is the same as before, and what is loaded without a launch is the new commit."""
    put(cache, FIRST, 0)
    plain = BackboneSettings(checkpoint=NAME)
    launched = dataclasses.replace(plain, commits={})
    assert pin_commit(launched, {}) == ""
    assert (launched.commits, pinned_revision(launched)) == ({NAME: FIRST}, FIRST)
    before = weights(launched)
    put(cache, SECOND, 1)
    assert torch.equal(weights(launched), before)
    assert not torch.equal(weights(plain), before)
    assert backbone_identity(launched) == backbone_identity(plain) == {"checkpoint": NAME, "revision": None}
    assert backbone_origin(launched) == f"wav2vec 2.0 {NAME}, revision {FIRST}"


def test_a_node_whose_cache_lacks_the_commit_refuses(cache: Path) -> None:
    """It does not load what its own branch says."""
    put(cache, SECOND, 1)
    with pytest.raises(InputError, match=f"{NAME}, revision {FIRST}: not in the local cache"):
        load_encoder(BackboneSettings(checkpoint=NAME, commits={NAME: FIRST}))


def test_a_later_launch_continues_with_the_former_commit(cache: Path) -> None:
    """And says that there is another one now, and how it is chosen."""
    put(cache, FIRST, 0)
    first = BackboneSettings(checkpoint=NAME)
    pin_commit(first, {})
    put(cache, SECOND, 1)
    stored = commits_of([{"backbone": dataclasses.asdict(first)}, {"backbone": {"checkpoint": "of/an-earlier-version"}}, {}])
    again = BackboneSettings(checkpoint=NAME)
    line = pin_commit(again, stored)
    assert again.commits == {NAME: FIRST}
    assert f"continues with commit {FIRST}" in line
    assert f"recipe.backbone.revision={SECOND}" in line
    chosen = BackboneSettings(checkpoint=NAME, revision=SECOND)
    assert pin_commit(chosen, stored) == ""
    assert (chosen.commits, pinned_revision(chosen)) == ({}, SECOND)


def test_without_the_model_in_the_cache_the_commit_is_not_known(cache: Path) -> None:
    """One line; the node that computes may have it. A commit whose files are not there does not count."""
    settings = BackboneSettings(checkpoint=NAME)
    assert "nodes may load different weights" in pin_commit(settings, {})
    assert settings.commits == {}
    (cache / "models--own--small" / "refs").mkdir(parents=True)
    (cache / "models--own--small" / "refs" / "main").write_text(FIRST)
    assert cached_commit(NAME, None) == ""


def test_a_folder_and_a_configuration_have_no_commit(cache: Path, tmp_path: Path) -> None:
    """Their identity is in the key."""
    for settings in (BackboneSettings(checkpoint=None, config=CONFIG), BackboneSettings(checkpoint=str(tmp_path))):
        assert pin_commit(settings, {NAME: FIRST}) == ""
        assert settings.commits == {}


@pytest.mark.parametrize(
    "variables",
    [{}, {"HF_HOME": "/a"}, {"HF_HUB_CACHE": "/b", "HF_HOME": "/a"}, {"XDG_CACHE_HOME": "/c"}, {"HUGGINGFACE_HUB_CACHE": "/d"}],
)
def test_the_cache_is_where_the_hub_package_has_it(variables: dict[str, str]) -> None:
    """The same variables choose it."""
    environment = {"HOME": "/home/somebody", "PATH": "/usr/bin:/bin", **variables}
    code = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    if not variables:
        code += "; from ser_core.models.hub import cache_folder; print(cache_folder())"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
        )
        assert len(set(done.stdout.split())) == 1
        return
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert str(cache_folder(environment)) == done.stdout.strip()
