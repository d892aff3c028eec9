"""The recipes of an experiment: presets, variants of a method, and which settings depart from a preset. Knows no setting by name.

A recipe whose schema has the key `preset` starts from `configs/recipe/PRESET.yaml`, which the experiment's own settings override.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from jobs.errors import UsageError
from jobs.text import did_you_mean, one_line

FOLDER = "recipe"  # in configs/
PRESET = "preset"  # key of the recipe with the preset's name
REFERENCE = "published"  # preset of the code that made the published figures


@dataclass
class Variant:
    """A method with settings of its own: one more row of the table, named by its key in `variants`.

    After loading, `recipe` is the whole recipe.
    """

    method: str = "???"  # of the registry
    label: str | None = None  # in tables; default: the variant's name
    recipe: Any = None  # settings that override those of the experiment


@dataclass(frozen=True)
class MetricColumn:
    """A metric of results, beside the score of a run, that tables show."""

    name: str  # in the metrics of a result
    heading: str
    decimals: int
    meaning: str  # a sentence for captions


@dataclass(frozen=True)
class Adaptation:
    """A method that is adapted: trained on a source first, then on the corpus of its table."""

    source: str  # what it is trained on first
    before: str  # metric of its results: the score before the adaptation
    factor: float  # from that metric to the unit of the score


@dataclass(frozen=True)
class MethodRecipe:
    """The preset of a method's recipe, and each setting that departs from it as `KEY=VALUE`."""

    method: str
    preset: str
    departures: tuple[str, ...]
    trained: tuple[str, ...] = ()  # what the method trains, by the recipe: `fine-tuning 15 epochs`
    unlike_published: tuple[str, ...] = ()  # settings that depart from the preset `REFERENCE`, as `departures`
    compared_within: tuple[str, ...] = ()  # `KEY=VALUE` not at its default: methods are compared by tests if they have the same
    metrics: tuple[MetricColumn, ...] = ()  # that its results have beside the score
    adaptation: Adaptation | None = None  # None: it is trained on the corpus of its table alone


def preset_file(configs: Path, name: str) -> Path:
    """The file of a preset. UsageError for an unknown one."""
    file = configs / FOLDER / f"{name}.yaml"
    if not file.is_file():
        known = sorted(path.stem for path in (configs / FOLDER).glob("*.yaml"))
        hint = did_you_mean(name, known, otherwise=f"known are {', '.join(known) or 'none'}")
        raise UsageError(f"recipe.{PRESET}: no preset {name!r} (configs/{FOLDER}/NAME.yaml); {hint}")
    return file


def method_recipes(recipes: Mapping[str, Any], configs: Path, variants: Mapping[str, str] | None = None) -> tuple[MethodRecipe, ...]:
    """Preset and departures of each recipe; empty without presets. `recipes`: by method, in the order of the tables.

    `variants`: name of each variant -> its method. A schema may have methods of its own, for a method of the registry: `trained` states
    what is trained, `further_metrics` returns objects with the attributes of `MetricColumn`, `adaptation` one with those of `Adaptation`
    or None, `reads` the keys that its stages read: departures in keys that none of the methods reads are left out. The settings that two
    methods must have in common to be compared are those in its class attribute `compared_within`.
    """
    found = []
    methods = {name: (variants or {}).get(name, name) for name in recipes}
    read = _read(recipes, methods)
    reference = _preset_values(preset_file(configs, REFERENCE)) if (configs / FOLDER / f"{REFERENCE}.yaml").is_file() else None
    for method, recipe in recipes.items():
        if not is_dataclass(recipe) or not hasattr(recipe, PRESET):
            return ()
        name = str(getattr(recipe, PRESET))
        trained = recipe.trained(methods[method]) if hasattr(recipe, "trained") else ()
        unlike = filter(read, departures(recipe, reference)) if reference is not None else ()
        own = filter(read, departures(recipe, _preset_values(preset_file(configs, name))))
        columns = recipe.further_metrics(methods[method]) if hasattr(recipe, "further_metrics") else ()
        metrics = tuple(MetricColumn(each.name, each.heading, each.decimals, each.meaning) for each in columns)
        first = recipe.adaptation(methods[method]) if hasattr(recipe, "adaptation") else None
        adaptation = None if first is None else Adaptation(first.source, first.before, first.factor)
        found.append(MethodRecipe(method, name, tuple(own), tuple(trained), tuple(unlike), _compared_within(recipe), metrics, adaptation))
    return tuple(found)


def _read(recipes: Mapping[str, Any], methods: Mapping[str, str]) -> Callable[[str], bool]:
    """Whether a departure `KEY=VALUE` is in a setting that some method reads. A schema without `reads` leaves that open: it counts."""
    if not all(hasattr(recipe, "reads") for recipe in recipes.values()):
        return lambda departure: True
    keys = {key for name, recipe in recipes.items() for key in recipe.reads(methods[name])}
    return lambda departure: departure.partition("=")[0].partition(".")[0] in keys


def comparable(recipes: Sequence[MethodRecipe], first: str, second: str) -> bool:
    """Whether two methods are compared by tests: their recipes agree in the settings that the schema names, or are not known."""
    of_method = {each.method: each.compared_within for each in recipes}
    return of_method.get(first, ()) == of_method.get(second, ())


def comparison_sentences(recipes: Sequence[MethodRecipe]) -> tuple[str, ...]:
    """What tables say of the comparisons: the settings in which compared methods agree, where methods of the table differ in them."""
    keys = {text.partition("=")[0] for each in recipes for text in each.compared_within}
    if len({each.compared_within for each in recipes}) < 2:
        return ()
    return (f"Compared are methods with the same {' and '.join(f'recipe.{key}' for key in sorted(keys))}.",)


def _compared_within(recipe: Any) -> tuple[str, ...]:
    values = {key: value for key, value, default in _compared(recipe, type(recipe)(), {}) if _plain(value) != _plain(default)}
    texts = {key: json.dumps(value, sort_keys=True) if isinstance(value, Mapping) else _text(value) for key, value in values.items()}
    return tuple(f"{key}={texts[key]}" for key in getattr(type(recipe), "compared_within", ()) if key in values)


def departures(recipe: Any, preset: Mapping[str, Any]) -> list[str]:
    """Settings of a recipe whose value is not the preset's, nor the default of a setting that the preset does not have: `KEY=VALUE`.

    `preset`: nested values as in its file. Settings that the schema lists in its class attribute `not_of_preset` are left out.
    """
    ignored = set(getattr(type(recipe), "not_of_preset", ()))
    return [
        f"{key}={_text(value)}"
        for key, value, expected in _compared(recipe, type(recipe)(), preset)
        if _plain(value) != _plain(expected) and key not in ignored and not any(key.startswith(f"{each}.") for each in ignored)
    ]


def recipe_sentences(recipes: Sequence[MethodRecipe], labels: Mapping[str, str]) -> tuple[str, ...]:
    """What tables and the dry run say: the preset and its departures, once if all methods have the same."""
    if not recipes:
        return ()
    described = {(each.preset, each.departures) for each in recipes}
    if len(described) == 1:
        return (f"Recipe: preset {_described(recipes[0].preset, recipes[0].departures)}.",)
    shared = [each for each in recipes[0].departures if all(each in other.departures for other in recipes)]
    own = _grouped(recipes, labels, lambda each: f"preset {_described(each.preset, [key for key in each.departures if key not in shared])}")
    common = (f"In all recipes: {', '.join(shared)}.",) if shared else ()
    return (f"Recipes: {'; '.join(own)}.", *common)


def training_sentences(recipes: Sequence[MethodRecipe], labels: Mapping[str, str]) -> tuple[str, ...]:
    """What captions say of the training: what was trained, and in what its preset differs from the code that made the published figures.

    Settings that `recipe_sentences` names already are left out. Once if all recipes are the same, else by the methods that share one.
    """

    def of_the_preset(recipe: MethodRecipe) -> list[str]:
        return [setting for setting in recipe.unlike_published if setting not in recipe.departures]

    return (
        *_for_each("Trained", recipes, labels, lambda each: each.trained, "; "),
        *_for_each("Differs from the published code also in", recipes, labels, of_the_preset, ", "),
    )


def _for_each(
    what: str, recipes: Sequence[MethodRecipe], labels: Mapping[str, str], parts: Callable[[MethodRecipe], Sequence[str]], between: str
) -> tuple[str, ...]:
    """`WHAT: ...` with the parts of all recipes, each once, or those of the methods that share them if recipes differ; () without parts."""
    if not any(parts(each) for each in recipes):
        return ()
    if len({(each.preset, each.departures) for each in recipes}) == 1:
        return (f"{what}: {between.join(dict.fromkeys(part for each in recipes for part in parts(each)))}.",)
    own = _grouped(recipes, labels, lambda each: between.join(parts(each)) or "nothing")
    return (f"{what}: {' | '.join(own)}.",)


def _grouped(recipes: Sequence[MethodRecipe], labels: Mapping[str, str], text: Callable[[MethodRecipe], str]) -> list[str]:
    """`METHOD, METHOD: TEXT` for each text, with the methods that have it; a text alone if all have the same."""
    found: dict[str, list[str]] = {}
    for each in recipes:
        found.setdefault(text(each), []).append(labels.get(each.method, each.method))
    return list(found) if len(found) == 1 else [f"{', '.join(names)}: {own}" for own, names in found.items()]


def _described(preset: str, departing: Sequence[str]) -> str:
    return f"{preset} with {', '.join(departing)}" if departing else preset


def _preset_values(file: Path) -> Mapping[str, Any]:
    import yaml

    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{file}: {one_line(error)}") from error
    if not isinstance(loaded, Mapping):
        raise UsageError(f"{file}: expected keys and values at the top")
    return loaded


def _compared(recipe: Any, default: Any, preset: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Key, value and the preset's value of every setting below dataclasses; a mapping is one setting."""
    for each in fields(recipe):
        value, expected = getattr(recipe, each.name), getattr(default, each.name)
        given = preset.get(each.name)
        if is_dataclass(value):
            yield from _compared(value, expected, given or {}, f"{prefix}{each.name}.")
        else:
            yield f"{prefix}{each.name}", value, preset.get(each.name, expected)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.name if isinstance(value, Enum) else value


def _text(value: Any) -> str:
    plain = _plain(value)
    if isinstance(plain, Mapping):
        return "{...}" if plain else "{}"
    if plain is None or isinstance(plain, bool):
        return {None: "null", True: "true", False: "false"}[plain]
    if isinstance(plain, list):
        return f"[{', '.join(map(_text, plain))}]"
    return f"{plain:g}" if isinstance(plain, float) else str(plain)
