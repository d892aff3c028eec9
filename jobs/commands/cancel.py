"""`cancel`: record that runs, or the whole experiment, are cancelled, then cancel their jobs in Slurm."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jobs.commands.console import say
from jobs.control.facts import InFlight, Phase, needed_keys
from jobs.errors import SlurmUnavailableError, UsageError
from jobs.experiment.graph import with_upstream
from jobs.experiment.lookup import find_target
from jobs.store.cancellations import record_cancellation
from jobs.store.clock import file_time
from jobs.text import counted, listed

if TYPE_CHECKING:
    from jobs.commands.session import Session
    from jobs.control.controller import Report
    from jobs.experiment.graph import Run
    from jobs.experiment.launched import Launched


@dataclass(frozen=True)
class Cancellation:
    """What a `cancel` did."""

    stages: int | None  # recorded as cancelled; of a whole experiment: those without a result, None if its stages are not known
    withdrawn: int  # stages whose Slurm jobs were cancelled, pending or running
    running: tuple[str, ...] = ()  # processes on this machine that still compute one of the stages
    controllers: tuple[str, ...] = ()  # controller jobs that were cancelled


def print_cancellation(session: Session, runs: Sequence[str]) -> None:
    """Cancel runs, or the whole experiment if none is named, and print what was done."""
    done = cancel(session, runs)
    if runs and not done.stages:
        say(f"{session.name}: nothing to cancel, what was named has its result")
        return
    if not (done.stages is None or done.stages or done.withdrawn or done.controllers):
        say(f"{session.name}: nothing to cancel, every stage has its result")
        return
    if done.stages is None:
        what = "everything cancelled (its stored configuration cannot be read)"
    else:
        stages = counted(done.stages, "stage")
        what = f"{stages} cancelled" if runs else f"everything cancelled ({stages} had no result)"
    say(f"{session.name}: {what}{f'; {done.withdrawn} withdrawn from Slurm' if session.may_have_jobs else ''}")
    if done.controllers:
        say(f"controller ended (jobs {', '.join(done.controllers)})")
    if done.running:
        say(f"still computing a stage, whose result is kept: {listed(done.running)}; no other stage is started")
    say(f"{session.resume_command} resumes")


def cancel(session: Session, runs: Sequence[str], *, now: float | None = None) -> Cancellation:
    """Cancel some runs, or everything: first on record, then in Slurm. `now`: seconds since the epoch.

    Stages upstream of a run are cancelled only where no other run needs them. To cancel everything, the stages need not be known
    (jobs.experiment.launched.without_configuration).
    """
    if runs:
        session.require_same_code()
    if session.on_slurm:
        session.require_own()
    # Clocks of two machines differ: a cancellation is recorded as later than the launch that it cancels.
    layout, moment = session.launched.layout, max(session.launched.since, file_time(session.launched.layout.root) if now is None else now)
    seen = session.look(ask_slurm=False)
    targets = [find_target(seen.graph, run) for run in runs]
    keys = keys_to_cancel(seen, [target.node.key for target in targets]) if runs else None
    if keys is not None and not keys:
        return Cancellation(0, 0)  # every stage has its result
    reserves = _reserve_keys(session.launched, [target.run for target in targets if target.run and keys and target.node.key in keys])
    record_cancellation(layout, None if keys is None else keys | reserves, moment)
    over = [key for key in seen.graph.nodes if (keys is None or key in keys) and not seen.facts[key].done]
    stages = len(over) if seen.graph.nodes else None
    executed = tuple(dict.fromkeys(seen.facts[key].executed_by for key in over if seen.facts[key].executed_by))
    here = () if session.on_slurm else executed
    if not session.may_have_jobs:
        return Cancellation(stages, 0, here)
    try:
        if keys is None:
            controllers = session.chain.stop()
            return Cancellation(stages, len(session.arrays.cancel_all()), here, controllers)
        withdrawn = session.arrays.cancel(keys)
        running = whole_jobs(session.arrays.in_flight(), keys)
        session.client.cancel(tuple(running))
    except (SlurmUnavailableError, UsageError) as error:
        raise UsageError(f"cancelled on record, so nothing is submitted again; but {error}: `cancel` once more ends the jobs") from error
    return Cancellation(stages, len(withdrawn) + sum(map(len, running.values())), here)


def keys_to_cancel(seen: Report, chosen: Collection[str]) -> frozenset[str]:
    """The chosen stages without a result, and those upstream of them that no other run needs."""
    others = replace(seen.graph, runs=tuple(run for run in seen.graph.runs if run.key not in chosen))
    needed = set(needed_keys(others, seen.facts))

    def cancelled(key: str) -> bool:
        return (key in chosen or key not in needed) and not seen.facts[key].done

    return frozenset(filter(cancelled, with_upstream(seen.graph, chosen, cancelled)))


def whole_jobs(in_flight: Mapping[str, InFlight], keys: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Running jobs that compute only stages in `keys`, with the keys of each."""
    found: dict[str, list[str]] = {}
    for key, flight in in_flight.items():
        if flight.phase is Phase.running:
            found.setdefault(flight.job, []).append(key)
    return {job: tuple(held) for job, held in found.items() if all(key in keys for key in held)}


def _reserve_keys(launched: Launched, runs: Sequence[Run]) -> frozenset[str]:
    """Every run that could fill the slots of these: one of them may still be computed to its end, diverge, and must have no successor."""
    slots = {run.slot_id: launched.experiment.policy.max_seeds - 1 for run in runs}
    graph = launched.refill(slots) if slots else None
    every = (*graph.superseded, *graph.runs) if graph else ()
    return frozenset(run.key for run in every if run.slot_id in slots)
