"""The controller chain: on Slurm a small job looks after an experiment and submits its own successor first; nobody need stay logged in.

    launch --> link 1 (runs) --> link 2 (waits) --> ...       same name, --dependency=singleton

The name follows from the experiment and the results folder, and the queue is asked for it: no record is needed to find a link again, and
whoever calls `Chain.ensure`, however often and at once, the chain comes back to one link that runs and one that waits. A link may be killed
at any point: its successor starts and does everything again, which changes nothing (what a link does is in jobs.slurm.chain_link).
Links have no intent on record, unlike all else that is submitted: a second link that waits is cancelled by the next look and never runs
beside the first, while a link that had to wait for a lost reply to settle could reach its time limit without a successor.
`EXPERIMENT/controller.json` tells people how it goes; nothing depends on it but the count of links that failed one after another, and the
word of a user who stopped the chain.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path

from jobs.errors import UsageError
from jobs.experiment.config import Experiment
from jobs.slurm.client import SlurmClient
from jobs.slurm.parse import QueuedElement, Refusal, why_stuck
from jobs.slurm.script import LinkJob, launcher_python, parameters, render_script
from jobs.slurm.submissions import call_sbatch, fixed_name
from jobs.store.attempts import own_slurm_job
from jobs.store.layout import Layout
from jobs.store.records import Decoder, write_json
from jobs.store.snapshot import Snapshot, take_snapshot

SCHEMA = 1
LINKS = 2  # in the queue at once: one runs, one waits
MAX_REFUSED = 3  # sbatch calls of one link that Slurm declined, then it asks no more
_log = logging.getLogger(__name__)


class Phase(Enum):
    """How a chain stands."""

    running = "running"
    pending = "pending"
    none = "none"  # there never was one since the launch
    ended = "ended"  # as it should
    broken = "broken"  # nobody looks after the experiment although somebody should


@dataclass(frozen=True)
class ChainState:
    """How a chain stands, with a sentence for people."""

    phase: Phase
    sentence: str
    running: str = ""  # job
    waiting: str = ""  # job of the link that comes next
    problem: str = ""  # why no successor could be submitted


@dataclass(frozen=True)
class ControllerRecord:
    """What the last link wrote down of itself."""

    state: str  # running, handed over, ended, broken
    job: str = ""  # "": written by a user's command
    host: str = ""
    launched: float = 0.0  # the launch that it looks after, seconds since the epoch
    started: float = 0.0
    passes: int = 0  # of this link, good ones
    last_pass: float = 0.0
    failing: int = 0  # passes in a row
    fruitless: int = 0  # links in a row without a good pass, this one included until it has had one
    last_error: str = ""
    successor: str = ""
    problem: str = ""
    message: str = ""  # why it ended


@dataclass(frozen=True)
class _Launch:
    """What a link reads of an experiment's record."""

    launched: float


_RECORDS, _LAUNCHES = Decoder(ControllerRecord, SCHEMA), Decoder(_Launch, None)


def link_name(layout: Layout) -> str:
    """Name of every link of an experiment's chain; another results folder is another chain."""
    return fixed_name(layout, "control", "controller")


def record_file(layout: Layout) -> Path:
    """The record of the last link."""
    return layout.folder / "controller.json"


def log_file(layout: Layout) -> Path:
    """The log of all links, one after another."""
    return layout.logs.resolve() / f"{link_name(layout)}.out"


def read_record(layout: Layout) -> ControllerRecord | None:
    """What the last link wrote, or None."""
    return _RECORDS.read(record_file(layout))


def write_record(layout: Layout, record: ControllerRecord) -> None:
    """Write what a link says of itself."""
    write_json(record_file(layout), {"schema": SCHEMA, **asdict(record)})


def launched_at(layout: Layout) -> float:
    """When the experiment was launched last, seconds since the epoch; 0 if it was not."""
    found = _LAUNCHES.read(layout.experiment_file)
    return found.launched if found else 0.0


class Chain:
    """The chain of one experiment. Any number of processes may have one; `source` is the folder of the code that they run.

    Links run the code of the last launch: the folder `snapshots/current` is a link to its snapshot, set by whoever is no snapshot itself.
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
        self.layout = replace(layout, root=layout.root.resolve())
        self.name = link_name(self.layout)
        self.own_job = own_slurm_job() if os.environ.get("SLURM_JOB_NAME") == self.name else ""
        self._experiment = experiment
        self._source = source
        root = str(self.layout.root)
        python = launcher_python(experiment.slurm, sys.executable)
        self._command = tuple(command) or (python, "launch.py", "control", self.layout.experiment, "--results", root)
        self._binds = (root, *binds)
        self._client = client or SlurmClient()
        self._snapshot: Snapshot | None = None
        self._refused = 0
        self._successor = ""  # as last seen
        self._full = False  # the queue had no room for one

    def ensure(self, queue: Sequence[QueuedElement] | None = None) -> ChainState:
        """See to it that exactly one link waits beside the calling one. `queue`: a look at it, if one was just taken.

        Raises SlurmUnavailableError if the queue cannot be seen; that no link can be submitted is no error but a `problem`.
        """
        running, waiting = self._others(queue)
        if len(waiting) > 1:
            self._client.cancel_jobs(waiting[1:])
        self.point_to_code()
        self._full = False
        if not waiting and self._successor:
            # It was cancelled, or has failed. Whoever cancels both links cannot do so in one moment, and is not to meet a third one.
            job, problem = "", f"the successor {self._successor} has left the queue; another one follows"
        else:
            job, problem = (waiting[0], "") if waiting else self._submit()
        self._successor = job
        present = self.own_job or (running[0] if running else "")
        if present:
            text = f"controller: job {present}, " + (f"its successor {job} waits" if job else f"without a successor: {problem}")
            return ChainState(Phase.running, text, present, job, problem)
        if job:
            return ChainState(Phase.pending, f"controller: job {job} waits for its turn", "", job)
        write_record(self.layout, ControllerRecord(Phase.broken.value, launched=launched_at(self.layout), problem=problem, message=problem))
        return ChainState(Phase.broken, f"no controller in Slurm: {problem}", problem=problem)

    @property
    def hopeless(self) -> bool:
        """No successor can be submitted from here, now or later."""
        return self._refused >= MAX_REFUSED or shutil.which("sbatch") is None

    @property
    def code_is_current(self) -> bool:
        """Whether links begin with the code that runs here; True for what is no link."""
        snapshot = self._snapshot = self._snapshot or take_snapshot(self._source, self.layout)
        inside = snapshot.source == snapshot.path
        return not inside or not self._current.is_dir() or self._current.resolve() == snapshot.path

    def come_again(self) -> bool:
        """Where the queue has no room for a successor: let the calling link itself run again, which takes no further place."""
        return self._full and bool(self.own_job) and self._client.requeue_job(self.own_job)

    def withdraw_successors(self) -> tuple[str, ...]:
        """Cancel the links that wait; returns their jobs. SlurmUnavailableError if Slurm does not answer."""
        _, waiting = self._others(None)
        self._client.cancel_jobs(waiting)
        return tuple(waiting)

    def stop(self, message: str = "stopped by its user") -> tuple[str, ...]:
        """End the chain, the running link too; returns the jobs that were cancelled. It begins again with the next launch."""
        record = ControllerRecord(Phase.ended.value, launched=launched_at(self.layout), message=message)
        write_record(self.layout, record)  # first: a link that is told to leave submits no other
        running, waiting = self._others(None)
        self._client.cancel_named(self.name)
        write_record(self.layout, record)
        return (*waiting, *running)

    def script(self) -> str:
        """The script of a link, with the templates of `source`; touches nothing."""
        return render_script(self._link_job(), self._experiment.slurm, self._source / "slurm_templates")

    def _others(self, queue: Sequence[QueuedElement] | None) -> tuple[list[str], list[str]]:
        """Links that run and that wait, oldest first, without the calling one."""
        found = queue if queue is not None else self._client.queue(name=self.name)
        return links(self.name, [element for element in found if element.job != self.own_job])

    def _link_job(self) -> LinkJob:
        return LinkJob(
            name=self.name,
            minutes=self._experiment.policy.controller_minutes,
            command=self._command,
            description=str(self.layout.experiment_file),
            folder=str(self._current),
            output=str(log_file(self.layout)),
            binds=self._binds,
        )

    @property
    def _current(self) -> Path:
        return self.layout.snapshots / "current"

    def point_to_code(self) -> None:
        """Let links run this code, unless it is itself a snapshot: then a launch has said what they run."""
        snapshot = self._snapshot = self._snapshot or take_snapshot(self._source, self.layout)
        inside = snapshot.source == snapshot.path
        target = self._current.readlink().name if self._current.is_symlink() else ""
        if target == snapshot.digest or (inside and self._current.is_dir()):
            return
        folder = Path(tempfile.mkdtemp(prefix=".current.", dir=self.layout.snapshots))
        try:
            (folder / "current").symlink_to(snapshot.digest)
            (folder / "current").rename(self._current)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _submit(self) -> tuple[str, str]:
        """Number of a new link, or "" and why there is none."""
        if self._refused >= MAX_REFUSED:
            return "", "sbatch declines to submit one (see the controller's log)"
        if shutil.which("sbatch") is None:
            return "", f"sbatch is not in PATH on {socket.gethostname()}"
        job, site = self._link_job(), self._experiment.slurm
        script = render_script(job, site, self._current.resolve() / "slurm_templates")
        self.layout.logs.mkdir(parents=True, exist_ok=True)
        try:
            reply = call_sbatch(self._client, self.layout.submissions / "scripts", script, parameters(job, site), site)
        except UsageError as error:
            self._refused += 1
            return "", str(error)
        if reply.job:
            return reply.job, ""
        self._full = reply.refusal is Refusal.full
        if reply.refusal is Refusal.refused:
            self._refused += 1
        _log.warning("%s: %s", self.name, reply.text)
        return "", reply.text if reply.refusal is not Refusal.unknown else f"{reply.text}; it is looked for again"


def links(name: str, queue: Iterable[QueuedElement]) -> tuple[list[str], list[str]]:
    """Jobs of the chain of that name that run and that wait, oldest first. One that is ending is none of them. Pure."""
    found = [element for element in queue if element.name == name]
    waiting = [element.job for element in found if element.state == "PENDING"]
    running = [element.job for element in found if element.state not in ("PENDING", "COMPLETING")]
    return sorted(running, key=int), sorted(waiting, key=int)


def chain_state(layout: Layout, queue: Sequence[QueuedElement] | None, *, now: float | None = None) -> ChainState:
    """How the chain of an experiment stands, for whoever only looks. `queue` None: Slurm cannot be asked, and the record has to do."""
    record, launched = read_record(layout), launched_at(layout)
    moment = time.time() if now is None else now
    current = record if record is not None and record.launched == launched else None
    running, waiting = links(link_name(layout), queue or ())
    if running:
        return _running_state(running[0], waiting, current, moment)
    if waiting:
        element = next(element for element in queue or () if element.job == waiting[0])
        stuck = why_stuck(element)
        text = (
            f"controller: job {waiting[0]} will never start: {stuck}" if stuck else f"controller: job {waiting[0]} waits ({element.reason})"
        )
        return ChainState(Phase.pending, text, "", waiting[0], stuck)
    if current is None:
        return ChainState(Phase.none, "no controller in Slurm")
    if current.state == Phase.ended.value:
        return ChainState(Phase.ended, f"controller: ended ({current.message})")
    if current.state == Phase.broken.value:
        return ChainState(Phase.broken, f"no controller in Slurm any more: {current.message}", problem=current.problem)
    if queue is None:
        told = f"controller: was job {current.job}{_last_pass(current, moment)}; Slurm cannot be asked now"
        return ChainState(Phase.running, told, current.job, current.successor, current.problem)
    why = "".join(f"{text}; " for text in (current.problem or current.last_error,) if text)
    told = f"no controller in Slurm any more: job {current.job} left no successor ({why}log {log_file(layout)})"
    return ChainState(Phase.broken, told, problem=current.problem)


def _running_state(job: str, waiting: Sequence[str], record: ControllerRecord | None, now: float) -> ChainState:
    own = record if record is not None and record.job == job else ControllerRecord("running")
    text = f"controller: job {job}" + (f" on {own.host}" if own.host else "") + (_last_pass(own, now) or ", no pass yet")
    if waiting:
        text += f", its successor {waiting[0]} waits"
    elif own.problem:
        text += f", without a successor: {own.problem}"
    if own.failing:
        text += f"; the last {own.failing} passes failed: {own.last_error}"
    return ChainState(Phase.running, text, job, waiting[0] if waiting else "", own.problem)


def _last_pass(record: ControllerRecord, now: float) -> str:
    return f", last pass {max(0, round(now - record.last_pass))} s ago" if record.last_pass else ""
