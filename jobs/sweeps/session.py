"""The actions of the command `sweep` on one sweep, on this machine or in a Slurm allocation. jobs.commands.sweep prints the results."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.errors import SlurmUnavailableError, UsageError
from jobs.experiment.config import Cluster
from jobs.signals import Interrupts
from jobs.slurm.client import SlurmClient
from jobs.store.layout import Layout, valid_experiment_name
from jobs.store.snapshot import code_facts, snapshot_facts, take_snapshot
from jobs.sweeps import allocation
from jobs.sweeps.driver_lock import complete, driver_of, driving, in_words, refusal
from jobs.sweeps.records import (
    Sweep,
    TrialRecord,
    TrialState,
    ask_to_stop,
    latest_file,
    latest_sweep,
    read_trials,
    store_latest,
    store_sweep,
)
from jobs.text import did_you_mean
from jobs.worker.machine import capacity_here

if TYPE_CHECKING:
    from jobs.experiment.registry import SweepRegistry
    from jobs.store.records import Claim


MAX_UNANSWERED = 30  # polls in a row without an answer of Slurm, then `wait` gives up
LAG_SECONDS = 30.0  # after the end of the job a shared file system may hide the last state of the sweep for so long


@dataclass(frozen=True)
class SweepStatus:
    """The state of a sweep, with a sentence for the user."""

    state: str  # running, waiting, complete, interrupted
    sentence: str
    job: str = ""  # of Slurm


@dataclass
class SweepLauncher:
    """The actions of `sweep`. `root` is the folder of the running code."""

    sweep: Sweep
    registry: SweepRegistry
    root: Path

    @property
    def name(self) -> str:
        return self.sweep.layout.experiment

    @property
    def on_slurm(self) -> bool:
        return self.sweep.experiment.cluster is Cluster.slurm

    @property
    def command(self) -> str:
        """The command that resumes it."""
        file = self.sweep.file or self.name
        named = file if file == self.name else f"{file} name={self.name}"
        return f"python launch.py sweep {named}{' --cluster slurm' if self.on_slurm else ''}"

    @cached_property
    def client(self) -> SlurmClient:
        return SlurmClient()

    # ---- reading

    def nothing_left(self) -> bool:
        """Whether all trials ended in an earlier launch without failures; then it is recorded as the last sweep launched."""
        if not complete(self.sweep.folder) or driver_of(self.sweep.folder) is not None:
            return False
        trials = read_trials(self.sweep.folder)
        if not trials or any(record.state not in (TrialState.complete, TrialState.stopped) for record in trials):
            return False
        store_latest(self.sweep)
        return True

    def status(self) -> SweepStatus:
        """Whether the sweep is running, waiting in the queue, complete or interrupted, and where."""
        holder = driver_of(self.sweep.folder)
        if holder is not None and not self._ended_by_slurm(holder):
            return SweepStatus("running", f"{self.name}: under way in {in_words(holder)}", holder.slurm_job)
        if complete(self.sweep.folder):
            return SweepStatus("complete", f"{self.name}: every trial has ended")
        resume = f"`{self.command}` with the same settings goes on"
        if self.on_slurm:
            try:
                found = self._allocation()
            except SlurmUnavailableError as error:
                unknown = f"{self.name}: no driver is running as far as files show; Slurm is not available ({error})"
                return SweepStatus("interrupted", unknown)
            if found.phase is not allocation.Phase.none:
                state = "running" if found.phase is allocation.Phase.running else "waiting"
                return SweepStatus(state, f"{self.name}: {found.sentence}", found.job)
            resume = f"its log is {allocation.log_file(self.sweep)}; {resume}"
        return SweepStatus("interrupted", f"{self.name}: interrupted, no driver is running: {resume}")

    # ---- acting

    def run_here(self, *, tell: Callable[[str], None]) -> bool:
        """Run the sweep on this machine, with its own Ray; False: it was interrupted. UsageError if another process runs it."""
        self._refuse_allocation()
        sweep, folder = replace(self.sweep, place=replace(self.sweep.place, code=code_facts(self.root))), self.sweep.folder
        with driving(folder) as turn:
            store_sweep(sweep)
            with Interrupts() as interrupts:  # a signal while Ray starts or ends must not cut it short
                from jobs.sweeps.driver import run_sweep
                from jobs.sweeps.ray.cluster import ray_here

                with ray_here(capacity_here(), self.root):
                    turn.complete = run_sweep(sweep, tell=tell, heard=lambda: interrupts.count > 0)
        return turn.complete

    def submit(self) -> tuple[str, bool]:
        """The Slurm job of the sweep, and whether it was submitted by this call."""
        present = self._allocation()
        if present.phase is not allocation.Phase.none:
            return present.job, False
        holder = driver_of(self.sweep.folder)
        if holder is not None and not holder.slurm_job:
            raise UsageError(refusal(self.sweep.folder, holder))
        snapshot = take_snapshot(self.root, self.sweep.layout)
        place = replace(self.sweep.place, code=snapshot_facts(snapshot))
        sweep = replace(self.sweep, code=str(snapshot.path), place=place)
        store_sweep(sweep)
        return allocation.submit(sweep, snapshot.path, self.client), True

    def wait(self, *, on_trials: Callable[[Sequence[TrialRecord]], None], on_state: Callable[[str], None]) -> bool | None:
        """Wait for the end of its job; True: every trial has ended. None: Ctrl-C, and the job keeps running.

        `on_trials` gets the records at every poll, `on_state` the state of the job when it changes. Raises SlurmUnavailableError after
        `MAX_UNANSWERED` polls without an answer, UsageError if the job will never start or runs longer than `policy.controller_days`.
        """
        policy, unanswered, last = self.sweep.experiment.policy, 0, ""
        pause, latest = policy.poll_seconds, time.monotonic() + 24 * 3600 * policy.controller_days
        try:
            while True:
                try:
                    found, unanswered = self._allocation(), 0
                except SlurmUnavailableError:
                    unanswered += 1
                    if unanswered >= MAX_UNANSWERED:
                        raise
                    time.sleep(pause)
                    continue
                on_trials(read_trials(self.sweep.folder))
                if found.phase is allocation.Phase.none:
                    break
                if found.stuck or time.monotonic() > latest:
                    why = found.sentence if found.stuck else f"{found.sentence}; stopped waiting for it"
                    raise UsageError(f"{self.name}: {why}; `sweep {self.name} --cancel` ends it")
                if found.sentence != last:
                    on_state(found.sentence)
                    last = found.sentence
                time.sleep(pause)
            end = time.monotonic() + LAG_SECONDS
            while not complete(self.sweep.folder) and driver_of(self.sweep.folder) and time.monotonic() < end:
                time.sleep(min(1.0, pause))
        except KeyboardInterrupt:
            return None
        on_trials(read_trials(self.sweep.folder))
        return complete(self.sweep.folder)

    def cancel(self) -> list[str]:
        """Stop it: running stages write a checkpoint. Returns lines for the user."""
        lines: list[str] = []
        if self.on_slurm:
            lines.extend(f"{self.name}: job {job} is ended" for job in allocation.cancel(self.sweep, self.client))
        elif (holder := driver_of(self.sweep.folder)) is not None:
            ask_to_stop(self.sweep.folder)
            lines.append(f"{self.name}: {in_words(holder)} is asked to stop; stages under way write a checkpoint")
        return lines or [f"{self.name}: nothing to cancel, it is not running"]

    # ---- inside

    def _allocation(self) -> allocation.AllocationState:
        return allocation.state(self.sweep, self.client)

    def _ended_by_slurm(self, holder: Claim) -> bool:
        """Whether the driver's job is known to be gone: it was killed before it could release the lock."""
        if not self.on_slurm or not holder.slurm_job:
            return False
        try:
            return self._allocation().phase is allocation.Phase.none
        except (SlurmUnavailableError, UsageError):
            return False

    def _refuse_allocation(self) -> None:
        """UsageError if its Slurm job from an earlier launch is still pending: its driver would start later."""
        if not self.sweep.folder.sweep.is_file() or not self.sweep.folder.submission.is_file():
            return
        try:
            found = self._allocation()
        except (SlurmUnavailableError, UsageError):
            return  # no Slurm here; a driver in Slurm has a heartbeat
        if found.phase is not allocation.Phase.none:
            raise UsageError(f"{self.name}: this sweep is in Slurm: {found.sentence}; `sweep {self.name} --cancel` ends it")


def drive(sweep: Sweep, *, tell: Callable[[str], None]) -> bool:
    """Inside the Ray of an allocation: start or resume a sweep, and write its report; False: it was interrupted."""
    from jobs.sweeps.driver import run_sweep
    from jobs.sweeps.ray.cluster import ray_joined
    from jobs.sweeps.report.write import write_report

    with driving(sweep.folder, allocated=True) as turn:
        with Interrupts() as interrupts, ray_joined():
            turn.complete = run_sweep(sweep, tell=tell, heard=lambda: interrupts.count > 0)
        for path in write_report(sweep).paths:
            tell(str(path))
    return turn.complete


def reopen(layout: Layout) -> Sweep:
    """The sweep of an experiment that was launched last. UsageError if there is none."""
    if not valid_experiment_name(layout.experiment):
        raise UsageError(f"experiment {layout.experiment!r}: not a name that an experiment can have")
    found = latest_sweep(layout)
    if found is None:
        known = sorted(path.parents[1].name for path in layout.root.glob("*/sweep/latest"))
        hint = did_you_mean(layout.experiment, known, otherwise=f"there are sweeps of: {', '.join(known) or 'none'}")
        raise UsageError(f"experiment {layout.experiment!r}: no sweep was launched (nothing in {latest_file(layout).parent}); {hint}")
    return found
