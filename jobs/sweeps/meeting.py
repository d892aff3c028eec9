"""How the nodes of a sweep's allocation meet: small files in a private folder of the sweep, one folder for every execution of a job.

    SWEEP/nodes/JOB.RESTART/         mode 0700
        NODE.json                    a node is there, where it can be reached, and what it can do
        start.json                   what the first node has decided: where its Ray listens, and how all start theirs
        token                        what members of this Ray prove themselves with, mode 0600
        over                         the driver has ended, with this exit code: everybody leaves

Files and no connections: a node may come late, or never, and a shared folder is there anyway.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from jobs.records import read_json, write_json, write_text
from jobs.sweeps.ray_cluster import write_token

POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Presence:
    """What a node says of itself."""

    node: str
    addresses: tuple[str, ...]
    symmetric: bool  # `ray symmetric-run` would be safe there


@dataclass(frozen=True)
class Start:
    """What the first node has decided."""

    number: int  # counted from 1: a port that somebody else was quicker to take makes another one necessary
    host: str
    port: int
    symmetric: bool  # everybody calls `ray symmetric-run`; else `ray start`
    node: str = ""  # who says so

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Meeting:
    """The folder of one execution of a job."""

    folder: Path

    @property
    def token(self) -> Path:
        return self.folder / "token"

    def open(self) -> None:
        """Make the folder; the first node does."""
        self.folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        if not self.token.exists():
            write_token(self.token)

    def attend(self, presence: Presence) -> None:
        """Say that a node is there."""
        self.folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        write_json(self.folder / f"{presence.node}.json", asdict(presence))

    def present(self) -> tuple[Presence, ...]:
        """The nodes that are there, by name."""
        found = [read_json(self.folder / name) for name in sorted(self._names()) if name.endswith(".json") and name != "start.json"]
        return tuple(Presence(each["node"], tuple(each["addresses"]), bool(each["symmetric"])) for each in found if each)

    def announce(self, start: Start) -> None:
        """Tell all how to start."""
        write_json(self.folder / "start.json", asdict(start))

    def start(self) -> Start | None:
        """What was announced last."""
        found = read_json(self.folder / "start.json") if "start.json" in self._names() else None
        return Start(**found) if found else None

    def end(self, code: int) -> None:
        """Tell all that it is over."""
        if self.code() is None:
            write_text(self.folder / "over", f"{code}\n")

    def code(self) -> int | None:
        """How it ended; None while it goes on."""
        if "over" not in self._names():
            return None
        text = (self.folder / "over").read_text(encoding="ascii").strip()
        return int(text) if text.isdigit() else 1

    def _names(self) -> list[str]:
        """Listed anew every time: that asks a network file system for what is new there."""
        try:
            return os.listdir(self.folder)
        except FileNotFoundError:
            return []


def meeting_of(sweep: Path, environment: Mapping[str, str]) -> Meeting:
    """Where the nodes of this execution of this job meet. KeyError outside of Slurm."""
    return Meeting(sweep / "nodes" / f"{environment['SLURM_JOB_ID']}.{environment.get('SLURM_RESTART_COUNT', '0')}")


def waited(true: Callable[[], object], seconds: float) -> bool:
    """Poll until `true()`, for so long at most; whether it came to pass."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS)
    return True
