"""The experiment that a command line asks for: its words, its settings, and the checks before a launch that need no corpus."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.errors import UsageError
from jobs.experiment.config import Cluster, Experiment, load_experiment
from jobs.experiment.launched import Corpus, last_place
from jobs.experiment.layers import ENDINGS, experiment_file, is_path, registry_name
from jobs.store.layout import Layout, shared_path
from jobs.store.scores import UNWEIGHTED, score_of
from jobs.text import listed
from jobs.worker.task import Workplace

if TYPE_CHECKING:
    from jobs.commands.program import Program
    from jobs.experiment.plugin import Plugin

OWN_PACKAGES = ("omegaconf", "submitit")  # of this package, whose versions results state beside those of the registry


@dataclass(frozen=True)
class Words:
    """The words of `COMMAND [EXPERIMENT] [KEY=VALUE ...] [--cluster CLUSTER]`."""

    file: str  # name of the experiment's file in configs/experiment/, or the absolute path of one
    overrides: tuple[str, ...]
    cluster: Cluster | None = None  # None: not given as an option
    named: bool = True  # False: `file` is the default

    @property
    def line(self) -> str:
        """Names the experiment where the user did not; "" otherwise."""
        return "" if self.named else f"experiment {self.file}: the default, as none is named"


def words_of(command: str, arguments: Sequence[str], cluster: str | None, default: str) -> Words:
    """The words of a command line. `default`: experiment if none is named. UsageError for two experiments or an unknown cluster."""
    named = [text for text in arguments if "=" not in text]
    if len(named) > 1:
        raise UsageError(f"{command}: one experiment at a time (got {', '.join(named)}); settings are given as KEY=VALUE")
    if cluster is not None and cluster not in Cluster.__members__:
        raise UsageError(f"--cluster {cluster}: known are {', '.join(Cluster.__members__)}")
    overrides = tuple(text for text in arguments if "=" in text)
    file = named[0] if named else default
    return Words(str(shared_path(Path(file))) if is_path(file) else file, overrides, Cluster[cluster] if cluster else None, bool(named))


def program_words(program: Program, command: str, arguments: Sequence[str], cluster: str | None, default: str = "") -> Words:
    """`words_of` with the user's own file of the experiment, where there is one. `default`: that of the program if ""."""
    words = words_of(command, arguments, cluster, default or program.experiment)
    return replace(words, file=program.file_of(words.file))


def chosen_experiment(named: str | None, results: Path, default: str) -> tuple[str, str]:
    """The experiment that a command is about, and a line that names it where the user did not: the only one launched, else the default."""
    if named is not None:
        return (Path(named).stem if named.endswith(ENDINGS) else named), ""
    launched = sorted(path.parent.name for path in results.glob("*/experiment.json"))
    if len(launched) == 1:
        return launched[0], f"experiment {launched[0]}: the only one that was launched"
    more = f"; launched are {listed(launched)}" if launched else ""
    return default, f"experiment {default}: the default, as none is named{more}"


def experiment_to_launch(
    words: Words, program: Program, results: Path, corpora: Collection[str] = (), *, sweep: bool = False
) -> tuple[Experiment, str]:
    """The experiment of a launch, and a line on where it will compute if that was not typed; "" if it was, or is no news.

    An experiment whose last launch was on Slurm stays there, with its site profile unless another one is typed; a `sweep` of it follows its
    last sweep, or if it has none its grid. `corpora`: names of the prepared ones.
    """
    require_file(words.file, program.configs, corpora)
    experiment = read_experiment(words, program)
    if words.cluster is not None or any(text.startswith("cluster=") for text in words.overrides):
        return experiment, ""
    last = _last_place(Layout(shared_path(results), experiment.name), sweep=sweep)
    if last is not None and last[0] is Cluster.slurm and experiment.cluster is Cluster.local:
        site = () if any(text.startswith("site=") for text in words.overrides) else (f"site={last[1]}",)
        experiment = read_experiment(replace(words, overrides=(*site, *words.overrides), cluster=Cluster.slurm), program)
        return experiment, f"{place_line(experiment)}, as at its last launch; `--cluster local` computes on this machine"
    if last is not None or shutil.which("sbatch") is None:
        return experiment, ""
    other = "local` computes on this machine" if experiment.cluster is Cluster.slurm else "slurm site=NAME` submits jobs to Slurm instead"
    return experiment, f"{place_line(experiment)}; `--cluster {other}"


def _last_place(layout: Layout, *, sweep: bool) -> tuple[Cluster, str] | None:
    from jobs.sweeps.records import latest_sweep

    last_sweep = latest_sweep(layout) if sweep else None
    return (last_place(last_sweep) if last_sweep is not None else None) or last_place(layout)


def require_file(name: str, configs: Path, corpora: Collection[str]) -> Path:
    """The file of an experiment. UsageError if there is none; it names `init` where a corpus of that name is prepared."""
    try:
        return experiment_file(name, configs)
    except UsageError as error:
        if name not in corpora:
            raise
        command = f"`python launch.py init {name} --corpus {name}`"
        raise UsageError(f"no experiment {name!r}, only a prepared corpus of that name: {command} writes a file for it") from error


def place_line(experiment: Experiment) -> str:
    """Where an experiment will compute, without a full stop."""
    if experiment.cluster is Cluster.slurm:
        return f"{experiment.name}: submits jobs to Slurm (site {experiment.site})"
    return f"{experiment.name}: computes on this machine ({socket.gethostname()}), not in Slurm"


def read_experiment(words: Words, program: Program) -> Experiment:
    """The experiment of a command line, checked as far as that needs no corpus."""
    registry = program.plugin(registry_name(experiment_file(words.file, program.configs), words.overrides)).registry
    experiment = load_experiment(
        words.file,
        words.overrides,
        configs=program.configs,
        recipe_schema=registry.recipe_schema,
        stages=registry.stages,
        teams=registry.teams,
        methods=registry.default_methods,
    )
    if words.cluster is not None:
        experiment = replace(experiment, cluster=words.cluster)
    check_experiment(experiment, program)
    return experiment


def check_experiment(experiment: Experiment, program: Program) -> None:
    """UsageError for settings that would only fail after everything is computed, or in every job."""
    from jobs.commands.notify import check_notify
    from jobs.control.outliers import check_rule
    from jobs.tables.published import load_published

    registry = program.plugin(experiment.registry).registry
    score = score_of(registry)
    if load_published(program.published, experiment.table).rows and score.name != UNWEIGHTED.name:
        raise UsageError(f"table={experiment.table}: its figures are {UNWEIGHTED.axis}, the runs have {score.axis}: set table=null")
    for recipe in (experiment.recipe, *experiment.recipes.values()):
        registry.check(recipe)
    check_rule(experiment.policy.outliers, experiment.seeds, experiment.policy.sigmas)
    check_notify(experiment.policy)


def check_corpus(experiment: Experiment, corpus: Corpus, program: Program) -> None:
    """UsageError, or the registry's error, where an experiment does not fit its corpus: another table's folds, too few utterances."""
    from jobs.tables.published import load_published

    published = load_published(program.published, experiment.table)
    other = [fold for fold in corpus.folds if fold not in published.columns]
    if published.columns and published.rows and other:
        raise UsageError(
            f"table={experiment.table}: its folds are {', '.join(published.columns)}, corpus {corpus.name} has {', '.join(corpus.folds)}; "
            "name the table of this corpus, or table=null"
        )
    methods = [(experiment.method_of(name), recipe) for name, recipe in experiment.recipes.items()]
    folds = [fold for fold in experiment.folds or corpus.folds if fold in corpus.folds]  # others are refused by the launch
    program.plugin(experiment.registry).registry.check_corpus(Path(corpus.folder), methods, dict.fromkeys(folds, ()))


def workplace(layout: Layout, corpus: Corpus, since: float, plugin: Plugin) -> Workplace:
    """What every task of an experiment gets. `since`: time of its launch."""
    return Workplace(
        registry=plugin.name,
        results=str(layout.root),
        experiment=layout.experiment,
        corpus=corpus.name,
        corpus_folder=corpus.folder,
        corpus_digest=corpus.digest,
        digest_of=plugin.digest_of,
        packages=(*plugin.registry.packages, *OWN_PACKAGES),
        launched=since,
    )
