"""Settings as JSON values, and as part of a stage's key: a setting that is newer than the first keys is left out at its first default.

A new field of a class in ser_core/settings that reaches a key is entered in `FIRST_DEFAULTS` with the value for which stages compute
what they computed before the field existed. At that value the key is that of before, so nothing is computed again. The entry does not
follow a later change of the field's default: the key states every value but the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any

JSON_SCALARS = (str, int, float, bool, type(None))

# Class of settings -> newer field -> its value, as JSON, that is left out of keys. Entries are added, never changed or removed.
FIRST_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "FinetuneSettings": {
        "adaptors": {
            "kinds": [],
            "bottleneck_units": 64,
            "bottleneck_start": "zero",
            "lora_rank": 8,
            "lora_alpha": 1.0,
            "lora_targets": ["q_proj", "k_proj", "v_proj"],
        },
        "clip_norm": 0.0,
        "attributes": {"weight": 0.0},
    },
    "HeadSettings": {"kind": "linear", "projector_units": 256},
}

# Class of settings -> fields that change no number of a stage, and are in no key.
NOT_KEYED: Mapping[str, frozenset[str]] = {"FinetuneSettings": frozenset({"keep"})}


def plain(value: Any) -> Any:
    """Convert settings to JSON values: dataclasses to objects, enums to their names."""
    return _json(value, keyed=False)


def keyed(value: Any) -> Any:
    """Convert settings as `plain` does, without the newer settings at their first default and those of `NOT_KEYED`."""
    return _json(value, keyed=True)


def completed(schema: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Add to the result of `keyed` for a settings class `schema` the settings that were left out, at all depths."""
    found = {**FIRST_DEFAULTS.get(schema.__name__, {}), **values}
    for each in fields(schema):
        default = None if each.default_factory is MISSING else each.default_factory()
        if is_dataclass(default) and isinstance(found.get(each.name), Mapping):
            found[each.name] = completed(type(default), found[each.name])
    return found


def _json(value: Any, *, keyed: bool) -> Any:
    if type(value) in JSON_SCALARS:
        return value
    if is_dataclass(value) and not isinstance(value, type):
        left_out = NOT_KEYED.get(type(value).__name__, frozenset()) if keyed else frozenset()
        found = {each.name: _json(getattr(value, each.name), keyed=keyed) for each in fields(value) if each.name not in left_out}
        first = FIRST_DEFAULTS.get(type(value).__name__, {}) if keyed else {}
        return {name: each for name, each in found.items() if name not in first or each != first[name]}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): _json(each, keyed=keyed) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(each, keyed=keyed) for each in value]
    return value
