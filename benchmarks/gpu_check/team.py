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
# Imported once, by the server that the processes are forked from: some seconds of each process otherwise. None of them initialises CUDA.
PRELOADED = ("torch.distributed", "transformers.models.wav2vec2.modeling_wav2vec2")


@dataclass
class FileTeam:
    """One process of a team, as `ser_core.parallel.team.Team`: what the leader shares is a file."""

    folder: Path
    rank: int
    size: int
    local_rank: int = 0
    address: str = "127.0.0.1"
    _shared: int = 0

    def share(self, value: str = "") -> str:
        path = self.folder / f"shared-{self._shared}"
        self._shared += 1
        if self.rank == 0:
            _write(path, value)
            return value
        return _wait_for(path, SHARE_SECONDS)

    def post(self, key: str, value: str) -> None:
        _write(self._posted(key), value)

    def find(self, key: str, seconds: float) -> str:
        return _wait_for(self._posted(key), seconds)

    def _posted(self, key: str) -> Path:
        """The file of a key; since the leader shared another value the same key is another one, as in the next stage of a real team."""
        return self.folder / f"posted-{self._shared}-{key.encode().hex()}"

    def advance(self, within: float) -> None:
        del within


def _write(path: Path, value: str) -> None:
    path.with_suffix(".tmp").write_text(value)
    path.with_suffix(".tmp").rename(path)


def _wait_for(path: Path, seconds: float) -> str:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise ConnectionError(f"{path.name}: not there after {seconds:g} s")
        time.sleep(POLL)
    return path.read_text()


@dataclass(frozen=True)
class Ended:
    """What a process returned, a JSON value, or why it did not."""

    returned: Any
    error: str  # "" if it returned


Work = Callable[..., Any]  # work(team, *arguments), a function of a module


def run_team(folder: Path, size: int, work: Work, arguments: Sequence[Any], seconds: float) -> list[Ended]:
    """Call `work` in `size` new processes and wait for them; those still running after `seconds` are killed."""
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")  # as with "spawn", a process inherits no CUDA context
    context.set_forkserver_preload(list(PRELOADED))
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
