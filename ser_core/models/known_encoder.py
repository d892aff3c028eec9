"""Whether the CPU implementation of the transformer (`ser_core.models.encoder`) computes all that an encoder of transformers holds.

It reads weights and calls no module, so a hook, a module of another library or an activation that it does not know would be left out
without an error. Every module must therefore be of an expected type, with the expected children and without hooks. For any other encoder
transformers' own code is called, which computes whatever its modules compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrizations, parametrize

from ser_core.models.adaptors import AdaptedBlock, Bottleneck, Gate, block_of, low_rank_of
from ser_core.models.convolutions import is_gelu

MAX_DROPOUT = 0.49  # for a higher probability the threshold of `DropoutBits` would have to be positive
STABLE = "EncoderStableLayerNorm"  # class name of an encoder with the layer norms before attention and feed-forward, without its prefix
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
BLOCK_PARTS = ("attention", "dropout", "layer_norm", "feed_forward", "final_layer_norm")
FEED_FORWARD_PARTS = ("intermediate_dropout", "intermediate_dense", "intermediate_act_fn", "output_dense", "output_dropout")


@dataclass(frozen=True)
class _Family:
    """Prefix of the class names of one kind of model, and their module."""

    prefix: str
    module: str

    def holds(self, part: Any, name: str, *children: str) -> bool:
        """Whether `part` is of the class `name` of this family, with exactly these children."""
        own = (type(part).__module__, type(part).__name__) == (f"transformers.models.{self.module}", f"{self.prefix}{name}")
        return own and {name for name, _ in part.named_children()} == set(children)


WAV2VEC2 = _Family("Wav2Vec2", "wav2vec2.modeling_wav2vec2")
HUBERT = _Family("Hubert", "hubert.modeling_hubert")
DATA2VEC = _Family("Data2VecAudio", "data2vec.modeling_data2vec_audio")
FAMILIES = {
    **{f"{family.prefix}{kind}": family for family in (WAV2VEC2, HUBERT) for kind in ("Encoder", STABLE)},
    "Data2VecAudioEncoder": DATA2VEC,
}


def is_known(encoder: Any) -> bool:
    """Whether the encoder (`Wav2Vec2Model.encoder`) consists of nothing but what `ser_core.models.encoder` computes."""
    family = FAMILIES.get(type(encoder).__name__)
    return (
        family is not None
        and not any(_is_changed(module) for module in encoder.modules())
        and family.holds(encoder, STABLE if is_stable(encoder) else "Encoder", "pos_conv_embed", "layer_norm", "dropout", "layers")
        and encoder.config._attn_implementation != "eager"
        and not encoder.gradient_checkpointing
        and _are(nn.LayerNorm, encoder.layer_norm)
        and _is_dropout(encoder.dropout)
        and _is_positional(family, encoder.pos_conv_embed)
        and all(_is_adaptor(layer) and _is_block(family, block_of(layer), stable=is_stable(encoder)) for layer in encoder.layers)
    )


def is_stable(encoder: Any) -> bool:
    """Whether an encoder of transformers applies its layer norms before attention and feed-forward."""
    return type(encoder).__name__.endswith(STABLE)


def _is_changed(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in HOOKS) or "forward" in vars(module)


def _is_adaptor(layer: Any) -> bool:
    """Whether nothing but our adaptors follows the block of a layer."""
    if type(layer) is not AdaptedBlock:
        return True
    return all(type(part) in (Bottleneck, Gate, type(None)) for part in (layer.bottleneck, layer.gate))


def _is_block(family: _Family, block: Any, *, stable: bool) -> bool:
    if not family.holds(block, "EncoderLayerStableLayerNorm" if stable else "EncoderLayer", *BLOCK_PARTS):
        return False
    attention, inner = block.attention, block.feed_forward
    return (
        family.holds(attention, "Attention", "q_proj", "k_proj", "v_proj", "out_proj")
        and family.holds(inner, "FeedForward", *FEED_FORWARD_PARTS)
        and is_gelu(inner.intermediate_act_fn)
        and all(map(_is_projection, (*attention.children(), inner.intermediate_dense, inner.output_dense)))
        and _are(nn.LayerNorm, block.layer_norm, block.final_layer_norm)
        and all(map(_is_dropout, (block.dropout, inner.intermediate_dropout, inner.output_dropout)))
        and 0 <= attention.dropout < MAX_DROPOUT
    )


def _is_positional(family: _Family, embedding: Any) -> bool:
    """One convolution with transformers' weight norm, or data2vec's stack, which is called as it is."""
    if family is DATA2VEC:
        return True
    return (
        family.holds(embedding, "PositionalConvEmbedding", "conv", "padding", "activation")
        and is_gelu(embedding.activation)
        and parametrize.is_parametrized(embedding.conv)
        and type(embedding.conv).__bases__ == (nn.Conv1d,)
        and set(embedding.conv.parametrizations) == {"weight"}
        and [type(each) for each in embedding.conv.parametrizations.weight] == [parametrizations._WeightNorm]
    )


def _is_projection(projection: Any) -> bool:
    """A linear layer with bias, with or without our LoRA."""
    try:
        low_rank_of(projection)
    except TypeError:
        return False
    return projection.bias is not None


def _is_dropout(module: Any) -> bool:
    return type(module) is nn.Dropout and 0 <= module.p < MAX_DROPOUT


def _are(kind: type[nn.Module], *modules: Any) -> bool:
    return all(type(module) is kind for module in modules)
