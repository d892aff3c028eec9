"""What Slurm's commands print, parsed: the queue, accounting, the site's configuration, and why sbatch said no. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

QUEUE_FORMAT = "%i|%T|%r|%j"  # the name last: another job's name may hold the separator
ACCOUNTING_FORMAT = "JobID,State"
_ARRAY = re.compile(r"(\d+)_\[([0-9,:-]+)(?:%\d+)?\]")
_SINGLE = re.compile(r"(\d+)(?:_(\d+))?(?:\+\d+)?")


@dataclass(frozen=True)
class QueuedElement:
    """One job or array element that Slurm holds now."""

    job: str  # `JOB` or `ARRAY_INDEX`
    state: str  # PENDING, RUNNING, COMPLETING, ...
    reason: str
    name: str

    @property
    def array(self) -> str:
        return self.job.partition("_")[0]


class Refusal(Enum):
    """What a failed sbatch tells."""

    full = "full"  # a limit on jobs in the queue: try again later
    refused = "refused"  # Slurm looked at the request and declined: nobody but the user can mend it
    unknown = "unknown"  # the reply was lost or never came: the job may exist


def expand_indices(text: str) -> tuple[int, ...]:
    """Indices of an array expression: `3-7,9`, `0-8:2`, with or without a throttle `%N`. ValueError for anything else."""
    found: list[int] = []
    for part in text.partition("%")[0].split(","):
        span, _, step = part.partition(":")
        first, dash, last = span.partition("-")
        found.extend(range(int(first), int(last) + 1, int(step or 1)) if dash else (int(first),))
    return tuple(found)


def compress_indices(indices: Iterable[int]) -> str:
    """The shortest array expression of some indices, ascending: (0, 1, 2, 5) -> `0-2,5`."""
    spans: list[list[int]] = []
    for index in sorted(set(indices)):
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def expand_job(text: str) -> tuple[str, ...]:
    """Elements behind a printed job id: `12` -> 12; `12_3` -> 12_3; `12_[3-5%2]` -> 12_3, 12_4, 12_5; () for what is none."""
    array = _ARRAY.fullmatch(text)
    if array:
        return tuple(f"{array[1]}_{index}" for index in expand_indices(array[2]))
    single = _SINGLE.fullmatch(text)
    if not single:
        return ()
    return (f"{single[1]}_{single[2]}" if single[2] is not None else single[1],)


def parse_queue(text: str) -> tuple[QueuedElement, ...]:
    """Elements in the output of `squeue --noheader --format=QUEUE_FORMAT`; ValueError if a line cannot be understood.

    A line skipped in silence would be a job taken for gone, so there is none.
    """
    found: list[QueuedElement] = []
    for line in filter(None, text.splitlines()):
        fields = line.split("|", 3)
        jobs = expand_job(fields[0].strip())
        if len(fields) != 4 or not jobs:
            raise ValueError(f"squeue printed a line that is none of a queue: {line[:200]!r}")
        found.extend(QueuedElement(job, fields[1].strip(), fields[2].strip(), fields[3].strip()) for job in jobs)
    return tuple(found)


def parse_accounting(text: str) -> dict[str, str]:
    """Element -> state in the output of `sacct -X --noheader --parsable2 --format=ACCOUNTING_FORMAT`.

    `CANCELLED by 1000` is CANCELLED. Lines that cannot be understood are left out: accounting only explains, it decides nothing.
    """
    found: dict[str, str] = {}
    for line in text.splitlines():
        job, _, state = line.partition("|")
        for element in expand_job(job.strip()):
            found[element] = state.split()[0] if state.split() else ""
    return found


def parse_site(text: str) -> dict[str, str]:
    """Key -> value in the output of `scontrol show config`."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def site_number(site: Mapping[str, str], key: str) -> int:
    """A whole number of the site's configuration; 0 where it says nothing or no limit."""
    return int(site.get(key, "")) if site.get(key, "").isdigit() else 0


def least_limit(text: str, columns: Mapping[int, str], limit: int) -> int:
    """The smallest limit among the rows of `sacctmgr --noheader --parsable2`; 0 if there is none.

    Only rows count whose column `i` is `columns[i]`; the limit stands in column `limit`.
    """
    rows = [line.split("|") for line in text.splitlines()]
    fitting = [row for row in rows if len(row) > limit and all(row[column] == value for column, value in columns.items())]
    return min((int(row[limit]) for row in fitting if row[limit].isdigit()), default=0)


_LOST_REPLY = (
    "timed out",
    "unable to contact slurm",
    "zero bytes were transmitted",
    "communication",
    "connection refused",
    "connection reset",
    "transport endpoint",
    "broken pipe",
    "backup controller",
    "unexpected message",
    "i/o error",
)
_FULL = (
    "submit limit",
    "submitjoblimit",
    "maxsubmit",
    "temporarily unable to accept",
    "resource temporarily unavailable",
    "job size limit",
    "too many jobs",
)
_LOOKED_AT = ("batch job submission failed", "invalid", "unrecognized", "sbatch: error: unable to open", "sbatch: fatal", "not permitted")


def read_refusal(text: str) -> Refusal:
    """Why sbatch failed, by what it wrote. What is not known for a refusal counts as a lost reply: the job may exist."""
    words = text.lower()
    if any(mark in words for mark in _LOST_REPLY):
        return Refusal.unknown
    if any(mark in words for mark in _FULL):
        return Refusal.full
    return Refusal.refused if any(mark in words for mark in _LOOKED_AT) else Refusal.unknown
