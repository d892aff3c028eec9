"""Values of recipe keys: typed as the recipe's schema has them, and written so that a command line reads them back. Pure."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from collections.abc import Hashable
from enum import Enum
from typing import TYPE_CHECKING, Any, cast

from jobs.config import known_keys, nearest
from jobs.errors import UsageError

if TYPE_CHECKING:
    from omegaconf import DictConfig

SECTION = "sweep.settings"  # where an experiment names the keys that it searches
_WORDS = "true|false|null|yes|no|on|off|y|n"  # read as something else than text
_UNQUOTED = re.compile(rf"(?!(?:{_WORDS})\Z)[A-Za-z_][A-Za-z0-9_./-]*", re.IGNORECASE)


def typed(schema: type[Any], key: str, value: Any) -> Any:
    """A value as the recipe's schema has it: `1e-4` a number even where YAML reads text, the name of an enum its member.

    UsageError in one line for a key that the schema does not have, and for a value that is none of it.
    """
    return _typed(cast(Hashable, schema), key, value)


@functools.lru_cache(maxsize=4096, typed=True)
def _typed(schema: Any, key: str, value: Any) -> Any:
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    where = f"{SECTION}.{key}"
    section: Any = _default(schema)
    *names, last = key.split(".")
    for name in names:
        section = section[name] if isinstance(section, DictConfig) and name in section else None
    if not isinstance(section, DictConfig) or (last not in section and OmegaConf.get_type(section) is not dict):
        raise UsageError(f"unknown key {where!r}{nearest(where, [f'{SECTION}.{each}' for each in known_keys(_default(schema))])}")
    if last in section and isinstance(section[last], DictConfig):
        raise UsageError(f"{where}: a section of the recipe; name one of its keys")
    section = copy.deepcopy(section)
    try:
        section[last] = value
    except OmegaConfBaseException as error:
        raise UsageError(f"{where}: {str(error).splitlines()[0]}") from error
    found = section[last]
    if isinstance(found, float) and not math.isfinite(found):
        raise UsageError(f"{where}: {found} is not a number that a recipe can have")
    return found


@functools.cache
def _default(schema: Any) -> DictConfig:
    """The recipe that says nothing, which is only looked at."""
    from omegaconf import OmegaConf

    return cast("DictConfig", OmegaConf.structured(schema))


def item(value: Any, key: str) -> Any:
    """What lies under a key of a section, or of a mapping."""
    return value.get(key) if isinstance(value, dict) else getattr(value, key)


def plain(value: Any) -> Any:
    """A typed value as JSON has it: the name of an enum's member."""
    return value.name if isinstance(value, Enum) else value


def text(value: Any) -> str:
    """A plain value as one word of an override, which is read as YAML."""
    if isinstance(value, str):
        return value if _UNQUOTED.fullmatch(value) else json.dumps(value, ensure_ascii=False)
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return repr(value)
