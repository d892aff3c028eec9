"""The one module that writes and reads records: JSON files, complete or absent, never torn into a wrong answer.

A record is written to a temporary name in the same folder, flushed to the disk and renamed; a reader that finds it
missing, torn or of another schema gets None, which is neither success nor failure.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from jobs.store.layout import AttemptFolder, StageFolder

SCHEMA = 1
_UMASK = os.umask(0o022)


os.umask(_UMASK)  # it can only be read by setting it


RecordT = TypeVar("RecordT")


class Ending(Enum):
    """How an attempt ended that has no result."""

    failed = "failed"
    interrupted = "interrupted"  # asked to stop; a checkpoint may exist; costs no attempt
    refused = "refused"  # the user's to mend: never retried by itself


@dataclass(frozen=True)
class Claim:
    """Who executes an attempt."""

    attempt: int
    host: str
    pid: int
    process_start: str  # of the kernel, so that a reused pid is told apart; "" where unknown
    started: float  # seconds since the epoch
    slurm_job: str = ""  # JOB or ARRAY_INDEX
    node: str = ""  # as Slurm calls the machine
    log: str = ""  # file that the worker's output goes to
    relief: int = 0  # how often the work of a pass was halved for want of memory
    checkpoint: float = 0.0  # when the newest resumable state was written that it found, seconds since the epoch
    team: str = ""  # machines of all processes that compute it together, a comma between them; "": `node` alone


@dataclass(frozen=True)
class Outcome:
    """The end of an attempt without a result."""

    attempt: int
    ending: Ending
    error: str  # class of the exception, or the signal
    message: str  # first line, for tables
    detail: str  # traceback
    host: str
    seconds: float
    slurm_job: str = ""
    kind: str = ""  # name of a jobs.store.failures.FailureClass
    node: str = ""  # of the process of a team that was lost, where that is known


@dataclass(frozen=True)
class Result:
    """A finished stage: what DESIGN calls the truth."""

    key: str
    stage: str
    version: int
    fold: str
    seed: int
    corpus: str
    corpus_digest: str
    settings: Mapping[str, Any]
    upstream: Mapping[str, str]
    attempt: int
    metrics: Mapping[str, Any]
    provenance: Mapping[str, Any]
    artifacts: Mapping[str, str] = field(default_factory=dict)  # relative name -> sha256
    confusion: tuple[tuple[int, ...], ...] = ()
    classes: tuple[str, ...] = ()
    diverged: str = ""  # why the run does not count: its training went wrong by a test fixed in advance


def write_json(path: Path, value: object, *, private: bool = False) -> None:
    """Write one JSON file atomically and durably, `private`: readable by this user only. See `write_bytes`."""
    write_bytes(path, _encoded(value), private=private)


def write_text(path: Path, text: str) -> None:
    """Write one UTF-8 file atomically and durably, newlines as they are."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write one file atomically and durably; raises OSError when the disk is full, leaving what was there."""
    temporary = _write_temporary(path, data, private=private)
    try:
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def create_json(path: Path, value: object) -> bool:
    """Write one JSON file only if none of that name exists; False if one does. `link` decides the winner, on NFS too."""
    temporary = _write_temporary(path, _encoded(value))
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return True


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None if there is none: missing, torn, or not an object."""
    try:
        with path.open("rb", buffering=0) as file:  # read at every look at a large experiment
            value = json.loads(file.read())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_result(folder: StageFolder, result: Result) -> None:
    """Publish a finished stage."""
    write_json(folder.result, {"schema": SCHEMA, **asdict(result)})


def read_result(folder: StageFolder, key: str) -> Result | None:
    """The result of a stage, or None when there is no valid one for this key."""
    value = read_json(folder.result)
    if value is None or value.pop("schema", None) != SCHEMA or value.get("key") != key:
        return None
    try:
        value["confusion"] = tuple(tuple(int(count) for count in row) for row in value.get("confusion", ()))
        value["classes"] = tuple(value.get("classes", ()))
        result = Result(**value)
    except (TypeError, ValueError, OverflowError):
        return None
    mappings = (result.metrics, result.provenance, result.artifacts)
    sound = isinstance(result.attempt, int) and isinstance(result.diverged, str) and all(isinstance(each, dict) for each in mappings)
    return result if sound else None


def result_intact(folder: StageFolder, result: Result) -> bool:
    """Whether the artifacts named by a result lie there with the digests it states (reads every byte)."""
    output = folder.attempt(result.attempt).output
    return all((output / name).is_file() and file_digest(output / name) == digest for name, digest in result.artifacts.items())


def artifacts_present(folder: StageFolder, result: Result) -> bool:
    """Whether the artifacts named by a result lie there (reads no content)."""
    output = folder.attempt(result.attempt).output
    return all((output / name).is_file() for name in result.artifacts)


def claim_attempt(folder: StageFolder, number: int, claim: Claim) -> bool:
    """Take attempt `number`; False if somebody has it already."""
    return create_json(folder.attempt(number).claim, {"schema": SCHEMA, **asdict(claim)})


def read_claim(folder: AttemptFolder) -> Claim | None:
    """Who took an attempt, or None."""
    return _read_record(folder.claim, Claim)


def write_outcome(folder: AttemptFolder, outcome: Outcome) -> None:
    """State how an attempt ended that has no result."""
    value = asdict(outcome)
    value["ending"] = outcome.ending.value
    write_json(folder.outcome, {"schema": SCHEMA, **value})


def read_outcome(folder: AttemptFolder) -> Outcome | None:
    """How an attempt ended without a result, or None."""
    value = read_json(folder.outcome)
    if value is None or value.pop("schema", None) != SCHEMA:
        return None
    try:
        return Outcome(**{**value, "ending": Ending(value["ending"])})
    except (TypeError, KeyError, ValueError):
        return None


def attempt_numbers(folder: StageFolder) -> tuple[int, ...]:
    """Numbers of all attempts ever begun, ascending."""
    try:
        names = os.listdir(folder.attempts)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    return tuple(sorted(int(name) for name in names if name.isdigit()))


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_record(path: Path, kind: type[RecordT]) -> RecordT | None:
    value = read_json(path)
    if value is None or value.pop("schema", None) != SCHEMA:
        return None
    try:
        return kind(**value)
    except TypeError:
        return None


def _encoded(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _write_temporary(path: Path, data: bytes, *, private: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # of mode 0600
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not private:
            temporary.chmod(0o666 & ~_UMASK)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
