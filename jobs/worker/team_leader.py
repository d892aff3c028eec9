"""The leader of a team (jobs.worker.team_follower): sends requests to the followers; a thread watches them while the main thread computes.

When a follower is lost, that thread records how the attempt ended and ends the process, even if the main thread hangs.
"""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from jobs.signals import StopRequest
from jobs.store.attempts import own_node
from jobs.store.failures import FailureClass
from jobs.worker.processes import exit_now, reap
from jobs.worker.team_board import Board
from jobs.worker.team_channel import (
    LOOPBACK,
    TEAM_LOST,
    Connection,
    Rendezvous,
    TeamError,
    TeamFailure,
    Timeouts,
    accept_follower,
    is_loopback,
)

KILL_SECONDS = 5.0  # for a killed process to end


@dataclass
class _Member:
    """A follower as the leader sees it."""

    rank: int
    node: str
    pid: int
    connection: Connection
    heard: float  # when it last sent something
    busy: bool = False
    lost: str = ""  # why it counts as lost
    rss: int = 0  # peak resident memory in bytes

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.node})"


class Leader:
    """Satisfies jobs.experiment.registry.Team. Use it in a `with` block, at whose end the followers are dismissed.

    `children`: pids of followers that this process has forked. `report` writes a line to the log.
    """

    rank = 0
    local_rank = 0

    def __init__(
        self,
        size: int,
        server: socket.socket,
        rendezvous: Rendezvous,
        *,
        timeouts: Timeouts | None = None,
        report: Callable[[str], None] = print,
        children: Sequence[int] = (),
        stop: StopRequest | None = None,
    ) -> None:
        self.size = size
        self._timeouts = timeouts or Timeouts()
        self._server, self._rendezvous, self._report, self._children = server, rendezvous, report, children
        self._stop = stop or StopRequest()
        self._stop_sent = False
        self._members: dict[int, _Member] = {}
        self._lock = threading.RLock()  # protects everything below
        self._board = Board()
        self._number = 0  # of the current or last request
        self._record_failure: Callable[[TeamFailure], None] | None = None  # while a stage is computed
        self._failures: list[TeamFailure] = []
        self._first_failure = math.inf  # time
        self._deadline = math.inf  # announced by `advance`
        self._changed = threading.Condition(self._lock)
        self._closing = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._watch, name="team", daemon=True)

    def __enter__(self) -> Leader:
        self._selector.register(self._server, selectors.EVENT_READ)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closing.set()
        self._thread.join()
        for member in self._members.values():
            with contextlib.suppress(OSError):
                member.connection.send({"leave": True})
            member.connection.close()
        self._server.close()
        self._selector.close()
        _end_children(self._children, self._timeouts.grace)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Machine of every connected process, by rank."""
        with self._lock:
            return (own_node(), *(self._members[rank].node for rank in sorted(self._members)))

    def peak_rss_bytes(self, own: int) -> int:
        """The largest peak of all processes; `own`: that of the leader."""
        with self._lock:
            return max(own, *(member.rss for member in self._members.values()))

    def wait_until_ready(self) -> str:
        """Wait until every process is connected and idle; "" or the reason why that failed, at once if asked to stop."""
        deadline = time.monotonic() + (self._timeouts.finish if len(self._members) == self.size - 1 else self._timeouts.join)
        with self._changed:
            while True:
                lost = next((member.lost for member in self._members.values() if member.lost), "")
                missing = self.size - 1 - len(self._members)
                busy = [member.rank for member in self._members.values() if member.busy]
                if lost or not (missing or busy):
                    return lost
                if self._stop():
                    return "asked to stop"
                if time.monotonic() >= deadline:
                    return f"{missing} of {self.size} processes did not connect" if missing else f"ranks {busy} are not ready"
                self._changed.wait(self._timeouts.poll)

    @contextlib.contextmanager
    def computing(self, request: Mapping[str, Any], record_failure: Callable[[TeamFailure], None]) -> Iterator[None]:
        """While the block lasts, the followers compute `request`; a failure ends the process after `record_failure` was called with it.

        The first exit decides the outcome: failures after the end of the block are ignored, and its own errors are the caller's to record.
        """
        with self._lock:
            self._number += 1
            self._board.clear_before(self._number)
            self._failures, self._first_failure, self._deadline = [], math.inf, math.inf
            self._record_failure = record_failure
            for member in self._members.values():
                member.busy = True
                if member.lost:  # since `wait_until_ready`
                    self._add_failure(_lost(member))
        try:
            self._broadcast({"compute": dict(request), "number": self._number})
            yield
        finally:
            with self._lock:  # never acquired again once the watching thread has begun to record the failure
                self._record_failure, self._deadline = None, math.inf

    def root_cause(self) -> TeamFailure | None:
        """The failure behind a communication error of the leader, as far as other processes report it in time."""
        deadline = time.monotonic() + self._timeouts.settle
        with self._changed:
            while time.monotonic() < min(deadline, self._first_failure + self._timeouts.settle):
                self._changed.wait(self._timeouts.poll / 2)
            return self._cause()

    def share(self, value: str = "") -> str:
        """Send a value to all followers. Raises TeamError if one is lost."""
        self._check()
        self._broadcast({"shared": value, "number": self._number})
        return value

    @property
    def address(self) -> str:
        """See jobs.experiment.registry.Team: an address by which a process of another machine has reached this one, if there is any."""
        with self._lock:
            used = [self._members[rank].connection.own_address for rank in sorted(self._members)]
        return next((address for address in used if address and not is_loopback(address)), LOOPBACK)

    def post(self, key: str, value: str) -> None:
        """See jobs.experiment.registry.Team."""
        self._board.put(self._number, key, value)
        self._broadcast({"posted": [key, value], "number": self._number})

    def find(self, key: str, seconds: float) -> str:
        """See jobs.experiment.registry.Team."""
        return self._board.find(self._number, key, seconds, self._check)

    def advance(self, within: float) -> None:
        """See jobs.experiment.registry.Team. Raises TeamError once another process is lost."""
        self._deadline = time.monotonic() + within if within > 0 else math.inf
        self._check()

    def _check(self) -> None:
        if self._failures:
            with self._lock:
                cause = self._cause()
            # Not the message of another failure class, which would make this error one of that class; `root_cause` returns it.
            quoted = cause is not None and cause.kind is FailureClass.communication
            raise TeamError(cause.message if cause and quoted else "another process of the team has failed")

    def _cause(self) -> TeamFailure | None:
        return min(self._failures, key=lambda failure: failure.cause_order, default=None)

    def _broadcast(self, message: Mapping[str, Any]) -> None:
        with self._lock:
            members = [member for member in self._members.values() if not member.lost]
        self._send(members, message)
        self._check()

    def _send(self, members: Sequence[_Member], message: Mapping[str, Any], *, wait: bool = True) -> None:
        for member in members:
            try:
                member.connection.send(message, wait=wait)
            except OSError as error:
                self._lose(member, f"is lost: {error}")

    # ---- the watching thread

    def _watch(self) -> None:
        try:
            self._watch_followers()
        except BaseException:  # without this thread no failure would be noticed
            traceback.print_exc()
            _end_children(self._children, 0.0)
            exit_now(TEAM_LOST)

    def _watch_followers(self) -> None:
        last_heartbeat = 0.0
        checked = time.monotonic()
        while not self._closing.is_set():
            for ready, _ in self._selector.select(self._timeouts.poll):
                if ready.fileobj is self._server:
                    self._accept()
                else:
                    self._receive(ready.data)
            now = time.monotonic()
            suspended, checked = self._timeouts.suspended(now - checked), now
            self._deadline += suspended
            members = [member for member in tuple(self._members.values()) if not member.lost]
            for member in members:
                member.heard = min(now, member.heard + suspended)
            if now - last_heartbeat >= self._timeouts.heartbeat:
                last_heartbeat = now
                self._send(members, {"beat": True}, wait=False)
            for member in members:
                if now - member.heard > self._timeouts.silent:
                    self._lose(member, f"has sent no heartbeat for {now - member.heard:.0f} s")
            if self._stop() and not self._stop_sent:
                self._stop_sent = True
                self._send(members, {"stop": self._stop.signal})
            if now > self._deadline:
                self._deadline = math.inf
                self._add_failure(_hangs("rank 0 made no progress within the time it announced"))
            if self._record_failure is not None and now >= self._first_failure + self._timeouts.settle + self._timeouts.grace:
                self._end()

    def _accept(self) -> None:
        try:
            socket_, _ = self._server.accept()
            connection, follower = accept_follower(socket_, self._rendezvous, self.size)
        except (OSError, ValueError):
            return
        with self._changed:
            if follower["rank"] in self._members:
                connection.close()
                return
            connection.set_timeout(self._timeouts.silent)
            member = _Member(follower["rank"], str(follower.get("node", "")), int(follower.get("pid", 0)), connection, time.monotonic())
            self._members[member.rank] = member
            self._selector.register(connection, selectors.EVENT_READ, member)
            if len(self._members) == self.size - 1:  # no other process may connect
                self._selector.unregister(self._server)
                self._server.close()
            self._changed.notify_all()

    def _receive(self, member: _Member) -> None:
        messages = member.connection.receive()
        if messages is None:
            self._lose(member, "is lost: its connection closed")
            return
        member.heard = time.monotonic()
        for message in messages:
            with self._changed:
                member.rss = max(member.rss, int(message.get("rss", 0)))
                if "stop" in message:
                    self._stop.request(int(message["stop"]))
                late = message.get("number", self._number) != self._number
                if "idle" in message and not late:
                    member.busy = False
                if "failed" in message and not late:
                    self._add_failure(_reported(member, message["failed"]))
                if "stuck" in message and not late:
                    self._add_failure(_hangs(f"{member} made no progress within the {message['stuck']:g} s it announced"))
                others = [each for each in self._members.values() if each is not member and not each.lost]
                self._changed.notify_all()
            if "posted" in message and not late:
                key, value = message["posted"]
                self._board.put(self._number, str(key), str(value))
                self._send(others, {"posted": [key, value], "number": self._number})

    def _lose(self, member: _Member, how: str) -> None:
        with self._changed:
            if member.lost:
                return
            member.lost = f"{member} {how}"
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(member.connection)
            if member.busy:  # a follower that has finished its part is not needed for this stage
                self._add_failure(_lost(member))
            self._changed.notify_all()

    def _add_failure(self, failure: TeamFailure) -> None:
        with self._changed:
            self._failures.append(failure)
            self._first_failure = min(self._first_failure, time.monotonic())
            self._changed.notify_all()

    def _end(self) -> None:
        with self._lock:
            cause, record_failure = self._cause(), self._record_failure
            if record_failure is None or cause is None:
                return
            try:
                self._report(f"the team ends: {cause.message}")
                record_failure(cause)
            except BaseException:  # the outcome could not be written: the process has to end all the same
                traceback.print_exc()
            finally:
                _end_children(self._children, 0.0)
                exit_now(TEAM_LOST)


def _lost(member: _Member) -> TeamFailure:
    return TeamFailure(FailureClass.communication, TeamError.__name__, member.lost, node=member.node, cause_order=1)


def _hangs(message: str) -> TeamFailure:
    return TeamFailure(FailureClass.communication, TeamError.__name__, message, cause_order=2)


def _reported(member: _Member, report: Mapping[str, Any]) -> TeamFailure:
    kind = FailureClass.__members__.get(str(report.get("kind")), FailureClass.code)
    order = 3 if kind is FailureClass.communication else 0
    detail = f"{member}:\n{report.get('detail', '')}"
    return TeamFailure(kind, str(report.get("error", "")), str(report.get("message", "")), detail, cause_order=order)


def _end_children(children: Sequence[int], seconds: float) -> None:
    """Wait for followers on this machine to exit, then kill them."""
    left = list(children)
    for patience in (seconds, KILL_SECONDS):
        deadline = time.monotonic() + patience
        while (left := [pid for pid in left if not _ended(pid)]) and time.monotonic() < deadline:
            time.sleep(0.01)
        for pid in left:
            os.kill(pid, signal.SIGKILL)  # not reaped, so the pid is still its own


def _ended(pid: int) -> bool:
    try:
        return reap(pid) is not None
    except ChildProcessError:
        return True
