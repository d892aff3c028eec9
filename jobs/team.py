"""The team of one task: one process leads, the others follow its orders over a control channel; each can tell when another is lost.

The leader does what a worker does (claims, checks, records); followers compute with it and write nothing. Whatever goes wrong with one of
them ends the attempt within a bounded time, also where the leader's main thread is stuck in a collective: its watching thread then states
how the attempt ended, and the process leaves. Seen are

    a connection that closed                     a process that died
    no heartbeat for `Patience.silent` seconds   one that is stopped, or whose machine or network is gone
    a promise of `advance` that was broken       one that is stuck
    an exception that a follower reports         that class of failure, e.g. memory, unless it is but an echo of another's end

A leader that is lost takes its followers with it at once.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import resource
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn

from jobs.failures import FailureClass, class_of_exception
from jobs.liveness import own_node
from jobs.rendezvous import Line, Meeting, Seat, TeamError, greet, readable

SILENT_VARIABLE = "SER_GRID_SILENT_SECONDS"  # of a site whose network pauses for longer
KILL_SECONDS = 5.0  # for what was killed to be gone
LOST = 1  # exit code of what leaves because another process is lost


@dataclass(frozen=True)
class Patience:
    """How long each thing may take, in seconds."""

    silent: float = 60.0  # without a heartbeat
    join: float = 300.0  # until all are there: Slurm starts the processes of a step together, a shared folder may lag
    settle: float = 2.0  # after a first sign of loss, for the reason behind it: an echo may arrive before its cause
    grace: float = 3.0  # then, for the main thread to end by itself
    finish: float = 60.0  # after a stage, until all are ready for the next
    share: float = 1800.0  # for the leader's word: the work before it may be long, and a leader that is lost is noticed otherwise

    @property
    def beat(self) -> float:
        """Between two heartbeats."""
        return min(5.0, self.silent / 6)

    @property
    def poll(self) -> float:
        return min(0.5, self.beat / 2)


def patience_of(environment: Mapping[str, str]) -> Patience:
    """As the site says, else as we do."""
    try:
        seconds = float(environment.get(SILENT_VARIABLE, ""))
    except ValueError:
        return Patience()
    return Patience(silent=seconds, finish=seconds) if 0 < seconds < math.inf else Patience()


@dataclass(frozen=True)
class Loss:
    """Why an attempt of a team cannot go on."""

    kind: FailureClass
    error: str
    message: str
    detail: str = ""
    node: str = ""  # where the process was that is lost; "" where it is not known whose fault it was
    echo: int = 0  # the least is told: 0 an error of its own, 1 a process that is gone, 2 one that is stuck, 3 an error of communication


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
    """The leader's end. Satisfies jobs.stages.Team. In a `with` block: at its end the followers are sent away."""

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
    ) -> None:
        self.size = size
        self._patience = patience or Patience()
        self._server, self._meeting, self._tell, self._children = server, meeting, tell, children
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
        """Wait until every process is there and idle; "" or what keeps one from it."""
        deadline = time.monotonic() + (self._patience.finish if len(self._members) == self.size - 1 else self._patience.join)
        with self._changed:
            while True:
                lost = next((member.lost for member in self._members.values() if member.lost), "")
                missing = self.size - 1 - len(self._members)
                busy = [member.rank for member in self._members.values() if member.busy]
                if lost or not (missing or busy):
                    return lost
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
        """See jobs.stages.Team. Raises TeamError once another process is lost."""
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
        for member in members:
            try:
                member.line.send(message)
            except OSError as error:
                self._lose(member, f"cannot be reached: {error}")
        self._check()

    # ---- the watching thread

    def _watch(self) -> None:
        try:
            self._look_until_closed()
        except BaseException:  # nobody would notice anything any more
            traceback.print_exc()
            _reap(self._children, 0.0)
            _leave(LOST)

    def _look_until_closed(self) -> None:
        last_beat = 0.0
        while not self._closing.is_set():
            for ready, _ in self._selector.select(self._patience.poll):
                if ready.fileobj is self._server:
                    self._accept()
                else:
                    self._hear(ready.data)
            now = time.monotonic()
            members = [member for member in tuple(self._members.values()) if not member.lost]
            if now - last_beat >= self._patience.beat:
                last_beat = now
                for member in members:
                    with contextlib.suppress(OSError):  # its own silence will tell
                        member.line.send({"beat": True}, wait=False)
            for member in members:
                if now - member.heard > self._patience.silent:
                    self._lose(member, f"has said nothing for {now - member.heard:.0f} s")
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
                self._note(Loss(FailureClass.communication, TeamError.__name__, member.lost, node=member.node, echo=1))
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
                _leave(LOST)


class Follower:
    """A follower's end. Satisfies jobs.stages.Team. A thread of it ends the process as soon as the leader is lost."""

    def __init__(self, seat: Seat, line: Line, *, patience: Patience | None = None, leave: Callable[[int], None] | None = None) -> None:
        self.rank, self.size, self.local_rank = seat.rank, seat.size, seat.local_rank
        self._line, self._patience, self._leave = line, patience or Patience(), leave or _leave
        self._orders: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._shared: queue.Queue[str] = queue.Queue()
        self._number = 0
        self._busy = False
        self._promise, self._within = math.inf, 0.0
        line.patient(self._patience.silent)
        self._thread = threading.Thread(target=self._watch, name="team", daemon=True)
        self._thread.start()

    def orders(self) -> Iterator[dict[str, Any]]:
        """What to compute, until the leader sends us away. Waits as long as the leader lives."""
        while (order := self._orders.get()) is not None:
            yield order

    def done(self) -> None:
        """This process has done its part."""
        self._answer({})

    def failed(self, error: BaseException) -> None:
        """This process could not do its part."""
        kind = class_of_exception(error)
        message = next(iter(str(error).strip().splitlines()), "") or "no message"
        told = {"kind": kind.name, "error": type(error).__name__, "message": message, "detail": "".join(traceback.format_exception(error))}
        self._answer({} if kind is FailureClass.interrupted else {"failed": told})  # interrupted: the leader saves, and says so

    def share(self, value: str = "") -> str:
        """What the leader gave."""
        del value
        try:
            return self._shared.get(timeout=self._patience.share)
        except queue.Empty:
            raise TeamError(f"the leader has given nothing for {self._patience.share:g} s") from None

    def advance(self, within: float) -> None:
        """See jobs.stages.Team."""
        self._within = within
        self._promise = time.monotonic() + within if within > 0 else math.inf

    def _answer(self, told: Mapping[str, Any]) -> None:
        self._promise, self._busy = math.inf, False
        with contextlib.suppress(OSError):  # a leader that is lost ends this process
            self._line.send({**told, "idle": True, "number": self._number, "rss": _peak_rss_bytes()})

    def _watch(self) -> None:
        try:
            code = self._look_until_sent_away()
        except Exception:
            traceback.print_exc()
            code = LOST
        if code is None:
            self._orders.put(None)
        else:
            self._leave(code)

    def _look_until_sent_away(self) -> int | None:
        """Exit code where the process is to end at once; None: when its main thread comes to it."""
        heard = time.monotonic()
        last_beat = 0.0
        while True:
            if readable(self._line, self._patience.poll):
                messages = self._line.receive()
                if messages is None:
                    return LOST
                heard = time.monotonic()
                for message in messages:
                    self._obey(message)
                    if "leave" in message:
                        return 0 if self._busy else None  # busy: with something that is of no use any more
            now = time.monotonic()
            if now - heard > self._patience.silent:
                return LOST
            with contextlib.suppress(OSError):  # seen at the next look
                if now - last_beat >= self._patience.beat:
                    last_beat = now
                    self._line.send({"rss": _peak_rss_bytes()}, wait=False)
                if now > self._promise:
                    self._promise = math.inf
                    self._line.send({"stuck": self._within, "number": self._number})

    def _obey(self, message: Mapping[str, Any]) -> None:
        if "compute" in message:
            self._number, self._busy, self._shared = int(message["number"]), True, queue.Queue()
            self._orders.put(message["compute"])
        if "shared" in message and message["number"] == self._number:
            self._shared.put(str(message["shared"]))


def _reported(member: _Member, told: Mapping[str, Any]) -> Loss:
    kind = FailureClass.__members__.get(str(told.get("kind")), FailureClass.code)
    echo = 3 if kind is FailureClass.communication else 0
    detail = f"{_words(member)}:\n{told.get('detail', '')}"
    return Loss(kind, str(told.get("error", "")), str(told.get("message", "")), detail, echo=echo)


def _words(member: _Member) -> str:
    return f"rank {member.rank} (process {member.pid} on {member.node})"


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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


def _leave(code: int) -> NoReturn:
    """End this process from any thread, whatever the others are stuck in."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
