"""The one module that writes and reads records: JSON files, complete or absent, decoded with validation.

A record is written to a temporary name in the same folder, flushed to the disk and renamed. A reader that finds it missing, torn, of
another schema, or with a value of the wrong type gets None, which is neither success nor failure. All of these but a missing file are
damage: each file is reported once per process, and `damaged_records` lists them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar, cast

from jobs.store.disk_space import naming
from jobs.store.layout import AttemptFolder, StageFolder
from jobs.store.type_adapters import type_adapter

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema, SchemaValidator


SCHEMA = 1
READ_BYTES = 1 << 16  # more than most records have
LARGEST_INTEGER = 2**63  # in the measured part of a result
LATEST = 1e11  # seconds since the epoch; later is no time that a record can state
UNUSABLE = "its confusion matrix is not square with one row per class and at least one example"
_UMASK = os.umask(0o022)


os.umask(_UMASK)  # it can only be read by setting it


RecordT = TypeVar("RecordT")
_log = logging.getLogger(__name__)
_damaged: dict[Path, str] = {}  # files that this process could not decode when it last read them -> why
_reported: set[Path] = set()


class DamagedRecordError(ValueError):
    """A file is there and is not a record of the expected kind."""


class Decoder(Generic[RecordT]):
    """Reads JSON records of one kind, a dataclass, whose fields must have the annotated types. Unknown fields are ignored.

    `schema` is the value that the field `schema` must have; None: the records have no such field. pydantic is imported at the first use.
    """

    def __init__(self, kind: type[RecordT], schema: int | None = SCHEMA) -> None:
        self._kind = kind
        self._schema = schema

    def read(self, path: Path | str) -> RecordT | None:
        """The record in a file; None where there is none. A damaged one is reported and counts as missing."""
        try:
            return self.load(path)
        except DamagedRecordError as error:
            report_damage(Path(path), str(error))
            return None

    def load(self, path: Path | str) -> RecordT | None:
        """The record in a file; None where there is none. Raises DamagedRecordError, which says what is wrong with it."""
        try:
            data = _content(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        record = self.decode(data)
        if _damaged:
            _damaged.pop(Path(path), None)
        return record

    def decode(self, data: bytes) -> RecordT:
        """The record that a JSON text states. Raises DamagedRecordError."""
        try:
            if b"\\" in data and (
                b"\\ud" in data or b"\\uD" in data
            ):  # a file name that is not UTF-8: Python writes lone surrogates, JSON has none
                data = json.dumps(json.loads(data), ensure_ascii=False).encode("utf-8", "replace")
            record = cast(RecordT, self._validator.validate_json(data, strict=True))
            # Not a number, in a field of any type; as part of a text they are sound. Single bytes are searched for first: much faster.
            if (b"N" in data and b"NaN" in data) or (b"I" in data and b"Infinity" in data):
                from pydantic_core import from_json

                from_json(data, allow_inf_nan=False)
        except (ValueError, RecursionError) as error:
            raise DamagedRecordError(_reason(error, self._schema)) from error
        return record

    def prepare(self) -> None:
        """Build the validator now: a process that forks others does it once for all of them."""
        self._validator  # noqa: B018 - built when first asked for

    @cached_property
    def _validator(self) -> SchemaValidator:
        from pydantic import ConfigDict, with_config
        from pydantic_core import SchemaValidator, core_schema

        with_config(ConfigDict(allow_inf_nan=False, extra="ignore"))(self._kind)
        schema: Any = type_adapter(self._kind).core_schema
        if self._schema is not None:
            schema = core_schema.tagged_union_schema({self._schema: schema}, discriminator="schema")
        return SchemaValidator(schema)


def report_damage(path: Path, reason: str) -> None:
    """Note that a file cannot be decoded, or is not what its place says; a warning is logged once for each file."""
    if path not in _reported:
        _reported.add(path)
        _log.warning("%s: damaged record, counts as missing: %s", path, reason)
    _damaged[path] = reason


def damaged_records(*folders: Path) -> tuple[str, ...]:
    """`PATH: REASON` of each damaged file in these folders, as far as this process has read them and they are still there."""
    found = sorted((path, reason) for path, reason in _damaged.items() if any(path.is_relative_to(folder) for folder in folders))
    return tuple(f"{path}: {reason}" for path, reason in found if path.exists())


def _reason(error: Exception, schema: int | None) -> str:
    """The first thing that is wrong, in one line: `started: Input should be a valid number`."""
    from pydantic_core import ValidationError

    if not isinstance(error, ValidationError):
        return f"not JSON: {' '.join(str(error).split())}"
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return "of another schema, written by another version of the program"
    location = first["loc"][1:] if first["loc"][:1] == (schema,) else first["loc"]
    where = ".".join(map(str, location))
    return f"{where}: {first['msg']}" if where else first["msg"]


class _Measured:
    """Annotation of provenance: the types of those of its entries that are computed with; others are left as they are.

    Each of them may be null or absent: not known.
    """

    @staticmethod
    def __get_pydantic_core_schema__(source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema as core

        integer = core.int_schema(ge=-LARGEST_INTEGER, le=LARGEST_INTEGER, strict=True)
        number = core.union_schema([integer, core.float_schema(allow_inf_nan=False, strict=True)], mode="left_to_right")
        kinds: dict[str, CoreSchema] = dict.fromkeys(MEASURED, number)
        kinds |= dict.fromkeys(("queue", "requested"), core.dict_schema(core.str_schema(), number))
        kinds["slurm"] = core.dict_schema(core.str_schema(), core.str_schema())
        known = {name: core.typed_dict_field(core.nullable_schema(kind), required=False) for name, kind in kinds.items()}
        return core.typed_dict_schema(known, extra_behavior="allow")


MEASURED = ("seconds", "seconds_before", "peak_rss_bytes", "peak_own_bytes", "peak_gpu_bytes", "processes", "threads")
Provenance = Annotated[Mapping[str, Any], _Measured]


def check_times(*times: float) -> None:
    """ValueError unless these are times that a calendar has, in seconds since the epoch."""
    wrong = [time for time in times if abs(time) > LATEST]
    if wrong:
        raise ValueError(f"{wrong[0]:g} is not a time")


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
    process_start: str  # of the kernel, distinguishes a reused pid; "" if unknown
    started: float  # seconds since the epoch
    slurm_job: str = ""  # JOB or ARRAY_INDEX
    node: str = ""  # as Slurm calls the machine
    log: str = ""  # file that the worker's output goes to
    relief: int = 0  # how often the work of a pass was halved for want of memory
    checkpoint: float = 0.0  # when the newest resumable state was written that it found, seconds since the epoch
    team: str = ""  # machines of all processes that compute it together, a comma between them; "": `node` alone
    uid: int | None = None  # of the user; None in claims of older versions
    cluster: str = ""  # Slurm's name of the cluster of `slurm_job`; "": not known
    experiment: str = ""  # whose task it is
    launch: float = 0.0  # number of the last launch of that experiment (jobs.store.launches); 0: not known
    submitted: float = 0.0  # when its Slurm job was submitted, seconds since the epoch; 0: not known, or outside of Slurm
    eligible: float = 0.0  # from when on only the queue kept the job from starting
    job_started: float = 0.0  # when the job got its node, for this attempt

    def __post_init__(self) -> None:
        check_times(self.started, self.submitted, self.eligible, self.job_started)

    @property
    def waited(self) -> float:
        """Seconds that its job waited in the queue; 0 too if that is not known."""
        return max(0.0, self.job_started - self.eligible)


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
    provenance: Provenance
    artifacts: Mapping[str, str] = field(default_factory=dict)  # relative name -> sha256
    confusion: tuple[tuple[int, ...], ...] = ()
    classes: tuple[str, ...] = ()
    diverged: str = ""  # why the run does not count: its training went wrong by a test fixed in advance
    warnings: tuple[str, ...] = ()  # of the stage, about a result that counts


_CLAIMS, _OUTCOMES, _RESULTS = Decoder(Claim), Decoder(Outcome), Decoder(Result)


def prepare_decoders() -> None:
    """Import and build what reading claims, outcomes and results needs; for a process that forks workers."""
    for decoder in (_CLAIMS, _OUTCOMES, _RESULTS):
        decoder.prepare()


def write_json(path: Path, value: object, *, private: bool = False) -> None:
    """Write one JSON file atomically and durably, `private`: readable by this user only. See `write_bytes`."""
    write_bytes(path, _encoded(value), private=private)


def json_text(value: object) -> str:
    """The text that `write_json` writes."""
    return _encoded(value).decode()


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
        # NFS repeats a request whose reply was lost, and reports the file that the first one has made: link(2), open(2) on O_EXCL
        if temporary.stat().st_nlink != 2:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return True


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None if there is none: missing, torn, or not an object. Its values are not checked."""
    try:
        with path.open("rb", buffering=0) as file:
            value = json.loads(file.read())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_result(folder: StageFolder, result: Result) -> None:
    """Publish a finished stage."""
    write_json(folder.result, {"schema": SCHEMA, **asdict(result)})


def read_result(folder: StageFolder, key: str) -> Result | None:
    """The result of a stage, or None when there is no valid one for this key."""
    return read_result_file(folder.result, key)


def read_result_file(path: Path | str, key: str) -> Result | None:
    """The same, of its file. A text is opened as it is: 200 000 Path objects would be a twentieth of a first pass over 100 000 results."""
    result = _RESULTS.read(path)
    if result is not None and result.key != key:
        report_damage(Path(path), f"the result of another stage, {result.key}")
        return None
    if result is not None and not usable_confusion(result.confusion, result.classes):
        report_damage(Path(path), UNUSABLE)
        return None
    return result


def usable_confusion(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> bool:
    """Whether these are a square matrix of counts with one row per class and at least one example, or nothing at all."""
    if not counts and not classes:
        return True
    size = len(classes)
    square = len(counts) == size and all(len(row) == size for row in counts)
    return square and len(set(classes)) == size and min(map(min, counts)) >= 0 and any(map(any, counts))


def file_exists(path: Path) -> bool:
    """Whether a regular file is there; OSError if that cannot be read, where `Path.is_file` of Python 3.14 returns False."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def result_intact(folder: StageFolder, result: Result) -> bool:
    """Whether the artifacts named by a result lie there with the digests it states (reads every byte). OSError if they cannot be read."""
    output = folder.attempt(result.attempt).output
    return all(file_exists(output / name) and file_digest(output / name) == digest for name, digest in result.artifacts.items())


def artifacts_present(folder: StageFolder, result: Result) -> bool:
    """Whether the artifacts named by a result lie there (reads no content)."""
    output = folder.attempt(result.attempt).output
    return all(file_exists(output / name) for name in result.artifacts)


def claim_attempt(folder: StageFolder, number: int, claim: Claim) -> bool:
    """Take attempt `number`; False if somebody has it already."""
    return create_json(folder.attempt(number).claim, {"schema": SCHEMA, **asdict(claim)})


def read_claim(folder: AttemptFolder) -> Claim | None:
    """Who took an attempt, or None."""
    return _CLAIMS.read(folder.claim)


def write_outcome(folder: AttemptFolder, outcome: Outcome) -> None:
    """State how an attempt ended that has no result."""
    value = asdict(outcome)
    value["ending"] = outcome.ending.value
    write_json(folder.outcome, {"schema": SCHEMA, **value})


def read_outcome(folder: AttemptFolder) -> Outcome | None:
    """How an attempt ended without a result, or None."""
    return _OUTCOMES.read(folder.outcome)


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


def _content(path: Path | str) -> bytes:
    """All bytes of a file: fewer system calls than `Path.read_bytes`, as a first pass reads 100 000 files."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return b"".join(iter(lambda: os.read(descriptor, READ_BYTES), b""))
    finally:
        os.close(descriptor)


def _encoded(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _write_temporary(path: Path, data: bytes, *, private: bool = False) -> Path:
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # of mode 0600
    temporary = Path(name)
    try:
        with naming(path), os.fdopen(descriptor, "wb") as file:
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
