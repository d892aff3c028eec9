"""wav2vec v1 (arXiv 1904.05862): convolutional feature extractor and causal aggregator, equal to fairseq's with the same weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ser_core.models.conv1d_matmul import convolve_rows
from ser_core.models.shapes import Wav2vecConfig


class Wav2vec(nn.Module):
    """Extractor and aggregator, without fairseq's pretraining head."""

    def __init__(self, config: Wav2vecConfig) -> None:
        super().__init__()
        self.config = config
        self.extractor = Extractor(config)
        self.aggregator = Aggregator(config)

    @property
    def channels(self) -> int:
        """Channels of the extractor's output."""
        return self.config.conv_feature_layers[-1][0]

    @property
    def outputs(self) -> int:
        """Channels of the aggregator's output."""
        return self.config.conv_aggregator_layers[-1][0]

    def forward(self, waves: Tensor) -> Tensor:
        """(B, samples) -> aggregated frames (B, outputs, frames)."""
        frames: Tensor = self.aggregator(self.extractor(waves))
        return frames


class _Norm(nn.GroupNorm):
    """Group norm with one group (over channels and time), in float32 also under autocast."""

    def __init__(self, channels: int, affine: bool) -> None:
        super().__init__(1, channels, affine=affine)

    def forward(self, frames: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        # With four dimensions torch recognises and keeps the channels-last memory format.
        normed = F.group_norm(frames.float().unsqueeze(2), self.num_groups, weight, bias, self.eps)
        return normed.squeeze(2).type_as(frames)


class _Layer(nn.Module):
    """Convolution, dropout, norm, activation; if `causal`, padded on the left by kernel - 1 frames."""

    def __init__(self, inputs: int, layer: tuple[int, int, int], config: Wav2vecConfig, *, causal: bool) -> None:
        super().__init__()
        channels, kernel, stride = layer
        self.pad = kernel - 1 if causal else 0
        self.zero_pad = config.zero_pad
        self.conv = nn.Conv1d(inputs, channels, kernel, stride=stride, bias=causal and config.conv_bias)
        self.dropout = nn.Dropout(config.dropout if causal else 0.0)
        self.norm = _Norm(channels, config.affine)
        self.activate = F.relu_ if config.activation == "relu" else F.gelu

    def forward(self, frames: Tensor) -> Tensor:
        if self.pad:
            frames = F.pad(frames, (self.pad, 0)) if self.zero_pad else F.pad(frames, (self.pad, 0), mode="replicate")
        if self.pad == 0 and frames.device.type == "cpu" and not torch.is_grad_enabled():
            # Frozen extractor: faster than torch's convolution. The result is (B, channels, T) in channels-last memory format.
            convolved = convolve_rows(self.conv, frames.transpose(1, 2)).transpose(1, 2)
        else:
            convolved = self.conv(frames)
        return self.activate(self.norm(self.dropout(convolved)))


class Extractor(nn.Module):
    """(B, samples) -> (B, channels, frames). The norms cover the whole input, so the frames of a crop differ from cropped frames."""

    def __init__(self, config: Wav2vecConfig) -> None:
        super().__init__()
        widths = [1, *(channels for channels, _, _ in config.conv_feature_layers)]
        self.layers = nn.ModuleList(
            _Layer(inputs, layer, config, causal=False) for inputs, layer in zip(widths, config.conv_feature_layers, strict=False)
        )
        self.skip = config.skip_connections_feat
        self.scale = math.sqrt(config.residual_scale)
        self.log_compression = config.log_compression

    def forward(self, waves: Tensor) -> Tensor:
        frames = waves[:, None]
        for layer in self.layers:
            before = frames
            frames = layer(before)
            if self.skip and frames.shape[1] == before.shape[1]:
                length = frames.shape[2]
                frames = (frames + before[..., :: before.shape[2] // length][..., :length]) * self.scale
        return torch.log1p(frames.abs()) if self.log_compression else frames


class Aggregator(nn.Module):
    """(B, channels, frames) -> (B, outputs, frames). Causal, except for the norms over time."""

    def __init__(self, config: Wav2vecConfig) -> None:
        super().__init__()
        widths = [config.conv_feature_layers[-1][0], *(channels for channels, _, _ in config.conv_aggregator_layers)]
        pairs = list(zip(widths, config.conv_aggregator_layers, strict=False))
        self.layers = nn.ModuleList(_Layer(inputs, layer, config, causal=True) for inputs, layer in pairs)
        self.skip = config.skip_connections_agg
        self.residuals = nn.ModuleList(
            nn.Conv1d(inputs, layer[0], 1, bias=False) if self.skip and inputs != layer[0] else nn.Identity() for inputs, layer in pairs
        )
        self.scale = math.sqrt(config.residual_scale)

    def forward(self, frames: Tensor) -> Tensor:
        for layer, residual in zip(self.layers, self.residuals, strict=True):
            after: Tensor = layer(frames)
            frames = (after + residual(frames)) * self.scale if self.skip else after
        return frames
