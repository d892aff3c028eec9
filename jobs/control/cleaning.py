"""Which files of a results folder can be removed: from the stages in the store and what each experiment needs. Pure.

Three kinds, each a function: what attempts without a result left behind, results that no experiment needs, and a whole experiment. A stage
that a process works on, that is in a queue, or that a pass may still continue is in none of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jobs.control.facts import StageFacts
from jobs.experiment.graph import Graph, Run
from jobs.store.layout import Layout
from jobs.store.usage import Size, StoredStage

UNNEEDED = "no experiment needs it"
NOT_BEST = "of a run that is not the best of its cell"
BEST_SLOT = "best_slot"
LOGS = Layout(Path(), "_").logs.name


@dataclass(frozen=True)
class Owner:
    """An experiment, or a sweep of one, and the stages it has a claim to."""

    experiment: str
    folder: str  # below the results folder: EXPERIMENT, or EXPERIMENT/sweep/DIGEST
    needs: Mapping[str, str] = field(default_factory=dict)  # key -> "" or why nothing continues the stage: given up, diverged, cancelled
    in_flight: frozenset[str] = frozenset()  # keys that are queued or running
    unknown: str = ""  # why its stages are not known; "": they are
    with_computed: bool = False  # it needs all that it has computed, besides `needs`
    models: Mapping[str, bool] = field(default_factory=dict)  # key -> whether it wants the model of a run that it asked to keep

    def has_computed(self, stage: StoredStage) -> bool:
        """Whether an attempt of the stage wrote its log into the folder of this experiment."""
        return bool(self.logs_of(stage))

    def may_need(self, stage: StoredStage) -> bool:
        """Whether the stage must stay for this experiment. If its stages are not known, it needs what it has computed, at least."""
        if stage.key in self.needs or stage.key in self.in_flight:
            return True
        return (self.with_computed or bool(self.unknown)) and self.has_computed(stage)

    def logs_of(self, stage: StoredStage) -> tuple[str, ...]:
        """Logs of the stage in the folder of this experiment, as paths below the results folder, which may have been moved since."""
        logs = f"{self.folder}/{LOGS}/"
        return tuple(logs + log.rpartition(f"/{logs}")[2] for log in stage.logs if f"/{logs}" in log)


@dataclass(frozen=True)
class Removal:
    """A file or folder to be removed."""

    path: Path
    size: Size
    why: str


def end_of(facts: StageFacts) -> str:
    """Why no pass continues a stage without a result; "" if one may."""
    if facts.diverged:
        return "diverged"
    if facts.cancelled:
        return "cancelled"
    return "given up" if facts.stopped else ""


def leftovers(stages: Iterable[StoredStage], owners: Sequence[Owner], *, before: float, experiment: str = "") -> tuple[Removal, ...]:
    """Checkpoints and outputs of attempts that belong to no result, of stages that nothing continues.

    `before`: only of stages without a sign of life since (seconds since the epoch); `experiment`: only of its stages, "": of all.
    Records of attempts stay: a stage that diverged is never computed again under its seed.
    """
    own = {key for owner in owners if owner.experiment == experiment for key in owner.needs}
    found: list[Removal] = []
    for stage in stages:
        if stage.alive or stage.touched > before or (experiment and stage.key not in own):
            continue
        why = "of other attempts than that of the result" if stage.finished else _why_over(stage, owners)
        if why and not any(stage.key in owner.in_flight for owner in owners):
            found.extend(Removal(path, size, why) for path, size in stage.left)
    return tuple(found)


def models_of(graph: Graph, facts: Mapping[str, StageFacts]) -> dict[str, bool]:
    """Which models an experiment wants, of the runs that keep theirs: key -> whether it does.

    `keep` in the runtime of a stage: `all` keeps the model of every run; `best_slot` that of the run with the best score of each cell, once
    all runs of the cell have a result, and until then all of them. Of equal scores the first slot counts.
    """
    found: dict[str, bool] = {}
    cells: dict[tuple[str, str], list[Run]] = {}
    for run in (*graph.superseded, *graph.runs):
        keep = graph.nodes[run.key].runtime.get("keep")
        if keep is None:
            continue
        found[run.key] = True
        if keep == BEST_SLOT:
            cells.setdefault((run.method, run.fold), []).append(run)
    present = {run.key for run in graph.runs}
    for runs in cells.values():
        filling = [run for run in runs if run.key in present]
        scores = {run.key: score for run in filling if facts[run.key].done and (score := facts[run.key].ua) is not None}
        if filling and len(scores) == len(filling):
            best = max(filling, key=lambda run: (scores[run.key] if graph.score.higher_is_better else -scores[run.key], -run.slot))
            found |= {run.key: run.key == best.key for run in runs}
    return found


def unwanted_models(stages: Iterable[StoredStage], owners: Sequence[Owner], *, before: float, experiment: str = "") -> tuple[Removal, ...]:
    """Models that an experiment asked to keep and no experiment wants any more; arguments as for `leftovers`.

    None as long as the stages of an experiment are not known.
    """
    if any(owner.unknown for owner in owners):
        return ()
    wanted = {key for owner in owners for key, wants in owner.models.items() if wants}
    given_up = {key for owner in owners if experiment in ("", owner.experiment) for key, wants in owner.models.items() if not wants}
    return tuple(
        Removal(*stage.model, NOT_BEST)
        for stage in stages
        if stage.model and stage.key in given_up - wanted and not stage.alive and stage.touched <= before
    )


def unneeded(stages: Iterable[StoredStage], owners: Sequence[Owner], *, before: float) -> tuple[Removal, ...]:
    """Stages that no experiment needs; none as long as the stages of an experiment are not known. `before`: as for `leftovers`."""
    if any(owner.unknown for owner in owners):
        return ()
    return tuple(
        Removal(stage.path, stage.size, UNNEEDED)
        for stage in stages
        if not stage.alive and stage.touched <= before and not any(owner.may_need(stage) for owner in owners)
    )


def only_of(experiment: str, stages: Iterable[StoredStage], owners: Sequence[Owner]) -> tuple[StoredStage, ...]:
    """Stages that an experiment needs or has computed, and that no other one needs. None is in flight or being computed."""
    own, others = _split(experiment, owners)
    return tuple(
        stage
        for stage in stages
        if any(owner.may_need(stage) or owner.has_computed(stage) for owner in own)
        and not (stage.alive or any(owner.may_need(stage) for owner in others))
    )


def kept_logs(experiment: str, stages: Iterable[StoredStage], removed: Iterable[StoredStage], owners: Sequence[Owner]) -> frozenset[str]:
    """Logs in an experiment's folder of stages that stay in the store, below the results folder: they outlive the experiment."""
    own, _ = _split(experiment, owners)
    gone = {stage.key for stage in removed}
    return frozenset(log for stage in stages if stage.key not in gone for owner in own for log in owner.logs_of(stage))


def _why_over(stage: StoredStage, owners: Sequence[Owner]) -> str:
    """Why nothing continues a stage without a result; "" if something may."""
    needing = [owner for owner in owners if owner.may_need(stage)]
    if not needing:
        return "" if any(owner.unknown for owner in owners) else UNNEEDED
    reasons = [owner.needs.get(stage.key, "") for owner in needing]
    return reasons[0] if all(reasons) else ""


def _split(experiment: str, owners: Sequence[Owner]) -> tuple[list[Owner], list[Owner]]:
    own = [owner for owner in owners if owner.experiment == experiment]
    return own, [owner for owner in owners if owner.experiment != experiment]
