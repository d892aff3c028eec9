"""Which experiments a results folder holds, and which stages of the store each of them, and each of its sweeps, needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.control.cleaning import Owner, end_of, models_of
from jobs.control.controller import read_facts
from jobs.control.observe import PassContext
from jobs.errors import SlurmUnavailableError, UsageError
from jobs.slurm.chain import chain_jobs, link_name
from jobs.slurm.submissions import SubmissionBook
from jobs.store.cancellations import read_cancellations
from jobs.store.layout import Layout, valid_experiment_name
from jobs.text import counted, did_you_mean

if TYPE_CHECKING:
    from jobs.commands.session import Session
    from jobs.sweeps.records import Sweep


@dataclass(frozen=True)
class Opening:
    """How the records of a results folder are opened: `grid` an experiment by name, `sweep` one of its sweeps by digest."""

    grid: Callable[[str], Session]
    sweep: Callable[[str, str], Sweep]


@dataclass(frozen=True)
class Launch:
    """The last launch of an experiment, for a list."""

    experiment: str
    launched: float = 0.0  # seconds since the epoch
    cluster: str = ""
    done: int = 0  # runs with a result
    runs: int = 0
    sweeps: int = 0
    unknown: str = ""  # why its stages are not known; "": they are


@dataclass(frozen=True)
class Experiments:
    """All experiments of a results folder."""

    launches: tuple[Launch, ...]
    owners: tuple[Owner, ...]  # of the stages: a grid and each sweep

    def require_known(self, act: str) -> None:
        """UsageError if the stages of one of them are not known: what it shares with others cannot be told. `act`: what is refused."""
        for owner in self.owners:
            if owner.unknown:
                raise UsageError(f"{owner.experiment}: its stages are not known ({owner.unknown}): {act} could remove what it needs")


def read_experiments(root: Path, opening: Opening) -> Experiments:
    """Every experiment below a results folder, its sweeps, and what each needs. Slurm is asked where jobs may be in its queue."""
    launches: list[Launch] = []
    owners: list[Owner] = []
    for name in experiment_names(root):
        layout = Layout(root, name)
        digests = sorted(path.parent.name for path in layout.sweep.glob("*/experiment.json"))
        launch = Launch(name, sweeps=len(digests))
        if layout.experiment_file.is_file():
            launch, owner = _grid(layout, opening, launch)
            owners.append(owner)
        owners.extend(_sweep(layout, digest, opening) for digest in digests)
        launches.append(launch)
    return Experiments(tuple(launches), tuple(owners))


def experiment_names(root: Path) -> tuple[str, ...]:
    """Names of the experiments of a results folder, also of those of which only a sweep was launched."""
    found = {path.parent.name for path in root.glob("*/experiment.json")} | {path.parents[1].name for path in root.glob("*/sweep/latest")}
    return tuple(sorted(filter(valid_experiment_name, found)))


def require_experiment(root: Path, name: str) -> Layout:
    """Layout of an experiment. UsageError if there is none of that name."""
    known = experiment_names(root)
    if name not in known:
        hint = did_you_mean(name, known, otherwise=f"there are {', '.join(known) or 'none'}")
        raise UsageError(f"experiment {name!r}: nothing of that name in {root}; {hint}")
    return Layout(root, name)


def why_busy(layout: Layout, owners: Sequence[Owner], opening: Opening) -> str:
    """Why an experiment must not be removed now; "" if it may: nothing of it is in a queue, running, or about to be submitted."""
    from jobs.sweeps.driver_lock import driver_of, in_words

    flying = {key for owner in owners if owner.experiment == layout.experiment for key in owner.in_flight}
    if flying:
        return f"{counted(len(flying), 'stage')} in the queue or running"
    layouts = [layout, *(Layout(layout.root, f"{layout.experiment}/sweep/{path.parent.name}") for path in layout.sweep.glob("*/driver"))]
    for each in layouts[1:]:
        if (holder := driver_of(each.folder)) is not None:
            return f"a sweep is under way in {in_words(holder)}"
    if not any(each.submissions.is_dir() for each in layouts):
        return ""
    try:
        client = opening.grid(layout.experiment).client
        for each in layouts:
            links = chain_jobs(link_name(each), client.queue(name=link_name(each), patient=False))
            if any(links):
                return f"its controller is in Slurm's queue (job {next(job for jobs in links for job in jobs)})"
    except (SlurmUnavailableError, UsageError) as error:
        return f"what is in Slurm's queue is not known ({error})"
    return ""


def _grid(layout: Layout, opening: Opening, launch: Launch) -> tuple[Launch, Owner]:
    owner = Owner(layout.experiment, layout.experiment)
    try:
        session = opening.grid(layout.experiment)
    except UsageError as error:
        return replace(launch, unknown=str(error)), replace(owner, in_flight=_submitted(layout), unknown=str(error))
    launched = session.launched
    launch = replace(launch, launched=launched.since, cluster=launched.experiment.cluster.name)
    if launched.changed:
        why = "the code defines other stages now than when it was launched"
        return replace(launch, unknown=why), replace(owner, in_flight=_submitted(layout), unknown=why)
    report = session.look()
    needs = {key: end_of(report.facts[key]) for key in report.graph.nodes}
    elsewhere = _submitted(layout) if session.other_user or not session.on_slurm else frozenset()
    executed = {key for key, fact in report.facts.items() if fact.awaited}
    launch = replace(launch, done=sum(report.facts[run.key].done for run in report.graph.runs), runs=len(report.graph.runs))
    return launch, replace(
        owner, needs=needs, in_flight=frozenset((*report.in_flight, *executed)) | elsewhere, models=models_of(report.graph, report.facts)
    )


def _sweep(layout: Layout, digest: str, opening: Opening) -> Owner:
    """A sweep needs every stage that its points may have, as its search is not replayed, and what it has computed with reserve seeds."""
    from jobs.sweeps.records import sweep_layout
    from jobs.sweeps.stages import every_stage

    own = sweep_layout(layout, digest)
    owner = Owner(layout.experiment, own.experiment, in_flight=_submitted(own), with_computed=True)
    try:
        sweep = opening.sweep(layout.experiment, digest)
        graph = every_stage(sweep)
    except UsageError as error:
        return replace(owner, unknown=str(error))
    cancelled = read_cancellations(own, sweep.launched)
    policy = sweep.experiment.policy
    context = PassContext(sweep.launched, policy.max_attempts, cancelled=cancelled, experiment=own.experiment)
    facts = read_facts(graph, own, context)
    executed = {key for key, fact in facts.items() if fact.awaited}
    return replace(owner, needs={key: end_of(facts[key]) for key in graph.nodes}, in_flight=owner.in_flight | executed)


def _submitted(layout: Layout) -> frozenset[str]:
    """Keys of submissions that are not known to have ended."""
    return frozenset(key for record in SubmissionBook(layout).open() for keys in record.tasks for key in keys)
