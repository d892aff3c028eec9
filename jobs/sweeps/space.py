"""The search space of a sweep: points, each a set of cluster counts and values of other settings of the recipe. Pure.

`space_of` reads it from the section `sweep` of an experiment; `grid_points` and `random_points` list points; `parameters` and `decode`
translate it for Optuna; `apply` makes an experiment of a point. `typed`, `plain` and `text` convert values of settings between the
types of the recipe, JSON and the command line.

For Optuna a set is encoded in random keys (J. C. Bean, "Genetic algorithms and random keys for sequencing and optimization", ORSA
Journal on Computing 6(2), 1994): a size, and a weight for each count of the pool. The set is the counts with the largest weights, so that
every draw is a valid set, and the sampler models each count separately.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jobs.errors import UsageError
from jobs.experiment.config import Experiment
from jobs.experiment.layers import known_keys, nearest
from jobs.experiment.recipes import method_recipes, recipe_sentences
from jobs.experiment.registry import SweptMethod
from jobs.experiment.sweep_section import MAX_POINTS, RANGE_KEYS, Search, flat

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from pydantic_core import CoreSchema

SECTION = "sweep.settings"  # the section of an experiment with the searched keys
_WORDS = "true|false|null|yes|no|on|off|y|n"  # YAML does not read these as text
_UNQUOTED = re.compile(rf"(?!(?:{_WORDS})\Z)[A-Za-z_][A-Za-z0-9_./-]*", re.IGNORECASE)
DIGITS = 4  # significant digits of a number drawn from a range, so that labels stay short
_DRAWS = 200  # attempts per requested point to draw a new one


@dataclass(frozen=True)
class Point:
    """One point of the search space, in canonical form: counts ascending, settings sorted by key, JSON values (of an enum, the name)."""

    counts: tuple[int, ...]
    settings: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", tuple(sorted(self.counts)))
        object.__setattr__(self, "settings", tuple(sorted(((key, value) for key, value in self.settings), key=lambda item: item[0])))

    @property
    def label(self) -> str:
        """For messages and tables: `16+64, ptapt.learning_rate=0.0005`."""
        return ", ".join((set_label(self.counts), *(f"{key}={text(value)}" for key, value in self.settings)))

    @property
    def name(self) -> str:
        """Unique short name, used for files."""
        counts = "k" + "-".join(map(str, self.counts))
        if len(counts) > 48:
            counts = f"{len(self.counts)}k-{_digest(self.counts)}"
        return f"{counts}-{_digest(self.settings)}" if self.settings else counts

    def to_json(self) -> dict[str, Any]:
        return {"counts": list(self.counts), "settings": dict(self.settings)}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[Point], handler: object) -> CoreSchema:
        """A record contains a point as `to_json` gives it."""
        from pydantic_core.core_schema import no_info_plain_validator_function

        return no_info_plain_validator_function(point_from_json)


def point_from_json(value: Mapping[str, Any]) -> Point:
    """Inverse of `Point.to_json`; ValueError for any other value."""
    try:
        counts, settings = value["counts"], value["settings"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a point of a sweep: {value!r}") from error
    named = isinstance(counts, list) and bool(counts) and isinstance(settings, dict)
    if not named or not all(type(k) is int for k in counts) or not all(map(_is_setting, settings.items())):
        raise ValueError(f"not a point of a sweep: {value!r}")
    return Point(tuple(counts), tuple(settings.items()))


def _is_setting(item: tuple[Any, Any]) -> bool:
    key, value = item
    return isinstance(key, str) and (value is None or isinstance(value, str | int | float))


def recipe_of_sweep(experiment: Experiment, code: str | Path) -> tuple[str, ...]:
    """What the report and the dry run say of the recipe that the points start from. `code`: folder of the program."""
    return recipe_sentences(method_recipes({swept_method(experiment).name: experiment.recipe}, Path(code) / "configs"), {})


def swept_method(experiment: Experiment) -> SweptMethod:
    """The method whose settings a sweep of an experiment searches, as declared by its recipe."""
    found: SweptMethod | None = getattr(experiment.recipe, "swept", None)
    if found is None:
        raise UsageError(f"sweep: the recipe {type(experiment.recipe).__name__} declares no method to sweep (class attribute `swept`)")
    return found


def overrides_of(experiment: Experiment, point: Point) -> tuple[str, ...]:
    """`KEY=VALUE` arguments that make an ordinary experiment of a point."""
    counts = f"recipe.{swept_method(experiment).counts}=[{','.join(map(str, point.counts))}]"
    return (counts, *(f"recipe.{key}={text(value)}" for key, value in point.settings))


def set_label(counts: Sequence[int]) -> str:
    """A set of cluster counts for messages: `16+64`."""
    return "+".join(map(str, counts))


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; integers if both are; `log`: uniform in the logarithm."""

    low: float
    high: float
    log: bool = False

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def at(self, share: float) -> float:
        """Maps a uniform `share` in [0, 1) to a number of the range."""
        low, high = (self.low, self.high + 1) if self.whole else (self.low, self.high)
        number = math.exp(math.log(low) + share * (math.log(high) - math.log(low))) if self.log else low + share * (high - low)
        return self.fitted(math.floor(number + 1e-9) if self.whole else number)

    def fitted(self, number: float) -> float:
        """The nearest number of the range with at most `DIGITS` significant digits."""
        if self.whole:
            return min(max(round(number), self.low), self.high)
        scale = min(abs(number) or math.inf, self.high - self.low)
        return min(max(round(number, DIGITS - 1 - math.floor(math.log10(scale))), self.low), self.high)


@dataclass(frozen=True)
class Space:
    """All points of a sweep: the product of its sets, choices and ranges."""

    sets: tuple[tuple[int, ...], ...]  # each ascending; sets drawn from a pool are ordered by size
    pool: tuple[int, ...]  # all counts of all sets, ascending
    sizes: tuple[int, ...] = ()  # of sets drawn from the pool; (): the sets are listed one by one
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)

    @property
    def size(self) -> float:
        """Number of points; infinite with a range of floats."""
        numbers = [each.high - each.low + 1 if each.whole else math.inf for each in self.ranges.values()]
        return math.prod([len(self.sets), *map(len, self.choices.values()), *numbers])


def space_of(experiment: Experiment) -> Space:
    """The space that an experiment's section `sweep` describes. Raises UsageError if it is not valid."""
    sweep, counts_key = experiment.sweep, swept_method(experiment).counts
    if sweep.sets:
        sets = _named_sets(sweep.sets)
        if sweep.counts or sweep.sizes:
            raise UsageError("sweep.sets: in place of sweep.counts and sweep.sizes, not beside them; name one or the other")
        pool = tuple(sorted(set(itertools.chain(*sets))))
        sizes: tuple[int, ...] = ()
    else:
        pool, sizes = _pool(experiment)
        sets = tuple(itertools.chain.from_iterable(itertools.combinations(pool, size) for size in sizes))
    choices: dict[str, tuple[Any, ...]] = {}
    ranges: dict[str, Range] = {}
    for key, asked in sorted(flat(sweep.settings).items()):
        if asked is None:
            continue
        if key == counts_key:
            raise UsageError(f"{SECTION}.{key}: sets of cluster counts are set by sweep.counts and sweep.sizes, or by sweep.sets")
        if isinstance(asked, Mapping):
            ranges[key] = _range(type(experiment.recipe), key, asked)
        else:
            choices[key] = _choices(type(experiment.recipe), key, asked)
    return Space(sets, pool, sizes, choices, ranges)


def grid_points(space: Space) -> tuple[Point, ...]:
    """Every point. UsageError for a space with ranges or with more than `MAX_POINTS` points."""
    for key in space.ranges:
        raise UsageError(f"{SECTION}.{key}: a grid needs choices, for example [a, b]; ranges are for sweep.search=random or optuna")
    if space.size > MAX_POINTS:
        raise UsageError(
            f"sweep: a grid of {space.size:.0f} points, at most {MAX_POINTS}; name fewer counts, sizes or choices, or sweep.search=random"
        )
    keys = list(space.choices)
    return tuple(
        Point(counts, tuple(zip(keys, values, strict=True)))
        for counts, values in itertools.product(space.sets, itertools.product(*space.choices.values()))
    )


def random_points(space: Space, trials: int, seed: int) -> tuple[Point, ...]:
    """Distinct points, uniform over sets and choices; fewer than `trials` if the space has fewer.

    Uses only `Random.random`, whose sequence is the same in every version of Python.
    """
    draw = random.Random(seed).random

    def one_of(values: Sequence[Any]) -> Any:
        return values[int(draw() * len(values))]

    found: dict[Point, None] = {}
    for _ in range(_DRAWS * trials):
        if len(found) >= min(trials, space.size):
            break
        counts = one_of(space.sets)
        chosen = [(key, one_of(values)) for key, values in space.choices.items()]
        drawn = [(key, each.at(draw())) for key, each in space.ranges.items()]
        found[Point(counts, (*chosen, *drawn))] = None
    return tuple(found)


def listed_points(experiment: Experiment) -> tuple[Point, ...] | None:
    """The points of a sweep in the order of evaluation; None if the search chooses each from the results of earlier ones."""
    space, sweep = space_of(experiment), experiment.sweep
    if sweep.search is Search.grid:
        return grid_points(space)
    return random_points(space, sweep.trials, sweep.seed) if sweep.search is Search.random else None


def number_of_points(experiment: Experiment) -> int:
    """Number of points that a sweep evaluates."""
    listed = listed_points(experiment)
    return len(listed) if listed is not None else int(min(experiment.sweep.trials, space_of(experiment).size))


def parameters(space: Space) -> Mapping[str, tuple[Any, ...] | Range]:
    """Choices and ranges that Optuna chooses from, by name. `decode` makes a point of the chosen values."""
    found: dict[str, tuple[Any, ...] | Range] = {}
    if not space.sizes or len(space.sets) == 1:
        found["set"] = tuple(set_label(counts) for counts in space.sets)
    else:
        if len(space.sizes) > 1:
            found["size"] = space.sizes
        found |= {f"weight.{k}": Range(0.0, 1.0) for k in space.pool}
    found |= {f"recipe.{key}": values for key, values in space.choices.items()}
    return found | {f"recipe.{key}": each for key, each in space.ranges.items()}


def decode(space: Space, config: Mapping[str, Any]) -> Point:
    """The point for values of `parameters`; of equal weights the smaller count comes first. KeyError if a value is missing."""
    if not space.sizes or len(space.sets) == 1:
        counts = {set_label(each): each for each in space.sets}[config["set"]]
    else:
        size = int(config["size"]) if len(space.sizes) > 1 else space.sizes[0]
        counts = tuple(sorted(space.pool, key=lambda k: (-float(config[f"weight.{k}"]), k))[:size])
    chosen = [(key, {text(each): each for each in values}[text(config[f"recipe.{key}"])]) for key, values in space.choices.items()]
    drawn = [(key, each.fitted(float(config[f"recipe.{key}"]))) for key, each in space.ranges.items()]
    return Point(counts, (*chosen, *drawn))


def apply(experiment: Experiment, point: Point) -> Experiment:
    """The experiment with the recipe of a point, the same as with the arguments of `overrides_of`."""
    recipe, method = copy.deepcopy(experiment.recipe), swept_method(experiment)
    for key, value in ((method.counts, list(point.counts)), *point.settings):
        *sections, last = key.split(".")
        inner = functools.reduce(item, sections, recipe)
        given = value if key == method.counts else typed(type(recipe), key, value)
        if isinstance(inner, dict):
            inner[last] = given
        else:
            setattr(inner, last, given)
    return replace(experiment, recipe=recipe, methods=[method.name])


def ends(space: Space) -> Iterator[Point]:
    """A point for each combination of choices and ends of ranges, all with every count of the pool. For checks before a sweep."""
    axes = _axes(space)
    for values in itertools.product(*axes.values()):
        yield Point(space.pool, tuple(zip(axes, values, strict=True)))


def variations(space: Space) -> dict[str, tuple[Point, ...]]:
    """For each key, the first point of `ends` with each choice of this key, or each end of its range."""
    first = dict(next(ends(space)).settings)
    return {key: tuple(Point(space.pool, tuple({**first, key: value}.items())) for value in values) for key, values in _axes(space).items()}


def _axes(space: Space) -> dict[str, tuple[Any, ...]]:
    return {**space.choices, **{key: (each.low, each.high) for key, each in space.ranges.items()}}


def _named_sets(asked: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    if len(asked) > MAX_POINTS:
        raise UsageError(f"sweep.sets: {len(asked)} sets, at most {MAX_POINTS}")
    found: list[tuple[int, ...]] = []
    for counts in asked:
        if not isinstance(counts, list):
            raise UsageError(f"sweep.sets: {counts!r} is not a set; write each as a list of cluster counts, for example [[16], [16, 64]]")
        if not counts:
            raise UsageError("sweep.sets: an empty set; name at least one number of clusters in each")
        ascending = _counts("sweep.sets", counts)
        if ascending in found:
            raise UsageError(f"sweep.sets: {list(ascending)} is there twice; name each set once")
        found.append(ascending)
    return tuple(found)


def _pool(experiment: Experiment) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The counts that sets are drawn from, and the sizes of the sets."""
    sweep, key = experiment.sweep, swept_method(experiment).counts
    if sweep.counts:
        pool = _counts("sweep.counts", sweep.counts)
    else:
        pool = _counts(f"recipe.{key}", functools.reduce(item, key.split("."), experiment.recipe))
    sizes = tuple(sorted(sweep.sizes or range(1, len(pool) + 1)))
    for size in sizes:
        if not 1 <= size <= len(pool):
            raise UsageError(f"sweep.sizes: no set of {size} from {len(pool)} cluster counts {list(pool)}; allowed: 1 to {len(pool)}")
    if len(set(sizes)) != len(sizes):
        raise UsageError(f"sweep.sizes: {sweep.sizes} names a size twice")
    number = sum(math.comb(len(pool), size) for size in sizes)
    if number > MAX_POINTS:
        raise UsageError(f"sweep.counts: {number} sets, at most {MAX_POINTS}; name fewer counts, or their sizes by sweep.sizes")
    return pool, sizes


def _counts(key: str, counts: Sequence[Any]) -> tuple[int, ...]:
    if not counts:
        raise UsageError(f"{key}=[]: an empty set; name at least one number of clusters")
    for k in counts:
        if type(k) is not int or k < 2:
            raise UsageError(f"{key}: {k!r} is not a number of clusters; whole numbers from 2")
    if len(set(counts)) != len(counts):
        raise UsageError(f"{key}: {list(counts)} names a number of clusters twice")
    return tuple(sorted(counts))


def _choices(schema: type[Any], key: str, asked: Any) -> tuple[Any, ...]:
    where = f"{SECTION}.{key}"
    if not isinstance(asked, list):
        typed(schema, key, asked)  # raises first for a wrong key or value
        raise UsageError(f"{where}: {asked!r} is one value; give a list of choices, or a range {{low: a, high: b, log: false}}")
    if not asked:
        raise UsageError(f"{where}: no choices; name at least one, or null to leave the key out")
    for value in asked:
        if isinstance(value, list | dict):
            raise UsageError(f"{where}: {value!r} is not one value; choices are numbers, names, true, false or null")
    found = [plain(typed(schema, key, value)) for value in asked]
    return tuple({text(value): value for value in found}.values())


def _range(schema: type[Any], key: str, asked: Mapping[str, Any]) -> Range:
    where = f"{SECTION}.{key}"
    if unknown := set(asked) - RANGE_KEYS:
        raise UsageError(f"{where}: a range has no key {min(unknown)!r}; write {{low: a, high: b, log: false}}")
    for end in ("low", "high"):
        if isinstance(asked.get(end), list | dict | None):
            raise UsageError(f"{where}: a range has a number for `{end}`; write {{low: a, high: b, log: false}}")
    low, high = (plain(typed(schema, key, asked[end])) for end in ("low", "high"))
    log = asked.get("log", False)
    if type(log) is not bool:
        raise UsageError(f"{where}.log: {log!r} is neither true nor false")
    if type(low) not in (int, float) or type(high) not in (int, float):
        raise UsageError(f"{where}: a range is of numbers; give a list of choices")
    if not low < high:
        raise UsageError(f"{where}: low={text(low)} is not below high={text(high)}")
    if log and low <= 0:
        raise UsageError(f"{where}: low={text(low)}: a range with log: true begins above 0")
    return Range(low, high, log) if type(low) is type(high) else Range(float(low), float(high), log)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:10]


def typed(schema: type[Any], key: str, value: Any) -> Any:
    """A value converted to its type in the recipe: the text `1e-4` to a number, the name of an enum to its member.

    UsageError for an unknown key and for a value of the wrong type.
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
        raise UsageError(f"{where}: {found} is not finite")
    return found


@functools.cache
def _default(schema: Any) -> DictConfig:
    """The recipe with all defaults. Not to be changed."""
    from omegaconf import OmegaConf

    return cast("DictConfig", OmegaConf.structured(schema))


def item(value: Any, key: str) -> Any:
    """The value of a key of a section, or of a mapping."""
    return value.get(key) if isinstance(value, dict) else getattr(value, key)


def plain(value: Any) -> Any:
    """A typed value as a JSON value: of an enum member, its name."""
    return value.name if isinstance(value, Enum) else value


def text(value: Any) -> str:
    """A JSON value as the value of an override on the command line, which is read as YAML."""
    if isinstance(value, str):
        return value if _UNQUOTED.fullmatch(value) else json.dumps(value, ensure_ascii=False)
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return repr(value)
