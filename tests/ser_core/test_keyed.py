"""Settings in keys: those of the first keys always, newer ones only where they are not at their first default."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import pytest

from ser_core import keyed as keyed_settings
from ser_core.keyed import FIRST_DEFAULTS, NOT_KEYED, completed, keyed, plain
from ser_core.registry import REGISTRY
from ser_core.settings.backbone import BackboneSettings
from ser_core.settings.finetune import FinetuneSettings, Keep
from ser_core.settings.recipe import Recipe
from ser_core.stages.context import parse_settings

# The settings that were part of keys before any was left out, and the first ones of each class that came later. No field of a class that is
# here is ever added: it belongs into FIRST_DEFAULTS.
FIRST = {
    "FeatureSettings": "padding",
    "FinetuneSettings": "epochs batch_size learning_rate max_seconds head spec_augment precision",
    "HeadSettings": "pooling",
    "AttributeSettings": "weight",
    "AdaptorSettings": "kinds bottleneck_units bottleneck_start lora_rank lora_alpha lora_targets",
    "SpecAugmentSettings": "spans_per time_length time_probability time_minimum feature_length feature_probability feature_minimum",
    "TaptSettings": "steps learning_rate warmup_steps flat_fraction batch_seconds max_seconds buckets batches_per_bucket drop_last "
    "negatives negative_frames temperature diversity_weight attention_mask mask_minimum mask_spans_per precision",
    "StatesSettings": "wav2vec steps learning_rate warmup_fraction flat_fraction batch_size validation_fraction validate_every rnn_units "
    "head_units spec_augment precision",
    "PretrainingLossSettings": "draws negatives temperature diversity_weight mask_minimum precision",
    "TextSettings": "encoder epochs batch_size learning_rate max_tokens precision transcripts",
    "FusedLayerSettings": "epochs batch_size learning_rate",
    "CrossSettings": "heads units dropout epochs batch_size learning_rate precision",
    "PtaptSettings": "steps learning_rate warmup_steps flat_fraction batch_seconds max_seconds buckets batches_per_bucket drop_last "
    "mask_length mask_probability mask_minimum mask_spans_per head_units precision",
}
# Classes whose values the registry puts into keys one by one (`SpeechRegistry.call`, `backbone_identity`), or not at all.
ONE_BY_ONE = {
    "Recipe",
    "BackboneSettings",
    "Wav2vecSettings",
    "TextEncoderSettings",
    "FusionSettings",
    "TwoStageSettings",
    "ClusterSettings",
    "ExecutionSettings",
}


def classes(schema: type[Any]) -> dict[str, set[str]]:
    found = {schema.__name__: {each.name for each in fields(schema)}}
    for each in fields(schema):
        value = getattr(schema(), each.name)
        if is_dataclass(value):
            found |= classes(type(value))
    return found


def test_every_newer_setting_has_a_first_default() -> None:
    """A new setting without an entry would change the keys of every stage that has been computed."""
    found = {name: names for name, names in classes(Recipe).items() if name not in ONE_BY_ONE}
    for name, names in found.items():
        first = set(FIRST.get(name, "").split())
        assert names - first - NOT_KEYED.get(name, frozenset()) == set(FIRST_DEFAULTS.get(name, {})), (
            f"{name}: enter new settings in FIRST_DEFAULTS of ser_core/keyed.py"
        )
    assert set(FIRST_DEFAULTS) <= set(found)


def test_weights_are_kept_under_the_same_key() -> None:
    """`finetune.keep` reaches the stage that tests the run, and no key; a stage that was planned without it has no entry."""
    backbone = BackboneSettings(checkpoint=None, config={"hidden_size": 16})
    plain_call, keeping = (
        REGISTRY.call("vft", Recipe(backbone=backbone, finetune=FinetuneSettings(keep=keep)), fold="1", seed=0)
        for keep in (Keep.none, Keep.all)
    )
    assert plain_call.settings == keeping.settings
    assert keeping.runtime == {**plain_call.runtime, "keep": "all"}
    assert parse_settings(FinetuneSettings, keeping.settings["finetune"]).keep is Keep.none


@dataclass
class Inner:
    old: int = 1
    new: int = 3  # the first default was 2


@dataclass
class Outer:
    old: str = "a"
    new: list[str] = field(default_factory=list)
    inner: Inner = field(default_factory=Inner)


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyed_settings, "FIRST_DEFAULTS", {"Inner": {"new": 2}, "Outer": {"new": []}})


@pytest.mark.usefixtures("newer")
def test_a_newer_setting_is_in_the_key_unless_at_its_first_default() -> None:
    """At the first default the key is that of before; a default that has changed since is another value."""
    assert keyed(Outer(inner=Inner(new=2))) == {"old": "a", "inner": {"old": 1}}
    assert keyed(Outer(new=["x"])) == {"old": "a", "new": ["x"], "inner": {"old": 1, "new": 3}}
    assert plain(Outer(inner=Inner(new=2))) == {"old": "a", "new": [], "inner": {"old": 1, "new": 2}}


@pytest.mark.usefixtures("newer")
def test_a_stage_reads_what_its_key_left_out() -> None:
    """The first default, not the default of the day, at all depths: a stage computes what its key states."""
    for chosen in (Outer(inner=Inner(new=2)), Outer(new=["x"]), Outer(old="b", inner=Inner(old=5, new=2))):
        assert parse_settings(Outer, keyed(chosen)) == chosen
    assert completed(Outer, {"old": "a"}) == {"old": "a", "new": []}  # a section that is missing gets its defaults
