"""Files of adaptors: kept with the bits they had, loaded strictly, merged into a plain model, exported for peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ser_core.errors import InputError
from ser_core.models.adaptor_files import export_peft, load_adaptors, merge, save_adaptors
from ser_core.models.adaptors import PROJECTIONS, AdaptorShape, LowRank, attach
from ser_core.models.backbone import save_encoder
from ser_core.models.encoder import run_transformer
from ser_core.models.known_encoder import is_known
from tests.ser_core.models import rebuild
from tests.ser_core.models.test_adaptors import KINDS, LENGTHS, adapted, base, features
from tests.ser_core.models.test_backbones import filled, waves

FRAMES = torch.tensor(LENGTHS)


def test_saved_and_loaded(tmp_path: Path) -> None:
    """Logits have the same bits after a reload, head included; a missing, an unknown and a misshapen tensor are refused, all at once."""
    model = adapted(KINDS).eval()
    with torch.no_grad():
        expected = model(features(), FRAMES)
    save_adaptors(model, tmp_path, {"classes": ["a", "b"]})
    written = (tmp_path / "adaptors.safetensors").read_bytes()
    state = load_file(tmp_path / "adaptors.safetensors")
    assert set(state) == {name for name, each in model.named_parameters() if each.requires_grad}
    other = adapted(KINDS).eval()
    with torch.no_grad():
        for each in other.parameters():
            if each.requires_grad:
                each.add_(1)
        assert not torch.equal(other(features(), FRAMES), expected)
        load_adaptors(other, tmp_path)
        assert torch.equal(other(features(), FRAMES), expected)
    save_adaptors(other, tmp_path / "again", {})
    assert (tmp_path / "again" / "adaptors.safetensors").read_bytes() == written

    state["head.weight"] = torch.zeros(1)
    state["unknown"] = state.pop("layer_sum.weights")
    save_file(state, tmp_path / "adaptors.safetensors")
    with pytest.raises(InputError) as caught:
        load_adaptors(other, tmp_path)
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    for word in ("1 key missing: layer_sum.weights", "1 key not in the model: unknown", "1 key of another shape: head.weight"):
        assert word in text
    with torch.no_grad():
        assert torch.equal(other(features(), FRAMES), expected)  # nothing of a refused file was loaded
    with pytest.raises(InputError, match="cannot be read"):
        load_adaptors(other, tmp_path / "nowhere")


def test_merged_into_the_base_model() -> None:
    """A plain model of transformers with the same output; a bottleneck or a gate has no place in one."""
    encoder = adapted(("lora",)).wav2vec2.eval()
    with torch.no_grad():
        expected = run_transformer(encoder, features(), FRAMES)
        merge(encoder)
        assert encoder.state_dict().keys() == base().state_dict().keys()
        assert is_known(encoder.encoder)
        torch.testing.assert_close(run_transformer(encoder, features(), FRAMES), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="only LoRA can"):
        merge(adapted(("lora", "wg")).wav2vec2)


def test_exported_for_peft(tmp_path: Path) -> None:
    """The factors under peft's names; the base weights with peft's formula, W + alpha / r * B A, are the merged model."""
    encoder: Any = adapted(("lora", "ba")).wav2vec2
    export_peft(encoder, tmp_path, "facebook/wav2vec2-base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["base_model_name_or_path"]) == ("LORA", 3, "facebook/wav2vec2-base")
    assert config["lora_alpha"] == pytest.approx(2.0)
    assert config["target_modules"] == ["q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"]
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert len(state) == 2 * 2 * 6
    for part in ("attention.q_proj", "feed_forward.output_dense"):
        down, up = (state[f"base_model.model.encoder.layers.1.{part}.lora_{letter}.weight"] for letter in "AB")
        weight = base().get_submodule(f"encoder.layers.1.{part}").weight
        merged = encoder.encoder.layers[1].block.get_submodule(part).weight
        torch.testing.assert_close(weight + config["lora_alpha"] / config["r"] * up @ down, merged)
    with pytest.raises(InputError, match="no LoRA"):
        export_peft(adapted(("ba",)).wav2vec2, tmp_path, "facebook/wav2vec2-base")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wav2vec2-stable", "hubert", "data2vec", "wavlm"])
def test_peft_computes_what_is_exported(name: str, tmp_path: Path) -> None:
    """On every projection, for each kind of model; but WavLM's attention calls no projection: no effect there."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModel

    encoder, wave = filled(name), waves()[0][None]
    save_encoder(encoder, tmp_path / "base")
    targets = PROJECTIONS[:4] if name == "wavlm" else PROJECTIONS
    attach(encoder, AdaptorShape(rank=3, alpha=2.0, targets=targets))
    factors = {key: each for key, each in encoder.named_parameters() if ".parametrizations.weight.0." in key}
    assert (
        len(factors) == 2 * len(targets) * len(encoder.encoder.layers) == 2 * sum(isinstance(each, LowRank) for each in encoder.modules())
    )
    rebuild.fill(factors, seed=2)
    export_peft(encoder, tmp_path / "lora", str(tmp_path / "base"))
    with torch.no_grad():
        expected = encoder(wave).last_hidden_state
        plain = AutoModel.from_pretrained(tmp_path / "base")
        unadapted = plain(wave).last_hidden_state
        assert float((unadapted - expected).abs().max()) > 1e-2
        found = peft.PeftModel.from_pretrained(plain, tmp_path / "lora")(wave).last_hidden_state
        torch.testing.assert_close(found, unadapted if name == "wavlm" else expected, rtol=1e-5, atol=1e-5)
        merge(encoder)
        save_encoder(encoder, tmp_path / "merged")
        found = AutoModel.from_pretrained(tmp_path / "merged")(wave).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
