"""A team of processes for the check: started by this process, joined by files; each calls one function and reports how it ended."""

from __future__ import annotations

import json
import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL = 0.02
SHARE_SECONDS = 300.0


@dataclass
class FileTeam:
    """One process of a team, as `ser_core.parallel.team.Team`: what the leader shares is a file."""

    folder: Path
    rank: int
    size: int
    local_rank: int = 0
    _shared: int = 0

    def share(self, value: str = "") -> str:
        path = self.folder / f"shared-{self._shared}"
        self._shared += 1
        if self.rank == 0:
            path.with_suffix(".tmp").write_text(value)
            path.with_suffix(".tmp").rename(path)
            return value
        deadline = time.monotonic() + SHARE_SECONDS
        while not path.exists():
            if time.monotonic() > deadline:
                raise ConnectionError("the leader shares nothing")
            time.sleep(POLL)
        return path.read_text()

    def advance(self, within: float) -> None:
        del within


@dataclass(frozen=True)
class Ended:
    """What a process returned, a JSON value, or why it did not."""

    returned: Any
    error: str  # "" if it returned


Work = Callable[..., Any]  # work(team, *arguments), a function of a module


def run_team(folder: Path, size: int, work: Work, arguments: Sequence[Any], seconds: float) -> list[Ended]:
    """Call `work` in `size` new processes and wait for them; those still running after `seconds` are killed."""
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_run, args=(folder, rank, size, work, tuple(arguments))) for rank in range(size)]
    deadline = time.monotonic() + seconds
    for process in processes:
        process.start()
    ended = []
    for rank, process in enumerate(processes):
        process.join(max(0.0, deadline - time.monotonic()))
        late = process.exitcode is None
        if late:
            process.kill()
            process.join()
        path = folder / f"ended-{rank}.json"
        if path.exists():
            ended.append(Ended(**json.loads(path.read_text())))
        else:
            ended.append(Ended(None, f"killed after {seconds:.0f} s" if late else f"exit code {process.exitcode}"))
    return ended


def _run(folder: Path, rank: int, size: int, work: Work, arguments: tuple[Any, ...]) -> None:
    try:
        ended = {"returned": work(FileTeam(folder, rank, size, rank), *arguments), "error": ""}
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines()
        ended = {"returned": None, "error": f"{type(error).__name__}: {' / '.join(lines[:4])}"}
    path = folder / f"ended-{rank}.tmp"
    path.write_text(json.dumps(ended))
    path.rename(folder / f"ended-{rank}.json")
