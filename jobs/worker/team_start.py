"""Starts the team of a task, and what its followers do: compute what the leader requests, without writing records.

Under Slurm all processes of the step run the same command, and the step assigns the ranks. Elsewhere the leader forks its followers before
it has started a thread; they are in its process group and are killed with it.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.experiment.registry import StopSignal, Team
from jobs.signals import StopRequest
from jobs.store.records import write_json
from jobs.worker.processes import fork, limit_threads
from jobs.worker.stage import Verdict, WorkerProcess
from jobs.worker.task import check_code, compute, workplace_from_json
from jobs.worker.team_channel import (
    TEAM_LOST,
    ProcessRank,
    Rendezvous,
    TeamError,
    Timeouts,
    connect_to_leader,
    listen,
    rank_in_step,
    read_rendezvous,
    rendezvous_file,
    timeouts_of,
)
from jobs.worker.team_follower import Follower
from jobs.worker.team_leader import Leader

VISIBLE_SECONDS = 60.0  # how long the attribute cache of NFS may hide a folder that another machine has made
POLL_SECONDS = 0.2


def work_together(process: WorkerProcess, work: Callable[[], int], environment: Mapping[str, str]) -> int:
    """Compute a task with as many processes as its description requests; the exit code of this process.

    `work` is the leader's part, called with `process.team` set if there are followers. Call this before any thread is started.
    """
    timeouts = timeouts_of(environment)
    own = rank_in_step(environment, process.description.team) or ProcessRank(0, process.description.team, 0)
    if own.size == 1:
        return work()
    file = rendezvous_file(process.place.layout, environment) if "SLURM_PROCID" in environment else None
    if own.rank > 0 and file is not None:
        return follow(own, lambda: read_rendezvous(file), process, timeouts)
    try:
        with _leading(process, own.size, file, timeouts, one_machine=environment.get("SLURM_STEP_NUM_NODES") == "1") as process.team:
            return work()
    except TeamError as error:  # before any attempt is claimed
        process.report(f"no team: {error}")
        return Verdict.interrupted.exit_code if process.stop() else TEAM_LOST


def follow(own: ProcessRank, find: Callable[[], Rendezvous | None], process: WorkerProcess, timeouts: Timeouts) -> int:
    """Compute what the leader requests until it dismisses this process. `find` returns where the leader listens, once that is known."""

    def report(line: str) -> None:
        process.report("\n".join(f"rank {own.rank}: {each}" for each in line.split("\n")))

    follower = join(own, find, timeouts, process.stop)
    if follower is None:
        report("asked to stop" if process.stop() else f"the leader did not answer for {timeouts.join:g} s")
        return Verdict.interrupted.exit_code if process.stop() else TEAM_LOST
    for request in follower.requests():
        try:
            compute_request(request, follower, process.stop, report)
        except (Exception, SystemExit) as error:
            report(f"{type(error).__name__}: {error}")
            follower.failed(error)
        else:
            follower.done()
    return 0


def join(own: ProcessRank, find: Callable[[], Rendezvous | None], timeouts: Timeouts, stop: StopRequest | None = None) -> Follower | None:
    """Connect to the leader; None if it cannot be found in time, or this process is asked to stop before."""
    deadline = time.monotonic() + timeouts.join
    while time.monotonic() < deadline and not (stop and stop()):
        rendezvous = find()
        leader = connect_to_leader(rendezvous, own) if rendezvous else None
        if leader is not None:
            return Follower(own, leader, timeouts=timeouts, stop=stop)
        time.sleep(POLL_SECONDS)
    return None


@contextlib.contextmanager
def _leading(process: WorkerProcess, size: int, file: Path | None, timeouts: Timeouts, *, one_machine: bool) -> Iterator[Leader]:
    """The leader of a team that connects by a file or, without one, on this machine. TeamError if it is not complete in time.

    `one_machine`: all processes of the Slurm step are on this one.
    """
    server, rendezvous = listen(local=one_machine or file is None)
    children: list[int] = []
    try:
        if file is None:
            process.threads = max(1, process.threads // size)
            limit_threads(process.threads)
            for rank in range(1, size):
                own = ProcessRank(rank, size, rank)
                work = functools.partial(follow, own, lambda: rendezvous, process, timeouts)
                children.append(fork(work, death_signal=signal.SIGKILL))
        else:
            write_json(file, asdict(rendezvous), private=True)
        with Leader(size, server, rendezvous, timeouts=timeouts, report=process.report, children=children, stop=process.stop) as leader:
            problem = leader.wait_until_ready()
            if problem:
                raise TeamError(problem)
            if file is not None:
                file.unlink(missing_ok=True)
            yield leader
    finally:
        if file is not None:
            file.unlink(missing_ok=True)


def compute_request(request: Mapping[str, Any], team: Team, stop: StopSignal, report: Callable[[str], None]) -> None:
    """A follower's part of a stage; its return value is not used.

    Raises UsageError if the code that this machine sees was changed, TeamError for a folder that stays invisible on this machine.
    """
    check_code(workplace_from_json(request["place"]))
    _wait_for([Path(folder) for folder in (*request["upstream"].values(), request["output"])])
    compute(request, team, stop, report)


def _wait_for(folders: list[Path], seconds: float = VISIBLE_SECONDS) -> None:
    """Wait for folders that another machine has made: a shared file system may show them late."""
    deadline = time.monotonic() + seconds
    while missing := [folder for folder in folders if not folder.is_dir()]:
        if time.monotonic() >= deadline:
            raise TeamError(f"{missing[0]} does not exist on this machine")
        time.sleep(POLL_SECONDS)
