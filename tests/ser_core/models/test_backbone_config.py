"""Configurations of a random backbone that are refused at launch are those that no model can be built with."""

from __future__ import annotations

from typing import Any

import pytest

from ser_core.errors import InputError
from ser_core.models.backbone import build_backbone
from ser_core.models.backbone_config import DEFAULTS, MORE_KEYS, config_problems
from ser_core.settings.backbone import BackboneSettings

SMALL: dict[str, Any] = {
    **{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
    **{"conv_dim": [8, 8], "conv_kernel": [10, 8], "conv_stride": [5, 8], "num_conv_pos_embeddings": 4},
    **{"num_conv_pos_embedding_groups": 2, "num_codevectors_per_group": 4, "codevector_dim": 8, "proj_codevector_dim": 8},
}


def test_keys_and_values_are_those_of_transformers() -> None:
    """Known keys exist there, and a key that is left out has the value that is assumed."""
    from transformers import Wav2Vec2Config

    found = Wav2Vec2Config().to_dict()
    assert set(found) >= MORE_KEYS
    assert {key: tuple(found[key]) if isinstance(found[key], list) else found[key] for key in DEFAULTS} == DEFAULTS


@pytest.mark.slow
def test_a_model_that_can_be_built_has_no_problem() -> None:
    """Also with a key that is looked up in transformers."""
    for config in (SMALL, {**SMALL, "feat_extract_norm": "layer", "ctc_zero_infinity": True}):
        assert not list(config_problems(config))
        build_backbone(BackboneSettings(checkpoint=None, config=config))


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"hidden_size": 10, "num_attention_heads": 4}, "hidden_size=10: must be divisible by num_attention_heads=4"),
        ({"num_conv_pos_embedding_groups": 3}, "hidden_size=8: must be divisible by num_conv_pos_embedding_groups=3"),
        ({"codevector_dim": 9}, "codevector_dim=9: must be divisible by num_codevector_groups=2"),
        ({"conv_stride": [5, 8, 2]}, "conv_dim has 2, conv_kernel has 2, conv_stride has 3 entries"),
        ({"hiden_size": 8}, "hiden_size: no such key; did you mean hidden_size?"),
        ({"hidden_size": "many"}, "hidden_size=many: must be a whole number"),
        ({"conv_dim": [8, -8]}, "conv_dim=[8, -8]: must be a list of whole numbers"),
        ({"feat_extract_norm": "batch"}, "feat_extract_norm=batch: unknown"),
        ({"mask_time_prob": 0.0}, "mask_time_prob=0: the model then has no mask embedding"),
        ({"add_adapter": True}, "add_adapter=true"),
    ],
)
def test_what_is_refused_at_launch_is_what_cannot_be_built(wrong: dict[str, Any], expected: str) -> None:
    """One line with the key; the same configuration is refused by the stage too."""
    (line,) = config_problems({**SMALL, **wrong})
    assert line.startswith("recipe.backbone.config")
    assert expected in line
    with pytest.raises((InputError, ZeroDivisionError)):
        build_backbone(BackboneSettings(checkpoint=None, config={**SMALL, **wrong}))
