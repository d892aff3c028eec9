"""One sweep in hand: what the command does with it, here or in an allocation of Slurm. It tells facts; jobs.commands.sweep prints them."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.errors import UsageError
from jobs.experiment.config import Cluster
from jobs.signals import Interrupts
from jobs.store.layout import Layout, valid_experiment_name
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

if TYPE_CHECKING:
    from jobs.experiment.registry import SweepRegistry
    from jobs.slurm.client import SlurmClient
    from jobs.store.records import Claim
    from jobs.sweeps.allocation import AllocationState
    from jobs.sweeps.preflight import Preview
    from jobs.sweeps.report.write import SweepReport


MAX_UNSEEN = 30  # looks in a row that Slurm did not answer, then nobody waits any more
LEAVE_SECONDS = 30.0  # after its job a shared folder may hide for so long how a sweep ended


@dataclass(frozen=True)
class Standing:
    """Where a sweep stands."""

    state: str  # running, waiting, complete, interrupted
    sentence: str
    job: str = ""  # of Slurm


@dataclass
class SweepLauncher:
    """What `sweep` does. `root` is the folder of the code that runs now."""

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
        """What launches it again."""
        file = self.sweep.config or self.name
        named = file if file == self.name else f"{file} name={self.name}"
        return f"python launch.py sweep {named}{' --cluster slurm' if self.on_slurm else ''}"

    @cached_property
    def client(self) -> SlurmClient:
        from jobs.slurm.client import SlurmClient

        return SlurmClient()

    # ---- looking

    def preview(self) -> Preview:
        """What a launch would do; touches nothing."""
        from jobs.sweeps.preflight import preview

        return preview(self.sweep, self.registry)

    def script(self) -> str:
        """What would be submitted."""
        from jobs.sweeps.allocation import preview

        return preview(self.sweep, self.root)

    @property
    def log(self) -> Path:
        """Of its jobs in Slurm."""
        from jobs.sweeps.allocation import log_file

        return log_file(self.sweep)

    def trials(self) -> tuple[TrialRecord, ...]:
        """As they are on record now."""
        return read_trials(self.sweep.folder)

    def nothing_left(self) -> bool:
        """Whether every trial came to its end in an earlier launch, and none failed; this is the last sweep launched then."""
        if not complete(self.sweep.folder) or driver_of(self.sweep.folder) is not None:
            return False
        trials = self.trials()
        if not trials or any(record.state not in (TrialState.complete, TrialState.stopped) for record in trials):
            return False
        store_latest(self.sweep)
        return True

    def report(self) -> SweepReport:
        """Write the report as it stands now."""
        from jobs.sweeps.report.write import write_report

        return write_report(self.sweep)

    def standing(self) -> Standing:
        """Who computes it now, and how far it is."""
        holder = driver_of(self.sweep.folder)
        if holder is not None and not self._ended_by_slurm(holder):
            return Standing("running", f"{self.name}: under way in {in_words(holder)}", holder.slurm_job)
        if complete(self.sweep.folder):
            return Standing("complete", f"{self.name}: every trial has ended")
        from jobs.errors import SlurmUnavailableError

        goes_on = f"`{self.command}` with the same settings goes on"
        if self.on_slurm:
            from jobs.sweeps.allocation import Phase

            try:
                found = self._allocation()
            except SlurmUnavailableError as error:
                return Standing("interrupted", f"{self.name}: nobody is at it as far as the files say, and Slurm cannot be asked ({error})")
            if found.phase is not Phase.none:
                return Standing("running" if found.phase is Phase.running else "waiting", f"{self.name}: {found.sentence}", found.job)
            goes_on = f"its log is {self.log}; {goes_on}"
        return Standing("interrupted", f"{self.name}: nobody is at it, and it is not at its end: {goes_on}")

    # ---- acting

    def run_here(self, *, tell: Callable[[str], None]) -> bool:
        """All of it on this machine, with a Ray of its own; False: it was interrupted. UsageError where somebody else is at it."""
        from jobs.store.snapshot import code_facts
        from jobs.worker.machine import capacity_here

        self._refuse_allocation()
        sweep, folder = replace(self.sweep, place=replace(self.sweep.place, code=code_facts(self.root))), self.sweep.folder
        with driving(folder) as turn:
            store_sweep(sweep)
            with Interrupts() as interrupts:
                from jobs.sweeps.driver import run_sweep
                from jobs.sweeps.ray.cluster import ray_here

                with ray_here(capacity_here(), self.root):
                    turn.complete = run_sweep(sweep, tell=tell, heard=lambda: interrupts.count > 0)
        return turn.complete

    def submit(self) -> tuple[str, bool]:
        """The job in Slurm that computes it, and whether it is a new one."""
        from jobs.store.snapshot import snapshot_facts, take_snapshot
        from jobs.sweeps.allocation import Phase, submit

        present = self._allocation()
        if present.phase is not Phase.none:
            return present.job, False
        holder = driver_of(self.sweep.folder)
        if holder is not None and not holder.slurm_job:
            raise UsageError(refusal(self.sweep.folder, holder))
        snapshot = take_snapshot(self.root, self.sweep.layout)
        place = replace(self.sweep.place, code=snapshot_facts(snapshot))
        sweep = replace(self.sweep, code=str(snapshot.path), place=place)
        store_sweep(sweep)
        return submit(sweep, snapshot.path, self.client), True

    def wait(self, *, tell: Callable[[Sequence[TrialRecord]], None], told: Callable[[str], None]) -> bool | None:
        """Watch its job to the end; True: every trial has ended. None: Ctrl-C, and the job goes on.

        `tell` is handed the records at every look, `told` what Slurm says of the job where that has changed. Raises SlurmUnavailableError
        where Slurm has not answered in `MAX_UNSEEN` looks one after another, UsageError where the job will never start, or has not come to
        its end in `policy.controller_days`.
        """
        from jobs.errors import SlurmUnavailableError
        from jobs.sweeps.allocation import Phase

        policy, unseen, said = self.sweep.experiment.policy, 0, ""
        pause, latest = policy.poll_seconds, time.monotonic() + 24 * 3600 * policy.controller_days
        try:
            while True:
                try:
                    found, unseen = self._allocation(), 0
                except SlurmUnavailableError:
                    unseen += 1
                    if unseen >= MAX_UNSEEN:
                        raise
                    time.sleep(pause)
                    continue
                tell(self.trials())
                if found.phase is Phase.none:
                    break
                if found.stuck or time.monotonic() > latest:
                    why = found.sentence if found.stuck else f"{found.sentence}; nobody waits for it any more"
                    raise UsageError(f"{self.name}: {why}; `sweep {self.name} --cancel` ends it")
                if found.sentence != said:
                    told(found.sentence)
                    said = found.sentence
                time.sleep(pause)
            end = time.monotonic() + LEAVE_SECONDS
            while not complete(self.sweep.folder) and driver_of(self.sweep.folder) and time.monotonic() < end:
                time.sleep(min(1.0, pause))
        except KeyboardInterrupt:
            return None
        tell(self.trials())
        return complete(self.sweep.folder)

    def cancel(self) -> list[str]:
        """End it: what is under way writes a checkpoint. Says what was done."""
        lines: list[str] = []
        if self.on_slurm:
            from jobs.sweeps.allocation import cancel

            lines.extend(f"{self.name}: job {job} is ended" for job in cancel(self.sweep, self.client))
        elif (holder := driver_of(self.sweep.folder)) is not None:
            ask_to_stop(self.sweep.folder)
            lines.append(f"{self.name}: {in_words(holder)} is asked to stop; stages under way write a checkpoint")
        return lines or [f"{self.name}: nothing to cancel, nobody is at it"]

    # ---- inside

    def _allocation(self) -> AllocationState:
        from jobs.sweeps.allocation import state

        return state(self.sweep, self.client)

    def _ended_by_slurm(self, holder: Claim) -> bool:
        """Whether the driver's job is known to be gone: it was killed, and could not say that it left."""
        from jobs.errors import SlurmUnavailableError
        from jobs.sweeps.allocation import Phase

        if not self.on_slurm or not holder.slurm_job:
            return False
        try:
            return self._allocation().phase is Phase.none
        except (SlurmUnavailableError, UsageError):
            return False

    def _refuse_allocation(self) -> None:
        """Its last launch may have been on Slurm, where its job still waits: nobody drives it yet, and soon somebody will."""
        from jobs.errors import SlurmUnavailableError

        if not self.sweep.folder.sweep.is_file() or not self.sweep.folder.submission.is_file():
            return
        from jobs.sweeps.allocation import Phase

        try:
            found = self._allocation()
        except (SlurmUnavailableError, UsageError):
            return  # no Slurm here: whoever computes it there says so by a sign of life
        if found.phase is not Phase.none:
            raise UsageError(f"{self.name}: this sweep is in Slurm: {found.sentence}; `sweep {self.name} --cancel` ends it")


def drive(sweep: Sweep, *, tell: Callable[[str], None]) -> bool:
    """Inside the Ray of an allocation: run a sweep, or go on with it, and write its report; False: it was interrupted."""
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
    """The sweep of an experiment that was launched last. UsageError where there was none."""
    if not valid_experiment_name(layout.experiment):
        raise UsageError(f"experiment {layout.experiment!r}: not a name that an experiment can have")
    found = latest_sweep(layout)
    if found is None:
        known = sorted(path.parents[1].name for path in layout.root.glob("*/sweep/latest"))
        near = difflib.get_close_matches(layout.experiment, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are sweeps of: {', '.join(known) or 'none'}"
        raise UsageError(f"experiment {layout.experiment!r}: no sweep was launched (nothing in {latest_file(layout).parent}); {hint}")
    return found
