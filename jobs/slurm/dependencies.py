"""Which element waits for which: dependencies between arrays of different shapes, element by element. Pure.

An array is submitted once, with one dependency for all its elements. Where elements wait for different things (fine-tunings of five
folds wait for five upstream elements), the array is submitted waiting for all of them, and each group of elements with the same
upstream set is then told to wait for that set alone. Should the second step fail, elements start later than they could, and never
too early. Where element i waits for element i of other arrays, Slurm's own `aftercorr` says so at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jobs.control.executor_protocol import Batch
from jobs.control.facts import InFlight
from jobs.experiment.graph import Graph

SLURM_JOB = re.compile(r"[0-9]+(?:_[0-9]+)?")


@dataclass(frozen=True)
class Dependency:
    """What a batch waits for."""

    initial: str = ""  # for `--dependency` of the whole array; "": nothing
    refined: tuple[tuple[tuple[int, ...], str], ...] = ()  # (indices, their own dependency; "": nothing)


def upstream_jobs(batch: Batch, graph: Graph, upstream: Mapping[str, InFlight]) -> tuple[frozenset[str], ...]:
    """For each task the jobs that hold its upstream stages (of stages that are done there is none)."""
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
    arrays = [{job.partition("_")[0] for job in jobs} for jobs in waits]
    corresponding = all(
        jobs and len(of) == len(jobs) and of == arrays[0] and all(job == f"{job.partition('_')[0]}_{index}" for job in jobs)
        for index, (jobs, of) in enumerate(zip(waits, arrays, strict=True))
    )
    if corresponding:
        own = ",".join(f"aftercorr:{array}" for array in _in_order(arrays[0]))
        # Said twice: beside `singleton`, which the first request carries, elements wait for the whole upstream array (seen on Slurm 22.05).
        return Dependency(own, ((tuple(range(len(waits))), own),))
    groups = tuple((tuple(index for index, jobs in enumerate(waits) if jobs == chosen), _after_ok(chosen)) for chosen in sets)
    return Dependency(_after_ok(frozenset().union(*waits)), groups)


def with_singleton(dependency: str) -> str:
    """The same, and only one array of this name at a time: should a lost one turn up, it and its double never run together."""
    return ",".join(filter(None, (dependency, "singleton")))


def _after_ok(jobs: Iterable[str]) -> str:
    ordered = _in_order(jobs)
    return f"afterok:{':'.join(ordered)}" if ordered else ""


def _in_order(jobs: Iterable[str]) -> list[str]:
    return sorted(jobs, key=lambda job: [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", job)])
