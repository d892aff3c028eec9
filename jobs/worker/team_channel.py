"""How the processes of a team find each other, and the JSON lines they exchange.

The leader listens on a free port and writes its addresses to a private file of the experiment, named by Slurm job, restart and step: two
jobs on one machine, or two executions of a requeued job, never connect. Both sides prove that they have read the file; its token is never
sent. Followers that the leader forks on its own machine need no file.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import math
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.store.attempts import own_node
from jobs.store.failures import FailureClass
from jobs.store.layout import Layout
from jobs.store.records import read_json

LOOPBACK = "127.0.0.1"
HANDSHAKE_SECONDS = 5.0  # for an address that may not answer, and for a peer that may send nothing
LONGEST = 1 << 26  # bytes of a line; a peer that sends more is not of this team
SILENT_VARIABLE = "SER_GRID_SILENT_SECONDS"  # set by a site whose network is interrupted for longer
TEAM_LOST = 1  # exit code of a process that exits because another process of the team is lost


class TeamError(ConnectionError):
    """Another process of the team is lost, hangs or has failed."""


@dataclass(frozen=True)
class ProcessRank:
    """Rank of a process, number of processes of the team, rank among those on this machine; all as in torch.distributed."""

    rank: int
    size: int
    local_rank: int


@dataclass(frozen=True)
class Timeouts:
    """Seconds to wait for other processes of the team."""

    silent: float = 60.0  # without a heartbeat
    join: float = 300.0  # until all have connected: Slurm starts the processes of a step together, but a shared folder may lag
    settle: float = 2.0  # after the first sign of a failure, for its cause: a consequence may be reported before it
    grace: float = 3.0  # then, for the main thread to end by itself
    finish: float = 60.0  # after a stage, until all are ready for the next
    share: float = 1800.0  # for a value from the leader: the work before it may be long, and a lost leader is noticed independently

    @property
    def heartbeat(self) -> float:
        """Interval between two heartbeats."""
        return min(5.0, self.silent / 6)

    @property
    def poll(self) -> float:
        """Interval at which the watching thread checks everything."""
        return min(0.5, self.heartbeat / 2)

    def suspended(self, seconds: float) -> float:
        """How long this process was itself stopped (a suspended job) if one check took so long: no other process is blamed for it."""
        return seconds if seconds > self.silent / 2 else 0.0


def timeouts_of(environment: Mapping[str, str]) -> Timeouts:
    """The time-outs that the site sets, else the defaults."""
    try:
        seconds = float(environment.get(SILENT_VARIABLE, ""))
    except ValueError:
        return Timeouts()
    return Timeouts(silent=seconds, finish=seconds) if 0 < seconds < math.inf else Timeouts()


@dataclass(frozen=True)
class TeamFailure:
    """Why an attempt of a team failed."""

    kind: FailureClass
    error: str
    message: str
    detail: str = ""
    node: str = ""  # machine of the lost process; "": it is unknown which process is to blame
    cause_order: int = 0  # the lowest is recorded: 0 own error, 1 process died, 2 process hangs, 3 communication error


@dataclass(frozen=True)
class Rendezvous:
    """Where the leader listens, and the token that proves that a process belongs to its team."""

    hosts: tuple[str, ...]  # names and addresses, the most likely first
    port: int
    token: str
    node: str = ""  # machine of the leader


def rank_in_step(environment: Mapping[str, str], team: int) -> ProcessRank | None:
    """The rank that Slurm gave to a process of a team's step; None outside of a step.

    The number of processes is the step's: a template of the site may start fewer than requested.
    """
    try:
        rank, local = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
        size = int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"])
    except (KeyError, ValueError):
        return None
    return ProcessRank(rank, size, local) if team > 1 else None


def rendezvous_file(layout: Layout, environment: Mapping[str, str]) -> Path:
    """File in which the leader of a Slurm step publishes its addresses."""
    job, restart, step = (environment.get(f"SLURM_{key}", "0") for key in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
    return layout.teams / f"{job}.{restart}.{step}.json"


def listen(*, local: bool) -> tuple[socket.socket, Rendezvous]:
    """A socket that listens on a free port, for this machine only or for all, and how to connect to it."""
    server = socket.create_server((LOOPBACK if local else "", 0), backlog=256)
    server.settimeout(HANDSHAKE_SECONDS)
    hosts = (LOOPBACK,) if local else tuple(dict.fromkeys((own_node(), socket.gethostname(), *own_addresses())))
    return server, Rendezvous(hosts, server.getsockname()[1], secrets.token_hex(32), own_node())


def own_addresses() -> tuple[str, ...]:
    """IPv4 addresses of this machine: those of its names, then that of the default route, loopback addresses last."""
    found: list[str] = []
    for name in (own_node(), socket.gethostname()):
        with contextlib.suppress(OSError):
            found += socket.gethostbyname_ex(name)[2]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: shows which local address is used for other networks (RFC 5737)
        found.append(probe.getsockname()[0])
    return tuple(sorted(dict.fromkeys(found), key=is_loopback))


def is_loopback(address: str) -> bool:
    """Whether an IPv4 address leads to the machine that uses it."""
    return address.startswith("127.")


def read_rendezvous(file: Path) -> Rendezvous | None:
    """What the leader has published; None before it has."""
    with contextlib.suppress(OSError):
        os.listdir(file.parent)  # makes NFS look for new files
    found = read_json(file)
    return Rendezvous(tuple(found["hosts"]), int(found["port"]), str(found["token"]), str(found["node"])) if found else None


class Connection:
    """A TCP connection that carries JSON objects, one per line. Any thread may send; only one receives."""

    def __init__(self, connection: socket.socket, seconds: float = HANDSHAKE_SECONDS) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(seconds)
        self._connection = connection
        self._lock = threading.Lock()
        self._partial = b""

    def fileno(self) -> int:
        return self._connection.fileno()

    @property
    def own_address(self) -> str:
        """IPv4 address of this end of the connection; "" if it is closed."""
        try:
            return str(self._connection.getsockname()[0])
        except OSError:
            return ""

    def set_timeout(self, seconds: float) -> None:
        """The longest time that sending may block."""
        self._connection.settimeout(seconds)

    def send(self, message: Mapping[str, Any], *, wait: bool = True) -> None:
        """Send one object; without `wait`, skip it while another thread is sending. OSError if the peer is lost or does not receive."""
        if not self._lock.acquire(blocking=wait):
            return
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        finally:
            self._lock.release()

    def receive(self) -> list[dict[str, Any]] | None:
        """Wait for data; the objects that are complete. None once the peer is lost."""
        try:
            received = self._connection.recv(1 << 16)
            *lines, self._partial = (self._partial + received).split(b"\n")
            found = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        return found if received and len(self._partial) < LONGEST and all(isinstance(each, dict) for each in found) else None

    def receive_one(self) -> dict[str, Any]:
        """One object, during the handshake. Raises ConnectionError if none arrives in time."""
        deadline = time.monotonic() + HANDSHAKE_SECONDS
        while time.monotonic() < deadline:
            found = self.receive()
            if found is None:
                break
            if found:
                return found[0]
        raise ConnectionError("the peer does not follow the protocol")

    def readable(self, seconds: float) -> bool:
        """Wait until there is data to receive; False if there is none in time."""
        return bool(select.select([self], [], [], max(0.0, seconds))[0])

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def accept_follower(connection: socket.socket, rendezvous: Rendezvous, size: int) -> tuple[Connection, dict[str, Any]]:
    """The leader's side of the handshake: the connection and the follower's `rank`, `node` and `pid`. ConnectionError for a wrong proof."""
    peer = Connection(connection)
    try:
        challenge = secrets.token_hex(16)
        peer.send({"challenge": challenge})
        answer = peer.receive_one()
        rank = answer.get("rank")
        if not isinstance(rank, int) or not 0 < rank < size or not _proves(rendezvous, f"{challenge}/{rank}", answer.get("proof")):
            raise ConnectionError("not a process of this team")
        peer.send({"proof": _proof(rendezvous, f"{answer.get('challenge')}/leader")})
    except (OSError, ValueError):
        peer.close()
        raise
    return peer, answer


def connect_to_leader(rendezvous: Rendezvous, own: ProcessRank) -> Connection | None:
    """The follower's side: a connection to the first address where the leader answers; None if it answers at none."""
    near = (LOOPBACK,) if rendezvous.node == own_node() else ()
    for host in dict.fromkeys((*near, *rendezvous.hosts)):
        with contextlib.suppress(OSError, ValueError):
            peer = Connection(socket.create_connection((host, rendezvous.port), HANDSHAKE_SECONDS))
            try:
                own_challenge, challenge = secrets.token_hex(16), peer.receive_one().get("challenge")
                answer = {"rank": own.rank, "node": own_node(), "pid": os.getpid(), "challenge": own_challenge}
                peer.send({**answer, "proof": _proof(rendezvous, f"{challenge}/{own.rank}")})
                if _proves(rendezvous, f"{own_challenge}/leader", peer.receive_one().get("proof")):
                    return peer
            except (OSError, ValueError):
                peer.close()
                raise
            peer.close()
    return None


def _proof(rendezvous: Rendezvous, text: str) -> str:
    return hmac.new(rendezvous.token.encode(), text.encode(), "sha256").hexdigest()


def _proves(rendezvous: Rendezvous, text: str, proof: object) -> bool:
    return isinstance(proof, str) and hmac.compare_digest(_proof(rendezvous, text).encode(), proof.encode())
