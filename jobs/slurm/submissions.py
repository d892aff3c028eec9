"""At most one job per intent, for arrays and for everything else: the records of submissions, and the guard around sbatch.

An intent is written before sbatch is called and the job's number after it, so that no reply can be lost unnoticed.

    intent ----> submitted ----> ended        the job's elements have left the queue, and it is known how, or will never be
       |             ^
       +-------> lost                         looked for under its name and not found for long enough; it may still turn up

The name of a submission is its identity: Slurm keeps it as the job's name, and a process that finds an intent without a number asks
Slurm for that name. The name of an array is made of what is submitted and how often that was submitted before. Its open record lies in
`submissions/`, a closed one in `submissions/ended/`, what the workers read in `submissions/tasks/`, scripts in `submissions/scripts/`.
A sweep keeps one name and one record, `submission.json` in its folder, which the next submission replaces.

Several processes may look after one experiment at once. A change is therefore made to what the file says at that moment, only if it
still is the record of that intent (`created`), and what was learnt of single elements is only added to.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
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
from jobs.store.attempts import claim_alive, process_start
from jobs.store.layout import Layout
from jobs.store.records import Claim, create_json, read_json, write_json
from jobs.text import one_line

SCHEMA = 1
SETTLE_SECONDS = 60.0  # how long a submission of unknown outcome stays unfound before it is made again, and accounting may lag behind
LAUNCH_FAILED = "LAUNCH_FAILED"  # our word beside Slurm's states: withdrawn because Slurm could not start it on the node it chose
Refinements = tuple[tuple[tuple[int, ...], str], ...]  # (indices, what they wait for), as in jobs.slurm.dependencies


class State(Enum):
    """Where a submission stands."""

    intent = "intent"
    submitted = "submitted"
    ended = "ended"
    lost = "lost"


@dataclass(frozen=True)
class Writer:
    """The process that submits."""

    host: str = ""
    pid: int = 0
    start: str = ""  # of the kernel; "" where unknown


@dataclass(frozen=True)
class Submission:
    """One array, or one job without elements, that was submitted or was about to be.

    Indices of elements are written as text: keys of a JSON object.
    """

    name: str
    stage: str
    method: str
    tasks: tuple[tuple[str, ...], ...]  # element -> keys
    created: float  # seconds since the epoch
    state: State = State.intent
    job: str = ""
    writer: Writer = Writer()
    replied: bool = False  # sbatch has returned without a number: nothing is under way any more
    looked_up: float = 0.0  # first time that Slurm had no job of the name, and no sbatch was known to run
    refine: Refinements = ()  # dependencies of single elements that Slurm has still to be told
    tries: int = 0  # at telling it
    cancelled: tuple[int, ...] = ()  # elements that the program itself withdraws, written before Slurm is told
    left: Mapping[str, float] = field(default_factory=dict)  # index -> when it was first seen missing from the queue
    ended: Mapping[str, str] = field(default_factory=dict)  # index -> last state; "" where accounting never said
    nodes: Mapping[str, str] = field(default_factory=dict)  # index -> node on which Slurm could not start it; "": never known
    asked: Asked | None = None  # for each element; None: not on record

    @property
    def job_name(self) -> str:
        """What Slurm calls the array: the record of a second one of that name has its number behind it."""
        return self.name.partition("+")[0]

    def element(self, index: int) -> str:
        return f"{self.job}_{index}"

    @property
    def all_left(self) -> bool:
        """None of its elements was in the queue when last looked at."""
        return self.state is State.submitted and len(self.left) == len(self.tasks)

    @property
    def unexplained(self) -> tuple[int, ...]:
        """Elements that have left the queue, and it is not known yet how, or because of which node."""
        return tuple(int(index) for index in self.left if index not in self.ended or self.unplaced(index))

    def unplaced(self, index: str) -> bool:
        """Slurm could not start an element, and it is not known yet where."""
        return self.ended.get(index) == LAUNCH_FAILED and index not in self.nodes


class SubmissionRecords:
    """Records of submissions that are not closed, each in a file of its own. `scripts`: folder of the scripts that sbatch is given."""

    def __init__(self, scripts: Path, file: Callable[[str], Path]) -> None:
        self.scripts = scripts
        self._file = file  # name -> path

    def find(self, name: str) -> Submission | None:
        """An open record, read anew: on a shared folder the look at a file's time may be a minute old, its content is not."""
        return _from_json(_renamed(read_json(self._file(name))))

    def check(self, name: str) -> None:
        """UsageError if the record of an open submission is there and cannot be read: nobody would ever close it."""
        file = self._file(name)
        if self.find(name) is None and file.is_file() and self.find(name) is None:
            raise UsageError(f"{file}: a damaged record of a submission; if squeue shows no job {name}, delete it")

    def begin(self, submission: Submission) -> bool:
        """Write an intent; False if the record exists: somebody else submits, or has submitted, the very same."""
        return create_json(self._file(submission.name), _to_json(submission))

    def change(self, submission: Submission, **changes: Any) -> Submission:
        """Write what is known now of an open submission; what is learnt of single elements is added to what is known.

        Of a record that somebody has put away, or made anew, nothing is written.
        """
        current = self._current(submission)
        if current is None:
            return _changed(submission, changes)
        changed = _changed(current, changes)
        if changed != current:
            write_json(self._file(submission.name), _to_json(changed))
        return changed

    def withdraw(self, submission: Submission) -> None:
        """Remove the record of a submission of which Slurm said that there is no job; one made anew by another process stays."""
        if self._current(submission) is not None:
            self._file(submission.name).unlink(missing_ok=True)

    def _current(self, submission: Submission) -> Submission | None:
        """What is on record of the same intent."""
        current = self.find(submission.name)
        return current if current is not None and current.created == submission.created else None


class SubmissionBook(SubmissionRecords):
    """The submission records of one experiment's arrays; the only writer of their folder."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.folder = layout.submissions
        super().__init__(self.folder / "scripts", lambda name: self.folder / f"{name}.json")
        self._ended = self.folder / "ended"
        self._known: dict[Path, tuple[tuple[int, int, int], Submission | None]] = {}  # what files said when last read

    def tasks_file(self, name: str) -> Path:
        """What the workers of a submission read."""
        return self.folder / "tasks" / f"{name}.json"

    def open(self) -> tuple[Submission, ...]:
        """Records that are not closed, oldest first."""
        closed = set(_listing(self._ended))
        return self._records(self.folder, [name for name in _listing(self.folder) if name not in closed])

    def closed(self) -> tuple[Submission, ...]:
        """Records that are put away, oldest first."""
        return self._records(self._ended, _listing(self._ended))

    def next_name(self, batch: Batch) -> str:
        """The name under which a batch would be submitted now. A lost submission is made good under its old name."""
        base = base_name(self._layout, batch)
        closed = [self._read(self._ended / name) for name in _listing(self._ended) if _number(name, base)]
        over = sum(record is None or record.state is not State.lost for record in closed)
        return f"{base}.{1 + over + sum(record.all_left and bool(_number(f'{record.name}.json', base)) for record in self.open())}"

    def begin(self, submission: Submission) -> bool:
        """The same; one that counted as lost is made good."""
        (self._ended / f"{submission.name}.json").unlink(missing_ok=True)
        return super().begin(submission)

    def adopt(self, submission: Submission) -> bool:
        """Write the record of an array that turned up; False if there is one. Its lost intent, if any, is forgotten."""
        made = super().begin(submission)
        (self._ended / f"{submission.name}.json").unlink(missing_ok=True)
        return made

    def close(self, submission: Submission, state: State, **changes: Any) -> None:
        """Put a record away, with what is known of it by now. Killed between the two steps, it is in both places and counts as closed."""
        current = self.find(submission.name)
        if current is not None and current.created != submission.created:
            return  # lost, closed by another process, and made anew
        write_json(self._ended / f"{submission.name}.json", _to_json(_changed(current or submission, {**changes, "state": state})))
        (self.folder / f"{submission.name}.json").unlink(missing_ok=True)

    def _records(self, folder: Path, names: Iterable[str]) -> tuple[Submission, ...]:
        found = [self._read(folder / name) for name in names]
        return tuple(sorted((record for record in found if record is not None), key=lambda record: (record.created, record.name)))

    def _read(self, path: Path) -> Submission | None:
        """A record; a file that is the one read before is not read again."""
        try:
            stat = path.stat()
        except FileNotFoundError:
            self._known.pop(path, None)
            return None
        mark = (stat.st_ino, stat.st_mtime_ns, stat.st_size)  # every write makes a new file
        known = self._known.get(path)
        if known is None or known[0] != mark:
            known = self._known[path] = (mark, _from_json(read_json(path)))
        return known[1]


@dataclass(frozen=True)
class Reply:
    """What came of one call of sbatch."""

    job: str = ""  # number
    refusal: Refusal | None = None  # why there is none; `unknown`: there may be one
    text: str = ""  # what sbatch wrote, in one line


def call_sbatch(client: SlurmClient, folder: Path, script: str, parameters: Mapping[str, Any], site: SlurmSite) -> Reply:
    """Call sbatch once; the script is kept in `folder`. UsageError if it was not called: wrong parameters, no Slurm."""
    try:
        return Reply(client.submit(folder, script, parameters, site))
    except SubmissionFailedError as error:
        text = one_line(error) or "sbatch printed no message"
        return Reply("", classify_refusal(text), text)


class Guard:
    """Makes at most one job per intent, whichever process submits, is killed or loses the reply of sbatch."""

    def __init__(self, records: SubmissionRecords, client: SlurmClient, *, settle_seconds: float, clock: Callable[[], float]) -> None:
        self._records = records
        self._client = client
        self._settle_seconds = settle_seconds
        self._clock = clock

    def send(
        self, intent: Submission, look: Callable[[], Sequence[str]], script: str, parameters: Mapping[str, Any], site: SlurmSite
    ) -> tuple[Submission, Reply]:
        """Submit what this process has just written the intent of, unless Slurm has it: `look` gives the jobs that it has under the name.

        The record stays if there is a job, or may be one; otherwise it is removed, also where UsageError or SlurmUnavailableError is raised
        because sbatch was not called.
        """
        try:
            found = look()
            reply = Reply(found[0]) if found else call_sbatch(self._client, self._records.scripts, script, parameters, site)
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
        """Names of intents of which nothing is under way any more. To be asked before the look at the queue that is compared with it."""
        found = [record for record in records if record.state is State.intent and (record.replied or writer_gone(record))]
        running = any(not record.replied for record in found) and sbatch_under_way(self._records.scripts)
        return frozenset(record.name for record in found if record.replied or not running)

    def settle(self, intent: Submission, job: str, *, abandoned: bool) -> Submission | None:
        """What is on record of an intent after a look at the queue. None: no job has turned up for long enough, it may be submitted again.

        `job` is the one of its name, if there is any. While an sbatch may be under way, at most for `UNDERWAY_SECONDS`, the settle time
        does not begin: the controller may take a job after the sbatch that asked for it was killed.
        """
        now = self._clock()
        begun = intent.created if abandoned else intent.created + UNDERWAY_SECONDS
        if job:
            return self._records.change(intent, state=State.submitted, job=job)
        if not intent.looked_up or now < begun:
            return self._records.change(intent, looked_up=now)
        return None if now - max(intent.looked_up, begun) >= self._settle_seconds else intent


def writer_gone(submission: Submission) -> bool:
    """Whether the process that wrote an intent is known to have ended; False where that cannot be known from here."""
    writer = submission.writer
    claim = Claim(0, writer.host, writer.pid, writer.start, submission.created)
    return not claim_alive(claim, submission.created, live_jobs=None, now=submission.created)


def base_name(layout: Layout, batch: Batch) -> str:
    """Name of a batch without its number; at most 60 characters of `[A-Za-z0-9_.-]`.

    The digest covers the results folder too: two trees of one user that run the same experiment do not take each other's jobs.
    """
    tasks = [list(task.keys) for task in batch.tasks]
    identity: list[object] = [os.path.realpath(layout.root), layout.experiment, batch.stage, batch.method, tasks]
    if batch.request.identity != Request().identity:
        identity.append(batch.request.identity)
    digest = hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:12]
    words = [layout.experiment[:20], batch.stage[:12], batch.method[:12], digest]
    return ".".join(re.sub(r"[^A-Za-z0-9_-]", "_", word) for word in words)


def fixed_name(layout: Layout, word: str, kind: str, *identity: str) -> str:
    """Name of a job that keeps its name however often it is submitted: of its kind, results folder, experiment, and `identity`."""
    whole = canonical_json([kind, os.path.realpath(layout.root), layout.experiment, *identity])
    digest = hashlib.sha256(whole.encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', layout.experiment[:40])}.{word}.{digest}"


def new_submission(name: str, batch: Batch, now: float, refine: Refinements = (), asked: Asked | None = None) -> Submission:
    """The intent of this process to submit a batch."""
    tasks = tuple(task.keys for task in batch.tasks)
    return Submission(name, batch.stage, batch.method, tasks, now, writer=this_writer(), refine=refine, asked=asked)


def this_writer() -> Writer:
    """This process."""
    return Writer(socket.gethostname(), os.getpid(), process_start(os.getpid()))


def double_of(submission: Submission, job: str, now: float) -> Submission:
    """The record of a second array that Slurm has under a submission's name."""
    name = f"{submission.name}+{job}"
    return Submission(name, submission.stage, submission.method, submission.tasks, now, State.submitted, job, asked=submission.asked)


def _changed(submission: Submission, changes: Mapping[str, Any]) -> Submission:
    added = dict(changes)
    if "cancelled" in added:
        added["cancelled"] = tuple(sorted({*submission.cancelled, *added["cancelled"]}))
    for name in ("left", "ended", "nodes"):  # what was seen first stays
        if name in added:
            added[name] = {**added[name], **getattr(submission, name)}
    return replace(submission, **added)


def _number(file: str, base: str) -> str:
    """`2` of `BASE.2.json`, "" of all other files."""
    name, _, number = file.removesuffix(".json").rpartition(".")
    return number if name == base and number.isdigit() else ""


def _to_json(submission: Submission) -> dict[str, object]:
    return {"schema": SCHEMA, **asdict(submission), "state": submission.state.value}


def _renamed(value: dict[str, Any] | None) -> dict[str, Any] | None:
    """A record of a sweep by a former version, in today's words; any other as it is."""
    if value is None or "writer" in value or "host" not in value:
        return value
    writer = {name: value[name] for name in ("host", "pid", "start") if name in value}
    state = State.submitted if value.get("job") else State.intent
    return {**value, "stage": "sweep", "method": "", "tasks": [], "state": state.value, "writer": writer}


def _from_json(value: dict[str, Any] | None) -> Submission | None:
    """The record, or None. What an older version did not write is as if it had not been seen; what a newer one adds is not read."""
    if value is None or value.get("schema") != SCHEMA:
        return None
    try:
        known = {one.name: value[one.name] for one in fields(Submission) if one.name in value}
        known |= {"state": State(value["state"]), "tasks": tuple(tuple(keys) for keys in value["tasks"])}
        known |= {"writer": Writer(**value.get("writer", {})), "cancelled": tuple(value.get("cancelled", ()))}
        known["refine"] = tuple((tuple(indices), str(own)) for indices, own in value.get("refine", ()))
        known["asked"] = Asked(**known["asked"]) if known.get("asked") else None
        return Submission(**known)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _listing(folder: Path) -> Sequence[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name.endswith(".json") and not name.startswith("."))
    except FileNotFoundError:
        return ()
