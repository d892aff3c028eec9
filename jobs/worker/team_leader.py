"""The leader of a team (jobs.worker.team_follower): its orders, and a thread that watches over the others while the main thread computes.

Where one is lost, that thread states how the attempt ended, and the process leaves, whatever its main thread is stuck in.
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
from jobs.worker.team_channel import Line, Meeting, TeamError, greet
from jobs.worker.team_follower import LOST, Loss, Patience, end_process

KILL_SECONDS = 5.0  # for what was killed to be gone


@dataclass
class _Member:
    """A follower as the leader sees it."""

    rank: int
    node: str
    pid: int
    line: Line
    heard: float
    busy: bool = False
    lost: str = ""  # why it counts as lost
    rss: int = 0  # bytes, the most it has used


class Leader:
    """The leader's end. Satisfies jobs.experiment.registry.Team. In a `with` block: at its end the followers are sent away."""

    rank = 0
    local_rank = 0

    def __init__(
        self,
        size: int,
        server: socket.socket,
        meeting: Meeting,
        *,
        patience: Patience | None = None,
        tell: Callable[[str], None] = print,
        children: Sequence[int] = (),
        stop: StopRequest | None = None,
    ) -> None:
        self.size = size
        self._patience = patience or Patience()
        self._server, self._meeting, self._tell, self._children = server, meeting, tell, children
        self._stop = stop or StopRequest()
        self._stop_told = False
        self._members: dict[int, _Member] = {}
        self._lock = threading.RLock()  # of all that follows
        self._number = 0  # of the order under way or the last one
        self._state_end: Callable[[Loss], None] | None = None  # while a stage is computed
        self._losses: list[Loss] = []
        self._first_loss = math.inf
        self._promise = math.inf
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
                member.line.send({"leave": True})
            member.line.close()
        self._server.close()
        self._selector.close()
        _reap(self._children, self._patience.grace)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Machine of every process, by rank; of those that are there."""
        with self._lock:
            return (own_node(), *(self._members[rank].node for rank in sorted(self._members)))

    def peak_rss_bytes(self, own: int) -> int:
        """The most that one of the processes has used; `own`: the leader."""
        with self._lock:
            return max(own, *(member.rss for member in self._members.values()))

    def gather(self) -> str:
        """Wait until every process is there and idle; "" or what keeps one from it. Nobody is waited for who was asked to stop."""
        deadline = time.monotonic() + (self._patience.finish if len(self._members) == self.size - 1 else self._patience.join)
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
                    return f"{missing} of {self.size} processes did not come" if missing else f"ranks {busy} are not ready"
                self._changed.wait(self._patience.poll)

    @contextlib.contextmanager
    def computing(self, order: Mapping[str, Any], state_end: Callable[[Loss], None]) -> Iterator[None]:
        """While the block lasts, followers compute `order` and a loss ends the process, after `state_end` has put it on record.

        Whoever leaves the block first has the last word: what comes afterwards is told by the caller.
        """
        with self._lock:
            self._number += 1
            self._losses, self._first_loss, self._promise = [], math.inf, math.inf
            self._state_end = state_end
            for member in self._members.values():
                member.busy = True
                if member.lost:  # since it was last gathered
                    self._note(_gone(member))
        try:
            self._broadcast({"compute": dict(order), "number": self._number})
            yield
        finally:
            with self._lock:  # the watching thread keeps it for good once it has begun to state the end
                self._state_end, self._promise = None, math.inf

    def reason(self) -> Loss | None:
        """What another process says of an end that the leader has met as an error of communication; waits a moment for it."""
        deadline = time.monotonic() + self._patience.settle
        with self._changed:
            while time.monotonic() < min(deadline, self._first_loss + self._patience.settle):
                self._changed.wait(self._patience.poll / 2)
            return self._told()

    def share(self, value: str = "") -> str:
        """Give a value to all."""
        self._check()
        self._broadcast({"shared": value, "number": self._number})
        return value

    def advance(self, within: float) -> None:
        """See jobs.experiment.registry.Team. Raises TeamError once another process is lost."""
        self._promise = time.monotonic() + within if within > 0 else math.inf
        self._check()

    def _check(self) -> None:
        if self._losses:
            with self._lock:
                told = self._told()
            # In words of ours: those of another class of failure would make this one of that class. `reason` has them.
            lost = told is not None and told.kind is FailureClass.communication
            raise TeamError(told.message if told and lost else "another process of the team has failed")

    def _told(self) -> Loss | None:
        return min(self._losses, key=lambda loss: loss.echo, default=None)

    def _broadcast(self, message: Mapping[str, Any]) -> None:
        with self._lock:
            members = [member for member in self._members.values() if not member.lost]
        self._send(members, message)
        self._check()

    def _send(self, members: Sequence[_Member], message: Mapping[str, Any], *, wait: bool = True) -> None:
        for member in members:
            try:
                member.line.send(message, wait=wait)
            except OSError as error:
                self._lose(member, f"cannot be reached: {error}")

    # ---- the watching thread

    def _watch(self) -> None:
        try:
            self._look_until_closed()
        except BaseException:  # nobody would notice anything any more
            traceback.print_exc()
            _reap(self._children, 0.0)
            end_process(LOST)

    def _look_until_closed(self) -> None:
        last_beat = 0.0
        looked = time.monotonic()
        while not self._closing.is_set():
            for ready, _ in self._selector.select(self._patience.poll):
                if ready.fileobj is self._server:
                    self._accept()
                else:
                    self._hear(ready.data)
            now = time.monotonic()
            paused, looked = self._patience.paused(now - looked), now
            self._promise += paused
            members = [member for member in tuple(self._members.values()) if not member.lost]
            for member in members:
                member.heard = min(now, member.heard + paused)
            if now - last_beat >= self._patience.beat:
                last_beat = now
                self._send(members, {"beat": True}, wait=False)
            for member in members:
                if now - member.heard > self._patience.silent:
                    self._lose(member, f"has said nothing for {now - member.heard:.0f} s")
            if self._stop() and not self._stop_told:
                self._stop_told = True
                self._send(members, {"stop": self._stop.signal})
            if now > self._promise:
                self._promise = math.inf
                self._note(Loss(FailureClass.communication, TeamError.__name__, "rank 0 does not get on as it had promised", echo=2))
            if self._state_end is not None and now >= self._first_loss + self._patience.settle + self._patience.grace:
                self._end()

    def _accept(self) -> None:
        try:
            connection, _ = self._server.accept()
            line, told = greet(connection, self._meeting, self.size)
        except (OSError, ValueError):
            return
        with self._changed:
            if told["rank"] in self._members:
                line.close()
                return
            line.patient(self._patience.silent)
            member = _Member(told["rank"], str(told.get("node", "")), int(told.get("pid", 0)), line, time.monotonic())
            self._members[member.rank] = member
            self._selector.register(line, selectors.EVENT_READ, member)
            if len(self._members) == self.size - 1:  # who calls now is none of ours
                self._selector.unregister(self._server)
                self._server.close()
            self._changed.notify_all()

    def _hear(self, member: _Member) -> None:
        messages = member.line.receive()
        if messages is None:
            self._lose(member, "is gone: its connection closed")
            return
        member.heard = time.monotonic()
        for message in messages:
            with self._changed:
                member.rss = max(member.rss, int(message.get("rss", 0)))
                if "stop" in message:
                    self._stop.ask(int(message["stop"]))
                late = message.get("number", self._number) != self._number
                if "idle" in message and not late:
                    member.busy = False
                if "failed" in message and not late:
                    self._note(_reported(member, message["failed"]))
                if "stuck" in message and not late:
                    words = f"{_words(member)} does not get on: it had promised to within {message['stuck']:g} s"
                    self._note(Loss(FailureClass.communication, TeamError.__name__, words, echo=2))
                self._changed.notify_all()

    def _lose(self, member: _Member, how: str) -> None:
        with self._changed:
            if member.lost:
                return
            member.lost = f"{_words(member)} {how}"
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(member.line)
            if member.busy:  # whoever has done its part may go
                self._note(_gone(member))
            self._changed.notify_all()

    def _note(self, loss: Loss) -> None:
        with self._changed:
            self._losses.append(loss)
            self._first_loss = min(self._first_loss, time.monotonic())
            self._changed.notify_all()

    def _end(self) -> None:
        with self._lock:
            loss, state_end = self._told(), self._state_end
            if state_end is None or loss is None:
                return
            try:
                self._tell(f"the team ends: {loss.message}")
                state_end(loss)
            except BaseException:  # its record could not be written: the process has to leave all the same
                traceback.print_exc()
            finally:
                _reap(self._children, 0.0)
                end_process(LOST)


def _gone(member: _Member) -> Loss:
    return Loss(FailureClass.communication, TeamError.__name__, member.lost, node=member.node, echo=1)


def _reported(member: _Member, told: Mapping[str, Any]) -> Loss:
    kind = FailureClass.__members__.get(str(told.get("kind")), FailureClass.code)
    echo = 3 if kind is FailureClass.communication else 0
    detail = f"{_words(member)}:\n{told.get('detail', '')}"
    return Loss(kind, str(told.get("error", "")), str(told.get("message", "")), detail, echo=echo)


def _words(member: _Member) -> str:
    return f"rank {member.rank} (process {member.pid} on {member.node})"


def _reap(children: Sequence[int], seconds: float) -> None:
    """Wait for followers on this machine to leave, then make them."""
    left = list(children)
    for patience in (seconds, KILL_SECONDS):
        deadline = time.monotonic() + patience
        while (left := [pid for pid in left if not _ended(pid)]) and time.monotonic() < deadline:
            time.sleep(0.01)
        for pid in left:
            os.kill(pid, signal.SIGKILL)  # not reaped, so the pid is still its own


def _ended(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return True
