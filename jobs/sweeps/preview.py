"""What a sweep would do, found without doing it: points, folds, how many stages of each kind are needed and there, the hours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.config import Experiment, resources_of
from jobs.experiment import Corpus
from jobs.forecast import Source, sibling_seconds
from jobs.graph import Graph, Node
from jobs.layout import Layout
from jobs.observe import read_facts
from jobs.plan import NodeFacts
from jobs.stages import SweepRegistry
from jobs.sweeps.records import Sweep
from jobs.sweeps.settings import Search, Stopping
from jobs.sweeps.space import Point, Space, grid_points, random_points
from jobs.sweeps.trial import fold_graph

SHOWN = 64  # points listed one by one


@dataclass(frozen=True)
class StageCount:
    """Stages of one name, and what those that are not there would take if every point were evaluated to its end."""

    stage: str
    needed: int
    there: int
    gpu_hours: float
    cpu_hours: float
    source: Source

    @property
    def missing(self) -> int:
        return self.needed - self.there


@dataclass(frozen=True)
class Preview:
    """What a sweep would try and need."""

    points: tuple[Point, ...]
    stand_in: bool  # the search chooses as it goes, and these were drawn at random in place of its points
    stages: tuple[StageCount, ...]  # in the order of computing

    @property
    def gpu_hours(self) -> float:
        return sum(each.gpu_hours for each in self.stages)

    @property
    def cpu_hours(self) -> float:
        return sum(each.cpu_hours for each in self.stages)


def points_of(experiment: Experiment, space: Space) -> tuple[Point, ...]:
    """The points that a sweep tries; of a search that chooses as it goes, as many drawn at random."""
    if experiment.sweep.search is Search.grid:
        return grid_points(space)
    return random_points(space, experiment.sweep.trials, experiment.sweep.seed)


def preview(sweep: Sweep, registry: SweepRegistry) -> Preview:
    """Reads results, writes nothing."""
    points = points_of(sweep.experiment, sweep.space)
    nodes: dict[str, Node] = {}
    for point in points:
        for fold in sweep.folds:
            nodes |= fold_graph(sweep.experiment, sweep.corpus, point, fold, sweep.validation[fold], registry).nodes
    return Preview(points, sweep.experiment.sweep.search is Search.optuna, _counts(sweep.experiment, sweep.corpus, sweep.layout, nodes))


def preview_lines(sweep: Sweep, found: Preview) -> list[str]:
    """For a terminal or a pipe."""
    asked, lines = sweep.experiment.sweep, []
    kind = {Search.grid: "every one of them", Search.random: "drawn at random", Search.optuna: "chosen by Optuna as it goes"}[asked.search]
    lines.append(f"{sweep.layout.experiment}: sweep {sweep.digest}: {_many(len(found.points), 'point')}, {kind}; {_stopping(sweep)}")
    if not found.stand_in:
        lines.extend(f"  {point.label}" for point in found.points[:SHOWN])
        lines.extend([f"  and {len(found.points) - SHOWN} more"] if len(found.points) > SHOWN else [])
    lines.append(
        f"{_many(len(sweep.folds), 'fold')}, {_many(asked.seeds, 'fine-tuning')} each; no stage opens a recording of the held-out fold"
    )
    lines.extend(f"  fold {fold} held out: scored on {', '.join(sweep.validation[fold])}" for fold in sweep.folds)
    lines.append("stages" + (f", counted for {len(found.points)} points drawn at random in place of Optuna's" if found.stand_in else ""))
    for each in found.stages:
        cost = f": {_hours(each.gpu_hours, each.cpu_hours)} ({each.source.value})" if each.missing else ""
        lines.append(f"  {each.stage}: {each.needed} needed, {each.there} there, {each.missing} to compute{cost}")
    lines.append(
        f"in all {sum(each.missing for each in found.stages)} stages to compute, at most about {_hours(found.gpu_hours, found.cpu_hours)}"
    )
    return lines


def _counts(experiment: Experiment, corpus: Corpus, layout: Layout, nodes: Mapping[str, Node]) -> tuple[StageCount, ...]:
    graph = Graph(nodes, (), corpus.name, corpus.digest, dict.fromkeys(nodes, ()))
    facts = read_facts(graph, layout)
    seconds = sibling_seconds(graph, facts)
    by_stage: dict[str, list[NodeFacts]] = {}
    for key, node in nodes.items():
        by_stage.setdefault(node.stage, []).append(facts[key])
    return tuple(_count(experiment, stage, found, seconds.get((stage, ""))) for stage, found in by_stage.items())


def _count(experiment: Experiment, stage: str, facts: Sequence[NodeFacts], measured: float | None) -> StageCount:
    given, there = resources_of(experiment, stage), sum(fact.done for fact in facts)
    seconds = given.minutes * 60.0 if measured is None else measured
    hours = seconds * (len(facts) - there) / 3600
    source = Source.requested if measured is None else Source.siblings
    return StageCount(stage, len(facts), there, hours * given.gpus, hours * given.cpus, source)


def _stopping(sweep: Sweep) -> str:
    asked = sweep.experiment.sweep
    if asked.stopping is Stopping.none or len(sweep.folds) <= asked.grace_folds:
        return "none is stopped early"
    rungs = [asked.grace_folds]
    while rungs[-1] * asked.reduction < len(sweep.folds):
        rungs.append(rungs[-1] * asked.reduction)
    when = " and ".join(filter(None, (", ".join(map(str, rungs[:-1])), str(rungs[-1]))))
    return f"after {when} of {len(sweep.folds)} folds one point in {asked.reduction} goes on (ASHA)"


def _hours(gpu: float, cpu: float) -> str:
    return f"{gpu:.1f} GPU-hours and {cpu:.1f} CPU-hours"


def _many(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
