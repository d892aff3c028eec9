"""The settings of an experiment as a launch stores them, and the experiment of stored settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from operator import attrgetter
from typing import Any, cast

from jobs.errors import StoredConfigurationError
from jobs.experiment.config import Experiment
from jobs.experiment.sweep_section import FORMER_KEYS
from jobs.store.type_adapters import type_adapter
from jobs.text import first_line

AGAIN = "launch `grid` again to renew it"


def restore_experiment(values: Mapping[str, Any], *, recipe_schema: type[Any], again: str = AGAIN) -> Experiment:
    """The experiment of stored `resolved_values`; keys that have been added to the schema since get their defaults.

    Raises StoredConfigurationError, ending in `again`, for a key that the schema does not have, or a value that it does not allow. Uses
    pydantic: importing OmegaConf alone would take half of the time that `status` may take.
    """
    from pydantic import ValidationError

    try:
        recipes = type_adapter(recipe_schema)
        recipe = recipes.validate_python(values["recipe"])
        experiment = replace(type_adapter(Experiment).validate_python({**values, "recipe": None}), recipe=recipe)
        for variant in experiment.variants.values():
            variant.recipe = recipes.validate_python(variant.recipe)
    except (KeyError, TypeError, ValidationError) as error:
        raise StoredConfigurationError(f"stored configuration: {first_line(error)}; {again}") from error
    differing = next(_differing(values, resolved_values(experiment)), "")
    if differing:
        raise StoredConfigurationError(f"stored configuration: {differing}: written by another version of the program; {again}")
    return experiment


def _differing(stored: Any, restored: Any, key: str = "") -> Iterator[str]:
    """Keys of the stored values that were not restored as they are, except those of `FORMER_KEYS`."""
    if not (isinstance(stored, Mapping) and isinstance(restored, Mapping)):
        if stored != restored:
            yield key
        return
    for name, value in stored.items():
        if name in restored:
            yield from _differing(value, restored[name], f"{key}.{name}".lstrip("."))
        elif not (key == "sweep" and name in FORMER_KEYS):
            yield f"{key}.{name}".lstrip(".")


def resolved_values(experiment: Experiment) -> dict[str, Any]:
    """Plain JSON values of an experiment, every default filled in, enums by name."""
    return cast(dict[str, Any], json.loads(json.dumps(asdict(experiment), default=attrgetter("name"))))
