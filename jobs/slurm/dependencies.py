"""Dependencies between arrays of different shapes, per element. Pure.

An array is submitted once, with one dependency for all its elements. Where elements wait for different jobs (the fine-tunings of five folds
wait for five upstream elements), the array is submitted waiting for all of them, and `scontrol update` then reduces the dependency of each
group of elements with the same upstream jobs. If that second step fails, elements start later than they could, and never too early. Where
element i waits for element i of other arrays, Slurm's `aftercorr` expresses it directly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jobs.control.executor_protocol import Batch
from jobs.control.facts import InFlight
from jobs.experiment.graph import Graph
from jobs.slurm.parse import JobRef

SLURM_JOB = re.compile(r"[0-9]+(?:_[0-9]+)?")


@dataclass(frozen=True)
class Dependency:
    """What a batch waits for."""

    initial: str = ""  # for `--dependency` of the whole array; "": nothing
    refined: tuple[tuple[tuple[int, ...], str], ...] = ()  # (indices, their own dependency; "": nothing)


def upstream_jobs(batch: Batch, graph: Graph, upstream: Mapping[str, InFlight]) -> tuple[frozenset[str], ...]:
    """For each task the jobs that compute its upstream stages; a stage that is done has none."""
    found: list[frozenset[str]] = []
    for task in batch.tasks:
        parents = {parent for key in task.keys for parent in graph.nodes[key].upstream.values()} - set(task.keys)
        found.append(frozenset(upstream[parent].job for parent in parents if parent in upstream))
    return tuple(found)


def make_dependency(waits: tuple[frozenset[str], ...]) -> Dependency:
    """The dependency of an array whose element i waits for the jobs `waits[i]` (`JOB` or `ARRAY_INDEX`)."""
    sets = dict.fromkeys(waits)
    if len(sets) <= 1:
        return Dependency(_after_ok(waits[0]) if waits else "")
    arrays = {JobRef.parse(job).array for job in waits[0]}
    if arrays and all(jobs == {str(JobRef(array, index)) for array in arrays} for index, jobs in enumerate(waits)):
        own = ",".join(f"aftercorr:{array}" for array in _in_order(arrays))
        # Also refined: beside `singleton`, which is part of the first request, elements wait for the whole upstream array (Slurm 22.05).
        return Dependency(own, ((tuple(range(len(waits))), own),))
    groups = tuple((tuple(index for index, jobs in enumerate(waits) if jobs == chosen), _after_ok(chosen)) for chosen in sets)
    return Dependency(_after_ok(frozenset().union(*waits)), groups)


def with_singleton(dependency: str) -> str:
    """The same plus `singleton`: arrays with the same name (a submission taken for lost, and its repetition) run one at a time."""
    return ",".join(filter(None, (dependency, "singleton")))


def _after_ok(jobs: Iterable[str]) -> str:
    ordered = _in_order(jobs)
    return f"afterok:{':'.join(ordered)}" if ordered else ""


def _in_order(jobs: Iterable[str]) -> list[str]:
    return sorted(jobs, key=lambda job: JobRef.parse(job).order)
