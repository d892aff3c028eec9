"""Adaptors of a transformer for parameter-efficient fine-tuning: bottleneck (BA), LoRA, weighted sum of layers (WS), weight gating (WG).

The definitions follow arXiv 2402.11747 where its abstract states them, else its first author's earlier public code
(NLashkarashvili/Thesis, commit 85801a6). What neither states is marked `ours`.

An adaptor is part of the encoder's modules, so that transformers computes it as well as `ser_core.models.encoder`: LoRA is a
parametrization of a projection's weight (WavLM passes `q_proj.weight` to torch and never calls the projection), BA and WG wrap a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
FEED_FORWARD_PROJECTIONS = ("intermediate_dense", "output_dense")
PROJECTIONS = (*ATTENTION_PROJECTIONS, *FEED_FORWARD_PROJECTIONS)


@dataclass(frozen=True)
class AdaptorShape:
    """Which adaptors an encoder gets in every block, and their sizes; the weighted sum of layers belongs to the head (`LayerSum`)."""

    bottleneck: int = 0  # units; 0: none
    identity_start: bool = True  # ours: the bottleneck's output weights start at zero; False: N(0, 0.02) as in the author's code
    rank: int = 0  # of LoRA; 0: none
    alpha: float = 1.0  # LoRA's product is scaled by alpha / rank
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")  # projections that get LoRA, of `PROJECTIONS`
    gate: bool = False


class LowRank(nn.Module):
    """LoRA (arXiv 2106.09685) as a parametrization: weight (outputs, inputs) -> weight + alpha / rank * up @ down. Starts at the weight."""

    def __init__(self, outputs: int, inputs: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # of loralib

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight, self.up, self.down, alpha=self.scale)


class Bottleneck(nn.Module):
    """x + up(ReLU(down(x))) on the output of a block, (..., hidden)."""

    def __init__(self, hidden: int, units: int, *, identity_start: bool) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, units)
        self.up = nn.Linear(units, hidden)
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        if identity_start:
            nn.init.zeros_(self.up.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        added: Tensor = self.up(F.relu(self.down(hidden)))
        return hidden + added


class Gate(nn.Module):
    """x * sigmoid(weight), one weight for each channel, the same for every frame; the weights start at 1, so the factor at 0.731."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * torch.sigmoid(self.weight)


class AdaptedBlock(nn.Module):
    """A block of transformers followed by a bottleneck and a gate (for pre-norm blocks, after the feed-forward residual: ours)."""

    def __init__(self, block: nn.Module, bottleneck: Bottleneck | None, gate: Gate | None) -> None:
        super().__init__()
        self.block = block
        self.bottleneck = bottleneck
        self.gate = gate

    def adapt(self, hidden: Tensor) -> Tensor:
        """Apply the adaptors to the output of the block."""
        if self.bottleneck is not None:
            hidden = self.bottleneck(hidden)
        return hidden if self.gate is None else self.gate(hidden)

    def forward(self, *args: Any, **options: Any) -> Any:
        """The block's result with an adapted first entry: a block of WavLM also returns its position bias."""
        output = self.block(*args, **options)
        return (self.adapt(output[0]), *output[1:]) if isinstance(output, tuple) else self.adapt(output)


class LayerSum(nn.Module):
    """Weighted sum of the states of L layers: input of the first block and every block's output; softmax weights, which start equal."""

    def __init__(self, states: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(states))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        shares = torch.softmax(self.weights, 0)
        return sum((share * state for share, state in zip(shares, states, strict=True)), start=torch.zeros_like(states[0]))


def attach(encoder: Any, shape: AdaptorShape) -> None:
    """Add adaptors to the transformer of an encoder (such as `Wav2Vec2Model`), in place, with weights from torch's default generator."""
    layers = encoder.encoder.layers
    for number, block in enumerate(layers):
        if shape.rank:
            for name in shape.targets:
                projection = projection_of(block, name)
                low_rank = LowRank(projection.out_features, projection.in_features, shape.rank, shape.alpha)
                # unsafe: not tried on the weight; its type and shape are right by construction.
                parametrize.register_parametrization(projection, "weight", low_rank, unsafe=True)
        hidden = encoder.config.hidden_size
        bottleneck = Bottleneck(hidden, shape.bottleneck, identity_start=shape.identity_start) if shape.bottleneck else None
        gate = Gate(hidden) if shape.gate else None
        if bottleneck is not None or gate is not None:
            layers[number] = AdaptedBlock(block, bottleneck, gate)


def adaptor_names(module: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    """Return the names of the parameters of all adaptors in a module, or of those of some classes."""
    kinds = kinds or (LowRank, Bottleneck, Gate, LayerSum)
    return [f"{name}.{inner}" for name, each in module.named_modules() if isinstance(each, kinds) for inner, _ in each.named_parameters()]


def block_of(layer: Any) -> Any:
    """Return transformers' block of an encoder layer with or without adaptors."""
    return layer.block if type(layer) is AdaptedBlock else layer


def projection_of(block: Any, name: str) -> Any:
    """Return a projection of `PROJECTIONS` of a block of transformers."""
    projection = getattr(block.attention if name in ATTENTION_PROJECTIONS else block.feed_forward, name)
    if not isinstance(projection, nn.Linear):
        raise TypeError(f"{name} of {type(block).__name__} is a {type(projection).__name__}, not a linear layer")
    return projection


def low_rank_of(projection: Any) -> LowRank | None:
    """Return the LoRA of a projection, None if it has none. Raises TypeError for a projection that is neither plain nor ours."""
    if type(projection) is nn.Linear:
        return None
    if parametrize.is_parametrized(projection) and type(projection).__bases__ == (nn.Linear,):
        found = {name: list(each) for name, each in projection.parametrizations.items()}
        if set(found) == {"weight"} and len(found["weight"]) == 1 and type(found["weight"][0]) is LowRank:
            return found["weight"][0]
    raise TypeError(f"{type(projection).__name__} is not a linear layer, with or without LoRA")
