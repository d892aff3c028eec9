"""Checkpoints in and out: every key has its place, every refusal says which key or path and what to do."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from ser_core.errors import InputError, is_memory_error
from ser_core.models.backbone import (
    backbone_identity,
    build_backbone,
    frame_count,
    hop_samples,
    load_encoder,
    minimum_samples,
    save_backbone,
    save_encoder,
)
from ser_core.models.identity import backbone_origin, wav2vec_origin
from ser_core.models.known_encoder import is_known
from ser_core.models.model_types import NORMALISE_KEY
from ser_core.settings.backbone import BackboneSettings, Wav2vecSettings
from ser_core.settings.execution import Attention
from tests.ser_core.models import rebuild

SMALL = BackboneSettings(checkpoint=None, config=rebuild.BACKBONE)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    save_backbone(build_backbone(SMALL), folder)
    return folder


def copy(folder: Path, to: Path, change: Any) -> Path:
    """Copy a checkpoint with its state changed."""
    to.mkdir()
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text((folder / "config.json").read_text())
    return to


def test_config_and_seed() -> None:
    """The same seed gives the same weights, another seed others, and torch's own generator is left alone."""
    before = torch.random.get_rng_state()
    first, same = build_backbone(SMALL), build_backbone(SMALL)
    other = build_backbone(BackboneSettings(checkpoint=None, config=rebuild.BACKBONE, init_seed=1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), same.state_dict().values(), strict=True))
    assert not torch.equal(first.project_q.weight, other.project_q.weight)


@pytest.mark.parametrize("attention", list(Attention))
def test_round_trip(saved: Path, attention: Attention) -> None:
    """What is saved is loaded to the bit, with the asked attention kernel."""
    model = build_backbone(saved, attention=attention)
    assert model.config._attn_implementation == attention.value
    for name, tensor in build_backbone(SMALL).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_saving_is_deterministic(saved: Path, tmp_path: Path) -> None:
    """A loaded model is saved as the same bytes."""
    save_backbone(build_backbone(saved), tmp_path)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


def test_encoder_artifact(saved: Path, tmp_path: Path) -> None:
    """An encoder comes out of a pretraining checkpoint and out of its own folder; the pretraining heads it lacks are named."""
    encoder = load_encoder(saved)
    save_encoder(encoder, tmp_path)
    again = load_encoder(BackboneSettings(checkpoint=str(tmp_path)))
    assert all(torch.equal(a, b) for a, b in zip(encoder.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(InputError, match=r"7 keys missing: project_hid\.bias"):
        build_backbone(tmp_path)


def test_older_names_of_weight_norm(saved: Path, tmp_path: Path) -> None:
    """Checkpoints from before torch's parametrizations (weight_g, weight_v) are loaded."""

    def rename(state: dict[str, torch.Tensor]) -> None:
        for name in list(state):
            state[rebuild.canonical(name)] = state.pop(name)

    folder = copy(saved, tmp_path / "old", rename)
    assert any(name.endswith("weight_g") for name in load_file(folder / "model.safetensors"))
    model, expected = build_backbone(folder), build_backbone(saved)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True))


@pytest.mark.parametrize("load", [build_backbone, load_encoder])
def test_keys_that_do_not_fit_the_model(saved: Path, tmp_path: Path, load: Any) -> None:
    """Unknown and missing keys and keys of another shape are all reported at once."""

    def change(state: dict[str, torch.Tensor]) -> None:
        state["wav2vec2.encoder.extra.weight"] = torch.zeros(2)
        del state["wav2vec2.encoder.layer_norm.bias"]
        state["wav2vec2.encoder.layers.0.attention.q_proj.bias"] = torch.zeros(3)

    with pytest.raises(InputError) as caught:
        load(copy(saved, tmp_path / "changed", change))
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    for word in ("1 key missing", "layer_norm.bias", "1 key not in the model", "extra.weight", "1 key of another shape", "q_proj.bias"):
        assert word in text


def test_not_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing folder, an empty one, a torn file, another kind of model and an unreachable hub each give one line."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    torn = tmp_path / "torn"
    save_backbone(build_backbone(SMALL), torn)
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])
    for checkpoint, message in (
        (str(tmp_path / "nowhere"), "no such backbone folder"),
        (str(tmp_path), "config.json is missing"),
        (str(torn), "cannot be loaded"),
        ("nobody/no-such-model", "set recipe.backbone.checkpoint to its folder"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            build_backbone(BackboneSettings(checkpoint=checkpoint))
        assert len(caught.value.problems) == 1
        assert "\n" not in caught.value.problems[0]


def test_wrong_config() -> None:
    """An unknown key names the nearest known one; lists of unequal length are refused in transformers' words; nothing at all is refused."""
    with pytest.raises(InputError, match="did you mean hidden_size"):
        build_backbone(BackboneSettings(checkpoint=None, config={"hiden_size": 32}))
    with pytest.raises(InputError, match=r"backbone\.config"):
        build_backbone(BackboneSettings(checkpoint=None, config={"conv_dim": [8, 8], "conv_kernel": [3], "conv_stride": [2]}))
    with pytest.raises(InputError, match="no mask embedding"):
        load_encoder(BackboneSettings(checkpoint=None, config={**rebuild.BACKBONE, "mask_time_prob": 0.0}))
    with pytest.raises(InputError, match="adapter after the transformer"):
        load_encoder(BackboneSettings(checkpoint=None, config={**rebuild.BACKBONE, "add_adapter": True}))
    with pytest.raises(InputError, match="neither checkpoint nor config"):
        build_backbone(BackboneSettings(checkpoint=None))


def test_an_out_of_memory_error_is_not_an_input_error() -> None:
    """It may be there on another machine, so it comes out as torch tells it and not as something for the user to mend."""
    with pytest.raises(RuntimeError, match="can't allocate memory") as raised:
        build_backbone(BackboneSettings(checkpoint=None, config={**rebuild.BACKBONE, "intermediate_size": 10**13}))
    assert is_memory_error(raised.value)
    assert is_memory_error(MemoryError())
    assert is_memory_error(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_memory_error(RuntimeError("expected a tensor"))


def test_normalised_waves(tmp_path: Path) -> None:
    """A layer-norm checkpoint whose preprocessor normalises is fed normalised waves, and so is what is saved from it; others are not."""
    for norm, expected in (("layer", True), ("group", False)):
        folder = tmp_path / norm
        model = build_backbone(BackboneSettings(checkpoint=None, config={**rebuild.BACKBONE, "feat_extract_norm": norm}))
        save_backbone(model, folder)
        (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True}))
        loaded = build_backbone(folder)
        assert getattr(loaded.config, NORMALISE_KEY, False) is expected
        save_backbone(loaded, folder / "again")
        assert getattr(build_backbone(folder / "again").config, NORMALISE_KEY, False) is expected


def test_gradient_checkpointing_of_a_checkpoint_is_switched_off(saved: Path, tmp_path: Path) -> None:
    """A configuration with `gradient_checkpointing: true`, neither recomputes activations nor bypasses our encoder."""
    from transformers import Wav2Vec2Model

    folder = tmp_path / "checkpointing"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(saved / "model.safetensors")
    config = json.loads((saved / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "gradient_checkpointing": True}))
    assert Wav2Vec2Model.from_pretrained(folder).encoder.gradient_checkpointing  # else this test shows nothing
    for model in (load_encoder(folder), build_backbone(folder).wav2vec2):
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        assert is_known(model.encoder)


def test_frame_count(saved: Path) -> None:
    """Frames are counted as the convolutions make them, for one length or many; below one frame there are none."""
    model = build_backbone(saved)
    config = model.config
    shortest = minimum_samples(config)
    lengths = [shortest, shortest + 1, 700, 5333, 6000]
    with torch.no_grad():
        made = [model.wav2vec2.feature_extractor(torch.zeros(1, n)).shape[2] for n in lengths]
    assert [frame_count(config, n) for n in lengths] == made
    assert frame_count(config, np.array(lengths)).tolist() == made
    assert (made[0], frame_count(config, shortest - 1), frame_count(config, 0)) == (1, 0, 0)
    assert hop_samples(config) == 80


def test_identity(saved: Path, tmp_path: Path) -> None:
    """Identity follows the weights, not the place or the writer: a copied folder has the same, changed weights another."""

    def nothing(state: dict[str, torch.Tensor]) -> None:
        return

    def nudge(state: dict[str, torch.Tensor]) -> None:
        state["project_q.bias"] += 1e-3

    original = backbone_identity(BackboneSettings(checkpoint=str(saved)))
    moved = copy(saved, tmp_path / "moved", nothing)
    assert backbone_identity(BackboneSettings(checkpoint=str(moved))) == original
    assert backbone_identity(BackboneSettings(checkpoint=str(copy(saved, tmp_path / "nudged", nudge)))) != original
    assert backbone_identity(SMALL) == {"config": rebuild.BACKBONE, "init_seed": 0}
    assert backbone_identity(BackboneSettings(revision="abc")) == {"checkpoint": "facebook/wav2vec2-base", "revision": "abc"}
    with pytest.raises(InputError, match="not a checkpoint"):
        backbone_identity(BackboneSettings(checkpoint=str(tmp_path)))


def test_origin_of_wav2vec_v1(tmp_path: Path) -> None:
    """A file by its name and digest."""
    file = tmp_path / "wav2vec_large.pt"
    file.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()[:12]
    assert wav2vec_origin(Wav2vecSettings(checkpoint=str(file))) == f"wav2vec v1 wav2vec_large.pt, sha256 {digest}"
    assert wav2vec_origin(Wav2vecSettings(config={"affine": True})) == "wav2vec v1 with random weights (seed 0)"


def test_origin_of_the_weights(saved: Path, tmp_path: Path) -> None:
    """A hub name with its revision, a folder of the hub's cache with its commit, any other folder with the digest of its weights."""
    pinned, other = "2dcc7b7f9b11f0ef271067e62599a27317a03114", "0b5b8e868dd84f03fd87d01f9c4ff0f080fecfe8"
    assert backbone_origin(BackboneSettings(revision=pinned)) == f"wav2vec 2.0 facebook/wav2vec2-base, revision {pinned}"
    assert backbone_origin(BackboneSettings()) == "wav2vec 2.0 facebook/wav2vec2-base, no revision pinned"
    assert backbone_origin(SMALL) == "wav2vec 2.0 with random weights (seed 0)"

    cached = tmp_path / "models--facebook--wav2vec2-base" / "snapshots" / other
    cached.parent.mkdir(parents=True)
    shutil.copytree(saved, cached)
    assert backbone_origin(BackboneSettings(checkpoint=str(cached))) == f"wav2vec 2.0 facebook/wav2vec2-base, revision {other}"
    assert (
        backbone_origin(BackboneSettings(checkpoint=str(cached), revision=other)) == f"wav2vec 2.0 facebook/wav2vec2-base, revision {other}"
    )
    named = backbone_origin(BackboneSettings(checkpoint=str(cached), revision=pinned))
    assert named == f"wav2vec 2.0 facebook/wav2vec2-base, revision {other}, not {pinned} as configured"

    digest = hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()[:12]
    assert backbone_origin(BackboneSettings(checkpoint=str(saved))) == f"wav2vec 2.0 from the local folder {saved.name}, sha256 {digest}"
    unknown = backbone_origin(BackboneSettings(checkpoint=str(saved), revision=pinned))
    assert unknown == f"wav2vec 2.0 from the local folder {saved.name}, sha256 {digest} (not known whether revision {pinned})"


@pytest.mark.parametrize("experiment", ["iemocap", "iemocap-ablation", "savee", "emodb-base"])
def test_experiments_pin_the_revision_of_the_hub_model(experiment: str) -> None:
    """Without a revision the hub's newest file would be loaded, and its weights would not be part of a stage's key."""
    backbone = OmegaConf.load(Path(__file__).parents[3] / "configs" / "experiment" / f"{experiment}.yaml").recipe.backbone
    assert backbone.checkpoint == "facebook/wav2vec2-base"
    assert backbone.revision == "2dcc7b7f9b11f0ef271067e62599a27317a03114"


def test_identity_is_cheap_to_import() -> None:
    """Planning asks for identities without paying for torch."""
    code = (
        "import sys; from ser_core.models.backbone import backbone_identity; "
        "from ser_core.models.fairseq_checkpoint import wav2vec_identity; "
        "print([m for m in ('torch', 'transformers', 'fairseq') if m in sys.modules])"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
