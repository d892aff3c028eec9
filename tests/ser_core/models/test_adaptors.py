"""Adaptors: our transformer computes what transformers computes with plain modules; every term counts; nothing unknown is left out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ser_core.models.adaptors import (
    PROJECTIONS,
    AdaptedBlock,
    AdaptorShape,
    LowRank,
    adaptor_names,
    attach,
    block_of,
    projection_of,
)
from ser_core.models.backbone import build_backbone
from ser_core.models.classifier import ClassifierAdaptors, EmotionClassifier
from ser_core.models.encoder import run_states, run_transformer
from ser_core.models.front_end import valid_frames
from ser_core.models.known_encoder import is_known
from ser_core.models.trained import below, parameter_counts, train_only
from ser_core.settings.backbone import BackboneSettings
from ser_core.settings.execution import Attention
from tests.ser_core.models import rebuild

LENGTHS = (40, 23, 1)
STABLE: dict[str, Any] = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}
FULL = AdaptorShape(bottleneck=6, identity_start=False, rank=3, alpha=2.0, targets=PROJECTIONS, gate=True)
KINDS = ("lora", "ba", "wg", "ws")
COMBINATIONS = [kinds for count in range(1, 5) for kinds in itertools.combinations(KINDS, count)]


def base(*, eager: bool = False, **config: Any) -> Any:
    settings = BackboneSettings(checkpoint=None, config={**rebuild.BACKBONE, **config})
    built = build_backbone(settings, attention=Attention.eager if eager else Attention.sdpa).wav2vec2
    rebuild.fill(dict(built.named_parameters()), seed=1)
    return built.train()


def shape_of(kinds: tuple[str, ...]) -> AdaptorShape:
    return AdaptorShape(
        bottleneck=6 if "ba" in kinds else 0,
        identity_start=False,
        rank=3 if "lora" in kinds else 0,
        alpha=2.0,
        targets=PROJECTIONS,
        gate="wg" in kinds,
    )


def adapted(kinds: tuple[str, ...], **config: Any) -> EmotionClassifier:
    """A classifier whose adaptors do something."""
    torch.manual_seed(0)
    model = EmotionClassifier(base(**config), 4, adaptors=ClassifierAdaptors(shape_of(kinds), layer_sum="ws" in kinds)).train()
    rebuild.fill({name: each for name, each in model.named_parameters() if each.requires_grad}, seed=2)
    return model


def features() -> Tensor:
    return torch.randn(len(LENGTHS), LENGTHS[0], 32, generator=torch.Generator().manual_seed(0))


def gradients(model: EmotionClassifier) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(features(), torch.tensor(LENGTHS))
    torch.autograd.backward((logits * torch.arange(1.0, 13.0).view(3, 4)).sum())
    return logits.detach(), {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def plainly(model: EmotionClassifier, **config: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients with transformers' encoder, its layers followed by adaptors that are written out here."""
    encoder = base(eager=True, **config)
    weights = {name: each.detach().clone().requires_grad_(each.requires_grad) for name, each in model.named_parameters()}
    frames = torch.tensor(LENGTHS)

    def weight(place: str, rest: str) -> Tensor:
        return weights[f"wav2vec2.encoder.layers.{place}.{rest}"]

    merged: dict[str, Tensor] = {}
    for number, layer in enumerate(model.wav2vec2.encoder.layers):
        block = f"{number}.block" if isinstance(layer, AdaptedBlock) else str(number)
        for name in PROJECTIONS:
            if f"wav2vec2.encoder.layers.{block}.attention.q_proj.parametrizations.weight.0.up" in weights:
                inside = f"{'attention' if name.endswith('proj') else 'feed_forward'}.{name}"
                up, down = (weight(block, f"{inside}.parametrizations.weight.0.{each}") for each in ("up", "down"))
                merged[f"layers.{number}.{inside}.weight"] = (
                    weight(block, f"{inside}.parametrizations.weight.original") + 2.0 / 3 * up @ down
                )
    states: list[Tensor] = []

    def adapt(number: int) -> Any:
        def hook(_module: Any, _args: Any, output: Tensor) -> Tensor:
            prefix = f"wav2vec2.encoder.layers.{number}."
            if f"{prefix}bottleneck.up.weight" in weights:
                down, up = (
                    (weight(str(number), f"bottleneck.{each}.weight"), weight(str(number), f"bottleneck.{each}.bias"))
                    for each in ("down", "up")
                )
                output = output + F.linear(F.relu(F.linear(output, *down)), *up)
            if f"{prefix}gate.weight" in weights:
                output = output * torch.sigmoid(weight(str(number), "gate.weight"))
            states.append(output)
            return output

        return hook

    encoder.encoder.dropout.register_forward_hook(lambda _module, _args, output: states.append(output))
    for number, layer in enumerate(encoder.encoder.layers):
        layer.register_forward_hook(adapt(number))
    valid = valid_frames(frames, LENGTHS[0])
    hidden = functional_call(encoder.encoder, merged, (features().masked_fill(~valid[..., None], 0),), {"attention_mask": valid})[0]
    if "layer_sum.weights" in weights:
        shares = torch.softmax(weights["layer_sum.weights"], 0)
        hidden = torch.stack([share * state for share, state in zip(shares, states, strict=True)]).sum(0)
    pooled = torch.stack([F.relu(hidden[row, :count].mean(0)) for row, count in enumerate(LENGTHS)])
    logits = F.linear(pooled, weights["head.weight"], weights["head.bias"])
    torch.autograd.backward((logits * torch.arange(1.0, 13.0).view(3, 4)).sum())
    return logits.detach(), {name: each.grad for name, each in weights.items() if each.grad is not None}


@pytest.mark.parametrize("kinds", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("config", [{}, STABLE], ids=["post", "stable"])
def test_equal_to_transformers_with_plain_modules(kinds: tuple[str, ...], config: dict[str, Any]) -> None:
    """All combinations, both orders of the layer norms, ragged rows: logits, and the gradient of everything that trains."""
    model = adapted(kinds, **config)
    assert is_known(model.wav2vec2.encoder)
    (ours, found), (theirs, expected) = gradients(model), plainly(model, **config)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys() == {name for name, each in model.named_parameters() if each.requires_grad}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize("config", [{}, STABLE], ids=["post", "stable"])
def test_every_term_counts(config: dict[str, Any]) -> None:
    """Without any one of the terms the comparison above would fail by far: no adaptor is left out of the computation."""
    model = adapted(KINDS, **config)
    expected = plainly(model, **config)[0]
    with torch.no_grad():
        for name in adaptor_names(model):
            if name.endswith(("bias", "down", "down.weight")):  # they act through `up`
                continue
            parameter = dict(model.named_parameters())[name]
            before = parameter.clone()
            parameter.fill_(1e4 if "gate" in name else 0)  # a gate of 1, equal shares, no product
            assert float((model(features(), torch.tensor(LENGTHS)) - expected).abs().max()) > 1e-4, name
            parameter.copy_(before)
        torch.testing.assert_close(model(features(), torch.tensor(LENGTHS)), expected, rtol=1e-5, atol=1e-5)


def test_adaptors_start_where_the_base_model_is() -> None:
    """LoRA and a bottleneck with zero output weights: the same bits. A gate scales by sigmoid(1). The layer sum is the mean."""
    frames = torch.tensor(LENGTHS)
    with torch.no_grad():
        expected, states = run_transformer(base(), features(), frames), run_states(base(), features(), frames)
        for shape in (AdaptorShape(rank=4), AdaptorShape(bottleneck=8), AdaptorShape(rank=4, bottleneck=8)):
            encoder = base()
            attach(encoder, shape)
            assert torch.equal(run_transformer(encoder, features(), frames), expected)
        gated = base(num_hidden_layers=1)
        attach(gated, AdaptorShape(gate=True))
        scaled = run_transformer(base(num_hidden_layers=1), features(), frames) * torch.sigmoid(torch.tensor(1.0))
        torch.testing.assert_close(run_transformer(gated, features(), frames), scaled)
        model = EmotionClassifier(base(), 4, adaptors=ClassifierAdaptors(layer_sum=True))
        assert model.layer_sum is not None
        torch.testing.assert_close(model.layer_sum(states), torch.stack(states).mean(0))


def test_states_are_those_of_transformers() -> None:
    """Input of the first block and output of every block, by our code and by transformers; a dropped block repeats its input."""
    for config in ({}, STABLE, {"layerdrop": 0.5, "num_hidden_layers": 5}):
        found = []
        for eager in (False, True):
            torch.manual_seed(4)
            with torch.no_grad():
                found.append(run_states(base(eager=eager, **config), features(), torch.tensor(LENGTHS)))
        valid = valid_frames(torch.tensor(LENGTHS), LENGTHS[0])
        assert len(found[0]) == len(found[1]) == config.get("num_hidden_layers", 2) + 1
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours[valid], theirs[valid], rtol=1e-5, atol=1e-5)
    repeated = [torch.equal(one, other) for one, other in itertools.pairwise(found[0])]
    assert 0 < sum(repeated) < 5


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def replace_projection(encoder: Any) -> None:
    encoder.layers[0].attention.q_proj.__class__ = Doubled


def hook(encoder: Any) -> None:
    encoder.layers[1].feed_forward.register_forward_hook(lambda _module, _args, output: 2 * output)


def two_adaptations(encoder: Any) -> None:
    nn.utils.parametrize.register_parametrization(encoder.layers[0].attention.v_proj, "weight", LowRank(32, 32, 2, 1.0))
    doubled = nn.Module()
    doubled.forward = lambda weight: 2 * weight
    nn.utils.parametrize.register_parametrization(encoder.layers[0].attention.v_proj, "weight", doubled)


def foreign_module(encoder: Any) -> None:
    encoder.layers[0].attention.scale = nn.Identity()


def own_forward(encoder: Any) -> None:
    block = encoder.layers[0]
    before = block.forward
    block.forward = lambda *args, **options: 2 * before(*args, **options)


@pytest.mark.parametrize("change", [replace_projection, hook, two_adaptations, foreign_module, own_forward])
def test_what_is_not_known_is_computed_by_transformers(change: Any) -> None:
    """A foreign projection, hook, parametrization, child or forward: never the base model without a word."""
    models = [base(eager=eager) for eager in (False, True)]
    for each in models:
        change(each.encoder)
        assert not is_known(each.encoder)
    with torch.no_grad():
        ours, theirs = (run_transformer(each, features(), torch.tensor(LENGTHS)) for each in models)
        unchanged = run_transformer(base(), features(), torch.tensor(LENGTHS))
    valid = valid_frames(torch.tensor(LENGTHS), LENGTHS[0])
    torch.testing.assert_close(ours[valid], theirs[valid], rtol=1e-5, atol=1e-5)
    if change is not foreign_module:
        assert float((ours - unchanged)[valid].abs().max()) > 1e-2


def backward_flops(model: EmotionClassifier) -> int:
    logits = model(features(), torch.tensor(LENGTHS))
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(logits.sum())
    return int(counter.get_total_flops())


def test_gradients_of_frozen_weights_are_not_computed() -> None:
    """Counted products of the backward pass: a sixth layer's worth less for each frozen group, none below the last trained part."""
    rows, hidden, inner = sum(LENGTHS), 32, 64
    full = EmotionClassifier(base(), 4).train()
    frozen = EmotionClassifier(base(), 4).train()
    train_only(
        frozen, [name for name in below(frozen, "wav2vec2.encoder", "head") if not ("proj.weight" in name or "dense.weight" in name)]
    )
    saved = 2 * 2 * rows * (4 * hidden * hidden + 2 * hidden * inner)  # two layers; a product has two operations per value
    assert backward_flops(full) - backward_flops(frozen) == saved
    head = EmotionClassifier(base(), 4, adaptors=ClassifierAdaptors()).train()
    assert backward_flops(head) == 2 * len(LENGTHS) * hidden * 4
    last = EmotionClassifier(base(), 4).train()
    train_only(last, below(last, "wav2vec2.encoder.layers.1.final_layer_norm", "head"))
    assert backward_flops(last) == 2 * 2 * len(LENGTHS) * hidden * 4  # the head's weight and input


def kept_values(model: EmotionClassifier) -> int:
    """Numbers (float32) that a forward pass keeps for the backward pass, tensors that share memory counted once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(features(), torch.tensor(LENGTHS))
    assert logits.requires_grad
    return sum(kept.values())


def test_inputs_of_frozen_weights_are_not_kept() -> None:
    """Each is a factor of its weight's gradient only."""
    rows, hidden, inner = sum(LENGTHS), 32, 64
    full = kept_values(EmotionClassifier(base(), 4).train())
    frozen = EmotionClassifier(base(), 4).train()
    train_only(frozen, [name for name in below(frozen, "wav2vec2.encoder", "head") if "proj." not in name and "dense." not in name])
    assert full - kept_values(frozen) == 2 * rows * (3 * hidden + inner)  # inputs of q, k, v; out; intermediate; output


def test_what_trains_with_adaptors() -> None:
    """Adaptors, layer sum and head; after steps of an optimiser all else has the bits of before."""
    model = adapted(KINDS)
    names = {name for name, each in model.named_parameters() if each.requires_grad}
    assert names == {*adaptor_names(model), "head.weight", "head.bias"}
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    optimiser = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], 1e-2)
    for _ in range(20):
        gradients(model)
        optimiser.step()
    for name, each in model.named_parameters():
        assert torch.equal(each, before[name]) == (name not in names), name
    for wrong in ([], ["head.weight", "nothing"]):
        with pytest.raises(ValueError, match="parameters to train"):
            train_only(model, wrong)
    with pytest.raises(ValueError, match="no part"):
        below(model, "wav2vec2.nothing")


def test_numbers_of_parameters_of_wav2vec2_base() -> None:
    """The counts of the definitions: BA of 64 units, LoRA of rank 8, gates, the weighted sum, a head of four classes."""
    expected = {
        (): 3_076,
        ("ba",): 1_189_632 + 3_076,
        ("lora",): 442_368 + 3_076,
        ("wg",): 9_216 + 3_076,
        ("ws",): 13 + 3_076,
        KINDS: 442_368 + 1_189_632 + 9_216 + 13 + 3_076,
    }
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    with torch.device("meta"):  # all of the author's earlier code, whose LoRA is on the output projection too
        shape = AdaptorShape(bottleneck=64, rank=8, targets=PROJECTIONS[:4], gate=True)
        adaptors = ClassifierAdaptors(shape, layer_sum=True)
        assert parameter_counts(EmotionClassifier(Wav2Vec2Model(Wav2Vec2Config()), 4, adaptors=adaptors, projector=256))[0] == 1_986_577
    for kinds, count in expected.items():
        with torch.device("meta"):
            shape = AdaptorShape(bottleneck=64 * ("ba" in kinds), rank=8 * ("lora" in kinds), gate="wg" in kinds)
            model = EmotionClassifier(Wav2Vec2Model(Wav2Vec2Config()), 4, adaptors=ClassifierAdaptors(shape, "ws" in kinds))
        trained, total = parameter_counts(model)
        assert trained == count
        assert total - count == 94_371_712  # wav2vec2-base without its pretraining heads


def test_under_autocast() -> None:
    """bfloat16 on the CPU: near full precision, gradients in the type of the weights."""
    model = adapted(KINDS)
    exact, expected = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(features(), torch.tensor(LENGTHS))
    torch.autograd.backward((logits * torch.arange(1.0, 13.0).view(3, 4)).sum())
    assert float((logits.detach() - exact).norm() / exact.norm()) < 0.02
    for name, gradient in expected.items():
        found = dict(model.named_parameters())[name].grad
        assert found is not None
        assert found.dtype == torch.float32
        assert float((found - gradient).norm() / gradient.norm()) < 0.15, name


def test_a_projection_is_found_in_every_kind_of_block() -> None:
    """With or without adaptors around the block; a projection of another kind is refused."""
    encoder = base().encoder
    assert block_of(encoder.layers[0]) is encoder.layers[0]
    assert projection_of(encoder.layers[0], "k_proj") is encoder.layers[0].attention.k_proj
    assert projection_of(encoder.layers[0], "output_dense") is encoder.layers[0].feed_forward.output_dense
    encoder.layers[0].attention.k_proj = nn.Identity()
    with pytest.raises(TypeError, match="k_proj"):
        projection_of(encoder.layers[0], "k_proj")
