"""Where each setting of an experiment comes from: command line, experiment file, preset, site profile or default."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, cast

from jobs.experiment.config import Experiment, schema_of
from jobs.experiment.layers import Layer, Layers, experiment_file, preset_layer, read_layers
from jobs.experiment.recipes import PRESET
from jobs.experiment.schema_keys import experiment_keys
from jobs.experiment.stored_config import resolved_values
from jobs.experiment.template import yaml_text

DEFAULT = "default"
COMMAND_LINE = "command line"
WIDTH = 60  # of a setting, up to which sources are aligned


@dataclass(frozen=True)
class Setting:
    """One setting with its source."""

    key: str  # as it is typed
    value: Any  # JSON
    changed: bool  # not the schema's default
    source: str  # DEFAULT, COMMAND_LINE, `preset NAME`, `site NAME`, or the experiment's file


def settings_of(
    experiment: Experiment, name: str, overrides: Sequence[str], configs: Path, *, cluster_typed: bool = False
) -> list[Setting]:
    """Every setting of an experiment that was loaded from the file `name` with overrides, in the order of the schema.

    Of `resources` and `variants` those that a layer has. `cluster_typed`: by the option `--cluster`.
    """
    schema = schema_of(type(experiment.recipe))
    layers = read_layers(experiment_file(name, configs), overrides, configs, schema.site)
    given = _given(experiment, layers, preset_layer(schema, layers.own, configs))
    if layers.searched:
        typed = any(text.startswith("sweep.settings") for text in overrides)
        given["sweep.settings"] = COMMAND_LINE if typed else str(layers.file), layers.searched
    if cluster_typed:
        given["cluster"] = COMMAND_LINE, experiment.cluster.name
    values = resolved_values(experiment)
    found: list[Setting] = []
    for key in experiment_keys(type(experiment.recipe)):
        if key.entry:
            entries = [(path, source, value) for path, (source, value) in given.items() if path.startswith(f"{key.path}.")]
            found.extend(Setting(path, value, True, source) for path, source, value in entries if not isinstance(value, Mapping))
        else:
            leaves = ((leaf.path, _value(values, leaf.path), leaf.default) for leaf in key.leaves())
            found.extend(Setting(path, value, value != default, given.get(path, (DEFAULT, None))[0]) for path, value, default in leaves)
    return found


def setting_lines(settings: Sequence[Setting], *, changed: bool = False) -> list[str]:
    """`KEY=VALUE  # source` of each setting, or of those that are not at their default (`changed`)."""
    shown = [each for each in settings if each.changed or not changed]
    texts = [f"{each.key}={yaml_text(each.value)}" for each in shown]
    width = max((len(text) for text in texts if len(text) <= WIDTH), default=0)
    return [f"{text:{width}}  # {each.source}" for text, each in zip(texts, shown, strict=True)]


def _given(experiment: Experiment, layers: Layers, preset: Layer | None) -> dict[str, tuple[str, Any]]:
    """Key or section -> its last source and its value there, of those that a layer has."""
    named = [(f"site {experiment.site}", layers.site), (str(layers.file), layers.experiment), (COMMAND_LINE, layers.typed)]
    if preset is not None:
        named.insert(1, (f"preset {getattr(experiment.recipe, PRESET)}", preset))
    return {path: (source, value) for source, layer in named for path, value in _paths(_container(layer))}


def _container(layer: Layer) -> Mapping[str, Any]:
    from omegaconf import OmegaConf

    return cast(Mapping[str, Any], OmegaConf.to_container(layer.values, resolve=False))


def _paths(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        yield f"{prefix}{name}", value
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{name}.")


def _value(values: Mapping[str, Any], path: str) -> Any:
    return reduce(lambda found, name: found[name], path.split("."), values)
