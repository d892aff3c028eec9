"""Typed experiment configuration: schema, files in `configs/`, dot-list overrides; unknown keys name the nearest known one."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jobs.errors import UsageError
from jobs.experiment.graph import MAX_SLOTS
from jobs.experiment.sweep_section import SweepSettings, flat, merged, sweep_bounds
from jobs.store.layout import valid_experiment_name

if TYPE_CHECKING:
    from omegaconf import DictConfig


DEFAULT_RESOURCES = "default"  # the entry of `resources` that stages inherit from


class Cluster(Enum):
    """Where stages are executed."""

    local = "local"
    slurm = "slurm"


class OutlierRule(Enum):
    """Which runs are dropped for their result and run again with another seed (jobs.control.outliers)."""

    pooled = "pooled"
    cell = "cell"
    none = "none"


class Requests(Enum):
    """How much time and memory is asked of Slurm for a stage."""

    experience = "experience"  # what finished siblings took, and a margin (jobs.control.estimates); at most what is configured
    configured = "configured"


@dataclass
class Resources:
    """What one attempt of a stage is given; cores, GPUs and memory are those of each of its nodes."""

    cpus: int = 4  # shared out over the processes
    gpus: int = 1
    nodes: int = 1
    memory_gb: float = 16.0
    minutes: int = 60
    processes: int = 0  # per node, that compute one stage together; 0: one for each GPU, or one
    runs_per_task: int = 1  # stages computed in one array task
    at_once: int = 1  # of them, computed at the same time with the same GPU; 0: as many as the memory measured before allows
    throttle: int = 0  # array tasks running at once; 0: no limit of ours

    @property
    def processes_per_node(self) -> int:
        """That compute a stage together: as asked for, else one for each GPU, at least one."""
        return self.processes or max(1, self.gpus)

    @property
    def team(self) -> int:
        """All processes that compute a stage together."""
        return self.nodes * self.processes_per_node

    @property
    def cpus_per_process(self) -> int:
        return max(1, self.cpus // self.processes_per_node)


@dataclass
class StageResources:
    """What an experiment says of the resources of one stage; None: as `default` says, and `Resources` where that says nothing."""

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
    """A site profile: how jobs are asked for on one cluster."""

    partition: str | None = None
    controller_partition: str | None = None  # of the small job that looks after an experiment; default: `partition`
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpu_type: str | None = None  # `--gpus-per-node=TYPE:N`
    exclude: str | None = None
    template: str = "stage.sh.j2"  # in slurm_templates/
    modules: list[str] = field(default_factory=list)
    container: str | None = None  # image for `apptainer exec --nv`
    container_arguments: list[str] = field(default_factory=list)
    python: str | None = None  # interpreter on the compute nodes; default: the one that launches
    environment: dict[str, str] = field(default_factory=dict)
    prologue: list[str] = field(default_factory=list)  # shell lines of the site's administrator, run before the worker
    extra: dict[str, str] = field(default_factory=dict)  # further sbatch options, e.g. {"reservation": "speech"}
    memory_requests: bool = True  # some sites refuse --mem
    signal_seconds: int = 120  # warning before the time limit
    max_submit: int = 0  # jobs we may have in the queue; 0: as the site says
    max_array_size: int = 0  # 0: as the site says


@dataclass
class Policy:
    """How failures and outliers are met, and who looks after an experiment."""

    outliers: OutlierRule = OutlierRule.pooled
    sigmas: float = 2.0  # a run further from its centre is out
    rounds: int = 3  # of judgement
    max_seeds: int = 6  # that one slot may use, the first included
    max_attempts: int = 12  # of one stage since the last launch that left neither a result nor a newer checkpoint
    requests: Requests = Requests.experience
    min_siblings: int = 3  # finished ones, before a request is predicted from them
    max_failures: int = 100  # failed attempts that cost, of a whole experiment since the last launch
    poll_seconds: float = 20.0  # between passes
    controller: bool = True  # on Slurm a small job looks after the experiment
    controller_minutes: int = 60  # time limit of one link of its chain
    controller_days: float = 14.0  # since the last launch
    mail: str | None = None  # told when the experiment ends
    mail_server: str = "localhost"
    webhook: str | None = None


@dataclass
class Experiment:
    """One experiment: a corpus, its folds, a few methods, N seeds."""

    name: str = "???"
    corpus: str = "???"  # a prepared corpus
    methods: list[str] = field(default_factory=lambda: ["vft", "tapt", "ptapt"])
    folds: list[str] = field(default_factory=list)  # empty: all of the corpus
    seeds: int = 5  # slots per cell
    first_seed: int = 0
    table: str | None = None  # key of configs/published.yaml printed beside
    cluster: Cluster = Cluster.local
    site: str = "default"  # configs/site/NAME.yaml
    resources: dict[str, StageResources] = field(default_factory=dict)  # stage -> what it gets; `default` for the rest, key by key
    policy: Policy = field(default_factory=Policy)
    slurm: SlurmSite = field(default_factory=SlurmSite)
    sweep: SweepSettings = field(default_factory=SweepSettings)
    recipe: Any = None  # schema of the package that owns the stages


def resources_of(experiment: Experiment, stage: str) -> Resources:
    """What a stage is given, key by key: as its own entry says, else as `default` says, else the schema's default."""
    found = Resources()
    for name in (DEFAULT_RESOURCES, stage):
        if name in experiment.resources:
            found = replace(found, **{key: value for key, value in asdict(experiment.resources[name]).items() if value is not None})
    return found


def at_once_of(resources: Resources) -> int:
    """Stages of one task computed at the same time; 0: as memory allows. What several processes compute together is never packed."""
    return 1 if resources.team > 1 else resources.at_once


def load_experiment(
    name: str,
    overrides: Sequence[str],
    *,
    configs: Path,
    recipe_schema: type[Any],
    stages: Sequence[str] | None = None,
    teams: Sequence[str] | None = None,
) -> Experiment:
    """Schema, then the site profile, then `configs/experiment/NAME.yaml`, then `KEY=VALUE` overrides.

    `stages` are the names that `resources` may have an entry for (None: any), `teams` those that several processes can compute together
    (None: all); the rest get one process whatever `default` says. Raises UsageError in one line for an unknown experiment, site, stage or
    key, and for a value of the wrong type or out of range.
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
    _replace_sets(layers)
    site = next((str(layer["site"]) for layer in reversed(layers) if "site" in layer), schema.site)
    site_file = configs / "site" / f"{site}.yaml"
    if not site_file.is_file():
        raise UsageError(
            f"no site profile {site!r}: known are {', '.join(_stems(configs / 'site')) or 'none'} (configs/site/NAME.yaml, key `site`)"
        )
    whole = schema
    sources = [(str(site_file), OmegaConf.create({"slurm": _read_yaml(site_file)})), (str(file), layers[0]), ("KEY=VALUE", layers[1])]
    for source, layer in sources:
        whole = _merge(whole, layer, source)
    if OmegaConf.is_missing(whole, "name"):
        whole.name = name
    whole.sweep.settings = searched
    return _checked(whole, file, stages, teams)


def restore_experiment(values: Mapping[str, Any], *, recipe_schema: type[Any]) -> Experiment:
    """An experiment from the values that `resolved_values` gave; UsageError if the schema has moved on since.

    Nothing is merged here, so OmegaConf is not needed, whose import alone would take half of the time that `status` has.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        values = {"sweep": _plain(asdict(SweepSettings())), **values}  # launched before there were sweeps: as if it said nothing of them
        recipe = TypeAdapter(recipe_schema).validate_python(values["recipe"])
        experiment = replace(TypeAdapter(Experiment).validate_python({**values, "recipe": None}), recipe=recipe)
    except (KeyError, TypeError, ValidationError) as error:
        raise UsageError(f"stored configuration: {str(error).splitlines()[0]}; launch `grid` again to renew it") from error
    if resolved_values(experiment) != values:
        raise UsageError("stored configuration: written by another version of the program; launch `grid` again to renew it")
    return experiment


def resolved_values(experiment: Experiment) -> dict[str, Any]:
    """Plain JSON values of an experiment, every default filled in, enums by name."""
    return cast(dict[str, Any], _plain(asdict(experiment)))


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _merge(base: DictConfig, layer: Any, source: str) -> DictConfig:
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    try:
        return OmegaConf.merge(base, layer)  # type: ignore[return-value]
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        known = known_keys(base)
        if key.startswith("resources.") and key.count(".") > 1:  # an entry need not be there yet to have keys
            known.extend(f"{key.rpartition('.')[0]}.{each.name}" for each in fields(StageResources))
        raise UsageError(f"unknown key {key!r} in {source}{nearest(key, known)}") from error
    except OmegaConfBaseException as error:
        listed = "ListConfig" in str(error)  # OmegaConf's word for a list
        reason = "a list is wanted, in brackets: [a, b]" if listed else str(error).splitlines()[0]
        raise UsageError(f"{error.full_key or 'configuration'} in {source}: {reason}") from error


def _checked(merged: DictConfig, file: Path, stages: Sequence[str] | None, teams: Sequence[str] | None) -> Experiment:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        experiment = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UsageError(f"{error.full_key} in {file}: {str(error).splitlines()[0]}") from error
    if not isinstance(experiment, Experiment):
        raise UsageError(f"{file}: not an experiment")
    if experiment.recipe is None:
        raise UsageError(f"recipe in {file} or an override: null is none; leave it out for the defaults")
    if not valid_experiment_name(experiment.name):
        raise UsageError(f"name {experiment.name!r}: use letters, digits, '_', '.', '-' (at most 64), and not 'store'")
    policy, tiny = experiment.policy, math.ulp(0.0)  # more than 0
    bounds: dict[str, tuple[float, float, float]] = {  # key -> its value, the least and the most it may be
        "seeds": (experiment.seeds, 1, MAX_SLOTS),
        "first_seed": (experiment.first_seed, 0, math.inf),
        "policy.sigmas": (policy.sigmas, tiny, math.inf),
        "policy.poll_seconds": (policy.poll_seconds, tiny, 3600),
        "policy.controller_minutes": (policy.controller_minutes, 2, 7 * 24 * 60),
        "policy.controller_days": (policy.controller_days, tiny, 366),
    }
    counts = ("max_attempts", "rounds", "max_seeds", "max_failures", "min_siblings")
    bounds |= {f"policy.{key}": (getattr(policy, key), 1, math.inf) for key in counts}
    bounds |= {f"slurm.{key}": (getattr(experiment.slurm, key), 0, math.inf) for key in ("signal_seconds", "max_submit", "max_array_size")}
    bounds |= {f"sweep.{key}": bound for key, bound in sweep_bounds(experiment.sweep).items()}
    for stage in experiment.resources:
        if stages is not None and stage not in (DEFAULT_RESOURCES, *stages):
            raise UsageError(f"resources.{stage}: no such stage; known are {', '.join((DEFAULT_RESOURCES, *stages))}")
        given = resources_of(experiment, stage)
        for key, least in (
            ("cpus", 1),
            ("gpus", 0),
            ("nodes", 1),
            ("minutes", 1),
            ("processes", 0),
            ("runs_per_task", 1),
            ("at_once", 0),
            ("throttle", 0),
        ):
            bounds[f"resources.{stage}.{key}"] = (getattr(given, key), least, math.inf)
        bounds[f"resources.{stage}.memory_gb"] = (given.memory_gb, tiny, math.inf)
    wrong = [_range(key, *bound) for key, bound in bounds.items() if not (math.isfinite(bound[0]) and bound[1] <= bound[0] <= bound[2])]
    if wrong:
        raise UsageError(f"{'; '.join(wrong)} (in {file} or an override)")
    _settle_teams(experiment, stages or (), teams)
    if len(set(experiment.methods)) != len(experiment.methods) or not experiment.methods:
        raise UsageError(f"methods: name each method once, at least one (got {experiment.methods})")
    return experiment


def _settle_teams(experiment: Experiment, stages: Sequence[str], teams: Sequence[str] | None) -> None:
    """Give stages that cannot use a team one process on one node, where only `default` says otherwise. UsageError for what cannot be."""
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
            raise UsageError(f"resources.{stage}: {given.processes} processes for {given.gpus} GPUs of a node: each needs one of its own")
        if given.processes_per_node > given.cpus:
            raise UsageError(f"resources.{stage}: {given.cpus} cpus for {given.processes_per_node} processes of a node: each needs one")


def _range(key: str, value: float, least: float, most: float) -> str:
    allowed = "more than 0" if 0 < least < 1 else f"{least:g} or more"
    return f"{key} out of range: {value:g}; allowed: {allowed}{'' if math.isinf(most) else f', at most {most:g}'}"


def _read_yaml(file: Path) -> DictConfig:
    from omegaconf import DictConfig, OmegaConf
    from yaml import YAMLError

    try:
        loaded = OmegaConf.load(file)
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise UsageError(f"{file}: expected keys and values at the top")
    return loaded


def _read_overrides(overrides: Sequence[str]) -> DictConfig:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    for text in overrides:
        if "=" not in text or text.startswith("="):
            raise UsageError(f"override {text!r}: write KEY=VALUE, for example seeds=20 or recipe.finetune.epochs=30")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (YAMLError, ValueError) as error:
        raise UsageError(f"overrides {list(overrides)}: {' '.join(str(error).split())}") from error


def _take_settings(layers: Sequence[DictConfig]) -> dict[str, Any]:
    """Take `sweep.settings` out of layers, by dotted key: OmegaConf merges no list with a mapping, and no dotted key with a nested one."""
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
    """Sets of cluster counts that a layer names take the place of counts and sizes named before it, and these of sets."""
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
    """Dotted keys of a configuration, those of its sections too."""
    from omegaconf import DictConfig, OmegaConf

    found: list[str] = []
    for key in map(str, config):
        name = f"{prefix}{key}"
        found.append(name)
        if not OmegaConf.is_missing(config, key) and isinstance(config[key], DictConfig):
            found.extend(known_keys(config[key], f"{name}."))
    return found


def nearest(name: str, known: Iterable[str]) -> str:
    """Words that name the known key most like this one, to end a message with; none where nothing is like it."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f": did you mean {found[0]!r}?" if found else ""


def _stems(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))
