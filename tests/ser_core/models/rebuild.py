"""Weights, waves, masks and noise of the golden values, rebuilt from seeds by name: nothing depends on torch's generators or on order."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

# wav2vec 2.0 in small: the group norm over time and the post-norm encoder of wav2vec2-base, one frame every 80 samples.
BACKBONE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [24, 24, 24],
    "conv_kernel": [10, 8, 4],
    "conv_stride": [5, 4, 4],
    "num_feat_extract_layers": 3,
    "feat_extract_norm": "group",
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_codevectors_per_group": 128,
    "num_codevector_groups": 2,
    "codevector_dim": 32,
    "proj_codevector_dim": 24,
    "num_negatives": 100,
    "contrastive_logits_temperature": 0.1,
    "diversity_loss_weight": 0.1,
    "mask_time_prob": 0.05,
    "mask_time_length": 10,
    "layerdrop": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "feat_quantizer_dropout": 0.0,
    "final_dropout": 0.0,
}

# wav2vec v1 in small: one frame every 40 samples, one emotion state every 80.
WAV2VEC: dict[str, Any] = {
    "conv_feature_layers": [[20, 10, 5], [20, 8, 4], [20, 4, 2], [20, 1, 1]],
    "conv_aggregator_layers": [[20, 2, 1], [20, 3, 1], [24, 4, 1]],
    "log_compression": True,
    "skip_connections_feat": True,
    "skip_connections_agg": True,
    "residual_scale": 0.5,
}

SAMPLES = (6000, 4100, 2900, 5333)
CLASS_COUNTS = (7, 3, 5, 4)
LABELS = (1, 0, 3, 2)
CLUSTERS = (5, 11)
HEAD_UNITS = 16
RNN_UNITS = 12


def generator(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def canonical(name: str) -> str:
    """One name for a parameter whatever torch's weight norm calls it."""
    return name.replace("parametrizations.weight.original0", "weight_g").replace("parametrizations.weight.original1", "weight_v")


def values(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Draw one parameter: matrices scaled by their inputs, norms about 1, biases about 0."""
    draw = generator(seed, canonical(name)).standard_normal(shape)
    if canonical(name).endswith("weight_g"):
        draw = 1 + 0.1 * draw
    elif name.endswith("bias") or "bias_" in name:
        draw = 0.1 * draw
    elif len(shape) == 1 and name.endswith("weight"):
        draw = 1 + 0.1 * draw
    elif len(shape) > 1 and "codevectors" not in name:
        draw = draw / np.sqrt(np.prod(shape[1:]))
    return draw.astype(np.float32)


def fill(parameters: Mapping[str, torch.Tensor], seed: int) -> None:
    """Set every parameter, each from its own name."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(values(name, tuple(parameter.shape), seed)))


def waves(samples: tuple[int, ...] = SAMPLES, seed: int = 5) -> list[NDArray[np.float32]]:
    """Noise with a slow envelope and an offset, so that a norm over time sees something."""
    result = []
    for index, length in enumerate(samples):
        time = np.arange(length)
        noise = generator(seed, f"wave{index}").standard_normal(length)
        result.append((0.1 * noise * (1.2 + np.sin(time / 700 + index)) + 0.02 * np.sin(time / (9 + index))).astype(np.float32))
    return result


def spans(lengths: tuple[int, ...], padded: int, starts: tuple[tuple[int, ...], ...], span: int) -> NDArray[np.bool_]:
    """A written-down mask (B, padded), cut to each row's valid length."""
    mask = np.zeros((len(lengths), padded), dtype=bool)
    for row, (length, row_starts) in enumerate(zip(lengths, starts, strict=True)):
        for start in row_starts:
            mask[row, start : min(start + span, length)] = True
    return mask


def frames(samples: int) -> int:
    """Frames of the small wav2vec 2.0."""
    for kernel, stride in zip(BACKBONE["conv_kernel"], BACKBONE["conv_stride"], strict=True):
        samples = (samples - kernel) // stride + 1
    return samples


FRAMES = tuple(frames(n) for n in SAMPLES)
TIME_STARTS = ((3, 40), (0, 31), (12, 30), (20, 50))


def time_mask(span: int = 8) -> NDArray[np.bool_]:
    return spans(FRAMES, max(FRAMES), TIME_STARTS, span)


def feature_mask() -> NDArray[np.bool_]:
    return spans((32,) * 4, 32, ((3,), (20,), (11,), (30,)), 6)


def negatives(mask: NDArray[np.bool_], count: int = 100, seed: int = 6) -> NDArray[np.int64]:
    """(B, T, count): for every frame of the padded batch others of its row, as flat indices; the authors' draw over all frames."""
    batch, length = mask.shape
    draw = generator(seed, "negatives").integers(0, length - 1, size=(batch, length, count))
    draw += draw >= np.arange(length)[None, :, None]
    flat: NDArray[np.int64] = draw + (np.arange(batch) * length)[:, None, None]
    return flat


def gumbel(shape: tuple[int, ...], seed: int = 10) -> NDArray[np.float32]:
    """Gumbel noise for logits of this shape; a seed under which no two frames of a row share their codes and no choice is close."""
    uniform = generator(seed, "gumbel").uniform(1e-6, 1 - 1e-6, size=shape)
    return (-np.log(-np.log(uniform))).astype(np.float32)


def fixed_gumbel_softmax(logits: torch.Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1) -> torch.Tensor:
    """torch's gumbel_softmax with the noise of `gumbel`: to stand in for it on both sides of a comparison."""
    noise = torch.from_numpy(gumbel(tuple(logits.shape))).to(logits)
    soft = torch.softmax((logits + noise) / tau, dim)
    if not hard:
        return soft
    chosen = torch.zeros_like(soft).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0)
    return chosen - soft.detach() + soft


def likeliest_softmax(logits: torch.Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1) -> torch.Tensor:
    """torch's gumbel_softmax without noise: to compare a batch with its parts, for which noise would be drawn in another order."""
    del eps
    soft = torch.softmax(logits / tau, dim)
    if not hard:
        return soft
    return torch.zeros_like(soft).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0) - soft.detach() + soft


def pseudo_labels(mask: NDArray[np.bool_], seed: int = 8) -> NDArray[np.int64]:
    """(B, heads, T), with a few frames at each row's end without label."""
    batch, length = mask.shape
    labels = np.stack([generator(seed, f"labels{k}").integers(0, k, size=(batch, length)) for k in CLUSTERS], axis=1)
    for row, valid in enumerate(FRAMES):
        labels[row, :, valid - 20 :] = -100
    return labels.astype(np.int64)


# Emotion states: equally long crops, as the stage makes them.
STATES_SAMPLES = 2900
STATES_FRAMES = 70
STATES_TIME_STARTS = ((3, 60), (0, 31), (12, 30), (20, 68))


def states_time_mask() -> NDArray[np.bool_]:
    return spans((STATES_FRAMES,) * 4, STATES_FRAMES, STATES_TIME_STARTS, 8)


def states_feature_mask() -> NDArray[np.bool_]:
    return spans((20,) * 4, 20, ((3,), (10,), (0,), (17,)), 5)
