"""Every kind of backbone: features and states of an utterance are those of transformers for it alone, whatever its batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ser_core.errors import InputError
from ser_core.features.store import front_end_key
from ser_core.models.adaptors import AdaptorShape
from ser_core.models.backbone import build_backbone, load_encoder, save_encoder
from ser_core.models.backbone_config import config_problems
from ser_core.models.classifier import ClassifierAdaptors, EmotionClassifier
from ser_core.models.encoder import run_states, run_transformer
from ser_core.models.front_end import project_independent, run_front_end
from ser_core.models.identity import backbone_identity, backbone_origin
from ser_core.models.known_encoder import is_known
from ser_core.models.model_types import MODEL_TYPES, NORMALISE_KEY, model_type_of
from ser_core.registry import REGISTRY
from ser_core.settings.backbone import BackboneSettings, Normalise, Padding
from ser_core.settings.execution import Attention
from ser_core.settings.recipe import Recipe
from tests.ser_core.models import rebuild
from tests.ser_core.models.unsafe import RunsCode

SMALL = {
    key: value
    for key, value in rebuild.BACKBONE.items()
    if not key.startswith(
        ("num_codevector", "codevector", "proj_codevector", "num_negatives", "contrastive", "diversity", "feat_quantizer")
    )
    and key not in ("final_dropout", "feat_extract_norm")
}
LAYER = {"feat_extract_norm": "layer"}
CONFIGS: dict[str, dict[str, Any]] = {
    "wav2vec2": {**rebuild.BACKBONE},
    "wav2vec2-stable": {**rebuild.BACKBONE, **LAYER, "do_stable_layer_norm": True},
    "hubert": {**SMALL, "model_type": "hubert"},
    "hubert-stable": {**SMALL, **LAYER, "model_type": "hubert", "do_stable_layer_norm": True, "conv_bias": True},
    "hubert-unnormed": {**SMALL, "model_type": "hubert", "feat_proj_layer_norm": False},
    "wavlm": {**SMALL, "model_type": "wavlm", "num_buckets": 20, "max_bucket_distance": 40},
    "wavlm-stable": {**SMALL, **LAYER, "model_type": "wavlm", "do_stable_layer_norm": True},
    "data2vec": {**SMALL, "model_type": "data2vec-audio", "num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 7},
    "data2vec-even": {**SMALL, "model_type": "data2vec-audio", "num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 8},
}
OF_CPU = {name: not name.startswith("wavlm") for name in CONFIGS}


def settings(name: str, **changes: Any) -> BackboneSettings:
    return BackboneSettings(checkpoint=None, config={**CONFIGS[name], **changes})


def filled(name: str, *, attention: Attention = Attention.sdpa, **changes: Any) -> Any:
    encoder = load_encoder(settings(name, **changes), attention=attention)
    rebuild.fill(dict(encoder.named_parameters()), seed=1)
    return encoder


def waves() -> list[Tensor]:
    return [torch.from_numpy(wave) for wave in rebuild.waves()][:3]


@torch.no_grad()
def in_a_batch(encoder: Any) -> list[Tensor]:
    """Output of the transformer for each utterance, computed in one padded batch with something behind the valid frames."""
    features = project_independent(encoder, waves())
    frames = torch.tensor([len(each) for each in features])
    padded = pad_sequence(features, batch_first=True, padding_value=3.0)
    output = run_transformer(encoder, padded, frames)
    return [output[row, :count] for row, count in enumerate(frames.tolist())]


@pytest.mark.parametrize("name", CONFIGS)
def test_an_utterance_is_computed_as_by_transformers_alone(name: str) -> None:
    """From wave to state, ragged batch against `Model(wave)`, by our transformer and by transformers' on padded rows."""
    encoder = filled(name)
    alone = []
    with torch.no_grad():
        for wave in waves():
            alone.append(encoder(wave[None]).last_hidden_state[0])
    assert is_known(encoder.encoder) == OF_CPU[name]
    for found in (in_a_batch(encoder), in_a_batch(filled(name, attention=Attention.eager))):
        for ours, theirs in zip(found, alone, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["data2vec", "data2vec-even"])
def test_padding_of_data2vec_would_reach_an_utterance(name: str) -> None:
    """transformers itself, on the same padded batch: without zeros behind each positional layer the shorter utterances differ."""
    encoder = filled(name, attention=Attention.eager)
    with torch.no_grad():
        features = project_independent(encoder, waves())
        padded = pad_sequence(features, batch_first=True)
        valid = torch.arange(padded.shape[1])[None] < torch.tensor([len(each) for each in features])[:, None]
        theirs = encoder.encoder(padded, attention_mask=valid).last_hidden_state
    differences = [float((theirs[row, : len(ours)] - ours).abs().max()) for row, ours in enumerate(in_a_batch(encoder))]
    assert differences[0] < 1e-5
    assert min(differences[1:]) > 1e-3


@pytest.mark.parametrize("name", ["hubert", "hubert-stable", "data2vec"])
def test_gradients_are_those_of_transformers(name: str) -> None:
    """The CPU transformer of the relatives of wav2vec 2.0: every gradient of the encoder."""
    found = []
    for attention in Attention:
        encoder = filled(name, attention=attention).train()
        features, frames = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([30, 17])
        output = run_transformer(encoder, features, frames)
        torch.autograd.backward(output[0].square().sum() + output[1, :17].square().sum())
        found.append({key: each.grad for key, each in encoder.encoder.named_parameters()})
    for key, gradient in found[1].items():
        assert gradient is not None
        torch.testing.assert_close(found[0][key], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-6, msg=key)


@pytest.mark.parametrize("name", ["wavlm", "wavlm-stable", "data2vec"])
def test_adaptors_of_other_encoders_are_computed(name: str) -> None:
    """WavLM passes its projections' weights to torch without calling them: LoRA must reach them; so must BA, WG and all states."""
    torch.manual_seed(0)
    shape = AdaptorShape(bottleneck=4, identity_start=False, rank=2, gate=True)
    model = EmotionClassifier(filled(name), 4, adaptors=ClassifierAdaptors(shape, layer_sum=True)).train()
    rebuild.fill({key: each for key, each in model.named_parameters() if each.requires_grad}, seed=2)
    features, frames = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([30, 17])
    torch.autograd.backward(model(features, frames).square().sum())
    for key, each in model.named_parameters():
        assert each.requires_grad == (each.grad is not None and bool(each.grad.abs().max() > 0)), key
    assert len(run_states(model.wav2vec2, features, frames)) == 3


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """An encoder folder holds its kind; what is loaded has the bits of what was saved, and features of one front end have one key."""
    encoder = filled(name)
    save_encoder(encoder, tmp_path)
    again = load_encoder(tmp_path)
    assert type(again) is type(encoder)
    assert again.config._attn_implementation == ("eager" if name.startswith("wavlm") else "sdpa")
    assert all(torch.equal(one, other) for one, other in zip(encoder.state_dict().values(), again.state_dict().values(), strict=True))
    assert front_end_key(again, "c" * 64, "cpu") == front_end_key(encoder, "c" * 64, "cpu")
    with torch.no_grad():
        again.feature_projection.projection.weight[0, 0] += 1
    assert front_end_key(again, "c" * 64, "cpu") != front_end_key(encoder, "c" * 64, "cpu")
    assert model_type_of(BackboneSettings(checkpoint=str(tmp_path))) == CONFIGS[name].get("model_type", "wav2vec2")


def test_weights_that_run_code_are_refused(tmp_path: Path) -> None:
    """A `pytorch_model.bin` is a pickle."""
    save_encoder(filled("hubert"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"x": RunsCode(tmp_path / "mark")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be loaded as HubertModel: Weights only load failed"):
        load_encoder(tmp_path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["hubert", "hubert-unnormed", "data2vec"])
def test_the_front_end_trains_too(name: str) -> None:
    """`run_front_end` projects what the frozen front end projects, for models whose projection returns one tensor or two."""
    encoder = filled(name)
    found = run_front_end(encoder, waves(), Padding.independent)
    for row, features in enumerate(project_independent(encoder, waves())):
        torch.testing.assert_close(found.projected[row, : len(features)], features, rtol=1e-5, atol=1e-5)


def recipe(name: str) -> Recipe:
    return Recipe(backbone=settings(name))


def test_methods_that_are_not_defined_are_refused_at_planning(tmp_path: Path) -> None:
    """TAPT continues a pretraining loss that only wav2vec 2.0 has; also for a checkpoint whose configuration is here."""
    for name in ("hubert", "wavlm", "data2vec"):
        assert REGISTRY.call("vft", recipe(name), fold="1", seed=0).stage == "finetune"
        with pytest.raises(InputError, match="method tapt: not defined for"):
            REGISTRY.call("tapt", recipe(name), fold="1", seed=0)
        with pytest.raises(InputError, match="method tapt: not defined for"):
            build_backbone(settings(name))
    save_encoder(filled("wavlm"), tmp_path)
    stored = Recipe(backbone=BackboneSettings(checkpoint=str(tmp_path)))
    assert REGISTRY.call("vft", stored, fold="1", seed=0).stage == "finetune"
    with pytest.raises(InputError, match="not defined for WavLM"):
        REGISTRY.call("tapt", stored, fold="1", seed=0)


@pytest.mark.slow
def test_configurations_are_checked_before_a_launch() -> None:
    """An unknown kind, keys of another kind, a batch norm that padding would pass; every configuration above is accepted."""
    for name, config in CONFIGS.items():
        assert list(config_problems(config)) == [], name
    for config, message in (
        ({"model_type": "whisper"}, "model_type=whisper: no such backbone; known are wav2vec2, hubert, wavlm, data2vec-audio"),
        ({"model_type": "hubert", "num_buckets": 20}, "num_buckets: no such key"),
        ({"model_type": "hubert", "conv_pos_batch_norm": True}, "conv_pos_batch_norm"),
        ({"model_type": "data2vec-audio", "feat_extract_norm": "layer"}, "feat_extract_norm: no such key"),
        ({"model_type": "wavlm", "hidden_size": 30}, "must be divisible"),
    ):
        problems = list(config_problems(config))
        assert len(problems) >= 1
        assert any(message in problem for problem in problems), problems
        if "divisible" not in message:
            with pytest.raises(InputError):
                load_encoder(BackboneSettings(checkpoint=None, config=config))


def test_identity_and_origin() -> None:
    """The kind is part of both; to name the default kind changes neither."""
    plain = BackboneSettings(checkpoint=None, config={"hidden_size": 8})
    named = BackboneSettings(checkpoint=None, config={"model_type": "wav2vec2", "hidden_size": 8})
    hubert = BackboneSettings(checkpoint=None, config={"model_type": "hubert", "hidden_size": 8})
    assert backbone_identity(plain) == backbone_identity(named) != backbone_identity(hubert)
    assert backbone_origin(hubert) == "HuBERT with random weights (seed 0)"
    assert Recipe(backbone=hubert).trained("vft")[0] == "backbone HuBERT with random weights (init_seed 0)"
    assert set(MODEL_TYPES) == {"wav2vec2", "hubert", "wavlm", "data2vec-audio"}


def test_normalised_waves_by_setting(tmp_path: Path) -> None:
    """`always` and `never` decide for every model and are part of the identity; `auto` is not."""
    raw = settings("hubert")
    always = BackboneSettings(checkpoint=None, config=raw.config, normalise=Normalise.always)
    assert backbone_identity(always) == {**backbone_identity(raw), "normalise": "always"}
    assert backbone_origin(always) == "HuBERT with random weights (seed 0), waves always normalised"
    quiet = [0.01 * wave + 0.5 for wave in waves()]
    found = []
    for chosen in (raw, always):
        encoder = load_encoder(chosen)
        found.append(project_independent(encoder, quiet)[0])
        save_encoder(encoder, tmp_path / chosen.normalise.name)
    assert not torch.allclose(found[0], found[1], rtol=1e-3)
    wave = (quiet[0] - quiet[0].mean()) / torch.sqrt(quiet[0].var(unbiased=False) + 1e-7)
    torch.testing.assert_close(project_independent(load_encoder(raw), [wave])[0], found[1])
    # A stage's encoder keeps what it was trained with; a setting overrides what a folder states.
    assert getattr(load_encoder(tmp_path / "always").config, NORMALISE_KEY) is True
    never = BackboneSettings(checkpoint=str(tmp_path / "always"), normalise=Normalise.never)
    assert getattr(load_encoder(never).config, NORMALISE_KEY) is False


def test_a_layer_norm_checkpoint_without_preprocessor_configuration_is_refused(tmp_path: Path) -> None:
    """Raw waves would be a guess: refused before a launch and on loading until the setting states it; artifacts of stages are not."""
    folder = tmp_path / "checkpoint"
    save_encoder(filled("hubert-stable"), folder)
    chosen = BackboneSettings(checkpoint=str(folder))
    for refused in (lambda: REGISTRY.check(Recipe(backbone=chosen)), lambda: load_encoder(chosen)):
        with pytest.raises(InputError, match=r"preprocessor_config\.json is missing.*recipe\.backbone\.normalise=always or never"):
            refused()
    assert not getattr(load_encoder(folder).config, NORMALISE_KEY, False)  # the folder of an upstream stage
    for setting in (Normalise.always, Normalise.never):
        stated = BackboneSettings(checkpoint=str(folder), normalise=setting)
        REGISTRY.check(Recipe(backbone=stated))
        assert getattr(load_encoder(stated).config, NORMALISE_KEY) is (setting is Normalise.always)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True}))
    REGISTRY.check(Recipe(backbone=chosen))
    assert getattr(load_encoder(chosen).config, NORMALISE_KEY) is True
