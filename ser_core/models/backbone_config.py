"""Checks of the configuration of a backbone with random weights, made before a launch without importing torch or transformers.

The conditions are those that the models of transformers and `ser_core.models.backbone` make when a model is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ser_core.models.model_types import BATCH_NORM, WAV2VEC2, type_problem, unknown_keys

# Values of `transformers.Wav2Vec2Config` where a configuration has no such key; those of HuBERT and WavLM are the same.
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
QUANTIZER = ("num_codevectors_per_group", "num_codevector_groups", "codevector_dim", "proj_codevector_dim")
# Values that another kind of model has beside these or instead; None: it has no such key.
OTHER_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "hubert": {**dict.fromkeys(QUANTIZER), "conv_pos_batch_norm": False, "add_adapter": None},
    "wavlm": {"num_buckets": 320, "max_bucket_distance": 800},
    "data2vec-audio": {**dict.fromkeys(QUANTIZER), "num_conv_pos_embeddings": 5, "conv_pos_kernel_size": 19, "feat_extract_norm": None},
}
# Keys that every kind of model has.
SHARED_KEYS = frozenset(
    (
        *("hidden_act", "hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "layerdrop", "initializer_range"),
        *("layer_norm_eps", "feat_extract_activation", "conv_bias", "mask_feature_length"),
    )
)
LAYERS = ("conv_dim", "conv_kernel", "conv_stride")
DIVISIBLE = (  # the first must be divisible by the second
    ("hidden_size", "num_attention_heads"),
    ("hidden_size", "num_conv_pos_embedding_groups"),
    ("codevector_dim", "num_codevector_groups"),
)
SECTION = "recipe.backbone.config"


def config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line per key or value of `backbone.config` that no model can be built with."""
    model_type = str(config.get("model_type", WAV2VEC2))
    if problem := type_problem(SECTION, model_type):
        yield problem
        return
    defaults = {**DEFAULTS, **OTHER_DEFAULTS.get(model_type, {})}
    defaults = {key: value for key, value in defaults.items() if value is not None}
    checked = set(defaults) | (MORE_KEYS if model_type == WAV2VEC2 else SHARED_KEYS)
    yield from unknown_keys(config, checked, SECTION)
    values = {**defaults, **config}
    sizes = [key for key, value in defaults.items() if type(value) is int]
    wrong = [key for key in sizes if type(values[key]) is not int or values[key] < 1]
    yield from (f"{SECTION}.{key}={values[key]}: must be a whole number of at least 1" for key in wrong)
    for key in LAYERS:
        layers = values[key]
        if not isinstance(layers, list | tuple) or not layers or not all(type(each) is int and each > 0 for each in layers):
            wrong.append(key)
            yield f"{SECTION}.{key}={layers}: must be a list of whole numbers of at least 1, one per convolution"
    for size, parts in DIVISIBLE:
        if {size, parts} <= set(defaults) and not {size, parts} & set(wrong) and values[size] % values[parts]:
            yield f"{SECTION}.{size}={values[size]}: must be divisible by {parts}={values[parts]}"
    lengths = {key: len(values[key]) for key in LAYERS if key not in wrong}
    if len(set(lengths.values())) > 1:
        yield f"{SECTION}: {', '.join(f'{key} has {count}' for key, count in lengths.items())} entries; one per convolution in each"
    if values.get("feat_extract_norm", "layer") not in ("group", "layer"):
        yield f"{SECTION}.feat_extract_norm={values['feat_extract_norm']}: unknown; known are group, layer"
    if not values["mask_time_prob"] and not values["mask_feature_prob"]:
        yield f"{SECTION}.mask_time_prob=0: the model then has no mask embedding, which every stage needs"
    if values.get("add_adapter"):
        yield f"{SECTION}.add_adapter=true: a model without an adapter after the transformer is needed"
    if values.get("conv_pos_batch_norm"):
        yield f"{SECTION}: {BATCH_NORM}"
