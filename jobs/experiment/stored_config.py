"""The settings of an experiment as a launch stores them, and the experiment of stored settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from operator import attrgetter
from typing import Any, cast

from jobs.errors import UsageError
from jobs.experiment.config import Experiment
from jobs.experiment.sweep_section import FORMER_KEYS
from jobs.text import first_line

AGAIN = "launch `grid` again to renew it"


def restore_experiment(
    values: Mapping[str, Any], *, recipe_schema: type[Any], again: str = AGAIN, add_settings: bool = False
) -> Experiment:
    """The experiment of stored `resolved_values`. UsageError, ending in `again`, if the schema has changed since.

    `add_settings`: only if the schema lacks a stored setting; one that it has added gets its default.

    Uses pydantic: importing OmegaConf alone would take half of the time that `status` may take.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        recipe = TypeAdapter(recipe_schema).validate_python(values["recipe"])
        experiment = replace(TypeAdapter(Experiment).validate_python({**values, "recipe": None}), recipe=recipe)
        for variant in experiment.variants.values():
            variant.recipe = TypeAdapter(recipe_schema).validate_python(variant.recipe)
    except (KeyError, TypeError, ValidationError) as error:
        raise UsageError(f"stored configuration: {first_line(error)}; {again}") from error
    resolved = resolved_values(experiment)
    asked = values.get("sweep", resolved["sweep"])  # without `sweep`: stored before sweeps existed
    stored = {**values, "sweep": {key: value for key, value in asked.items() if key not in FORMER_KEYS}}
    if add_settings and (lost := next(_lost_settings(stored, resolved), "")):
        raise UsageError(f"stored configuration: this version has no setting {lost}; {again}")
    if not add_settings and resolved != stored:
        raise UsageError(f"stored configuration: written by another version of the program; {again}")
    return experiment


def _lost_settings(stored: Mapping[str, Any], resolved: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of stored settings that the resolved ones lack, or have another value of."""
    for key, value in stored.items():
        there = resolved.get(key)
        if isinstance(value, Mapping) and isinstance(there, Mapping):
            yield from _lost_settings(value, there, f"{prefix}{key}.")
        elif key not in resolved or there != value:
            yield f"{prefix}{key}={value}"


def resolved_values(experiment: Experiment) -> dict[str, Any]:
    """Plain JSON values of an experiment, every default filled in, enums by name."""
    return cast(dict[str, Any], json.loads(json.dumps(asdict(experiment), default=attrgetter("name"))))
