"""Records of submissions: an intent is written before sbatch is called, the job's number after, so that no reply can be lost unnoticed.

    intent ----> submitted ----> ended        the job's elements have left the queue
       |
       +-------> lost                         looked for under its name and not found for long enough

The name of a submission is its identity: it is made of what is submitted and how often that was submitted before, Slurm keeps it as
the job's name, and whoever finds an intent without a number asks Slurm for that name. Open records lie in `submissions/`, closed ones in
`submissions/ended/`, what the workers read in `submissions/tasks/`, scripts in `submissions/scripts/`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path

from jobs.graph import canonical_json
from jobs.layout import Layout
from jobs.plan import Batch
from jobs.records import create_json, read_json, write_json

SCHEMA = 1


class State(Enum):
    """Where a submission stands."""

    intent = "intent"
    submitted = "submitted"
    ended = "ended"
    lost = "lost"


@dataclass(frozen=True)
class Submission:
    """One array that was submitted, or was about to be."""

    name: str
    stage: str
    method: str
    tasks: tuple[tuple[str, ...], ...]  # element -> keys
    created: float  # seconds since the epoch
    state: State = State.intent
    job: str = ""
    replied: bool = False  # sbatch has returned without a number: nothing is under way any more
    looked_up: float = 0.0  # first time that Slurm, asked for the name, had none
    gone: float = 0.0  # first time that none of its elements was in the queue
    ended: Mapping[str, str] = field(default_factory=dict)  # index -> last state that accounting gave

    def element(self, index: int) -> str:
        return f"{self.job}_{index}"


class SubmissionBook:
    """The submission records of one experiment; the only writer of their folder."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.folder = layout.submissions
        self._ended = self.folder / "ended"

    @property
    def scripts(self) -> Path:
        return self.folder / "scripts"

    def tasks_file(self, name: str) -> Path:
        """What the workers of a submission read."""
        return self.folder / "tasks" / f"{name}.json"

    def open(self) -> tuple[Submission, ...]:
        """Records that are not closed, oldest first."""
        found = [_read(self.folder / name) for name in _listing(self.folder)]
        closed = set(_listing(self._ended))
        alive = [record for record in found if record is not None and f"{record.name}.json" not in closed]
        return tuple(sorted(alive, key=lambda record: (record.created, record.name)))

    def next_name(self, batch: Batch) -> str:
        """The name under which a batch would be submitted now. A lost submission is made good under its old name."""
        base = base_name(self._layout, batch)
        closed = [_read(self._ended / name) for name in _listing(self._ended) if name.rpartition(".json")[0].rpartition(".")[0] == base]
        return f"{base}.{1 + sum(1 for record in closed if record is None or record.state is not State.lost)}"

    def find(self, name: str) -> Submission | None:
        """An open record."""
        return _read(self.folder / f"{name}.json")

    def begin(self, submission: Submission) -> bool:
        """Write an intent; False if the record exists: somebody else submits, or has submitted, the very same."""
        (self._ended / f"{submission.name}.json").unlink(missing_ok=True)  # lost, and now made good
        return create_json(self.folder / f"{submission.name}.json", _to_json(submission))

    def update(self, submission: Submission) -> Submission:
        """Write what is known now of an open submission."""
        write_json(self.folder / f"{submission.name}.json", _to_json(submission))
        return submission

    def withdraw(self, submission: Submission) -> None:
        """Forget an intent of which Slurm said that there is no job."""
        (self.folder / f"{submission.name}.json").unlink(missing_ok=True)

    def close(self, submission: Submission, state: State) -> None:
        """Put a record away. Killed between the two steps, it is in both places and counts as closed."""
        write_json(self._ended / f"{submission.name}.json", _to_json(replace(submission, state=state)))
        (self.folder / f"{submission.name}.json").unlink(missing_ok=True)


def base_name(layout: Layout, batch: Batch) -> str:
    """Name of a batch without its number; at most 60 characters of `[A-Za-z0-9_.-]`.

    The digest covers the results folder too: two trees of one user that run the same experiment do not take each other's jobs.
    """
    identity = [os.path.realpath(layout.root), layout.experiment, batch.stage, batch.method, [list(task.keys) for task in batch.tasks]]
    digest = hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:12]
    words = [layout.experiment[:20], batch.stage[:12], batch.method[:12], digest]
    return ".".join(re.sub(r"[^A-Za-z0-9_-]", "_", word) for word in words)


def new_submission(name: str, batch: Batch, now: float) -> Submission:
    """The intent to submit a batch."""
    return Submission(name, batch.stage, batch.method, tuple(task.keys for task in batch.tasks), now)


def _to_json(submission: Submission) -> dict[str, object]:
    return {"schema": SCHEMA, **asdict(submission), "state": submission.state.value}


def _read(path: Path) -> Submission | None:
    value = read_json(path)
    if value is None or value.pop("schema", None) != SCHEMA:
        return None
    try:
        return Submission(**{**value, "state": State(value["state"]), "tasks": tuple(tuple(keys) for keys in value["tasks"])})
    except (KeyError, TypeError, ValueError):
        return None


def _listing(folder: Path) -> Sequence[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name.endswith(".json") and not name.startswith("."))
    except FileNotFoundError:
        return ()
