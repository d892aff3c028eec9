"""The controller chain: small Slurm jobs (links), each of which makes one pass of the controller, so that no user has to stay logged in.

    launch --> link 1   link 2        same job name, --dependency=singleton, --begin at now + 1 and 2 x policy.poll_minutes
                  |        |
                pass     pass         a link first submits what is missing of two successors, then makes its pass (jobs.slurm.chain_link)
                  |        |
               link 3   link 4

No process waits between passes. The job name follows from the experiment and the results folder, and squeue finds the links by it, so no
record is needed. `Chain.ensure` restores the state of two pending links, however often and from however many processes it is called. A link
may be killed at any point: its successors repeat the pass, which is idempotent. A link that cannot run on its node submits itself again
(slurm_templates/controller.sh.j2).
Links are submitted without an intent: a superfluous pending link is cancelled by the next call and never runs beside another one.
`EXPERIMENT/controller.json` is for display. Only two of its entries have an effect: the count of failed passes, and that the user stopped
the chain.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from functools import cached_property
from pathlib import Path

from jobs.errors import UsageError
from jobs.experiment.config import Experiment
from jobs.slurm.client import SlurmClient
from jobs.slurm.parse import WAITING_STATES, QueuedElement, Refusal, describe_pending, why_stuck
from jobs.slurm.script import LinkJob, launcher_python, render_script
from jobs.slurm.submissions import call_sbatch, fixed_name
from jobs.store.attempts import own_slurm_job
from jobs.store.launches import launched_at
from jobs.store.layout import Layout, shared_path
from jobs.store.records import Decoder, write_json
from jobs.store.snapshot import Snapshot, take_snapshot
from jobs.text import counted

SCHEMA = 1
LINKS = 2  # pending at once, beside one that makes its pass
_log = logging.getLogger(__name__)


class Phase(Enum):
    """State of a chain."""

    running = "running"
    pending = "pending"
    none = "none"  # no link since the launch
    unknown = "unknown"  # Slurm does not answer
    ended = "ended"  # regularly
    broken = "broken"  # no link, although the experiment is not finished


@dataclass(frozen=True)
class ChainState:
    """State of a chain, with a sentence for the user."""

    phase: Phase
    sentence: str
    running: str = ""  # job id of the running link
    waiting: str = ""  # job id of the next link
    problem: str = ""  # why no successor could be submitted

    @property
    def known(self) -> bool:
        """Slurm has answered."""
        return self.phase is not Phase.unknown


class LinkState(Enum):
    """State of the last link, as recorded."""

    running = "running"  # makes its pass, or was killed
    handed_over = "handed over"  # the next link continues
    ended = "ended"  # and with it the chain
    broken = "broken"  # the chain ended with an error


@dataclass(frozen=True)
class ControllerRecord:
    """`controller.json`: the state of the last link. Times in seconds since the epoch."""

    state: LinkState = LinkState.running
    job: str = ""  # "": written by a user's command
    host: str = ""
    launched: float = 0.0  # the launch that the link belongs to
    started: float = 0.0
    passes: int = 0  # since the launch that succeeded
    last_pass: float = 0.0
    failing: int = 0  # links in a row whose pass failed or did not end; a shared folder or a Slurm that does not answer is not counted
    stuck_since: float = 0.0  # since when each pass has found jobs that will never start; 0: the last one found none
    last_error: str = ""
    successor: str = ""
    problem: str = ""  # why there is no successor
    message: str = ""  # why it ended


_RECORDS = Decoder(ControllerRecord, SCHEMA)


def link_name(layout: Layout) -> str:
    """Job name of all links of an experiment's chain; another results folder is another chain."""
    return fixed_name(layout, "control", "controller")


def record_file(layout: Layout) -> Path:
    """File of the last link's record."""
    return layout.folder / "controller.json"


def log_file(layout: Layout) -> Path:
    """Log to which all links append."""
    return shared_path(layout.logs) / f"{link_name(layout)}.out"


def read_record(layout: Layout) -> ControllerRecord | None:
    """The record of the last link; None if there is none that can be read."""
    return _RECORDS.read(record_file(layout))


def write_record(layout: Layout, record: ControllerRecord) -> None:
    """Replace the record."""
    write_json(record_file(layout), {"schema": SCHEMA, **asdict(record), "state": record.state.value})


class Chain:
    """The chain of one experiment. Any number of processes may have one; `source`: folder of the code that the process runs.

    Links run the code of the last launch: `snapshots/current` is a symbolic link to its snapshot. A process that runs from a snapshot
    does not change the link.
    """

    def __init__(
        self,
        experiment: Experiment,
        layout: Layout,
        *,
        source: Path,
        command: Sequence[str] = (),
        binds: Sequence[str] = (),
        client: SlurmClient | None = None,
    ) -> None:
        self.layout = replace(layout, root=shared_path(layout.root))
        self.name = link_name(self.layout)
        self.own_job = own_slurm_job() if os.environ.get("SLURM_JOB_NAME") == self.name else ""
        self._experiment = experiment
        self._source = source
        root = str(self.layout.root)
        python = launcher_python(experiment.slurm, sys.executable)
        self._command = tuple(command) or (python, "launch.py", "control", self.layout.experiment, "--results", root)
        self._binds = (root, *binds)
        self._client = client or SlurmClient()

    def ensure(self, queue: Sequence[QueuedElement] | None = None, *, renew: bool = False) -> ChainState:
        """Make sure that two pending links exist besides the calling one. `queue`: a reading of squeue, if there is a recent one.

        `renew`: replace the pending links, whose settings are those of an earlier launch. Raises SlurmUnavailableError if squeue fails. A
        failed submission is not raised but returned as `problem`.
        """
        running, waiting = self._others(queue)
        self.point_to_code()
        kept = [] if renew else waiting[:LINKS]
        submitted: list[str] = []
        problem = ""
        while len(kept) + len(submitted) < LINKS and not problem:
            job, problem = self._submit(len(kept) + len(submitted) + 1)
            submitted.extend(filter(None, [job]))
        if not renew or submitted:
            self._client.cancel_jobs([job for job in waiting if job not in kept])
        following = [*kept, *submitted] or waiting
        present = self.own_job or (running[0] if running else "")
        next_link = following[0] if following else ""
        if present:
            text = f"controller: job {present} makes a pass, " + (
                f"job {next_link} the next" if next_link else f"no job follows: {problem}"
            )
            return ChainState(Phase.running, text, present, next_link, problem)
        if next_link:
            self._mend_record(next_link)
            after = f"{self._experiment.policy.poll_minutes:g} min"
            return ChainState(Phase.pending, f"controller: job {next_link} makes the next pass, in {after}", "", next_link, problem)
        write_record(self.layout, ControllerRecord(LinkState.broken, launched=launched_at(self.layout), problem=problem, message=problem))
        return ChainState(Phase.broken, f"no controller in Slurm: {problem}", problem=problem)

    def withdraw_successors(self) -> tuple[str, ...]:
        """Cancel the pending links and return their job ids. SlurmUnavailableError if Slurm does not answer."""
        _, waiting = self._others(None)
        self._client.cancel_jobs(waiting)
        return tuple(waiting)

    def stop(self, message: str = "stopped by its user") -> tuple[str, ...]:
        """End the chain until the next launch, the running link too. Returns the job ids that were cancelled."""
        record = ControllerRecord(LinkState.ended, launched=launched_at(self.layout), message=message)
        write_record(self.layout, record)  # first: a link that receives SIGTERM must not submit another one
        running, waiting = self._others(None)
        self._client.cancel_named(self.name)
        write_record(self.layout, record)
        return (*waiting, *running)

    def script(self) -> str:
        """The batch script of a link, from the templates of `source`. Writes nothing."""
        return render_script(self._link_job(1), self._experiment.slurm, self._source / "slurm_templates")

    def _mend_record(self, next_link: str) -> None:
        """Overwrite the record of a call that found no link and could submit none: now there is one."""
        record, launched = read_record(self.layout), launched_at(self.layout)
        if record is not None and record.state is LinkState.broken and record.launched == launched:
            write_record(self.layout, ControllerRecord(LinkState.handed_over, launched=launched, successor=next_link))

    def _others(self, queue: Sequence[QueuedElement] | None) -> tuple[list[str], list[str]]:
        """Running and pending links except the calling one, oldest first."""
        found = queue if queue is not None else self._client.queue(name=self.name)
        return chain_jobs(self.name, [element for element in found if element.job != self.own_job])

    def _link_job(self, polls: int) -> LinkJob:
        """A link that begins in `polls` times the time between passes."""
        seconds = max(1, round(60 * self._experiment.policy.poll_minutes))
        return LinkJob(
            name=self.name,
            minutes=self._experiment.policy.controller_minutes,
            command=self._command,
            description=str(self.layout.experiment_file),
            folder=str(self._current),
            output=str(log_file(self.layout)),
            binds=self._binds,
            begin_seconds=polls * seconds,
            again_seconds=seconds,
        )

    @cached_property
    def _snapshot(self) -> Snapshot:
        return take_snapshot(self._source, self.layout, self._experiment.registry)

    @property
    def _in_snapshot(self) -> bool:
        """This process runs from a snapshot itself."""
        return self._snapshot.source == self._snapshot.path.resolve()

    @property
    def _current(self) -> Path:
        return self.layout.snapshots / "current"

    def point_to_code(self) -> None:
        """Let `snapshots/current` point to this process's code, unless that is itself a snapshot: then a launch has set it."""
        target = self._current.readlink().name if self._current.is_symlink() else ""
        if target == self._snapshot.digest or (self._in_snapshot and self._current.is_dir()):
            return
        folder = Path(tempfile.mkdtemp(prefix=".current.", dir=self.layout.snapshots))
        try:
            (folder / "current").symlink_to(self._snapshot.digest)
            (folder / "current").rename(self._current)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _submit(self, polls: int) -> tuple[str, str]:
        """Job id of a new link that begins in `polls` times the time between passes and "", or "" and why there is none."""
        self.layout.logs.mkdir(parents=True, exist_ok=True)
        scripts, templates = self.layout.submissions / "scripts", self._current.resolve() / "slurm_templates"
        try:
            reply = call_sbatch(self._client, scripts, self._link_job(polls), self._experiment.slurm, templates)
        except UsageError as error:
            return "", str(error)
        if reply.job:
            return reply.job, ""
        _log.warning("%s: %s", self.name, reply.text)
        return "", reply.text if reply.refusal is not Refusal.unknown else f"{reply.text}; the next pass looks for it by name"


def chain_jobs(name: str, queue: Iterable[QueuedElement]) -> tuple[list[str], list[str]]:
    """Job ids of the running and of the pending links of that name, oldest first; a completing one is neither. Pure."""
    found = [element for element in queue if element.name == name]
    waiting = [element.job for element in found if element.state in WAITING_STATES]
    running = [element.job for element in found if element.state not in (*WAITING_STATES, "COMPLETING")]
    return sorted(running, key=int), sorted(waiting, key=int)


def chain_state(layout: Layout, queue: Sequence[QueuedElement] | None, *, now: float | None = None) -> ChainState:
    """State of an experiment's chain, for display. `queue` None: Slurm did not answer, and the record alone is used."""
    record, launched = read_record(layout), launched_at(layout)
    moment = time.time() if now is None else now
    current = record if record is not None and record.launched == launched else None
    running, waiting = chain_jobs(link_name(layout), queue or ())
    elements = {element.job: element for element in queue or ()}
    last = (_last_pass(current, moment) + _failing(current)) if current else ""
    if running:
        own = current if current is not None and current.job == running[0] else ControllerRecord()
        follows = f", job {waiting[0]} the next" if waiting else f", no job follows: {own.problem}" if own.problem else ""
        where = f" on {own.host}" if own.host else ""
        text = f"controller: job {running[0]}{where} makes a pass{follows}{last}"
        return ChainState(Phase.running, text, running[0], waiting[0] if waiting else "", own.problem)
    if waiting:
        text = f"controller: job {waiting[0]} {describe_pending(elements[waiting[0]])}{last or ', no pass yet'}"
        return ChainState(Phase.pending, text, "", waiting[0], why_stuck(elements[waiting[0]]))
    if current is not None and current.state is LinkState.ended:
        return ChainState(Phase.ended, f"controller: ended ({current.message})")
    if current is not None and current.state is LinkState.broken:
        return ChainState(Phase.broken, f"no controller in Slurm any more: {current.message}", problem=current.problem)
    if queue is None:
        return ChainState(Phase.unknown, f"controller: not known, Slurm does not answer now{last}")
    if current is None:
        return ChainState(Phase.none, "no controller in Slurm")
    why = "; ".join(filter(None, (current.problem or current.last_error, f"log {log_file(layout)}")))
    text = f"no controller in Slurm any more: job {current.job} left no successor ({why})"
    return ChainState(Phase.broken, text, problem=current.problem)


def _failing(record: ControllerRecord) -> str:
    if record.failing > 1:
        return f"; the last {counted(record.failing, 'pass', 'passes')} failed: {record.last_error}"
    return f"; the last pass failed: {record.last_error}" if record.last_error else ""


def _last_pass(record: ControllerRecord, now: float) -> str:
    return f", last pass {max(0, round(now - record.last_pass))} s ago" if record.last_pass else ""
