"""Convolutions as matrix products are transformers' and torch's own, values and gradients, whatever lies beside an utterance."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ser_core.models import conv1d_matmul
from ser_core.models.backbone import build_backbone
from ser_core.models.conv1d_matmul import convolve_rows
from ser_core.models.convolutions import convolve, supports
from ser_core.models.front_end import project_independent
from ser_core.settings.backbone import BackboneSettings
from tests.ser_core.models import rebuild

SHAPES: list[dict[str, Any]] = [
    {"conv_dim": [16] * 7, "conv_kernel": [10, 3, 3, 3, 3, 2, 2], "conv_stride": [5, 2, 2, 2, 2, 2, 2], "num_feat_extract_layers": 7},
    {},  # kernels of two strides and of one
    {"conv_dim": [8, 16, 12], "conv_kernel": [12, 2, 7], "conv_stride": [7, 3, 2], "num_feat_extract_layers": 3},  # frames passed over
    {"conv_dim": [8], "conv_kernel": [12], "conv_stride": [7], "num_feat_extract_layers": 1},
]


def extractor_of(**changes: Any) -> Any:
    model = build_backbone(BackboneSettings(checkpoint=None, config={**rebuild.BACKBONE, **changes}))
    rebuild.fill(dict(model.named_parameters()), seed=1)
    return model.double().wav2vec2.feature_extractor


def waves() -> list[Tensor]:
    return [torch.from_numpy(wave).double() for wave in rebuild.waves((6000, 4100, 401, 5333))]


@pytest.mark.slow
@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize(("norm", "bias"), list(itertools.product(["group", "layer"], [False, True])))
def test_equal_to_transformers(changes: dict[str, Any], norm: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames and gradients of several utterances together are those of transformers' module on each alone; chunks meet inside them."""
    monkeypatch.setattr(conv1d_matmul, "CHUNK_ROWS", 50)
    extractor = extractor_of(**changes, feat_extract_norm=norm, conv_bias=bias)
    assert supports(extractor)
    ours, theirs = convolve(extractor, waves()), [extractor(wave[None])[0].T for wave in waves()]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    weights = [torch.randn_like(frames) for frames in theirs]
    parameters = list(extractor.parameters())
    found, expected = (
        torch.autograd.grad(sum((a * b).sum() for a, b in zip(frames, weights, strict=True)), parameters) for frames in (ours, theirs)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_in_single_precision(offset: float) -> None:
    """Single precision gives 1e-5 of the largest value, and the norm takes out an offset a hundred times the signal as far as it can."""
    extractor = extractor_of(**SHAPES[0])
    expected = [extractor((wave + offset)[None])[0].T for wave in waves()]
    found = convolve(extractor.float(), [(wave + offset).float() for wave in waves()])
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).detach().abs().max() / other.detach().abs().max()) < (1e-3 if offset else 1e-5)


def waves_of_float() -> list[Tensor]:
    return [wave.float() for wave in waves()]


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["group", "layer"])
def test_gradient(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own check of gradients, by differences."""
    monkeypatch.setattr(conv1d_matmul, "CHUNK_ROWS", 3)
    shape = {"conv_dim": [3, 2, 4], "conv_kernel": [4, 3, 2], "conv_stride": [2, 2, 2], "num_feat_extract_layers": 3}
    extractor = extractor_of(**shape, feat_extract_norm=norm, conv_bias=norm == "layer")
    parameters = dict(extractor.named_parameters())
    clips = [torch.randn(60, dtype=torch.float64), torch.randn(41, dtype=torch.float64)]

    def through(*_: Tensor) -> Tensor:
        return torch.cat(convolve(extractor, clips))

    assert torch.autograd.gradcheck(through, tuple(parameters.values()))


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_another_utterance_never_reaches_a_frame(norm: str) -> None:
    """Not even one that is no number."""
    extractor = extractor_of(**SHAPES[0], feat_extract_norm=norm)
    batch = waves()
    expected = convolve(extractor, batch)
    batch[1] = torch.full_like(batch[1], float("nan"))
    for number, (one, other) in enumerate(zip(convolve(extractor, batch), expected, strict=True)):
        assert torch.equal(one, other) == (number != 1)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["group", "layer"])
def test_autocast(norm: str) -> None:
    """Under autocast the frames have its type and the gradients that of the weights, near those of full precision."""
    extractor = extractor_of(**SHAPES[0], feat_extract_norm=norm).float()
    exact = torch.cat(convolve(extractor, waves_of_float()))
    with torch.autocast("cpu", torch.bfloat16):
        frames = torch.cat(convolve(extractor, waves_of_float()))
    assert frames.dtype == torch.bfloat16
    assert float((frames - exact).norm() / exact.norm()) < 0.02
    torch.autograd.backward(frames.float().square().sum())
    assert all(each.grad.dtype == torch.float32 and bool(each.grad.isfinite().all()) for each in extractor.parameters())


def test_unsupported_extractors_use_transformers() -> None:
    """An activation that is not GELU runs through the module."""
    model = build_backbone(BackboneSettings(checkpoint=None, config={**rebuild.BACKBONE, "feat_extract_activation": "relu"}))
    assert not supports(model.wav2vec2.feature_extractor)
    wave = waves_of_float()[0]
    expected = model.wav2vec2.feature_projection(model.wav2vec2.feature_extractor(wave[None]).transpose(1, 2))[0][0]
    torch.testing.assert_close(project_independent(model, [wave])[0], expected)


@pytest.mark.parametrize(("inputs", "kernel", "stride"), [(1, 10, 5), (6, 8, 4), (6, 3, 2), (6, 4, 1), (6, 1, 1), (6, 2, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_one_convolution(inputs: int, kernel: int, stride: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`convolve_rows` is torch's convolution."""
    monkeypatch.setattr(conv1d_matmul, "CHUNK_ROWS", 4)
    conv = nn.Conv1d(inputs, 5, kernel, stride, bias=bias).double()
    rows = torch.randn(3, 23, inputs, dtype=torch.float64)
    torch.testing.assert_close(convolve_rows(conv, rows), conv(rows.transpose(1, 2)).transpose(1, 2).detach())
