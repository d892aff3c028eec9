"""A launch that differs from the last one of its name: what has changed, and what becomes of queued and running stages of before."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

import typer

from jobs.commands.console import note
from jobs.control.facts import InFlight, Phase
from jobs.experiment.config import SECRETS
from jobs.experiment.differences import new_stage_lines, setting_differences
from jobs.experiment.stored_config import resolved_values
from jobs.text import counted

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from jobs.commands.session import Session
    from jobs.control.controller import Report


class OldStages(Enum):
    """What a launch does with stages of earlier settings that are queued or running in Slurm."""

    ask = "ask"  # on a terminal; withdraw otherwise
    withdraw = "withdraw"
    keep = "keep"


@dataclass(frozen=True)
class Unneeded:
    """Stages in Slurm's queue that no run of the experiment needs with its settings of now."""

    queued: tuple[str, ...] = ()
    running: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = [f"{len(keys)} {state}" for keys, state in ((self.queued, "queued"), (self.running, "running")) if keys]
        stages = "stage" if len(self.queued) + len(self.running) == 1 else "stages"
        return f"{' and '.join(counts)} {stages} of earlier settings"


def old_stages(*, yes: bool, keep: bool) -> OldStages:
    """What the options `--yes` and `--keep-old` ask for."""
    return OldStages.keep if keep else OldStages.withdraw if yes else OldStages.ask


def difference_lines(session: Session) -> list[str]:
    """How the settings, the corpus and the code differ from those of the last launch; none if nothing does, or it is the first launch."""
    former, now = session.former, session.launched
    if former is None:
        return []
    found = [str(each) for each in setting_differences(former.values, resolved_values(now.experiment), secret=SECRETS)]
    if former.corpus.digest != now.corpus.digest:
        found.append(f"digest of corpus {now.corpus.name}: {former.corpus.digest[:12]} -> {now.corpus.digest[:12]}")
    if not found and former.graph is None:
        found.append("the code: it defines other stages for the same settings")
    if not found:
        return []
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(former.time))
    return [f"{session.name} differs from its last launch ({when}):", *(f"  {line}" for line in found)]


def new_lines(session: Session, report: Report) -> list[str]:
    """Which key makes the stages that the plan would submit new, beside those of the last launch."""
    former = session.former
    if former is None or former.graph is None:
        return []
    new = [key for batch in report.plan.batches for key in batch.keys] + list(report.plan.deferred)
    typed = [each.key for each in setting_differences({}, resolved_values(session.launched.experiment))]
    return new_stage_lines(former.graph, report.graph, new, typed)


def unneeded(in_flight: Mapping[str, InFlight], needed: Collection[str]) -> Unneeded:
    """Those of the stages in flight that are not needed. Pure."""
    over = {phase: tuple(key for key, each in in_flight.items() if each.phase is phase and key not in needed) for phase in Phase}
    return Unneeded(over[Phase.queued], over[Phase.running])


def unneeded_now(session: Session) -> Unneeded:
    """The stages in Slurm's queue that the launch does not need; none on this machine. Slurm is asked once."""
    if not session.on_slurm or session.former is None:
        return Unneeded()
    in_flight = session.arrays.look_only()
    if all(key in session.launched.graph.nodes for key in in_flight):
        return Unneeded()
    report = session.look()  # with the reserve seeds that fill slots now
    return unneeded(report.in_flight, report.graph.nodes)


def settle_old_stages(session: Session, choice: OldStages, confirm: Callable[[str], bool] | None = None) -> None:
    """Print what has changed since the last launch, and withdraw the stages that the experiment no longer needs, unless they are kept.

    A launch records that they are kept. `confirm`: asks the user; by default on a terminal only.
    """
    for line in difference_lines(session):
        note(line)
    old = unneeded_now(session)
    if not (old.queued or old.running):
        return
    asks = confirm if confirm is not None else _confirm if sys.stdin.isatty() else None
    if choice is OldStages.ask:
        withdraws = asks is None or asks(f"no longer needed: {old}. Withdraw them (running ones write a checkpoint)?")
        choice = OldStages.withdraw if withdraws else OldStages.keep
    if choice is OldStages.keep:
        note(f"kept: {old}, which the launch does not need")
        session.launched = replace(session.launched, keep_old=True)
        return
    done = session.arrays.withdraw((*old.queued, *old.running))
    left = [key for key in (*old.queued, *old.running) if key not in done]
    shared = f"; {counted(len(left), 'stage')} left in jobs that also compute stages that are needed" if left else ""
    note(f"withdrawn: {old}, which the launch does not need{shared}")


def _confirm(question: str) -> bool:
    return typer.confirm(question, default=True, err=True)
