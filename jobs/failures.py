"""What went wrong with an attempt, and what follows: one policy per class of failure. Pure.

| class         | seen as                                                  | what follows                                     |
|---------------|----------------------------------------------------------|--------------------------------------------------|
| node          | NODE_FAIL, BOOT_FAIL, PREEMPTED, requeued, lost, killed  | same seed, resumed; free while it makes progress |
| interrupted   | asked to stop, and stopped                               | the same                                         |
| time limit    | TIMEOUT, Slurm's warning before it                       | resumed; free, and not stopped, with progress    |
| memory        | OUT_OF_MEMORY, out-of-memory errors                      | half the work per pass and more memory; twice    |
| crowded       | the same while other stages ran beside it (jobs.packing) | resumed, from now on with nothing beside it      |
| communication | errors of NCCL, gloo, sockets between processes          | same seed on other nodes; three times            |
| disk          | no space left, quota exceeded                            | same seed; twice                                 |
| code          | any other exception                                      | stopped                                          |
| refused       | configuration or data that only the user can mend        | stopped                                          |
| divergence    | NaN, a result that is not finite                         | another seed for the slot (jobs.rounds)          |
| cancelled     | `cancel`, or the owner's own scancel                     | stopped until the user launches again            |

Where time or memory that was predicted from siblings (jobs.experience) was not enough, the attempt is free: the next one gets what is
configured, and the work of a pass stays as it is.
"""

from __future__ import annotations

import errno
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from jobs.errors import UsageError
from jobs.plan import Asked, Departure, NodeFacts, Request

MAX_LOST = 5  # attempts in a row that may end by interruption or without a word and without a newer checkpoint
MAX_SILENT = 4  # jobs of a stage that may leave the queue, everything upstream of it done, before the worker begins
DOUBTFUL_SILENT = 2  # of them, after which it may have been a predicted request: a start that takes longer than any before
MEMORY_RETRIES = 2
MEMORY_STEP = 1.5  # on the memory asked for, each time
COMMUNICATION_RETRIES = 3
DISK_RETRIES = 2


class FailureClass(Enum):
    """Why an attempt has no result; the names are stored in records."""

    node = "node"
    interrupted = "interrupted"
    time_limit = "time limit"
    memory = "memory"
    crowded = "crowded"
    communication = "communication"
    disk = "disk"
    code = "code"
    refused = "refused"
    divergence = "divergence"
    cancelled = "cancelled"


# What Slurm says of a job whose worker left no word. FAILED and COMPLETED: it was killed, or left without having begun.
_OF_STATE = {
    "TIMEOUT": FailureClass.time_limit,
    "DEADLINE": FailureClass.time_limit,
    "OUT_OF_MEMORY": FailureClass.memory,
}
_GPU = re.compile(r"CUDA|\bHIP\b|OutOfMemoryError")
_NODES_FAULT = frozenset(("NODE_FAIL", "BOOT_FAIL", "LAUNCH_FAILED"))
_CANCELLED_BY = re.compile(r"CANCELLED by (\d+)")
_MEMORY_NAMES = frozenset(("MemoryError", "OutOfMemoryError", "_ArrayMemoryError"))
_MEMORY = re.compile(
    r"out of (shared )?memory|can't allocate memory|cannot allocate memory|std::bad_alloc|failed to allocate|STATUS_ALLOC_FAILED"
    r"|could not (create|execute) a primitive",  # oneDNN's words for it, seen under a real limit on memory
    re.IGNORECASE,
)
_COMMUNICATION_NAMES = frozenset(("DistError", "DistBackendError", "DistNetworkError", "DistStoreError", "ConnectionError"))
# An error of the machine itself is met in the same way: the same seed on another node.
_COMMUNICATION = re.compile(
    r"\bNCCL\b|\bgloo\b|ProcessGroup|watchdog|connection (closed|reset) by peer|socket timeout|broken pipe|connect\(\) timed out"
    r"|application timeout caused pair closure"  # gloo, of a pair that an earlier time-out has broken
    r"|uncorrectable (ECC|NVLink)",
    re.IGNORECASE,
)
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_FULL_DISK_WORDS = re.compile(r"no space left on device|disk quota exceeded", re.IGNORECASE)


@dataclass(frozen=True)
class Ended:
    """An attempt that has no result and is over."""

    started: float  # seconds since the epoch
    failure: FailureClass
    error: str  # in one line
    node: str = ""
    nodes_fault: bool = False  # Slurm blames the node
    progress: bool = False  # it left a newer checkpoint than it found
    short_of: str = ""  # `time`, `memory` or `time or memory`, predicted from siblings, less than configured, and not enough
    suspects: tuple[str, ...] = ()  # machines that a failure of communication may be due to, where that is not `node` alone


def class_of_exception(error: BaseException) -> FailureClass:
    """From the classes, attributes and messages of an exception and of what it was raised from."""
    if getattr(error, "interrupted", False):
        return FailureClass.interrupted
    if isinstance(error, UsageError) or getattr(error, "problems", None) is not None:
        return FailureClass.refused
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    if any(getattr(each, "diverged", False) for each in seen):
        return FailureClass.divergence
    for tells, failure in ((_tells_of_memory, FailureClass.memory), (_tells_of_disk, FailureClass.disk)):
        if any(tells(each) for each in seen):
            return failure
    return FailureClass.communication if any(_tells_of_communication(each) for each in seen) else FailureClass.code


def class_of_state(state: str) -> FailureClass:
    """From the last state that Slurm gave of a job whose worker left no word ("": it did not say)."""
    if cancelled_by_hand(state):
        return FailureClass.cancelled
    return _OF_STATE.get(state, FailureClass.node)


def cancelled_by_hand(state: str) -> bool:
    """Whether a user ended the job: Slurm itself, and root, cancel as user 0."""
    by = _CANCELLED_BY.fullmatch(state)
    return by is not None and int(by[1]) != 0


def short_of(asked: Asked | None, failure: FailureClass, error: str, *, killed: bool = False, told: bool = True) -> str:
    """What an attempt that ended so was short of because less was asked for than configured: `time`, `memory`, `time or memory` or nothing.

    A worker that was `killed`, nobody says why, may have been killed for its memory: not every site tells. Where Slurm has not `told` at
    all how its job ended, it may have been for its time.
    """
    if asked is None:
        return ""
    time = failure is FailureClass.time_limit or (killed and not told)
    memory = killed or lacks_memory_of_host(failure, error)
    return " or ".join([*(["time"] if time and asked.less_time else []), *(["memory"] if memory and asked.less_memory else [])])


def lacks_memory_of_host(failure: FailureClass, error: str) -> bool:
    """Whether memory ran out that is asked of Slurm: that of a GPU is not."""
    return failure is FailureClass.memory and _GPU.search(error) is None


def blames_node(state: str) -> bool:
    """Whether Slurm says that the machine failed."""
    return state in _NODES_FAULT


def judge(
    attempts: Sequence[Ended],
    *,
    since: float,
    max_attempts: int,
    silent: Sequence[Departure] = (),
    cancelled: bool = False,
) -> NodeFacts:
    """What is to become of a stage without a result, from its attempts that are over, oldest first.

    Attempts begun before `since` (the last launch by hand) are forgiven, except that a training that diverged would do so again.
    What a prediction had made too short costs nothing, and is not forgotten by a launch: from then on it is as configured. So is it after
    `DOUBTFUL_SILENT` silent jobs, whatever ended them.
    `silent`: jobs submitted since then that left the queue before the worker began although everything upstream was done.
    """
    diverged = next((each.error for each in reversed(attempts) if each.failure is FailureClass.divergence), "")
    recent = [each for each in attempts if each.started >= since and each.failure is not FailureClass.divergence]
    last = recent[-1] if recent else None
    charged = [each for each in recent if not each.short_of]  # the others are the prediction's fault, and happen once
    counts = Counter(each.failure for each in charged)
    by_hand = cancelled or (last is not None and last.failure is FailureClass.cancelled)
    by_hand = by_hand or any(cancelled_by_hand(each.state) for each in silent[-1:] if last is None or each.submitted > last.started)
    silent = [each for each in silent if not cancelled_by_hand(each.state)]
    stopped = _reason_to_stop(charged, counts, silent, max_attempts)
    blamed = [each.node for each in recent if each.nodes_fault and each.node]
    cut_off = [each for each in recent if each.failure is FailureClass.communication]
    apart = {name for each in cut_off for name in each.suspects or (each.node,) if name}
    memory = min(counts[FailureClass.memory], MEMORY_RETRIES)
    doubtful = len(silent) >= DOUBTFUL_SILENT
    return NodeFacts(
        failures=sum(each.failure in COSTLY and not (each.failure is FailureClass.time_limit and each.progress) for each in charged),
        stopped=stopped,
        error=diverged or (last.error if last else _silent_error(silent)),
        failure=FailureClass.divergence.name if diverged else last.failure.name if last else FailureClass.node.name if silent else "",
        diverged=diverged,
        cancelled=by_hand,
        request=Request(memory, MEMORY_STEP**memory, tuple(sorted(apart))),
        bad_nodes=tuple(blamed),
        short_of_time=doubtful or any("time" in each.short_of for each in attempts),
        short_of_memory=doubtful or any("memory" in each.short_of for each in attempts),
    )


COSTLY = (
    FailureClass.time_limit,
    FailureClass.memory,
    FailureClass.communication,
    FailureClass.disk,
    FailureClass.code,
    FailureClass.refused,
)


def _reason_to_stop(recent: Sequence[Ended], counts: Counter[FailureClass], silent: Sequence[Departure], max_attempts: int) -> str:
    """Why nothing more is tried by itself; "" while there is something to try."""
    last = recent[-1] if recent else None
    if last is not None and last.failure in (FailureClass.code, FailureClass.refused):
        return last.error
    for failure, retries, what in (
        (FailureClass.memory, MEMORY_RETRIES, "memory ran out {} times, at last with a quarter of the work per pass"),
        (FailureClass.communication, COMMUNICATION_RETRIES, "{} attempts failed in communication"),
        (FailureClass.disk, DISK_RETRIES, "{} attempts found the disk full: make room"),
    ):
        if counts[failure] > retries:
            return what.format(counts[failure])
    if counts[FailureClass.time_limit] >= 2 and last is not None and last.failure is FailureClass.time_limit and not last.progress:
        return "two attempts ended at the time limit and the last one left no newer checkpoint: ask for more `minutes`"
    free = (FailureClass.node, FailureClass.interrupted, FailureClass.crowded)
    stalled = len(list(itertools.takewhile(lambda each: each.failure in free and not each.progress, reversed(recent))))
    if stalled > MAX_LOST:
        return f"{stalled} attempts in a row were lost or interrupted without a newer checkpoint"
    if len(silent) >= MAX_SILENT:
        return _silent_error(silent)
    fruitless = sum(not each.progress for each in recent)
    return f"{fruitless} attempts brought it no further (policy.max_attempts)" if fruitless >= max_attempts else ""


def _silent_error(silent: Sequence[Departure]) -> str:
    if not silent:
        return ""
    state = f", Slurm says {silent[-1].state}" if silent[-1].state else ""
    return f"{len(silent)} jobs ended before the worker began (last {silent[-1].job}{state})"


def _tells_of_memory(error: BaseException) -> bool:
    return any(each.__name__ in _MEMORY_NAMES for each in type(error).__mro__) or (
        isinstance(error, RuntimeError | OSError) and _MEMORY.search(str(error)) is not None
    )


def _tells_of_disk(error: BaseException) -> bool:
    return (isinstance(error, OSError) and error.errno in _FULL_DISK) or _FULL_DISK_WORDS.search(str(error)) is not None


def _tells_of_communication(error: BaseException) -> bool:
    named = any(each.__name__ in _COMMUNICATION_NAMES for each in type(error).__mro__)
    return named or (isinstance(error, RuntimeError) and _COMMUNICATION.search(str(error)) is not None)
