"""An experiment as launched: configuration, corpus and stage graph, stored so that later commands use the same ones."""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jobs.errors import StoredConfigurationError, UsageError
from jobs.experiment.config import Cluster, Experiment, OutlierRule, secrets_of
from jobs.experiment.graph import WHOLE, Extend, Graph, Refill, Slot, build_graph, seeds_of_slots
from jobs.experiment.registry import Registry
from jobs.experiment.stored_config import resolved_values, restore_experiment
from jobs.store.identity import record_identity
from jobs.store.launches import next_launch
from jobs.store.layout import Layout, valid_experiment_name
from jobs.store.records import DamagedRecordError, Decoder, read_json, write_json
from jobs.text import did_you_mean

SCHEMA = 1
POOLED = 2  # version of the outlier rule `pooled`; version 1 is now called `common`


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus, as the job system sees it."""

    name: str
    digest: str
    folds: tuple[str, ...]
    folder: str  # absolute
    caption: tuple[str, ...] = ()  # sentences that captions state of it


@dataclass(frozen=True)
class _Stored:
    """The record of a launch."""

    launched: float  # seconds since the epoch
    corpus: Corpus
    config: Mapping[str, Any]
    file: str = ""
    user: int | None = None
    stages: str = ""  # digest of the graph
    typed: tuple[str, ...] = ()
    pooled: int = 1  # version of the outlier rule `pooled` at the launch
    keep_old: bool = False


@dataclass(frozen=True)
class _Settings:
    """The part that the records of launches of experiments and of sweeps have in common."""

    config: Mapping[str, Any]


_RECORDS = Decoder(_Stored, SCHEMA)
_SETTINGS = Decoder(_Settings, None)


@dataclass(frozen=True)
class Launched:
    """A launched experiment and its stage graph."""

    experiment: Experiment
    corpus: Corpus
    graph: Graph
    layout: Layout
    since: float  # time and number of the last launch by the user (jobs.store.launches), seconds since the epoch
    refill: Refill
    changed: bool = False  # the code changed since the launch and defines other stages for this configuration
    user: int | None = None  # uid of the launch; None: not recorded
    config: str = ""  # name of its file in configs/experiment/; "": not recorded
    extend: Extend | None = None  # None: results add no runs
    typed: tuple[str, ...] = ()  # words of the last launch, after `launch.py`; (): not recorded
    keep_old: bool = False  # queued stages of earlier settings are not withdrawn


@dataclass(frozen=True)
class LastLaunch:
    """What an experiment was launched with before the launch that is under way."""

    values: Mapping[str, Any]  # as `resolved_values`
    corpus: Corpus
    time: float  # seconds since the epoch
    graph: Graph | None  # None: this version of the program lacks one of its settings, or defines other stages for them


def last_place(layout: Layout) -> tuple[Cluster, str] | None:
    """Where an experiment or a sweep was launched last, and with which site profile; None if not launched, or its record cannot be read."""
    stored = _SETTINGS.read(layout.experiment_file)
    cluster = str(stored.config.get("cluster")) if stored else ""
    return (Cluster[cluster], str(stored.config.get("site"))) if stored and cluster in Cluster.__members__ else None


def stored_registry(layout: Layout) -> str:
    """The key `registry` of an experiment's or a sweep's last launch; "": the program's own registry, or nothing is recorded."""
    config = (read_json(layout.experiment_file) or {}).get("config")
    name = config.get("registry") if isinstance(config, Mapping) else None
    return name if isinstance(name, str) else ""


def last_launch(layout: Layout, registry: Registry, recipe_schema: type[Any]) -> LastLaunch | None:
    """The last launch on record; None if there is none, or its record is damaged."""
    stored = _RECORDS.read(layout.experiment_file)
    if stored is None:
        return None
    try:
        experiment = _restore(stored, layout, registry, recipe_schema)
        graph = _graph(experiment, stored.corpus, registry, {})
    except UsageError:
        return LastLaunch(stored.config, stored.corpus, stored.launched, None)
    same = not stored.stages or stored.stages == _digest(graph)
    return LastLaunch(resolved_values(experiment), stored.corpus, stored.launched, graph if same else None)


def last_recipes(layout: Layout) -> tuple[Mapping[str, Any], ...]:
    """The recipes of the last launch of an experiment or a sweep as JSON values, with those of variants; () without a readable record."""
    stored = _SETTINGS.read(layout.experiment_file)
    if stored is None:
        return ()
    variants = stored.config.get("variants")
    sections = [stored.config, *(variants.values() if isinstance(variants, Mapping) else ())]
    return tuple(recipe for section in sections if isinstance(section, Mapping) and isinstance(recipe := section.get("recipe"), Mapping))


def launch(
    experiment: Experiment, corpus: Corpus, registry: Registry, layout: Layout, file: str = "", typed: tuple[str, ...] = ()
) -> Launched:
    """A new launch of an experiment. Raises UsageError for an unknown method or fold, and if there is no method."""
    if not experiment.methods:
        raise UsageError(f"methods: name at least one of {', '.join(registry.methods)}")
    known = (*registry.methods, *registry.measurements)
    _known("methods", experiment.methods, (*known, *experiment.variants))
    for name, variant in experiment.variants.items():
        if name in known:
            raise UsageError(f"variants.{name}: is the name of a method; choose another")
        _known(f"variants.{name}.method", [variant.method], known)
    _known("folds", experiment.folds, corpus.folds)
    graph = _graph(experiment, corpus, registry, {})
    refill = functools.partial(_graph, experiment, corpus, registry, base=graph)
    return Launched(experiment, corpus, graph, layout, next_launch(layout), refill, user=os.getuid(), config=file, typed=typed)


def store(launched: Launched) -> None:
    """Store an experiment under its name; only its user can read the record if it has settings that may hold secrets."""
    record_identity(launched.layout.root)
    config, stages = resolved_values(launched.experiment), _digest(launched.graph)
    record = _Stored(
        launched.since, launched.corpus, config, launched.config, launched.user, stages, launched.typed, POOLED, launched.keep_old
    )
    private = bool(secrets_of(launched.experiment))
    write_json(launched.layout.experiment_file, {"schema": SCHEMA, **asdict(record)}, private=private)


def reopen(layout: Layout, registry: Registry, recipe_schema: type[Any]) -> Launched:
    """The experiment as it was launched last.

    Raises UsageError if there is none of that name, StoredConfigurationError if its record is damaged or of another version.
    """
    stored = _load(layout)
    experiment = _restore(stored, layout, registry, recipe_schema)
    graph = _graph(experiment, stored.corpus, registry, {})
    refill = functools.partial(_graph, experiment, stored.corpus, registry, base=graph)
    changed = bool(stored.stages) and stored.stages != _digest(graph)
    return Launched(
        experiment,
        stored.corpus,
        graph,
        layout,
        stored.launched,
        refill,
        changed,
        stored.user,
        stored.file,
        typed=stored.typed,
        keep_old=stored.keep_old,
    )


def relaunch(layout: Layout, registry: Registry, recipe_schema: type[Any]) -> Launched:
    """A new launch with the settings of the last one, whatever its file in configs/experiment says now.

    Settings that this version of the program has added get their defaults. UsageError if it lacks one of the stored settings, and as for
    `reopen`.
    """
    stored = _load(layout)
    experiment = _restore(stored, layout, registry, recipe_schema)
    return launch(experiment, stored.corpus, registry, layout, stored.file, stored.typed)


def require_same_corpus(launched: Launched, digest: str, launch_command: str) -> None:
    """UsageError if the corpus has another digest now than at the launch. `launch_command`: launches with the corpus as it is now."""
    corpus = launched.corpus
    if digest != corpus.digest:
        raise UsageError(
            f"corpus {corpus.name} in {corpus.folder} was prepared again since the launch "
            f"(digest {digest[:12]}, at the launch {corpus.digest[:12]}): {launch_command} launches with it as it is now"
        )


def _restore(stored: _Stored, layout: Layout, registry: Registry, recipe_schema: type[Any]) -> Experiment:
    """The stored experiment, with the outlier rule of its launch.

    StoredConfigurationError, with the command of the launch, if this version lacks a setting of it.
    """
    command = shlex.join(("python", "launch.py", *(stored.typed or ("grid", stored.file or layout.experiment))))
    again = f"`{command}` launches with the settings of its file"
    experiment = restore_experiment(stored.config, recipe_schema=recipe_schema, again=again)
    if stored.pooled < POOLED and experiment.policy.outliers is OutlierRule.pooled:
        experiment.policy.outliers = OutlierRule.common
    known = (*registry.methods, *registry.measurements, *experiment.variants)
    gone = [name for name in experiment.methods if name not in known]
    if gone:
        raise StoredConfigurationError(f"stored configuration: method {gone[0]!r} does not exist any more; {again}")
    return experiment


def _load(layout: Layout) -> _Stored:
    if not valid_experiment_name(layout.experiment):
        raise UsageError(f"experiment {layout.experiment!r}: not a name that an experiment can have")
    try:
        stored = _RECORDS.load(layout.experiment_file)
    except DamagedRecordError as error:
        raise StoredConfigurationError(f"{layout.experiment_file}: damaged ({error}); launch `grid` again to renew it") from error
    if stored is None:
        known = sorted(path.parent.name for path in layout.root.glob("*/experiment.json"))
        hint = did_you_mean(layout.experiment, known, otherwise=f"launched are: {', '.join(known) or 'none'}")
        raise UsageError(f"experiment {layout.experiment!r} was not launched (nothing in {layout.folder}); {hint}")
    return stored


def without_configuration(layout: Layout) -> Launched:
    """What `cancel` needs of a launch whose configuration cannot be read: its time, user and cluster. It has no stages.

    Parts of the record that are damaged too count as not known: the user is then the owner of the file, the time 0, and the cluster is
    Slurm's if anything was submitted.
    """
    stored = read_json(layout.experiment_file) or {}
    config, since, user = (stored.get(name) for name in ("config", "launched", "user"))
    cluster = config.get("cluster") if isinstance(config, dict) else None
    on_slurm = cluster == Cluster.slurm.name or layout.submissions.is_dir()
    experiment = Experiment(name=layout.experiment, cluster=Cluster.slurm if on_slurm else Cluster.local)
    graph = Graph({}, (), "", "", {})
    return Launched(
        experiment,
        Corpus("", "", (), ""),
        graph,
        layout,
        float(since) if isinstance(since, int | float) else 0.0,
        lambda generations: graph,
        changed=True,
        user=user if isinstance(user, int) else layout.experiment_file.stat().st_uid,
    )


def _graph(experiment: Experiment, corpus: Corpus, registry: Registry, generations: Mapping[Slot, int], base: Graph | None = None) -> Graph:
    folds = experiment.folds or list(corpus.folds)
    variants = {name: (variant.method, variant.recipe) for name, variant in experiment.variants.items()}
    measuring = [name for name in experiment.methods if variants.get(name, (name, None))[0] in registry.measurements]
    scored = [name for name in experiment.methods if name not in measuring]
    slots = {
        **seeds_of_slots(scored, folds, seeds=experiment.seeds, first_seed=experiment.first_seed, generations=generations),
        **seeds_of_slots(measuring, [WHOLE], seeds=1, first_seed=experiment.first_seed),
    }
    return build_graph(
        registry,
        experiment.recipe,
        corpus=corpus.name,
        corpus_digest=corpus.digest,
        methods=experiment.methods,
        folds=list(dict.fromkeys((*folds, WHOLE))) if measuring else folds,
        seeds=slots,
        base=base,
        variants=variants,
        measurements=measuring,
    )


def _digest(graph: Graph) -> str:
    """Digest of the keys of all stages at launch, before any run is dropped."""
    return hashlib.sha256(" ".join(graph.nodes).encode()).hexdigest()[:16]


def _known(key: str, asked: Sequence[str], known: Sequence[str]) -> None:
    for name in asked:
        if name not in known:
            hint = did_you_mean(name, known, otherwise=f"known are {', '.join(known)}")
            raise UsageError(f"{key}: {name!r} is unknown; {hint}")
    if len(set(asked)) != len(asked):
        raise UsageError(f"{key}: {', '.join(asked)}: name each once")
