"""What Slurm's commands print, parsed: the queue, accounting, the site's configuration, and why sbatch said no. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

QUEUE_FORMAT = "%i|%T|%r|%j"  # the name last: another job's name may hold the separator
ACCOUNTING_FORMAT = "JobID,State"
LONGEST_EXPRESSION = 8000  # characters of one array expression in a command
_ARRAY = re.compile(r"(\d+)_\[([0-9,:-]+)(?:%\d+)?\]")
_SINGLE = re.compile(r"(\d+)(?:_(\d+))?(?:\+\d+)?")
_ENDINGS = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT")
)
HELD_BY_USER = "held by you: `scontrol release` lets it start"
_LAUNCH_FAILURES = frozenset(("launch failed requeued held", "user env retrieval failed requeued held"))
# Reasons of squeue, in lower case. What may pass by itself (Resources, Priority, ReqNodeNotAvail, AssocMaxJobsLimit, AssocGrp...,
# QOSMaxJobs..., PartitionDown, Licenses, ...) is none of them.
_STUCK = {
    **dict.fromkeys(_LAUNCH_FAILURES, "Slurm could not start it on the node it chose"),
    "jobhelduser": HELD_BY_USER,
    "job requeued in held state": HELD_BY_USER,
    "jobheldadmin": "held by the site's administrator",
    "badconstraints": "no node fits its request",
    "dependencyneversatisfied": "what it waits for has failed",
    "partitiontimelimit": "its time limit is above the partition's",
    "partitionnodelimit": "it asks for more nodes than the partition gives",
    "invalidaccount": "its account is not valid",
    "invalidqos": "its QOS is not valid",
    "accountnotallowed": "its account may not use the partition",
    "qosnotallowed": "its QOS may not be used there",
    "reservationdeleted": "its reservation was deleted",
}
# A limit on each single job, on its own size or time (of an association or a QOS): waiting does not help.
_ABOVE_LIMIT = re.compile(r"(?:assoc|qos)max[a-z/]+per(?:job|node)(?:limit)?|qosmin[a-z/]+|maxmemperlimit")


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


def array_expressions(elements: Iterable[str]) -> tuple[str, ...]:
    """Array elements as commands take them, each expression of a bounded length: 12_0, 12_1, 13_4 -> `12_[0-1]`, `13_[4]`."""
    arrays: dict[str, list[int]] = {}
    for element in elements:
        array, _, index = element.partition("_")
        arrays.setdefault(array, []).append(int(index))
    found: list[str] = []
    for array in sorted(arrays, key=int):
        part: list[str] = []
        for span in compress_indices(arrays[array]).split(","):
            if part and sum(map(len, part)) + len(part) + len(span) > LONGEST_EXPRESSION:
                found.append(f"{array}_[{','.join(part)}]")
                part = []
            part.append(span)
        found.append(f"{array}_[{','.join(part)}]")
    return tuple(found)


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

    States are as printed: `CANCELLED by 1000` names who cancelled (0: root), plain `CANCELLED` is Slurm itself, for want of a dependency.
    Lines that cannot be understood are left out: accounting only explains, it decides nothing.
    """
    found: dict[str, str] = {}
    for line in text.splitlines():
        job, _, state = line.partition("|")
        for element in expand_job(job.strip()):
            found[element] = " ".join(state.split())
    return found


def has_ended(state: str) -> bool:
    """Whether a state of accounting is one that a job ends in: what lags may still call it pending or running."""
    return state.partition(" ")[0] in _ENDINGS


def failed_to_launch(element: QueuedElement) -> bool:
    """Whether Slurm could not start an element on the node it chose, and holds it now until somebody interferes."""
    return element.state == "PENDING" and _words(element.reason) in _LAUNCH_FAILURES


def why_stuck(element: QueuedElement) -> str:
    """Why a pending element will never start unless somebody interferes; "" if it only waits. Only reasons known for it are."""
    if element.state != "PENDING":
        return ""
    reason = _words(element.reason)
    found = _STUCK.get(reason, "") or ("its request is above a limit of the site" if _ABOVE_LIMIT.fullmatch(reason) else "")
    return f"{found} ({element.reason})" if found else ""


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


def _words(reason: str) -> str:
    """A reason as it is compared: squeue prints some with blanks that scontrol prints with underscores."""
    return reason.replace("_", " ").lower()
