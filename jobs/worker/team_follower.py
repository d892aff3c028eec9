"""The team of one task: one process leads (jobs.worker.team_leader), the others follow its orders over a control channel.

The leader does what a worker does (claims, checks, records); followers compute with it and write nothing. Whatever goes wrong with one of
them ends the attempt within a bounded time, also where the leader's main thread is stuck in a collective. Seen are

    a connection that closed                     a process that died
    no heartbeat for `Patience.silent` seconds   one that is stopped, or whose machine or network is gone
    a promise of `advance` that was broken       one that is stuck
    an exception that a follower reports         that class of failure, e.g. memory, unless it is but an echo of another's end

A leader that is lost takes its followers with it at once. A request to stop that reaches one process is handed on to all.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from jobs.signals import StopRequest
from jobs.store.failures import FailureClass, class_of_exception
from jobs.worker.team_channel import Line, Seat, TeamError, readable

SILENT_VARIABLE = "SER_GRID_SILENT_SECONDS"  # of a site whose network pauses for longer
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

    def paused(self, seconds: float) -> float:
        """How long we were stopped ourselves (a suspended job) when one look took so long: time in which nobody is to blame."""
        return seconds if seconds > self.silent / 2 else 0.0


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


class Follower:
    """A follower's end. Satisfies jobs.experiment.registry.Team. A thread of it ends the process as soon as the leader is lost."""

    def __init__(
        self,
        seat: Seat,
        line: Line,
        *,
        patience: Patience | None = None,
        stop: StopRequest | None = None,
        leave: Callable[[int], None] | None = None,
    ) -> None:
        self.rank, self.size, self.local_rank = seat.rank, seat.size, seat.local_rank
        self._line, self._patience = line, patience or Patience()
        self._stop, self._leave = stop or StopRequest(), leave or end_process
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
        """See jobs.experiment.registry.Team."""
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
        looked, stop_told = heard, False
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
            paused, looked = self._patience.paused(now - looked), now
            heard, self._promise = min(now, heard + paused), self._promise + paused
            if now - heard > self._patience.silent:
                return LOST
            with contextlib.suppress(OSError):  # seen at the next look
                if now - last_beat >= self._patience.beat:
                    last_beat = now
                    self._line.send({"rss": _peak_rss_bytes()}, wait=False)
                if self._stop() and not stop_told:
                    stop_told = True
                    self._line.send({"stop": self._stop.signal})
                if now > self._promise:
                    self._promise = math.inf
                    self._line.send({"stuck": self._within, "number": self._number})

    def _obey(self, message: Mapping[str, Any]) -> None:
        if "compute" in message:
            self._number, self._busy, self._shared = int(message["number"]), True, queue.Queue()
            self._orders.put(message["compute"])
        if "stop" in message:
            self._stop.ask(int(message["stop"]))
        if "shared" in message and message["number"] == self._number:
            self._shared.put(str(message["shared"]))


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def end_process(code: int) -> NoReturn:
    """End this process from any thread, whatever the others are stuck in."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
