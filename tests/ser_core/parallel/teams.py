"""Teams of real processes for tests, forked from a server that has already imported torch."""

from __future__ import annotations

import functools
import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.team import FileTeam

PRELOADED = "tests.ser_core.parallel.preloaded"


@dataclass
class FolderTeam(FileTeam):
    """A team whose promises of progress are recorded."""

    promises: list[float] = field(default_factory=list)

    def advance(self, within: float) -> None:
        self.promises.append(within)


@dataclass
class Ended:
    """How one process ended: what its work returned or raised, and its exit code."""

    returned: Any = None
    error: BaseException | None = None
    exit: int | None = None


Work = Callable[..., Any]  # work(team, *arguments)


@functools.cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    return context


def run_team(folder: Path, size: int, work: Work, *arguments: Any, hung: int | None = None, seconds: float = 300.0) -> list[Ended]:
    """`work` in `size` processes, all of them over when this returns.

    One that takes longer is killed, and has neither result nor error; the one that is to be `hung` is not waited for.
    """
    folder.mkdir(parents=True)
    started = time.monotonic()
    processes = [_context().Process(target=_run, args=(folder, rank, size, work, arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    for rank, process in enumerate(processes):
        if rank != hung:
            process.join(max(0.0, started + seconds - time.monotonic()))
    found = []
    for rank, process in enumerate(processes):
        if process.exitcode is None:
            process.kill()
            process.join()
        path = folder / f"ended-{rank}"
        ended = pickle.loads(path.read_bytes()) if path.exists() else Ended()  # noqa: S301 - ours
        ended.exit = process.exitcode
        found.append(ended)
    return found


def results(ended: list[Ended]) -> list[Any]:
    """What all of them returned; none may have failed."""
    assert [(each.error, each.exit) for each in ended] == [(None, 0)] * len(ended)
    return [each.returned for each in ended]


def _run(folder: Path, rank: int, size: int, work: Work, arguments: tuple[Any, ...]) -> None:
    ended = Ended()
    try:
        ended.returned = work(FolderTeam(folder, rank, size), *arguments)
    except Exception as error:
        traceback.print_exc()
        ended.error = error
    (folder / f"ending-{rank}").write_bytes(pickle.dumps(ended))
    (folder / f"ending-{rank}").rename(folder / f"ended-{rank}")
