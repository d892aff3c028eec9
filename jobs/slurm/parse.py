"""Parses the output of Slurm's commands: the queue, accounting, the site's configuration, and why sbatch failed. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

QUEUE_FORMAT = "%i|%T|%r|%N|%j"  # the name last: it may contain the separator; a mark before it, because a name may contain line breaks
ACCOUNTING_FORMAT = "JobID,State,End,NodeList,JobName%100"  # with SLURM_TIME_FORMAT=%s: the end in seconds since the epoch
NODE_FORMAT = "%N|%P"  # of sinfo: one line for each node and partition
LONGEST_EXPRESSION = 8000  # characters of one array expression on a command line
_ARRAY = re.compile(r"(\d+)_\[([0-9,:-]+)(?:%\d+)?\]")
_SINGLE = re.compile(r"(\d+)(?:_(\d+))?(?:\+\d+)?")
_FINAL_STATES = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT")
)
# No node, and none before it is released or, PENDING, before its turn. CONFIGURING is not among them: its nodes are booting.
WAITING_STATES = frozenset(("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"))
HELD_BY_USER = "held by you: `scontrol release` lets it start"
_STUCK_STATES = {
    "REQUEUE_HOLD": "requeued and held: `scontrol release` lets it start",
    "SPECIAL_EXIT": "requeued and held in the state SPECIAL_EXIT: `scontrol release` lets it start",
    "RESV_DEL_HOLD": "held because its reservation was deleted: cancel it, or `scontrol release`",
}
_LAUNCH_FAILURES = frozenset(("launch failed requeued held", "user env retrieval failed requeued held"))
# Reasons of squeue, in lower case. Temporary ones (Resources, Priority, ReqNodeNotAvail, AssocMaxJobsLimit, AssocGrp..., QOSMaxJobs...,
# PartitionDown, Licenses, ...) are not listed.
_STUCK = {
    **dict.fromkeys(_LAUNCH_FAILURES, "Slurm could not start it on the node it chose"),
    "jobhelduser": HELD_BY_USER,
    "job requeued in held state": HELD_BY_USER,
    "jobheldadmin": "held by the site's administrator",
    "badconstraints": "no node fits its request",
    "dependencyneversatisfied": "what it waits for has failed",
    "partitiontimelimit": "its time limit is above the partition's",
    "partitionnodelimit": "it requests more nodes than the partition allows",
    "invalidaccount": "its account is not valid",
    "invalidqos": "its QOS is not valid",
    "accountnotallowed": "its account may not use the partition",
    "qosnotallowed": "its QOS may not be used there",
    "reservationdeleted": "its reservation was deleted",
}
# A limit of an association or a QOS on the size or time of one job: waiting does not help.
_ABOVE_LIMIT = re.compile(r"(?:assoc|qos)max[a-z/]+per(?:job|node)(?:limit)?|qosmin[a-z/]+|maxmemperlimit")


@dataclass(frozen=True)
class JobRef:
    """A job id as Slurm prints it, split: `JOB`, or `ARRAY_INDEX` of one array element."""

    array: str
    index: int | None = None  # None: a whole job

    @classmethod
    def parse(cls, job: str) -> JobRef:
        """Any other text is a job without an index: `JOB1` of a preview, `?NAME` of a submission whose job id is not known yet."""
        array, _, index = job.partition("_")
        return cls(array, int(index)) if index.isdecimal() else cls(job)

    @property
    def order(self) -> tuple[int, str, int]:
        """Sort key: by number, job 9 before job 10."""
        return len(self.array), self.array, -1 if self.index is None else self.index

    def __str__(self) -> str:
        return self.array if self.index is None else f"{self.array}_{self.index}"


@dataclass(frozen=True)
class QueuedElement:
    """One job or array element in Slurm's queue."""

    job: str  # `JOB` or `ARRAY_INDEX`
    state: str  # PENDING, RUNNING, COMPLETING, ...
    reason: str
    name: str
    node: str = ""  # the one on which it runs or ran; "": none yet, or several

    @property
    def ref(self) -> JobRef:
        return JobRef.parse(self.job)


@dataclass(frozen=True)
class Accounted:
    """What accounting reports of one job or array element."""

    state: str  # as printed: COMPLETED, `CANCELLED by 1000`, ...
    end: float | None = None  # seconds since the epoch; None: not ended, or not in that format
    name: str = ""
    node: str = ""  # "": none, or several


class Refusal(Enum):
    """Why sbatch returned no job id."""

    full = "full"  # a limit on jobs in the queue: retry later
    refused = "refused"  # Slurm rejected the request: the user has to change it
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
    """Elements of a printed job id: `12` -> 12; `12_3` -> 12_3; `12_[3-5%2]` -> 12_3, 12_4, 12_5; () for any other text."""
    array = _ARRAY.fullmatch(text)
    if array:
        return tuple(f"{array[1]}_{index}" for index in expand_indices(array[2]))
    single = _SINGLE.fullmatch(text)
    return (f"{single[1]}_{single[2]}" if single[2] else single[1],) if single else ()


def array_expressions(elements: Iterable[str]) -> tuple[str, ...]:
    """Array elements as arguments of commands: 12_0, 12_1, 13_4 -> `12_[0-1]`, `13_[4]`.

    No expression is longer than LONGEST_EXPRESSION. ValueError for a job without an index.
    """
    arrays: dict[str, list[int]] = {}
    for element in elements:
        ref = JobRef.parse(element)
        if ref.index is None:
            raise ValueError(f"{element}: an element is ARRAY_INDEX")
        arrays.setdefault(ref.array, []).append(ref.index)
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


def parse_queue(text: str, mark: str) -> tuple[QueuedElement, ...]:
    """Elements in the output of `squeue --noheader --format=MARK QUEUE_FORMAT`; `mark`: what begins each job, unknown to other programs.

    A job in the state REVOKED runs on another cluster of a federation and is left out. ValueError for a job that cannot be parsed: if it
    were skipped, it would be taken for ended.
    """
    first, *jobs_printed = text.split(mark)
    if first.strip():
        raise ValueError(f"unexpected output of squeue: {first[:200]!r}")
    found: list[QueuedElement] = []
    for line in jobs_printed:
        fields = [field.strip() for field in line.removesuffix("\n").split("|", 4)]
        jobs = expand_job(fields[0])
        if len(fields) != 5 or not jobs:
            raise ValueError(f"unexpected output of squeue: {line[:200]!r}")
        _, state, reason, nodes, name = fields
        if state != "REVOKED":
            found.extend(QueuedElement(job, state, reason, name, _one_node(nodes)) for job in jobs)
    return tuple(found)


def parse_accounting(text: str) -> dict[str, Accounted]:
    """Element -> state, end, node and job name in the output of `sacct -X --noheader --parsable2 --format=ACCOUNTING_FORMAT`.

    States are as printed: `CANCELLED by 1000` gives the uid that cancelled (0: root), plain `CANCELLED` means that a dependency failed.
    Lines that cannot be parsed are ignored: accounting only explains, it decides nothing.
    """
    found: dict[str, Accounted] = {}
    for line in text.splitlines():
        job, state, end, nodes, name = [*line.split("|", 4), "", "", "", ""][:5]
        seconds = float(end) if end.isdecimal() and int(end) else None
        for element in expand_job(job.strip()):
            found[element] = Accounted(" ".join(state.split()), seconds, name.strip(), _one_node(nodes.strip()))
    return found


def _one_node(nodes: str) -> str:
    """The node of a node list; "" for none (`None assigned`, `(null)`) and for several (`n[1-2]`, `n1,n2`)."""
    return nodes if nodes and not set(nodes) & set(" ,[()") else ""


def count_nodes(text: str, partitions: str) -> int:
    """Nodes of some partitions, in the output of `sinfo --Node --noheader --format=NODE_FORMAT`; 0 if there is none.

    `partitions`: names with commas in between; "": the partition that sinfo marks as the default.
    """
    wanted = {f"{name}{mark}" for name in partitions.split(",") for mark in ("", "*")} if partitions else None
    rows = (line.strip().split("|", 1) for line in text.splitlines() if "|" in line)
    return len({node for node, partition in rows if (partition.endswith("*") if wanted is None else partition in wanted)})


def is_final(state: str) -> bool:
    """Whether a job in that state has ended; accounting that lags may still report an ended job as pending or running."""
    return state.partition(" ")[0] in _FINAL_STATES


def failed_to_launch(element: QueuedElement) -> bool:
    """Whether Slurm could not start an element on the node it chose and put it back into the queue, held."""
    return element.state in WAITING_STATES and _normalised(element.reason) in _LAUNCH_FAILURES


def why_stuck(element: QueuedElement) -> str:
    """Why a waiting element will never start without intervention; "" if it only waits, also for reasons that are not known here."""
    if element.state not in WAITING_STATES:
        return ""
    reason = _normalised(element.reason)
    found = (
        _STUCK_STATES.get(element.state, "")
        or _STUCK.get(reason, "")
        or ("its request is above a limit of the site" if _ABOVE_LIMIT.fullmatch(reason) else "")
    )
    return f"{found} ({element.reason})" if found else ""


def reason_given(element: QueuedElement) -> str:
    """Slurm's reason why an element is pending; "" if it states none: its scheduler has not considered the element yet."""
    return "" if element.reason.strip("()").lower() in ("", "none", "null", "n/a") else element.reason


def describe_pending(element: QueuedElement) -> str:
    """`is pending (Priority)`, `is pending`, or `will never start: ...`."""
    stuck, reason = why_stuck(element), reason_given(element)
    return f"will never start: {stuck}" if stuck else f"is pending ({reason})" if reason else "is pending"


def parse_site(text: str) -> dict[str, str]:
    """Key -> value in the output of `scontrol show config`."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def site_number(site: Mapping[str, str], key: str) -> int:
    """A whole number of the site's configuration; 0 if it is missing or no number."""
    return int(site.get(key, "")) if site.get(key, "").isdigit() else 0


def largest_array(site: Mapping[str, str]) -> int:
    """Most tasks of one array by the site's configuration: MaxArraySize, or max_array_tasks of SchedulerParameters; 0: no limit."""
    tasks = re.search(r"(?:^|,)max_array_tasks=(\d+)", site.get("SchedulerParameters", ""))
    limits = (site_number(site, "MaxArraySize"), int(tasks[1]) if tasks else 0)
    return min(filter(None, limits), default=0)


def least_limit(text: str, columns: Mapping[int, str], limit: int) -> int:
    """The smallest limit among the rows of `sacctmgr --noheader --parsable2`; 0 if there is none.

    Only rows whose column `i` equals `columns[i]` count; column `limit` holds the limit.
    """
    rows = [line.split("|") for line in text.splitlines()]
    fitting = [row for row in rows if len(row) > limit and all(row[column] == value for column, value in columns.items())]
    return min((int(row[limit]) for row in fitting if row[limit].isdigit()), default=0)


_LIMIT = re.compile(r"\b(?:assoc|qos)(?:max|min|grp)\w*", re.IGNORECASE)  # the limit that a request exceeds, on a line of its own
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
    "standby mode",
    "authentication",
    "munge",
    "unspecified error",
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
_REFUSED = ("batch job submission failed", "invalid", "unrecognized", "sbatch: error: unable to open", "sbatch: fatal", "not permitted")


def classify_refusal(text: str) -> Refusal:
    """Why sbatch failed, by its error message. An unfamiliar message counts as a lost reply: the job may exist.

    A limit that is named decides: one on jobs in the queue (`QOSMaxSubmitJobPerUserLimit`) is temporary, any other one is permanent. The
    general message beside it mentions both.
    """
    words = text.lower()
    limits = _LIMIT.findall(words)
    if limits:
        return Refusal.full if any("submit" in limit for limit in limits) else Refusal.refused
    if any(mark in words for mark in _LOST_REPLY):
        return Refusal.unknown
    if any(mark in words for mark in _FULL):
        return Refusal.full
    return Refusal.refused if any(mark in words for mark in _REFUSED) else Refusal.unknown


def _normalised(reason: str) -> str:
    """A reason in lower case with blanks: squeue prints blanks where scontrol prints underscores."""
    return reason.replace("_", " ").lower()
