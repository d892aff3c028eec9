"""Makes the team of a task, and what its followers do: compute what the leader orders, and write no records.

Under Slurm all processes of the step run the same command, and the step says which is which. Elsewhere the leader forks its followers
before it has started a thread; they are in its process group and die with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from jobs.experiment.registry import StopSignal, Team
from jobs.signals import StopRequest
from jobs.store.layout import Layout
from jobs.worker.processes import die_with, end_child, limit_threads
from jobs.worker.stage import EXIT_CODES, Verdict, WorkerProcess
from jobs.worker.task import compute
from jobs.worker.team_channel import Meeting, Seat, TeamError, call, find, listen, meeting_file, publish, seat_in_step
from jobs.worker.team_follower import LOST, Follower, Patience, patience_of
from jobs.worker.team_leader import Leader

SEEN_SECONDS = 60.0  # until a folder that another machine has made is seen: what attribute caches of NFS may hide
SEEN_POLL_SECONDS = 0.2
JOIN_POLL_SECONDS = 0.2


def work_together(process: WorkerProcess, work: Callable[[], int], environment: Mapping[str, str]) -> int:
    """Do the work of a task with as many processes as its description says; the exit code of this one.

    `work` is what the leader does, with `process.team` set where it is not alone. Call it before any thread is started.
    """
    patience = patience_of(environment)
    seat = seat_in_step(environment, process.description.team) or Seat(0, process.description.team, 0)
    layout = Layout(Path(process.place.results), process.place.experiment)
    if seat.size == 1:
        return work()
    file = meeting_file(layout, environment) if "SLURM_PROCID" in environment else None
    if seat.rank > 0 and file is not None:
        return follow(seat, lambda: find(file), process, patience)
    try:
        with _leading(process, seat.size, file, patience) as process.team:
            return work()
    except TeamError as error:  # nothing is claimed yet
        process.tell(f"no team: {error}")
        return EXIT_CODES[Verdict.interrupted] if process.stop() else LOST


def follow(seat: Seat, look: Callable[[], Meeting | None], process: WorkerProcess, patience: Patience) -> int:
    """Obey the leader until it sends us away. `look` says where it listens, once that is known."""

    def tell(line: str) -> None:
        process.tell("\n".join(f"rank {seat.rank}: {each}" for each in line.split("\n")))

    follower = join(seat, look, patience, process.stop)
    if follower is None:
        tell("asked to stop" if process.stop() else f"the leader did not answer for {patience.join:g} s")
        return EXIT_CODES[Verdict.interrupted] if process.stop() else LOST
    for order in follower.orders():
        try:
            follow_order(order, follower, process.stop, tell)
        except (Exception, SystemExit) as error:
            tell(f"{type(error).__name__}: {error}")
            follower.failed(error)
        else:
            follower.done()
    return 0


def join(seat: Seat, look: Callable[[], Meeting | None], patience: Patience, stop: StopRequest | None = None) -> Follower | None:
    """Take our seat in the team; None if the leader cannot be found, or we are asked to stop before."""
    deadline = time.monotonic() + patience.join
    while time.monotonic() < deadline and not (stop and stop()):
        meeting = look()
        line = call(meeting, seat) if meeting else None
        if line is not None:
            return Follower(seat, line, patience=patience, stop=stop)
        time.sleep(JOIN_POLL_SECONDS)
    return None


@contextlib.contextmanager
def _leading(process: WorkerProcess, size: int, file: Path | None, patience: Patience) -> Iterator[Leader]:
    """The leader of a team that meets by a file, or, without one, on this machine."""
    server, meeting = listen(local=file is None)
    children: list[int] = []
    try:
        if file is None:
            process.threads = max(1, process.threads // size)
            limit_threads(process.threads)
            for rank in range(1, size):
                children.append(_fork(Seat(rank, size, rank), meeting, process, patience))
        else:
            publish(file, meeting)
        with Leader(size, server, meeting, patience=patience, tell=process.tell, children=children, stop=process.stop) as leader:
            lacks = leader.gather()
            if lacks:
                raise TeamError(lacks)
            if file is not None:
                file.unlink(missing_ok=True)
            yield leader
    finally:
        if file is not None:
            file.unlink(missing_ok=True)


def _fork(seat: Seat, meeting: Meeting, process: WorkerProcess, patience: Patience) -> int:
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _become_follower(parent, seat, meeting, process, patience)
    return pid


def _become_follower(parent: int, seat: Seat, meeting: Meeting, process: WorkerProcess, patience: Patience) -> NoReturn:
    code = LOST
    try:
        die_with(parent, signal.SIGKILL)
        code = follow(seat, lambda: meeting, process, patience)
    except BaseException:
        traceback.print_exc()
    finally:
        end_child(code)


def follow_order(order: Mapping[str, Any], team: Team, stop: StopSignal, tell: Callable[[str], None]) -> None:
    """A follower's part of a stage; what it returns is the leader's to publish. Raises TeamError for a folder that cannot be seen here."""
    _wait_for([Path(folder) for folder in (*order["upstream"].values(), order["output"])])
    compute(order, team, stop, tell)


def _wait_for(folders: list[Path], seconds: float = SEEN_SECONDS) -> None:
    """A shared file system may show this machine late what another has made."""
    deadline = time.monotonic() + seconds
    while missing := [folder for folder in folders if not folder.is_dir()]:
        if time.monotonic() >= deadline:
            raise TeamError(f"{missing[0]} is not to be seen on this machine")
        time.sleep(SEEN_POLL_SECONDS)
