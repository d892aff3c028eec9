"""How the processes of one team find one another, and the lines of JSON they exchange.

The leader listens on a port that the kernel gives it, and says where in a private file of the experiment, named by Slurm job, restart and
step: two jobs on one machine, or two executions of a requeued job, never meet. Either side proves that it has read the file; the token in
it is never sent. What the leader forks itself on its own machine is told in memory.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import select
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.store.attempts import own_node
from jobs.store.layout import Layout
from jobs.store.records import read_json

LOOPBACK = "127.0.0.1"
HANDSHAKE_SECONDS = 5.0  # for one address that may not answer, and for one caller that may not speak
POLL_SECONDS = 0.2
LONGEST = 1 << 26  # bytes of a line; a peer that sends more is none of ours


class TeamError(ConnectionError):
    """A process of the team is gone, or does not get on."""


@dataclass(frozen=True)
class Seat:
    """Which process of a team this is."""

    rank: int
    size: int
    local_rank: int  # among those of this machine


@dataclass(frozen=True)
class Meeting:
    """Where the leader listens, and what shows that a process is of its team."""

    hosts: tuple[str, ...]  # names and addresses, the likeliest first
    port: int
    token: str
    node: str = ""  # machine of the leader


def seat_in_step(environment: Mapping[str, str], team: int) -> Seat | None:
    """The seat that Slurm has given a process of a team's step; None outside of one.

    The step itself says how many they are: with a template of the site's own that may be fewer than were asked for.
    """
    try:
        rank, local = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
        size = int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"])
    except (KeyError, ValueError):
        return None
    return Seat(rank, size, local) if team > 1 else None


def meeting_file(layout: Layout, environment: Mapping[str, str]) -> Path:
    """Where the leader of a Slurm step says where it listens."""
    job, restart, step = (environment.get(f"SLURM_{key}", "0") for key in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
    return layout.teams / f"{job}.{restart}.{step}.json"


def listen(*, local: bool) -> tuple[socket.socket, Meeting]:
    """A socket on a free port, for callers of this machine only or for all, and what they must know."""
    server = socket.create_server((LOOPBACK if local else "", 0), backlog=256)
    server.settimeout(HANDSHAKE_SECONDS)
    hosts = (LOOPBACK,) if local else _addresses()
    return server, Meeting(hosts, server.getsockname()[1], secrets.token_hex(32), own_node())


def publish(file: Path, meeting: Meeting) -> None:
    """Write it for nobody but this user to read, complete or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)  # of mode 0600
    try:
        with os.fdopen(descriptor, "w") as opened:
            json.dump(asdict(meeting), opened)
            opened.flush()
            os.fsync(opened.fileno())
        Path(name).replace(file)
    finally:
        Path(name).unlink(missing_ok=True)


def find(file: Path) -> Meeting | None:
    """What the leader has published, as soon as it has."""
    with contextlib.suppress(OSError):
        os.listdir(file.parent)  # asks NFS for what is new there
    found = read_json(file)
    return Meeting(tuple(found["hosts"]), int(found["port"]), str(found["token"]), str(found["node"])) if found else None


class Line:
    """A connection that carries JSON objects, one a line. Any thread may send; one receives."""

    def __init__(self, connection: socket.socket, seconds: float = HANDSHAKE_SECONDS) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(seconds)
        self._connection = connection
        self._lock = threading.Lock()
        self._partial = b""

    def fileno(self) -> int:
        return self._connection.fileno()

    def patient(self, seconds: float) -> None:
        """How long a peer may keep us from sending."""
        self._connection.settimeout(seconds)

    def send(self, message: Mapping[str, Any], *, wait: bool = True) -> None:
        """Send one object. OSError if the peer is gone or takes nothing. Not `wait`: leave it out while another thread is sending."""
        if not self._lock.acquire(blocking=wait):
            return
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        finally:
            self._lock.release()

    def receive(self) -> list[dict[str, Any]] | None:
        """The objects that have come, after waiting for something to come; None once the peer is gone."""
        try:
            received = self._connection.recv(1 << 16)
            *lines, self._partial = (self._partial + received).split(b"\n")
            found = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        return found if received and len(self._partial) < LONGEST and all(isinstance(each, dict) for each in found) else None

    def next(self) -> dict[str, Any]:
        """One object of a conversation in which the peer sends one and waits. ConnectionError if none comes."""
        deadline = time.monotonic() + HANDSHAKE_SECONDS
        while time.monotonic() < deadline:
            found = self.receive()
            if found is None:
                break
            if found:
                return found[0]
        raise ConnectionError("the peer does not speak as it should")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def greet(connection: socket.socket, meeting: Meeting, size: int) -> tuple[Line, dict[str, Any]]:
    """The leader's side of a new connection: the line and who it is (`rank`, `node`, `pid`). ConnectionError for a stranger."""
    line = Line(connection)
    try:
        challenge = secrets.token_hex(16)
        line.send({"challenge": challenge})
        told = line.next()
        rank = told.get("rank")
        if not isinstance(rank, int) or not 0 < rank < size or not _proves(meeting, f"{challenge}/{rank}", told.get("proof")):
            raise ConnectionError("a stranger")
        line.send({"proof": _proof(meeting, f"{told.get('challenge')}/leader")})
    except (OSError, ValueError):
        line.close()
        raise
    return line, told


def call(meeting: Meeting, seat: Seat) -> Line | None:
    """A follower's side: a line to the leader, at the first address where it answers; None if it does at none."""
    near = (LOOPBACK,) if meeting.node == own_node() else ()
    for host in dict.fromkeys((*near, *meeting.hosts)):
        with contextlib.suppress(OSError, ValueError):
            line = Line(socket.create_connection((host, meeting.port), HANDSHAKE_SECONDS))
            try:
                challenge, asked = secrets.token_hex(16), line.next().get("challenge")
                told = {"rank": seat.rank, "node": own_node(), "pid": os.getpid(), "challenge": challenge}
                line.send({**told, "proof": _proof(meeting, f"{asked}/{seat.rank}")})
                if _proves(meeting, f"{challenge}/leader", line.next().get("proof")):
                    return line
            except (OSError, ValueError):
                line.close()
                raise
            line.close()
    return None


def readable(line: Line, seconds: float) -> bool:
    """Wait for something to come."""
    return bool(select.select([line], [], [], max(0.0, seconds))[0])


def _proof(meeting: Meeting, text: str) -> str:
    return hmac.new(meeting.token.encode(), text.encode(), "sha256").hexdigest()


def _proves(meeting: Meeting, text: str, proof: object) -> bool:
    return isinstance(proof, str) and hmac.compare_digest(_proof(meeting, text).encode(), proof.encode())


def _addresses() -> tuple[str, ...]:
    """Names and addresses under which other machines may reach this one; those of the loopback are of use only here."""
    names = [own_node(), socket.gethostname()]
    found: list[str] = list(names)
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: asks which address leads outwards (RFC 5737)
        found.append(probe.getsockname()[0])
    for name in names:
        with contextlib.suppress(OSError):
            found += socket.gethostbyname_ex(name)[2]
    return tuple(dict.fromkeys(found))
