"""At most one job per intent: the records of submissions, and the guard around sbatch.

An intent is written before sbatch is called and the job id after it, so that a lost reply is noticed.

    intent ----> submitted ----> ended        all elements have left the queue, and their final states are known or never will be
       |             ^
       +-------> lost                         no job of the name in Slurm for the settle time; it may still turn up
       +-------> refused                      Slurm rejected the request

The name of a submission is its identity: it is the job's name in Slurm, and a process that finds an intent without a job id asks Slurm for
that name. The name of an array is made of its content and of the number of earlier submissions of that content. Its open record is in
`submissions/`, a closed one in `submissions/ended/`, the workers' description in `submissions/tasks/`, scripts in `submissions/scripts/`.

Several processes may control one experiment at once. A change is therefore applied to the content of the file at that moment, only if it is
still the record of the same intent (`created`), and facts about single elements are only added, never replaced.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from jobs.control.executor_protocol import Batch
from jobs.control.facts import Asked, Request
from jobs.errors import SlurmUnavailableError, SubmissionFailedError, UsageError
from jobs.experiment.config import SlurmSite
from jobs.experiment.graph import canonical_json
from jobs.slurm.client import UNDERWAY_SECONDS, SlurmClient, sbatch_under_way
from jobs.slurm.parse import Refusal, classify_refusal
from jobs.slurm.script import Job, parameters, render_script
from jobs.store.attempts import claim_alive, process_start
from jobs.store.identity import identity_of
from jobs.store.layout import Layout
from jobs.store.records import Claim, Decoder, check_times, create_json, write_json
from jobs.text import one_line

SCHEMA = 1
SETTLE_SECONDS = 60.0  # how long a submission must be missing in Slurm before it is repeated, and how long accounting may lag
FAILED = "FAILED"  # Slurm's state of a job whose script ended with an error; of these the node is recorded
LAUNCH_FAILED = "LAUNCH_FAILED"  # beside Slurm's own states: withdrawn because Slurm could not start it on the node it chose
Refinements = tuple[tuple[tuple[int, ...], str], ...]  # (indices, what they wait for), as in jobs.slurm.dependencies


class State(Enum):
    """State of a submission."""

    intent = "intent"
    submitted = "submitted"
    ended = "ended"
    lost = "lost"
    refused = "refused"


@dataclass(frozen=True)
class Writer:
    """The process that submits."""

    host: str = ""
    pid: int = 0
    start: str = ""  # start time that the kernel reports; "" if unknown


@dataclass(frozen=True)
class Submission:
    """One array that was or is to be submitted.

    Indices of elements are text where they are keys of a JSON object.
    """

    name: str
    stage: str
    method: str
    tasks: tuple[tuple[str, ...], ...]  # element -> keys
    created: float  # seconds since the epoch
    state: State
    job: str = ""
    writer: Writer = Writer()
    replied: bool = False  # sbatch has returned without a job id, so it is not running any more
    looked_up: float = 0.0  # first time that Slurm had no job of the name while no sbatch was known to run
    refine: Refinements = ()  # dependencies of single elements that are still to be set
    tries: int = 0  # at setting them
    cancelled: tuple[int, ...] = ()  # elements that the program withdraws, recorded before scancel
    left: Mapping[str, float] = field(default_factory=dict)  # index -> time at which it was first missing from the queue
    ended: Mapping[str, str] = field(default_factory=dict)  # index -> final state; "": accounting did not report it
    ended_at: Mapping[str, float] = field(default_factory=dict)  # index -> end in accounting, by slurmctld's clock; missing: unknown
    nodes: Mapping[str, str] = field(default_factory=dict)  # index -> node on which it could not be started, or failed; "": unknown
    asked: Asked | None = None  # time and memory requested for each element; None: not recorded
    refused: str = ""  # Slurm's message, if it rejected the request
    launch: float = 0.0  # number of the launch it belongs to (jobs.store.launches); 0: not recorded

    def __post_init__(self) -> None:
        wrong = [index for index in (*self.left, *self.ended, *self.ended_at, *self.nodes) if not index.isdecimal()]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not the index of an element")
        check_times(self.created, *self.left.values(), *self.ended_at.values())

    @property
    def job_name(self) -> str:
        """The job's name in Slurm; the record of a second array of that name is called `NAME+JOB`."""
        return self.name.partition("+")[0]

    def element(self, index: int) -> str:
        return f"{self.job}_{index}"

    @property
    def all_left(self) -> bool:
        """None of its elements was in the queue when it was last read."""
        return self.state is State.submitted and len(self.left) == len(self.tasks)

    @property
    def unexplained(self) -> tuple[int, ...]:
        """Elements that have left the queue and whose final state, or node of a failed launch, is not known yet."""
        return tuple(int(index) for index in self.left if index not in self.ended or self.unplaced(index))

    def unplaced(self, index: str) -> bool:
        """Slurm could not start an element, and the node is not known yet."""
        return self.ended.get(index) == LAUNCH_FAILED and index not in self.nodes


_SUBMISSIONS = Decoder(Submission, SCHEMA)  # what an older version did not write has the value that says nothing


class SubmissionBook:
    """The submission records of one experiment's arrays, open and closed; the only writer of their folder."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.folder = layout.submissions
        self.scripts = self.folder / "scripts"
        self._ended = self.folder / "ended"
        self._known: dict[Path, tuple[tuple[int, int, int], Submission | None]] = {}  # path -> (file identity, its record)

    def find(self, name: str) -> Submission | None:
        """An open record, read without the cache: on a shared folder the times of a file may be a minute old, its content is not."""
        return _SUBMISSIONS.read(self._file(name))

    def check(self, name: str) -> None:
        """UsageError if the record of an open submission exists and cannot be read: it would never be closed."""
        file = self._file(name)
        if self.find(name) is None and file.is_file() and self.find(name) is None:
            raise UsageError(f"{file}: a damaged record of a submission; if squeue shows no job {name}, delete it")

    def begin(self, submission: Submission) -> bool:
        """Write an intent; False if the record exists: another process submits, or has submitted, the same.

        The closed record of a lost submission of that name is removed.
        """
        (self._ended / f"{submission.name}.json").unlink(missing_ok=True)
        return create_json(self._file(submission.name), _to_json(submission))

    def change(self, submission: Submission, **changes: Any) -> Submission:
        """Change the record of an open submission and return it; facts about single elements are added to those in the file.

        Nothing is written if another process has closed the record or replaced it by a new intent.
        """
        current = self._current(submission)
        if current is None:
            return _changed(submission, changes)
        changed = _changed(current, changes)
        if changed != current:
            write_json(self._file(submission.name), _to_json(changed))
        return changed

    def withdraw(self, submission: Submission) -> None:
        """Remove the record of a submission that made no job; a new intent of another process stays."""
        if self._current(submission) is not None:
            self._file(submission.name).unlink(missing_ok=True)

    def _current(self, submission: Submission) -> Submission | None:
        """The record in the file, if it is of the same intent."""
        current = self.find(submission.name)
        return current if current is not None and current.created == submission.created else None

    def tasks_file(self, name: str) -> Path:
        """The description that the workers of a submission read."""
        return self.folder / "tasks" / f"{name}.json"

    def open(self) -> tuple[Submission, ...]:
        """Records that are not closed, oldest first."""
        closed = set(_listing(self._ended))
        return self._records(self.folder, [name for name in _listing(self.folder) if name not in closed])

    def closed(self) -> tuple[Submission, ...]:
        """Closed records, oldest first."""
        return self._records(self._ended, _listing(self._ended))

    def next_name(self, batch: Batch) -> str:
        """The name under which a batch would be submitted now. A lost submission is repeated under its old name."""
        base = base_name(self._layout, batch)
        closed = [self._read(self._ended / name) for name in _listing(self._ended) if _number(name, base)]
        ended = sum(record is None or record.state is not State.lost for record in closed)
        return f"{base}.{1 + ended + sum(record.all_left and bool(_number(f'{record.name}.json', base)) for record in self.open())}"

    def adopt(self, submission: Submission) -> bool:
        """Write the record of an array that turned up, and remove its closed record, if any. False if there is an open record already."""
        made = create_json(self._file(submission.name), _to_json(submission))
        (self._ended / f"{submission.name}.json").unlink(missing_ok=True)
        return made

    def close(self, submission: Submission, state: State, **changes: Any) -> None:
        """Move a record to the closed ones, with the changes. After a kill in between it is in both places and counts as closed."""
        current = self.find(submission.name)
        if current is not None and current.created != submission.created:
            return  # another process has closed it as lost and written a new intent
        write_json(self._ended / f"{submission.name}.json", _to_json(_changed(current or submission, {**changes, "state": state})))
        self._file(submission.name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _records(self, folder: Path, names: Iterable[str]) -> tuple[Submission, ...]:
        found = [self._read(folder / name) for name in names]
        return tuple(sorted((record for record in found if record is not None), key=lambda record: (record.created, record.name)))

    def _read(self, path: Path) -> Submission | None:
        """A record, cached by the file's inode, time and size."""
        try:
            stat = path.stat()
        except FileNotFoundError:
            self._known.pop(path, None)
            return None
        mark = (stat.st_ino, stat.st_mtime_ns, stat.st_size)  # every write creates a new file
        known = self._known.get(path)
        if known is None or known[0] != mark:
            known = self._known[path] = (mark, _SUBMISSIONS.read(path))
        return known[1]


@dataclass(frozen=True)
class Reply:
    """Result of one call of sbatch."""

    job: str = ""  # job id
    refusal: Refusal | None = None  # why there is none; `unknown`: the job may exist
    text: str = ""  # message of sbatch in one line


def call_sbatch(client: SlurmClient, folder: Path, job: Job, site: SlurmSite, templates: Path) -> Reply:
    """Call sbatch once; the script is kept in `folder`. UsageError if it was not called: wrong script or parameters, or no Slurm."""
    try:
        return Reply(client.submit(folder, render_script(job, site, templates), parameters(job, site), site))
    except SubmissionFailedError as error:
        text = one_line(error) or "sbatch printed no message"
        return Reply("", classify_refusal(text), text)


class Guard:
    """Makes at most one job per intent, whichever process submits, is killed, or loses sbatch's reply."""

    def __init__(self, records: SubmissionBook, client: SlurmClient, *, settle_seconds: float, clock: Callable[[], float]) -> None:
        self._records = records
        self._client = client
        self._settle_seconds = settle_seconds
        self._clock = clock

    def send(
        self, intent: Submission, look: Callable[[], Sequence[str]], job: Job, site: SlurmSite, templates: Path
    ) -> tuple[Submission, Reply]:
        """Submit the job of an intent that this process has just written, unless `look`, which returns the job ids of its name, finds one.

        The record stays if there is a job, or may be one; otherwise it is removed, also where UsageError or SlurmUnavailableError is raised
        because sbatch was not called.
        """
        try:
            found = look()
            reply = Reply(found[0]) if found else call_sbatch(self._client, self._records.scripts, job, site, templates)
        except (SlurmUnavailableError, UsageError):
            self._records.withdraw(intent)
            raise
        if reply.job:
            return self._records.change(intent, state=State.submitted, job=reply.job), reply
        if reply.refusal is Refusal.unknown:
            return self._records.change(intent, replied=True), reply
        self._records.withdraw(intent)
        return intent, reply

    def abandoned(self, records: Iterable[Submission]) -> frozenset[str]:
        """Names of intents whose sbatch is not running any more. Call it before the reading of squeue that it is compared with."""
        found = [record for record in records if record.state is State.intent and (record.replied or writer_gone(record))]
        running = any(not record.replied for record in found) and sbatch_under_way(self._records.scripts)
        return frozenset(record.name for record in found if record.replied or not running)

    def settle(self, intent: Submission, job: str, *, abandoned: bool) -> Submission | None:
        """Update the record of an intent after a reading of squeue. None: no job of its name for the settle time; it may be repeated.

        `job`: job id found under its name, or "". The settle time starts when no sbatch can be running any more, at the latest after
        `UNDERWAY_SECONDS`: slurmctld may accept a job after its sbatch was killed.
        """
        now = self._clock()
        begun = intent.created if abandoned else intent.created + UNDERWAY_SECONDS
        if job:
            return self._records.change(intent, state=State.submitted, job=job)
        if not intent.looked_up or now < begun:
            return self._records.change(intent, looked_up=now)
        return None if now - max(intent.looked_up, begun) >= self._settle_seconds else intent


def writer_gone(submission: Submission) -> bool:
    """Whether the process that wrote an intent has ended; False if that cannot be known on this machine."""
    writer = submission.writer
    claim = Claim(0, writer.host, writer.pid, writer.start, submission.created)
    return not claim_alive(claim, submission.created, live_jobs=None, now=submission.created)


def base_name(layout: Layout, batch: Batch) -> str:
    """Name of a batch's submissions without the number behind it; at most 60 characters of `[A-Za-z0-9_.-]`.

    The digest covers the results folder too, so that two results folders with the same experiment do not share jobs.
    """
    tasks = [list(task.keys) for task in batch.tasks]
    identity: list[object] = [identity_of(layout.root), layout.experiment, batch.stage, batch.method, tasks]
    if batch.request.identity != Request().identity:
        identity.append(batch.request.identity)
    digest = hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:12]
    words = [layout.experiment[:20], batch.stage[:12], batch.method[:12], digest]
    return ".".join(re.sub(r"[^A-Za-z0-9_-]", "_", word) for word in words)


def fixed_name(layout: Layout, word: str, kind: str, *identity: str) -> str:
    """Name of a job that is the same for every submission: from its kind, the results folder, the experiment, and `identity`."""
    whole = canonical_json([kind, identity_of(layout.root), layout.experiment, *identity])
    digest = hashlib.sha256(whole.encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', layout.experiment[:40])}.{word}.{digest}"


def new_submission(
    name: str, batch: Batch, now: float, refine: Refinements = (), asked: Asked | None = None, launch: float = 0.0
) -> Submission:
    """A new intent of this process for a batch. `now`: seconds since the epoch."""
    tasks = tuple(task.keys for task in batch.tasks)
    intent = Submission(name, batch.stage, batch.method, tasks, now, State.intent, launch=launch)
    return replace(intent, writer=this_writer(), refine=refine, asked=asked)


def this_writer() -> Writer:
    """The calling process."""
    return Writer(socket.gethostname(), os.getpid(), process_start(os.getpid()))


def double_of(submission: Submission, job: str, now: float) -> Submission:
    """A record for a second array in Slurm under a submission's name."""
    name = f"{submission.name}+{job}"
    state = State.submitted
    alike = Submission(name, submission.stage, submission.method, submission.tasks, now, state, job, launch=submission.launch)
    return replace(alike, asked=submission.asked)


def _changed(submission: Submission, changes: Mapping[str, Any]) -> Submission:
    added = dict(changes)
    if "cancelled" in added:
        added["cancelled"] = tuple(sorted({*submission.cancelled, *added["cancelled"]}))
    for name in ("left", "ended", "ended_at", "nodes"):  # the first value of an element is kept
        if name in added:
            added[name] = {**added[name], **getattr(submission, name)}
    return replace(submission, **added)


def _number(file: str, base: str) -> str:
    """`2` of `BASE.2.json`, "" of any other file."""
    name, _, number = file.removesuffix(".json").rpartition(".")
    return number if name == base and number.isdigit() else ""


def _to_json(submission: Submission) -> dict[str, object]:
    return {"schema": SCHEMA, **asdict(submission), "state": submission.state.value}


def _listing(folder: Path) -> Sequence[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name.endswith(".json") and not name.startswith("."))
    except FileNotFoundError:
        return ()
