"""The end of an attempt whose worker could not state it itself: killed, or gone without a word. Whoever started the worker states it."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from signal import SIGKILL, Signals

from jobs.experiment.graph import Node
from jobs.store.failures import FailureClass
from jobs.store.layout import AttemptFolder, StageFolder
from jobs.store.records import Ending, Outcome, attempt_numbers, read_claim, read_outcome, read_result, write_outcome

ENDS_OF_ITS_OWN = (0, 1, 3)  # exit codes after which a worker has said itself what became of its stages
VMSTAT = Path("/proc/vmstat")


def attempt_of(folder: StageFolder, pid: int) -> AttemptFolder | None:
    """The newest attempt of a stage, if a process of this machine claimed it."""
    for number in attempt_numbers(folder)[-1:]:
        claim = read_claim(folder.attempt(number))
        if claim is not None and claim.pid == pid and claim.host == socket.gethostname():
            return folder.attempt(number)
    return None


def state_end(folder: StageFolder, node: Node, pid: int, failure: FailureClass, *, code: int | None, signal: int | None, log: str) -> bool:
    """Write how the attempt of a process ended; False if it has claimed none, or has ended it itself."""
    attempt = attempt_of(folder, pid)
    claim = read_claim(attempt) if attempt else None
    if attempt is None or claim is None or read_outcome(attempt) or read_result(folder, node.key):
        return False
    ending = Ending.interrupted if failure is FailureClass.interrupted else Ending.failed
    name, message = _words(code, signal, log)
    seconds = round(time.time() - claim.started, 3)
    outcome = Outcome(claim.attempt, ending, name, message, f"log: {log}", claim.host, seconds, claim.slurm_job, failure.name)
    write_outcome(attempt, outcome)
    return True


def oom_kills() -> int | None:
    """Processes of this machine that the kernel has killed for want of memory since it started; None where it does not say."""
    try:
        lines = VMSTAT.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def class_of_death(signal: int | None, *, stopping: bool, beside: int, oom_killed: bool) -> FailureClass:
    """Why a worker died that left no word. Pure. `oom_killed`: the kernel has killed for want of memory meanwhile, or does not say."""
    if stopping:
        return FailureClass.interrupted
    if signal != SIGKILL:
        return FailureClass.code
    if not oom_killed:
        return FailureClass.node
    return FailureClass.crowded if beside else FailureClass.memory


def _words(code: int | None, signal: int | None, log: str) -> tuple[str, str]:
    if signal is None:
        return f"exit{code}", f"the worker left with exit code {code} and said nothing: see {log}"
    name = Signals(signal).name
    hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
    return name, f"the worker was killed by {name}{hint}: see {log}"
