"""Experiment configuration: typed schema, files in `configs/`, `KEY=VALUE` overrides. Messages name the nearest known key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.errors import UsageError
from jobs.experiment.graph import MAX_SLOTS
from jobs.experiment.layers import Layer, experiment_file, merge_layer, merge_layers, read_layers
from jobs.experiment.recipes import PRESET, Variant
from jobs.experiment.sweep_section import SWEEP_BOUNDS, SweepSettings
from jobs.store.layout import valid_experiment_name
from jobs.text import first_line

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

    local = "local"  # on this machine
    slurm = "slurm"  # as jobs of Slurm


class OutlierRule(Enum):
    """Rule by which runs are dropped for their result and run again with another seed (jobs.control.outliers)."""

    pooled = "pooled"  # distance from the median of the cell, on a robust scale of its fold and of all folds
    common = "common"  # `pooled` of earlier versions: one robust scale for all folds
    cell = "cell"  # distance from the mean of the cell in standard deviations; needs 6 seeds
    none = "none"  # every run counts


class Requests(Enum):
    """How the time and memory requested from Slurm for a stage are chosen."""

    experience = "experience"  # use of finished runs and a margin (jobs.control.estimates), at most as configured
    configured = "configured"  # as in `resources`


@dataclass
class Resources:
    """Resources of one attempt of a stage; cores, GPUs and memory are per node."""

    cpus: int = 4  # of a node; divided among the processes
    gpus: int = 1  # of a node
    nodes: int = 1  # that compute one stage together
    memory_gb: float = 16.0  # of a node
    minutes: int = 60  # time limit
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
    """sbatch options and environment of one cluster: those of the site profile, which keys here override."""

    partition: str | None = None  # of the stages; default: the site's
    controller_partition: str | None = None  # of the controller job; default: `partition`
    account: str | None = None  # that is charged
    qos: str | None = None  # quality of service
    constraint: str | None = None  # features that a node must have, e.g. "a100|h100"
    gpu_type: str | None = None  # `--gpus-per-node=TYPE:N`
    exclude: str | None = None  # nodes never to use, e.g. node[07,13]
    template: str = "stage.sh.j2"  # in slurm_templates/
    modules: list[str] = field(default_factory=list)  # environment modules loaded on the node, after `module purge`
    container: str | None = None  # image for `apptainer exec --nv`
    container_arguments: list[str] = field(default_factory=list)  # of `apptainer exec`, e.g. ["--bind", "/scratch"]
    python: str | None = None  # interpreter on the compute nodes; default: the one of the launch
    environment: dict[str, str] = field(default_factory=dict)  # variables of the jobs
    prologue: list[str] = field(default_factory=list)  # shell lines executed before the worker, trusted
    extra: dict[str, str] = field(default_factory=dict)  # further sbatch options, e.g. {"reservation": "course"}
    memory_requests: bool = True  # False for sites that reject --mem
    signal_seconds: int = 120  # SIGUSR1 so long before the time limit
    max_submit: int = 0  # our jobs in the queue at most; 0: the site's limit
    max_array_size: int = 0  # tasks of one array at most; 0: the site's limit


@dataclass
class Policy:
    """Policies for outliers, failures, requests and the controller."""

    outliers: OutlierRule = OutlierRule.pooled  # rule by which runs are dropped and run again with another seed
    sigmas: float = 2.0  # a run further from the centre, in scales of its cell, is an outlier
    rounds: int = 3  # of the outlier rule at most
    max_seeds: int = 6  # per slot at most, the first included
    max_attempts: int = 12  # of one stage since the last launch without a result or a newer checkpoint
    requests: Requests = Requests.experience  # time and memory asked of Slurm
    min_siblings: int = 3  # finished runs needed to predict a request
    hold_diverging: bool = True  # a method whose first runs diverge is held, instead of all its runs being tried with every seed
    max_failures: int = 100  # failed attempts of the whole experiment since the last launch, interruptions not counted
    poll_seconds: float = 20.0  # between passes of `grid --wait`
    controller: bool = True  # on Slurm small jobs make the passes
    poll_minutes: float = 5.0  # between passes of controller jobs
    controller_minutes: int = 15  # time limit of one controller job, which makes one pass
    controller_days: float = 14.0  # after the last launch no further controller job is submitted
    mail: str | None = None  # gets a notice when the experiment ends
    mail_server: str = "localhost"  # SMTP
    webhook: str | None = None  # URL that gets the notice


@dataclass
class Experiment:
    """One experiment: a corpus, its folds, a few methods, N seeds."""

    name: str = "???"  # of the experiment and of its folder in results/; default: the name of its file
    corpus: str = "???"  # a prepared corpus
    registry: str = ""  # package.module:NAME of the stages and methods (docs/your-own-grid.md); default: those of speech, in ser_core
    methods: list[str] = field(default_factory=list)  # of the registry, or names in `variants`; default: all of the registry
    variants: dict[str, Variant] = field(default_factory=dict)  # methods with settings of their own, by name
    folds: list[str] = field(default_factory=list)  # empty: all of the corpus
    seeds: int = 5  # slots per cell
    first_seed: int = 0  # of slot 0
    table: str | None = None  # key of configs/published.yaml, printed beside the results
    cluster: Cluster = Cluster.local  # where the stages are computed; on the command line `--cluster`
    site: str = "default"  # configs/site/NAME.yaml
    resources: dict[str, StageResources] = field(default_factory=dict)  # of one attempt, by stage; `default` for every stage
    policy: Policy = field(default_factory=Policy)
    slurm: SlurmSite = field(default_factory=SlurmSite)
    sweep: SweepSettings = field(default_factory=SweepSettings)
    recipe: Any = None  # settings of the stages, with the schema of their package

    @property
    def recipes(self) -> dict[str, Any]:
        """The recipe of each method, in the order of the tables."""
        return {name: self.variants[name].recipe if name in self.variants else self.recipe for name in self.methods}

    def method_of(self, name: str) -> str:
        """The registry's method that a method or variant of the experiment runs."""
        return self.variants[name].method if name in self.variants else name


ENTRIES: Mapping[str, Sequence[str]] = {"resources": [each.name for each in fields(StageResources)]}  # sections of entries with these keys


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
    """Schema, then the site profile, the recipe's preset, the experiment's file, and `KEY=VALUE` overrides.

    The recipe of a variant is made in the same way, with the variant's settings last.

    `name`: of a file in configs/experiment, or the path of one, whose experiment is named after it.
    `stages`: names that `resources` may have an entry for (None: any). `teams`: stages that several processes can compute together (None:
    all); the others get one process whatever the entry `default` is. `methods`: used if no layer names any. Raises UsageError, in one
    line, for an unknown experiment, site, stage or key, and for a value of the wrong type or out of range.
    """
    from omegaconf import OmegaConf

    schema = schema_of(recipe_schema)
    layers = read_layers(experiment_file(name, configs), overrides, configs, schema.site)
    whole = merge_layers(schema, [layers.site, *layers.own], configs, ENTRIES)
    if OmegaConf.is_missing(whole, "name"):
        whole.name = layers.file.stem
    if not any("methods" in layer.values for layer in layers.own):
        whole.methods = list(methods)
    whole.sweep.settings = dict(layers.searched)
    experiment = _checked(whole, layers.file, stages, teams)
    if experiment.variants:
        common = merge_layers(schema, layers.own, configs, ENTRIES)
        common.variants = {}
    for name, variant in experiment.variants.items():
        if not isinstance(variant.recipe, dict | None):
            raise UsageError(f"variants.{name}.recipe: expected settings, got {variant.recipe!r}")
        own = Layer(f"variants.{name}", OmegaConf.create({"recipe": variant.recipe or {}}), f"variants.{name}.")
        other_preset = PRESET in (variant.recipe or {})  # lies below all layers
        whole = merge_layers(schema, [*layers.own, own], configs, ENTRIES) if other_preset else merge_layer(common, own, ENTRIES)
        variant.recipe = _converted(whole.recipe, f"variants.{name}")
    return experiment


def schema_of(recipe_schema: type[Any]) -> DictConfig:
    """The schema of experiments with a recipe, as a configuration of its defaults."""
    from omegaconf import OmegaConf

    schema: DictConfig = OmegaConf.structured(Experiment(recipe=None))
    schema.recipe = OmegaConf.structured(recipe_schema)
    return schema


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
