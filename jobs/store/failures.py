"""Failure classes, and how an exception or a Slurm state is classified. Pure. jobs.control.failure_policy applies what follows:

| class         | seen as                                                  | what follows                                     |
|---------------|----------------------------------------------------------|--------------------------------------------------|
| node          | NODE_FAIL, BOOT_FAIL, PREEMPTED, requeued, lost, killed, | same seed, resumed; free while it makes progress |
|               | cancelled by another account                             |                                                  |
| interrupted   | asked to stop, and stopped                               | the same                                         |
| time limit    | TIMEOUT, Slurm's warning before it                       | resumed; free, and not stopped, with progress    |
| memory        | OUT_OF_MEMORY, out-of-memory errors                      | half the micro-batch and more memory; twice      |
| crowded       | the same while other stages shared its memory            | resumed, from now on with no stage beside it     |
| communication | errors of NCCL, gloo, sockets between processes          | same seed on other nodes; three times            |
| storage       | I/O errors of a file system, no space left, quota        | same seed after a pause, 5 minutes to 6 hours    |
| disk          | an artifact that is damaged                              | same seed; twice                                 |
| code          | any other exception                                      | stopped                                          |
| refused       | wrong configuration or data, no permission for a file    | stopped                                          |
| divergence    | NaN, a result that is not finite                         | another seed for the slot (jobs.control.rounds)  |
| cancelled     | `cancel`, or scancel by a user                           | stopped until the user launches again            |

Where a time or memory limit predicted from other runs (jobs.control.estimates) was too small, the attempt is free: the next one gets the
configured limit, and the micro-batch stays as it is.
"""

from __future__ import annotations

import errno
import re
from enum import Enum

from jobs.errors import UsageError


class FailureClass(Enum):
    """Why an attempt has no result; the names are stored in records."""

    node = "node"
    interrupted = "interrupted"
    time_limit = "time limit"
    memory = "memory"
    crowded = "crowded"
    communication = "communication"
    storage = "storage"
    disk = "disk"
    code = "code"
    refused = "refused"
    divergence = "divergence"
    cancelled = "cancelled"


# States of a job whose worker wrote no outcome. FAILED and COMPLETED count as `node`: it was killed, or exited before it started a stage.
_OF_STATE = {
    "TIMEOUT": FailureClass.time_limit,
    "DEADLINE": FailureClass.time_limit,
    "OUT_OF_MEMORY": FailureClass.memory,
}
_NODE_STATES = frozenset(("NODE_FAIL", "BOOT_FAIL", "LAUNCH_FAILED"))
_CANCELLED_BY = re.compile(r"CANCELLED by (\d+)")
_MEMORY_NAMES = frozenset(("MemoryError", "OutOfMemoryError", "_ArrayMemoryError"))
_MEMORY = re.compile(
    r"out of (shared )?memory|can't allocate memory|cannot allocate memory|std::bad_alloc|failed to allocate|STATUS_ALLOC_FAILED"
    r"|could not (create|execute) a primitive",  # oneDNN's message, seen under a real memory limit
    re.IGNORECASE,
)
_COMMUNICATION_NAMES = frozenset(("DistError", "DistBackendError", "DistNetworkError", "DistStoreError", "ConnectionError"))
# Errors of the GPU hardware are handled in the same way: same seed on another node.
_COMMUNICATION = re.compile(
    r"\bNCCL\b|\bgloo\b|ProcessGroup|watchdog|connection (closed|reset) by peer|socket timeout|broken pipe|connect\(\) timed out"
    r"|application timeout caused pair closure"  # gloo, of a pair that an earlier time-out has broken
    r"|uncorrectable (ECC|NVLink)",
    re.IGNORECASE,
)
# Of a file system that is full, read-only, or whose server does not answer, and of resources that a node lacks for a while.
_STORAGE = frozenset(
    (
        *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS, errno.EREMOTEIO),
        *(errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EAGAIN, errno.EMFILE, errno.ENFILE),
    )
)
# The same in the text of libraries that raise errors of their own.
_STORAGE_MESSAGE = re.compile(
    r"no space left on device|disk quota exceeded|input/output error|stale (NFS )?file handle|read-only file system", re.IGNORECASE
)


def class_of_exception(error: BaseException) -> FailureClass:
    """Class of an exception, by the types, attributes and messages of itself and of the exceptions it was raised from."""
    if getattr(error, "interrupted", False):
        return FailureClass.interrupted
    if isinstance(error, UsageError | PermissionError) or getattr(error, "problems", None) is not None:
        return FailureClass.refused
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    if any(getattr(each, "diverged", False) for each in seen):
        return FailureClass.divergence
    for matches, failure in (
        (_is_out_of_memory, FailureClass.memory),
        (is_storage_error, FailureClass.storage),
        (_is_communication, FailureClass.communication),
    ):
        if any(matches(each) for each in seen):
            return failure
    return FailureClass.code


def class_of_state(state: str) -> FailureClass:
    """Class of a job whose worker wrote no outcome, by its last Slurm state ("": unknown)."""
    if cancelled_by_hand(state):
        return FailureClass.cancelled
    return _OF_STATE.get(state, FailureClass.node)


def cancelled_by_hand(state: str) -> bool:
    """Whether its owner cancelled the job. Slurm itself and root cancel as user 0, another account is in words (jobs.slurm.queue)."""
    by = _CANCELLED_BY.fullmatch(state)
    return by is not None and int(by[1]) != 0


def blames_node(state: str) -> bool:
    """Whether a Slurm state means that the node failed."""
    return state in _NODE_STATES


def _is_out_of_memory(error: BaseException) -> bool:
    return any(each.__name__ in _MEMORY_NAMES for each in type(error).__mro__) or (
        isinstance(error, RuntimeError | OSError) and _MEMORY.search(str(error)) is not None
    )


def is_storage_error(error: BaseException) -> bool:
    """Whether a file system failed: what is stored there is neither known to be missing nor wrong."""
    return (isinstance(error, OSError) and error.errno in _STORAGE) or _STORAGE_MESSAGE.search(str(error)) is not None


def _is_communication(error: BaseException) -> bool:
    named = any(each.__name__ in _COMMUNICATION_NAMES for each in type(error).__mro__)
    return named or (isinstance(error, RuntimeError) and _COMMUNICATION.search(str(error)) is not None)
