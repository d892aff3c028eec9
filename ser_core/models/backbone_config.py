"""Checks of the configuration of a wav2vec 2.0 with random weights, made before a launch without importing torch or transformers.

The conditions are those that `transformers.Wav2Vec2ForPreTraining` and `ser_core.models.backbone` make when the model is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ser_core.models.checkpoint_keys import unknown_key

# Values of `transformers.Wav2Vec2Config` where a configuration has no such key.
DEFAULTS: Mapping[str, Any] = {
    **{"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "intermediate_size": 3072},
    **{"num_conv_pos_embeddings": 128, "num_conv_pos_embedding_groups": 16},
    **{"conv_dim": (512,) * 7, "conv_stride": (5, 2, 2, 2, 2, 2, 2), "conv_kernel": (10, 3, 3, 3, 3, 2, 2)},
    **{"feat_extract_norm": "group", "mask_time_length": 10, "mask_time_prob": 0.05, "mask_feature_prob": 0.0, "add_adapter": False},
    **{"num_codevectors_per_group": 320, "num_codevector_groups": 2, "codevector_dim": 256, "proj_codevector_dim": 256},
}
# Further keys that every supported version of transformers has: a configuration of these and those above is checked without importing it.
MORE_KEYS = frozenset(
    (
        *("hidden_act", "hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "feat_quantizer_dropout"),
        *("final_dropout", "layerdrop", "initializer_range", "layer_norm_eps", "feat_extract_activation", "conv_bias"),
        *("do_stable_layer_norm", "apply_spec_augment", "mask_time_min_masks", "mask_feature_length", "mask_feature_min_masks"),
        *("contrastive_logits_temperature", "num_negatives", "diversity_loss_weight"),
    )
)
LAYERS = ("conv_dim", "conv_kernel", "conv_stride")
SIZES = tuple(key for key, value in DEFAULTS.items() if type(value) is int)
DIVISIBLE = (  # the first must be divisible by the second
    ("hidden_size", "num_attention_heads"),
    ("hidden_size", "num_conv_pos_embedding_groups"),
    ("codevector_dim", "num_codevector_groups"),
)
SECTION = "recipe.backbone.config"


def config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line per key or value of `backbone.config` that no model can be built with."""
    others = set(config) - set(DEFAULTS) - MORE_KEYS
    if others:
        from transformers import Wav2Vec2Config

        known = Wav2Vec2Config().to_dict()
        yield from (unknown_key(SECTION, key, known) for key in sorted(others - set(known)))
    values = {**DEFAULTS, **config}
    wrong = [key for key in SIZES if type(values[key]) is not int or values[key] < 1]
    yield from (f"{SECTION}.{key}={values[key]}: must be a whole number of at least 1" for key in wrong)
    for key in LAYERS:
        layers = values[key]
        if not isinstance(layers, list | tuple) or not layers or not all(type(each) is int and each > 0 for each in layers):
            wrong.append(key)
            yield f"{SECTION}.{key}={layers}: must be a list of whole numbers of at least 1, one per convolution"
    for size, parts in DIVISIBLE:
        if not {size, parts} & set(wrong) and values[size] % values[parts]:
            yield f"{SECTION}.{size}={values[size]}: must be divisible by {parts}={values[parts]}"
    lengths = {key: len(values[key]) for key in LAYERS if key not in wrong}
    if len(set(lengths.values())) > 1:
        yield f"{SECTION}: {', '.join(f'{key} has {count}' for key, count in lengths.items())} entries; one per convolution in each"
    if values["feat_extract_norm"] not in ("group", "layer"):
        yield f"{SECTION}.feat_extract_norm={values['feat_extract_norm']}: unknown; known are group, layer"
    if not values["mask_time_prob"] and not values["mask_feature_prob"]:
        yield f"{SECTION}.mask_time_prob=0: the model then has no mask embedding, which every stage needs"
    if values["add_adapter"]:
        yield f"{SECTION}.add_adapter=true: a model without an adapter after the transformer is needed"
