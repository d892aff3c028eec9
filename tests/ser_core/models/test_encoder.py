"""The own transformer computes what transformers' does, and its dropout drops as often as it says, from torch's seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ser_core.models import encoder as own
from ser_core.models.backbone import build_backbone
from ser_core.models.encoder import DropoutBits, run_transformer, threshold_for
from ser_core.models.front_end import valid_frames
from ser_core.models.known_encoder import is_known
from ser_core.settings.backbone import BackboneSettings
from ser_core.settings.execution import Attention
from tests.ser_core.models import rebuild

LENGTHS = (90, 71, 33, 1)
STABLE: dict[str, Any] = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}
DROPOUT: dict[str, Any] = {"hidden_dropout": 0.1, "attention_dropout": 0.2, "activation_dropout": 0.3}


def model(*, eager: bool = False, **changes: Any) -> Any:
    settings = BackboneSettings(checkpoint=None, config={**rebuild.BACKBONE, **changes})
    built = build_backbone(settings, attention=Attention.eager if eager else Attention.sdpa).wav2vec2
    rebuild.fill(dict(built.named_parameters()), seed=1)
    return built


def features(batch: int = len(LENGTHS)) -> Tensor:
    return torch.randn(batch, LENGTHS[0], 32, generator=torch.Generator().manual_seed(0))


def results(encoder: Any, lengths: tuple[int, ...] | None = LENGTHS) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output of the valid frames, gradient of the input, gradients of the weights."""
    hidden = features().requires_grad_()
    frames = None if lengths is None else torch.tensor(lengths)
    valid = valid_frames(torch.tensor(lengths or (LENGTHS[0],) * len(LENGTHS)), LENGTHS[0])
    output = run_transformer(encoder, hidden, frames)[valid]
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    torch.autograd.backward((output * weights).sum())
    assert hidden.grad is not None
    return output.detach(), hidden.grad, {name: p.grad for name, p in encoder.encoder.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [LENGTHS, None])
@pytest.mark.parametrize("config", [{}, STABLE, {"num_conv_pos_embeddings": 15, "num_conv_pos_embedding_groups": 2}])
def test_equal_to_transformers(config: dict[str, Any], lengths: tuple[int, ...] | None) -> None:
    """Post-norm and stable-layer-norm models, even and odd positional kernels, with and without padding: output and every gradient."""
    one, other = model(**config), model(eager=True, **config)
    assert is_known(one.encoder)
    assert not is_known(other.encoder)
    one.train()
    other.train()
    ours, theirs = results(one, lengths), results(other, lengths)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-5)
    assert ours[2].keys() == theirs[2].keys() == {name for name, _ in one.encoder.named_parameters()}
    scale = max(float(gradient.abs().max()) for gradient in theirs[2].values())
    for name, gradient in theirs[2].items():
        torch.testing.assert_close(ours[2][name], gradient, rtol=1e-4, atol=1e-6 * scale, msg=name)


def test_evaluation_is_equal_and_draws_nothing() -> None:
    """Without gradient and with dropout configured: transformers' output, and torch's generator is where it was."""
    one, other = model(**DROPOUT, layerdrop=0.5), model(eager=True, **DROPOUT, layerdrop=0.5)
    before = torch.get_rng_state()
    with torch.no_grad():
        ours, theirs = (run_transformer(each, features(), torch.tensor(LENGTHS)) for each in (one, other))
    valid = valid_frames(torch.tensor(LENGTHS), LENGTHS[0])
    torch.testing.assert_close(ours[valid], theirs[valid], rtol=1e-5, atol=2e-6)
    assert torch.equal(before, torch.get_rng_state())


def test_an_utterance_does_not_see_the_others() -> None:
    """The same output alone and in a batch; what lies behind the valid frames has no influence."""
    encoder = model()
    together = run_transformer(encoder, features(), torch.tensor(LENGTHS))
    behind = features()
    behind[1, LENGTHS[1] :] = 99
    assert torch.equal(together, run_transformer(encoder, behind, torch.tensor(LENGTHS)))
    alone = run_transformer(encoder, features()[1:2, : LENGTHS[1]], None)
    torch.testing.assert_close(together[1, : LENGTHS[1]], alone[0], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("config", [{}, STABLE])
def test_gradients_with_dropout(monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]) -> None:
    """With the same bits drawn each time, loss and gradients are those of the layers written out with masks and autograd."""
    encoder = model(**config, **DROPOUT, num_hidden_layers=1).train()
    seeds = DropoutBits(5)
    monkeypatch.setattr(DropoutBits, "seeded", classmethod(lambda cls: cls(5)))
    monkeypatch.setattr(F, "dropout", lambda x, *_: x)  # the one of torch before the first layer
    ours = results(encoder)
    fused = {name: gradient.clone() for name, gradient in ours[2].items()}
    encoder.zero_grad()

    def drop(x: Tensor, p: float) -> Tensor:
        return x * (seeds.bits(tuple(x.shape), x.dtype) > threshold_for(p, x.dtype)) / (1 - p)

    def attend(attention: Any, residual: Tensor, hidden: Tensor, options: Any) -> Tensor:
        lengths, heads, inner, outer, *_ = options
        merged = []
        q, k, v = attention.q_proj(hidden), attention.k_proj(hidden), attention.v_proj(hidden)
        for q_, k_, v_ in zip(*(own._heads(each, lengths, heads) for each in (q, k, v)), strict=True):
            p = torch.softmax(q_ @ k_.transpose(1, 2) * q_.shape[-1] ** -0.5, -1)
            merged.append((drop(p, inner) @ v_).transpose(0, 1).flatten(1))
        return residual + drop(attention.out_proj(torch.cat(merged)), outer)

    def feed(block: Any, residual: Tensor, hidden: Tensor, options: Any) -> Tensor:
        inner, outer, *_ = options
        return residual + drop(block.output_dense(drop(F.gelu(block.intermediate_dense(hidden)), inner)), outer)

    def numbers_only(self: DropoutBits, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.nan_to_num(original(self, shape, dtype), nan=1.0)  # a pattern that is no number is kept, as 1 is

    original = DropoutBits.bits
    monkeypatch.setattr(DropoutBits, "bits", numbers_only)
    monkeypatch.setattr(own, "_attend", attend)
    monkeypatch.setattr(own, "_feed_forward", feed)
    plain = results(encoder)
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], plain[1], rtol=1e-4, atol=1e-4)
    for name, gradient in plain[2].items():
        torch.testing.assert_close(fused[name], gradient, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probability", [0.05, 0.1, 0.4])
def test_dropped_share(dtype: torch.dtype, probability: float) -> None:
    """What is dropped of a million numbers is its share within five standard deviations, and neighbours are independent."""
    bits = DropoutBits(3).bits((1000, 1000), dtype)
    dropped = (own._dropped(torch.ones(1000, 1000, dtype=dtype), bits, probability) == 0).float()
    deviation = (probability * (1 - probability)) ** 0.5
    assert abs(float(dropped.mean()) - probability) < 5 * deviation / 1000
    assert abs(float((dropped[:, 1:] * dropped[:, :-1]).mean()) - probability**2) < 5 * probability / 1000


def test_dropout_is_seeded_by_torch() -> None:
    """manual_seed decides; another seed draws other masks; the number of threads does not matter to the bits."""
    encoder = model(**DROPOUT, layerdrop=0.3).train()
    frames = torch.tensor(LENGTHS)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        output: Tensor = run_transformer(encoder, features(), frames).detach()
        return output

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    shape = (own.PARALLEL_DRAW_WORDS, 4)
    before = torch.get_num_threads()
    drawn = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        drawn.append(DropoutBits(1).bits(shape, torch.float32).view(torch.int32))
    torch.set_num_threads(before)
    assert torch.equal(*drawn)


def test_layer_drop() -> None:
    """A dropped layer gets no gradient, and torch's generator decides which, as in transformers."""
    kept = []
    for eager in (False, True):
        encoder = model(eager=eager, layerdrop=0.5, num_hidden_layers=6).train()
        torch.manual_seed(4)
        found = results(encoder)[2]
        kept.append({name.split(".")[1] for name in found if name.startswith("layers.")})
    assert kept[0] == kept[1]
    assert 0 < len(kept[0]) < 6


@pytest.mark.parametrize("change", [{"hidden_act": "relu"}, {"attention_dropout": 0.5}, {"adapter_attn_dim": 8, **STABLE}])
def test_unsupported_configurations_use_transformers(change: dict[str, Any]) -> None:
    """Another activation, half of everything dropped, attention adapters."""
    assert not is_known(model(**change).encoder)
