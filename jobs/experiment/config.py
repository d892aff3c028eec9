"""Experiment configuration: typed schema, files in `configs/`, `KEY=VALUE` overrides. Messages name the nearest known key."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jobs.errors import UsageError
from jobs.experiment.graph import MAX_SLOTS
from jobs.experiment.recipes import PRESET, Variant, preset_file
from jobs.experiment.sweep_section import SWEEP_BOUNDS, SweepSettings, flat, merged
from jobs.store.layout import valid_experiment_name
from jobs.text import did_you_mean, first_line, one_line

if TYPE_CHECKING:
    from omegaconf import DictConfig

_TINY = math.ulp(0.0)  # minimum of values that must be more than 0
_BOUNDS: Mapping[str, tuple[float, float]] = {  # key -> minimum, maximum
    "seeds": (1, MAX_SLOTS),
    "first_seed": (0, math.inf),
    "policy.sigmas": (_TINY, math.inf),
    "policy.poll_seconds": (_TINY, 3600),
    "policy.poll_minutes": (_TINY, 24 * 60),
    "policy.controller_minutes": (2, 7 * 24 * 60),
    "policy.controller_days": (_TINY, 366),
    **{f"policy.{key}": (1, math.inf) for key in ("max_attempts", "rounds", "max_seeds", "max_failures", "min_siblings")},
    **{f"slurm.{key}": (0, math.inf) for key in ("signal_seconds", "max_submit", "max_array_size")},
    **{f"sweep.{key}": limits for key, limits in SWEEP_BOUNDS.items()},
}
_RESOURCE_BOUNDS: Mapping[str, float] = {  # key of an entry of `resources` -> minimum
    **dict.fromkeys(("cpus", "nodes", "minutes", "runs_per_task"), 1),
    **dict.fromkeys(("gpus", "processes", "at_once", "throttle"), 0),
    "memory_gb": _TINY,
}
SECRETS = ("policy.webhook", "slurm.environment")  # keys whose values may hold secrets: not published, stored for their user only
DEFAULT_RESOURCES = "default"  # the entry of `resources` that every stage inherits from


class Cluster(Enum):
    """Where stages are executed."""

    local = "local"
    slurm = "slurm"


class OutlierRule(Enum):
    """Rule by which runs are dropped for their result and run again with another seed (jobs.control.outliers)."""

    pooled = "pooled"
    common = "common"  # `pooled` of earlier versions: one scale for all folds
    cell = "cell"
    none = "none"


class Requests(Enum):
    """How the time and memory requested from Slurm for a stage are chosen."""

    experience = "experience"  # use of finished runs and a margin (jobs.control.estimates), at most as configured
    configured = "configured"


@dataclass
class Resources:
    """Resources of one attempt of a stage; cores, GPUs and memory are per node."""

    cpus: int = 4  # divided among the processes
    gpus: int = 1
    nodes: int = 1
    memory_gb: float = 16.0
    minutes: int = 60
    processes: int = 0  # per node, that compute one stage together; 0: one per GPU, at least one
    runs_per_task: int = 1  # stages computed in one array task
    at_once: int = 1  # of them, computed concurrently on the same GPU; 0: as many as fit by measured memory
    throttle: int = 0  # array tasks running at the same time; 0: no limit

    @property
    def processes_per_node(self) -> int:
        """Processes on each node: as configured, else one per GPU, at least one."""
        return self.processes or max(1, self.gpus)

    @property
    def team(self) -> int:
        """Number of processes that compute a stage together (world size)."""
        return self.nodes * self.processes_per_node

    @property
    def cpus_per_process(self) -> int:
        return max(1, self.cpus // self.processes_per_node)


@dataclass
class StageResources:
    """Entry of `resources` for one stage; None: the value of the entry `default`, or of `Resources` if that has none."""

    cpus: int | None = None
    gpus: int | None = None
    nodes: int | None = None
    memory_gb: float | None = None
    minutes: int | None = None
    processes: int | None = None
    runs_per_task: int | None = None
    at_once: int | None = None
    throttle: int | None = None


@dataclass
class SlurmSite:
    """A site profile: sbatch options and environment of one cluster."""

    partition: str | None = None
    controller_partition: str | None = None  # of the controller job; default: `partition`
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpu_type: str | None = None  # `--gpus-per-node=TYPE:N`
    exclude: str | None = None
    template: str = "stage.sh.j2"  # in slurm_templates/
    modules: list[str] = field(default_factory=list)
    container: str | None = None  # image for `apptainer exec --nv`
    container_arguments: list[str] = field(default_factory=list)
    python: str | None = None  # interpreter on the compute nodes; default: the one of the launch
    environment: dict[str, str] = field(default_factory=dict)
    prologue: list[str] = field(default_factory=list)  # shell lines executed before the worker, trusted
    extra: dict[str, str] = field(default_factory=dict)  # further sbatch options, e.g. {"reservation": "speech"}
    memory_requests: bool = True  # False for sites that reject --mem
    signal_seconds: int = 120  # SIGUSR1 so long before the time limit
    max_submit: int = 0  # our jobs in the queue at most; 0: the site's limit
    max_array_size: int = 0  # 0: the site's limit


@dataclass
class Policy:
    """Policies for outliers, failures, requests and the controller."""

    outliers: OutlierRule = OutlierRule.pooled
    sigmas: float = 2.0  # a run further from the centre is an outlier
    rounds: int = 3  # of the outlier rule at most
    max_seeds: int = 6  # per slot at most, the first included
    max_attempts: int = 12  # of one stage since the last launch without a result or a newer checkpoint
    requests: Requests = Requests.experience
    min_siblings: int = 3  # finished runs needed to predict a request
    hold_diverging: bool = True  # a method whose first runs diverge is held, instead of all its runs being tried with every seed
    max_failures: int = 100  # failed attempts of the whole experiment since the last launch, interruptions not counted
    poll_seconds: float = 20.0  # between passes of `grid --wait`
    controller: bool = True  # on Slurm small jobs make the passes
    poll_minutes: float = 5.0  # between passes of controller jobs
    controller_minutes: int = 15  # time limit of one controller job, which makes one pass
    controller_days: float = 14.0  # after the last launch no further controller job is submitted
    mail: str | None = None  # gets a notice when the experiment ends
    mail_server: str = "localhost"
    webhook: str | None = None


@dataclass
class Experiment:
    """One experiment: a corpus, its folds, a few methods, N seeds."""

    name: str = "???"
    corpus: str = "???"  # a prepared corpus
    methods: list[str] = field(default_factory=list)  # of the registry, or names in `variants`; default: all of the registry
    variants: dict[str, Variant] = field(default_factory=dict)  # by name
    folds: list[str] = field(default_factory=list)  # empty: all of the corpus
    seeds: int = 5  # slots per cell
    first_seed: int = 0
    table: str | None = None  # key of configs/published.yaml, printed beside the results
    cluster: Cluster = Cluster.local
    site: str = "default"  # configs/site/NAME.yaml
    resources: dict[str, StageResources] = field(default_factory=dict)  # by stage; `default` for every stage
    policy: Policy = field(default_factory=Policy)
    slurm: SlurmSite = field(default_factory=SlurmSite)
    sweep: SweepSettings = field(default_factory=SweepSettings)
    recipe: Any = None  # settings of the stages, with the schema of their package

    @property
    def recipes(self) -> dict[str, Any]:
        """The recipe of each method, in the order of the tables."""
        return {name: self.variants[name].recipe if name in self.variants else self.recipe for name in self.methods}


def resources_of(experiment: Experiment, stage: str) -> Resources:
    """Resources of a stage: each value is that of its own entry, else of `default`, else of the schema."""
    found = Resources()
    for name in (DEFAULT_RESOURCES, stage):
        if name in experiment.resources:
            found = replace(found, **{key: value for key, value in asdict(experiment.resources[name]).items() if value is not None})
    return found


def secrets_of(experiment: Experiment) -> tuple[str, ...]:
    """The keys of `SECRETS` that are set."""
    return tuple(key for key in SECRETS if attrgetter(key)(experiment))


def at_once_of(resources: Resources) -> int:
    """Stages of one task computed concurrently; 0: as memory allows. Stages of several processes are never packed."""
    return 1 if resources.team > 1 else resources.at_once


def load_experiment(
    name: str,
    overrides: Sequence[str],
    *,
    configs: Path,
    recipe_schema: type[Any],
    stages: Sequence[str] | None = None,
    teams: Sequence[str] | None = None,
    methods: Sequence[str] = (),
) -> Experiment:
    """Schema, then the site profile, the recipe's preset, `configs/experiment/NAME.yaml`, and `KEY=VALUE` overrides.

    The recipe of a variant is made in the same way, with the variant's settings last.

    `stages`: names that `resources` may have an entry for (None: any). `teams`: stages that several processes can compute together (None:
    all); the others get one process whatever the entry `default` is. `methods`: used if no layer names any. Raises UsageError, in one
    line, for an unknown experiment, site, stage or key, and for a value of the wrong type or out of range.
    """
    from omegaconf import OmegaConf

    file = configs / "experiment" / f"{name}.yaml"
    if not file.is_file():
        known = _stems(configs / "experiment")
        raise UsageError(f"no experiment {name!r}: known are {', '.join(known) or 'none'}{nearest(name, known)}")
    schema = OmegaConf.structured(Experiment(recipe=None))
    schema.recipe = OmegaConf.structured(recipe_schema)
    layers = [_read_yaml(file), _read_overrides(overrides)]
    searched = _take_settings(layers)
    _check_pools(layers)
    _replace_sets(layers)
    site = next((str(layer["site"]) for layer in reversed(layers) if "site" in layer), schema.site)
    site_file = configs / "site" / f"{site}.yaml"
    if not site_file.is_file():
        known = _stems(configs / "site")
        raise UsageError(f"no site profile {site!r}: known are {', '.join(known) or 'none'} (configs/site/NAME.yaml, key `site`)")
    site_layer = (str(site_file), OmegaConf.create({"slurm": _read_yaml(site_file)}))
    sources = [(str(file), layers[0]), ("KEY=VALUE", layers[1])]
    whole = _with_preset(schema, [site_layer, *sources], configs)
    if OmegaConf.is_missing(whole, "name"):
        whole.name = name
    if not any("methods" in layer for layer in layers):
        whole.methods = list(methods)
    whole.sweep.settings = searched
    experiment = _checked(whole, file, stages, teams)
    for name, variant in experiment.variants.items():
        if not isinstance(variant.recipe, dict | None):
            raise UsageError(f"variants.{name}.recipe: expected settings, got {variant.recipe!r}")
        own = OmegaConf.create({"recipe": variant.recipe or {}})
        merged_recipe = _with_preset(schema, [*sources, (f"variants.{name}", own)], configs).recipe
        variant.recipe = _converted(merged_recipe, f"variants.{name}")
    return experiment


def _merge(base: DictConfig, layer: Any, source: str) -> DictConfig:
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    try:
        return OmegaConf.merge(base, layer)  # type: ignore[return-value]
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        known = known_keys(base)
        if key.startswith("resources.") and key.count(".") > 1:  # keys of an entry that no layer has yet
            known.extend(f"{key.rpartition('.')[0]}.{each.name}" for each in fields(StageResources))
        raise UsageError(f"unknown key {key!r} in {source}{nearest(key, known)}") from error
    except OmegaConfBaseException as error:
        listed = "ListConfig" in str(error)  # OmegaConf's name of a list
        reason = "expected a list in brackets: [a, b]" if listed else first_line(error)
        raise UsageError(f"{error.full_key or 'configuration'} in {source}: {reason}") from error


def _with_preset(schema: DictConfig, sources: Sequence[tuple[str, DictConfig]], configs: Path) -> DictConfig:
    """The schema with all sources merged, above the preset that the last of them names, or the schema does."""
    from omegaconf import DictConfig, OmegaConf

    sections = [section for _, layer in sources if isinstance(section := layer.get("recipe"), DictConfig)]
    whole = schema
    if isinstance(schema.recipe, DictConfig) and PRESET in schema.recipe:
        name = next((section[PRESET] for section in reversed(sections) if PRESET in section), schema.recipe[PRESET])
        file = preset_file(configs, str(name))
        whole = _merge(whole, OmegaConf.create({"recipe": _read_yaml(file)}), str(file))
    for source, layer in sources:
        whole = _merge(whole, layer, source)
    return whole


def _converted(config: DictConfig, source: str) -> Any:
    """A merged configuration as an object of its schema."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UsageError(f"{error.full_key} in {source}: {first_line(error)}") from error


def _checked(merged: DictConfig, file: Path, stages: Sequence[str] | None, teams: Sequence[str] | None) -> Experiment:
    experiment = _converted(merged, str(file))
    if not isinstance(experiment, Experiment):
        raise UsageError(f"{file}: not an experiment")
    if experiment.recipe is None:
        raise UsageError(f"recipe in {file} or an override: null is not a recipe; leave it out for the defaults")
    if not valid_experiment_name(experiment.name):
        raise UsageError(f"name {experiment.name!r}: use letters, digits, '_', '.', '-' (at most 64), and not 'store'")
    bounds = {key: (attrgetter(key)(experiment), *limits) for key, limits in _BOUNDS.items()}
    for stage in experiment.resources:
        if stages is not None and stage not in (DEFAULT_RESOURCES, *stages):
            raise UsageError(f"resources.{stage}: no such stage; known are {', '.join((DEFAULT_RESOURCES, *stages))}")
        given = resources_of(experiment, stage)
        bounds |= {f"resources.{stage}.{key}": (getattr(given, key), least, math.inf) for key, least in _RESOURCE_BOUNDS.items()}
    wrong = [_range(key, *bound) for key, bound in bounds.items() if not (math.isfinite(bound[0]) and bound[1] <= bound[0] <= bound[2])]
    if wrong:
        raise UsageError(f"{'; '.join(wrong)} (in {file} or an override)")
    _settle_teams(experiment, stages or (), teams)
    if len(set(experiment.methods)) != len(experiment.methods) or not experiment.methods:
        raise UsageError(f"methods: name each method once, at least one (got {experiment.methods})")
    for name in experiment.variants:
        if not valid_experiment_name(name):
            raise UsageError(f"variants.{name} in {file}: use letters, digits, '_', '.', '-' for a variant's name (at most 64)")
    return experiment


def _settle_teams(experiment: Experiment, stages: Sequence[str], teams: Sequence[str] | None) -> None:
    """Set one process on one node for stages that cannot use more, if only `default` asks for more. UsageError for impossible resources."""
    single = [] if teams is None else [stage for stage in dict.fromkeys((*stages, *experiment.resources)) if stage not in teams]
    for stage in single:
        if stage == DEFAULT_RESOURCES:
            continue
        own = experiment.resources.get(stage, StageResources())
        wrong = [f"{key}={value}" for key in ("nodes", "gpus", "processes") if (value := getattr(own, key) or 0) > 1]
        if wrong:
            raise UsageError(f"resources.{stage}: {', '.join(wrong)}: this stage is computed by one process, with one GPU at most")
        given = resources_of(experiment, stage)
        if given.team > 1:
            experiment.resources[stage] = replace(own, nodes=1, processes=1, gpus=min(1, given.gpus))
    for stage in experiment.resources:
        given = resources_of(experiment, stage)
        if given.processes_per_node > given.gpus > 0:
            raise UsageError(f"resources.{stage}: {given.processes} processes for {given.gpus} GPUs of a node: each needs its own")
        if given.processes_per_node > given.cpus:
            raise UsageError(
                f"resources.{stage}: {given.cpus} cpus for {given.processes_per_node} processes of a node: each process needs one"
            )


def _range(key: str, value: float, least: float, most: float) -> str:
    allowed = "more than 0" if 0 < least < 1 else f"{least:g} or more"
    return f"{key} out of range: {value:g}; allowed: {allowed}{'' if math.isinf(most) else f', at most {most:g}'}"


def _read_yaml(file: Path) -> DictConfig:
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


def _check_pools(layers: Sequence[DictConfig]) -> None:
    """UsageError for an empty `sweep.counts` without `sweep.sets` in the same layer."""
    from omegaconf import DictConfig, OmegaConf

    sections = [section for layer in layers if isinstance(section := layer.get("sweep"), DictConfig)]
    named = [cast(dict[str, Any], OmegaConf.to_container(section, resolve=False)) for section in sections]
    if any(own.get("counts") == [] and not own.get("sets") for own in named):
        raise UsageError("sweep.counts=[]: name at least one number of clusters, or leave it out for the counts of the recipe")


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


def _stems(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))
