"""The layers of an experiment's configuration: site profile, preset of the recipe, experiment file, `KEY=VALUE`; read and merged.

OmegaConf is imported where it is used: importing it takes half of the time that `status` may take.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jobs.errors import UsageError
from jobs.experiment.recipes import PRESET, preset_file
from jobs.experiment.sweep_section import flat, merged
from jobs.text import did_you_mean, first_line, one_line

if TYPE_CHECKING:
    from omegaconf import DictConfig

TYPED = "KEY=VALUE"  # source of what was typed
ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True)
class Layer:
    """Settings from one source."""

    source: str  # the file, or `TYPED`
    values: DictConfig
    prefix: str = ""  # of its keys where they are typed


@dataclass(frozen=True)
class Layers:
    """The layers of an experiment, without presets; later layers override earlier ones."""

    file: Path
    site: Layer
    experiment: Layer
    typed: Layer
    searched: Mapping[str, Any]  # `sweep.settings` of all layers, removed from them

    @property
    def own(self) -> tuple[Layer, ...]:
        """The layers above the site profile."""
        return self.experiment, self.typed


def is_path(name: str) -> bool:
    """Whether an experiment is named by the path of its file."""
    return name.endswith(ENDINGS) or "/" in name


def experiment_file(name: str, configs: Path) -> Path:
    """`configs/experiment/NAME.yaml`, or the file that `name` is the path of. UsageError if there is none."""
    if is_path(name):
        file = Path(name)
        if not file.is_file():
            raise UsageError(f"no experiment {name!r}: no such file; an experiment is a YAML file, or a name in configs/experiment/")
        return file
    file = configs / "experiment" / f"{name}.yaml"
    if not file.is_file():
        known = stems(configs / "experiment")
        raise UsageError(f"no experiment {name!r}: known are {', '.join(known) or 'none'}{nearest(name, known)}")
    return file


def read_layers(file: Path, overrides: Sequence[str], configs: Path, default_site: str) -> Layers:
    """The layers of an experiment's file with overrides; `default_site`: the profile if no layer names one."""
    from omegaconf import OmegaConf

    layers = [read_yaml(file), _read_overrides(overrides)]
    searched = _take_settings(layers)
    _check_counts(layers[1])
    _replace_sets(layers)
    site = next((str(layer["site"]) for layer in reversed(layers) if "site" in layer), default_site)
    site_file = Path(site) if is_path(site) else configs / "site" / f"{site}.yaml"
    if not site_file.is_file():
        known = stems(configs / "site")
        raise UsageError(f"no site profile {site!r}: known are {', '.join(known) or 'none'} (configs/site/NAME.yaml, key `site`)")
    site_layer = Layer(str(site_file), OmegaConf.create({"slurm": read_yaml(site_file)}))
    return Layers(file, site_layer, Layer(str(file), layers[0]), Layer(TYPED, layers[1]), searched)


def registry_name(file: Path, overrides: Sequence[str]) -> str:
    """The registry that an experiment names, which decides the schema of its recipe; "" if it names none."""
    layers = (read_yaml(file), _read_overrides(overrides))
    return next((str(layer["registry"] or "") for layer in reversed(layers) if "registry" in layer), "")


def preset_layer(schema: DictConfig, layers: Sequence[Layer], configs: Path) -> Layer | None:
    """The preset of the recipe that the last of the layers names, or the schema does; None for a recipe without presets."""
    from omegaconf import DictConfig, OmegaConf

    if not (isinstance(schema.recipe, DictConfig) and PRESET in schema.recipe):
        return None
    sections = [section for layer in layers if isinstance(section := layer.values.get("recipe"), DictConfig)]
    name = next((section[PRESET] for section in reversed(sections) if PRESET in section), schema.recipe[PRESET])
    file = preset_file(configs, str(name))
    return Layer(str(file), OmegaConf.create({"recipe": read_yaml(file)}))


def merge_layers(schema: DictConfig, layers: Sequence[Layer], configs: Path, entries: Mapping[str, Sequence[str]]) -> DictConfig:
    """The schema with all layers merged, above the preset that they name.

    `entries`: section of named entries -> the keys of an entry, for messages. UsageError for an unknown key or a value of the wrong type.
    """
    preset = preset_layer(schema, layers, configs)
    whole = schema
    for layer in (preset, *layers) if preset else layers:
        whole = merge_layer(whole, layer, entries)
    return whole


def merge_layer(base: DictConfig, layer: Layer, entries: Mapping[str, Sequence[str]]) -> DictConfig:
    """A configuration with one more layer, as `merge_layers`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    try:
        plain = cast(dict[Any, Any], OmegaConf.to_container(layer.values, resolve=False))
        return OmegaConf.merge(base, _fitted(base, plain, typed=layer.source == TYPED))  # type: ignore[return-value]
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        known = known_keys(base)
        section = key.partition(".")[0]
        if section in entries and key.count(".") > 1:  # keys of an entry that no layer has yet
            known.extend(f"{key.rpartition('.')[0]}.{each}" for each in entries[section])
        typed = [f"{layer.prefix}{each}" for each in known]
        raise UsageError(f"unknown key '{layer.prefix}{key}' in {layer.source}{nearest(f'{layer.prefix}{key}', typed)}") from error
    except OmegaConfBaseException as error:
        listed = "ListConfig" in str(error)  # OmegaConf's name of a list
        reason = "expected a list in brackets: [a, b]" if listed else first_line(error)
        raise UsageError(f"{layer.prefix}{error.full_key or 'configuration'} in {layer.source}: {reason}") from error


def _fitted(base: DictConfig, values: Mapping[Any, Any], *, typed: bool) -> dict[Any, Any]:
    """The values, with a list of one where the base has a list and they have one plain value. A text with a comma stays as it is.

    A section without a value, whose keys are all in comments, is left out unless it was typed.
    """
    from omegaconf import DictConfig, ListConfig, OmegaConf

    found = dict(values)
    for key in (key for key in map(str, base) if key in values and not OmegaConf.is_missing(base, key)):
        value, own = values[key], base[key]
        if isinstance(own, DictConfig) and value is None and not typed:
            del found[key]
        elif isinstance(own, DictConfig) and isinstance(value, dict):
            found[key] = _fitted(own, value, typed=typed)
        elif isinstance(own, ListConfig) and isinstance(value, str | int | float) and not {",", "$"} & set(str(value)):
            found[key] = [value]
    return found


def read_yaml(file: Path) -> DictConfig:
    """The keys and values of a YAML file. UsageError if it cannot be read or is no mapping."""
    from omegaconf import DictConfig, OmegaConf
    from yaml import YAMLError

    try:
        loaded = OmegaConf.load(file)
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: {one_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise UsageError(f"{file}: expected keys and values at the top")
    return loaded


def _read_overrides(overrides: Sequence[str]) -> DictConfig:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    for text in overrides:
        if "=" not in text or text.startswith("="):
            raise UsageError(f"override {text!r}: write KEY=VALUE, for example seeds=20 or policy.rounds=2")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (YAMLError, ValueError) as error:
        raise UsageError(f"overrides {list(overrides)}: {one_line(error)}") from error


def _take_settings(layers: Sequence[DictConfig]) -> dict[str, Any]:
    """Remove `sweep.settings` from the layers and merge it, by dotted key: OmegaConf cannot merge a list with a mapping."""
    from omegaconf import DictConfig, OmegaConf

    found: dict[str, Any] = {}
    for layer in layers:
        section = layer.get("sweep")
        if isinstance(section, DictConfig) and "settings" in section:
            if not isinstance(section.settings, DictConfig):
                raise UsageError("sweep.settings: write keys of the recipe, each with a list of choices or a range")
            found = merged(found, flat(cast(dict[str, Any], OmegaConf.to_container(section.pop("settings")))))
    return found


def _replace_sets(layers: Sequence[DictConfig]) -> None:
    """Remove `sweep.sets` of a layer if a later layer has counts or sizes, and the reverse: they exclude each other."""
    from omegaconf import DictConfig, OmegaConf

    sections = [section for layer in layers if isinstance(section := layer.get("sweep"), DictConfig)]
    for number, section in enumerate(sections):
        own = cast(dict[str, Any], OmegaConf.to_container(section, resolve=False))
        for named, replaced in ((("sets",), ("counts", "sizes")), (("counts", "sizes"), ("sets",))):
            if any(own.get(key) for key in named):
                for before, key in itertools.product(sections[:number], replaced):
                    if key in before.keys():  # noqa: SIM118 - `in` would resolve an interpolation
                        del before[key]


def known_keys(config: DictConfig, prefix: str = "") -> list[str]:
    """Dotted keys of a configuration, including those of its sections."""
    from omegaconf import DictConfig, OmegaConf

    found: list[str] = []
    for key in map(str, config):
        name = f"{prefix}{key}"
        found.append(name)
        if not OmegaConf.is_missing(config, key) and isinstance(config[key], DictConfig):
            found.extend(known_keys(config[key], f"{name}."))
    return found


def nearest(name: str, known: Sequence[str]) -> str:
    """`: did you mean 'X'?` to end a message with; "" if no known name is near."""
    hint = did_you_mean(name, known)
    return f": {hint}" if hint else ""


def stems(folder: Path) -> list[str]:
    """Names of the YAML files of a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _check_counts(typed: DictConfig) -> None:
    """UsageError for an empty `sweep.counts` on the command line, which would mean the counts of the recipe, unless sets are given."""
    from omegaconf import DictConfig, OmegaConf

    section = typed.get("sweep")
    own = cast(dict[str, Any], OmegaConf.to_container(section, resolve=False)) if isinstance(section, DictConfig) else {}
    if own.get("counts") == [] and not own.get("sets"):
        raise UsageError("sweep.counts=[]: name at least one number of clusters, or leave it out for the counts of the recipe")
