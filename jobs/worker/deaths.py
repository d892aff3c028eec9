"""Records the outcome of an attempt whose worker died before writing one. Called by the process that started the worker."""

from __future__ import annotations

import socket
from pathlib import Path
from signal import SIGKILL, Signals

from jobs.experiment.graph import Node
from jobs.store.clock import file_time
from jobs.store.failures import FailureClass
from jobs.store.layout import AttemptFolder, StageFolder
from jobs.store.records import Ending, Outcome, attempt_numbers, read_claim, read_outcome, read_result, write_outcome
from jobs.worker.processes import Exit

RECORDED_EXITS = (0, 1, 3)  # exit codes of a worker that has recorded how its stages ended
VMSTAT = Path("/proc/vmstat")


def attempt_of(folder: StageFolder, pid: int) -> AttemptFolder | None:
    """The newest attempt of a stage, if process `pid` of this machine claimed it."""
    for number in attempt_numbers(folder)[-1:]:
        claim = read_claim(folder.attempt(number))
        if claim is not None and claim.pid == pid and claim.host == socket.gethostname():
            return folder.attempt(number)
    return None


def record_death(folder: StageFolder, node: Node, pid: int, failure: FailureClass, ended: Exit, log: str) -> None:
    """Write the outcome of the attempt that process `pid` claimed, unless there is none or the worker has recorded it itself."""
    attempt = attempt_of(folder, pid)
    claim = read_claim(attempt) if attempt else None
    if attempt is None or claim is None or read_outcome(attempt) or read_result(folder, node.key):
        return
    ending = Ending.interrupted if failure is FailureClass.interrupted else Ending.failed
    error, message = _error(ended, log, at_limit=failure is FailureClass.time_limit)
    seconds = round(file_time(folder.root) - claim.started, 3)
    write_outcome(
        attempt, Outcome(claim.attempt, ending, error, message, f"log: {log}", claim.host, seconds, claim.slurm_job, failure.name)
    )


def oom_kills() -> int | None:
    """Processes of this machine that the kernel's out-of-memory killer has ended since boot; None where the kernel does not report it."""
    try:
        lines = VMSTAT.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def class_of_death(signal: int | None, *, stopping: bool, concurrent: int, oom_killed: bool, at_limit: bool = False) -> FailureClass:
    """Failure class of a worker that died without an outcome. Pure.

    `stopping`: it had been asked to stop. `concurrent`: stages that shared its memory. `oom_killed`: whether the out-of-memory killer was
    active meanwhile, or may have been. `at_limit`: it was killed for running on after its time limit.
    """
    if stopping:
        return FailureClass.interrupted
    if at_limit:
        return FailureClass.time_limit
    if signal != SIGKILL:
        return FailureClass.code
    if not oom_killed:
        return FailureClass.node
    return FailureClass.crowded if concurrent else FailureClass.memory


def _error(ended: Exit, log: str, *, at_limit: bool) -> tuple[str, str]:
    if ended.signal is None:
        return f"exit{ended.code}", f"the worker exited with code {ended.code} without recording an error: see {log}"
    name = Signals(ended.signal).name
    if at_limit:
        return name, f"the worker reached its time limit (`minutes`) and wrote no checkpoint in time: see {log}"
    hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
    return name, f"the worker was killed by {name}{hint}: see {log}"
