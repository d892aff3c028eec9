"""Before a launch on Slurm: refuse one of which nothing can ever start, and name the stages that cannot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from jobs.commands.console import note
from jobs.errors import UsageError

if TYPE_CHECKING:
    from jobs.commands.session import Session
    from jobs.control.controller import Report
    from jobs.control.executor_protocol import Batch
    from jobs.experiment.graph import Graph


def impossible_lines(session: Session, seen: Report) -> list[str]:
    """One line for each kind of stages that are left to compute and can never start on Slurm, with the reason."""
    return _lines(session, session.arrays.impossible(seen.plan.batches))


def require_startable(session: Session, seen: Report) -> None:
    """UsageError if no stage that is left to compute can ever start on Slurm; a line on stderr for each kind if only some cannot.

    `seen`: the state before the launch. Nothing is refused while a stage is in the queue or running.
    """
    impossible = session.arrays.impossible(seen.plan.batches)
    if not impossible:
        return
    lines = _lines(session, impossible)
    if not (startable(seen.plan.batches, seen.graph, impossible) or seen.plan.waiting or session.arrays.in_flight()):
        raise UsageError(f"{session.name}: nothing is submitted: {lines[0]}")
    for line in lines:
        note(f"{session.name}: {line}")


def _lines(session: Session, impossible: Mapping[Batch, str]) -> list[str]:
    site = session.launched.experiment.site
    return [
        f"{batch.stage} {batch.method} can never start: {why}; change resources.{batch.stage} or the site profile `{site}`"
        for batch, why in {(batch.stage, batch.method, why): (batch, why) for batch, why in impossible.items()}.values()
    ]


def startable(batches: Sequence[Batch], graph: Graph, impossible: Mapping[Batch, str]) -> Iterable[str]:
    """Keys of a plan's stages that can start some time: neither they nor what is upstream of them is impossible. Pure."""
    hopeless: set[str] = set()
    for batch in batches:  # upstream batches come first
        for key in batch.keys:
            if batch in impossible or not hopeless.isdisjoint(graph.nodes[key].upstream.values()):
                hopeless.add(key)
    return [key for batch in batches for key in batch.keys if key not in hopeless]
