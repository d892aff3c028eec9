"""A follower of a team: computes what the leader (jobs.worker.team_leader) requests, and writes no records.

The leader does what a single worker does (claims, verifies, records); followers verify the code and compute with it. A failure of any
process ends the attempt within a bounded time, even if the leader's main thread hangs in a collective. The leader detects

    a closed connection                              the process died
    no heartbeat for `Timeouts.silent` seconds       the process is stopped, or its machine or network is down
    a deadline announced by `advance` that passed    the process hangs
    an exception reported by a follower              its failure class, e.g. memory, unless it is only a consequence of another failure

When the leader is lost, its followers exit at once. A stop request that reaches one process is forwarded to all.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jobs.signals import StopRequest
from jobs.store.failures import FailureClass
from jobs.text import first_line
from jobs.worker.imports import failure_class
from jobs.worker.processes import exit_now
from jobs.worker.provenance import peak_rss_bytes
from jobs.worker.team_board import Board
from jobs.worker.team_channel import TEAM_LOST, Connection, ProcessRank, TeamError, Timeouts


class Follower:
    """Satisfies jobs.experiment.registry.Team. A thread of it ends the process as soon as the leader is lost."""

    def __init__(
        self,
        own: ProcessRank,
        leader: Connection,
        *,
        timeouts: Timeouts | None = None,
        stop: StopRequest | None = None,
        exit_process: Callable[[int], None] = exit_now,
    ) -> None:
        self.rank, self.size, self.local_rank = own.rank, own.size, own.local_rank
        self._leader, self._timeouts = leader, timeouts or Timeouts()
        self._stop, self._exit_process = stop or StopRequest(), exit_process
        self._requests: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._shared: queue.Queue[str] = queue.Queue()
        self._board = Board()
        self._number = 0  # of the current request
        self._busy = False
        self._deadline, self._within = math.inf, 0.0  # announced by `advance`
        leader.set_timeout(self._timeouts.silent)
        self._thread = threading.Thread(target=self._watch, name="team", daemon=True)
        self._thread.start()

    def requests(self) -> Iterator[dict[str, Any]]:
        """The stages to compute, until the leader dismisses this process. Waits as long as the leader lives."""
        while (request := self._requests.get()) is not None:
            yield request

    def done(self) -> None:
        """Report that this process has finished its part of the stage."""
        self._report_idle({})

    def failed(self, error: BaseException) -> None:
        """Report that this process failed. An interruption is no failure: the leader writes the checkpoint and the record."""
        kind = failure_class(error)
        detail = "".join(traceback.format_exception(error))
        report = {"kind": kind.name, "error": type(error).__name__, "message": first_line(error), "detail": detail}
        self._report_idle({} if kind is FailureClass.interrupted else {"failed": report})

    def share(self, value: str = "") -> str:
        """The value that the leader shared. Raises TeamError if there is none in time."""
        del value
        try:
            return self._shared.get(timeout=self._timeouts.share)
        except queue.Empty:
            raise TeamError(f"the leader has shared nothing for {self._timeouts.share:g} s") from None

    @property
    def address(self) -> str:
        """See jobs.experiment.registry.Team."""
        return self._leader.own_address

    def post(self, key: str, value: str) -> None:
        """See jobs.experiment.registry.Team. Raises OSError if the leader is lost."""
        self._board.put(self._number, key, value)
        self._leader.send({"posted": [key, value], "number": self._number})

    def find(self, key: str, seconds: float) -> str:
        """See jobs.experiment.registry.Team."""
        return self._board.find(self._number, key, seconds)

    def advance(self, within: float) -> None:
        """See jobs.experiment.registry.Team."""
        self._within = within
        self._deadline = time.monotonic() + within if within > 0 else math.inf

    def _report_idle(self, message: Mapping[str, Any]) -> None:
        self._deadline, self._busy = math.inf, False
        with contextlib.suppress(OSError):  # the watching thread ends this process if the leader is lost
            self._leader.send({**message, "idle": True, "number": self._number, "rss": peak_rss_bytes()})

    def _watch(self) -> None:
        try:
            code = self._watch_leader()
        except Exception:
            traceback.print_exc()
            code = TEAM_LOST
        if code is None:
            self._requests.put(None)
        else:
            self._exit_process(code)

    def _watch_leader(self) -> int | None:
        """Exit code if the process is to end at once; None: its main thread ends it after the current request."""
        checked = heard = time.monotonic()
        last_heartbeat, stop_sent = 0.0, False
        while True:
            if self._leader.readable(self._timeouts.poll):
                messages = self._leader.receive()
                if messages is None:
                    return TEAM_LOST
                heard = time.monotonic()
                for message in messages:
                    self._handle(message)
                    if "leave" in message:
                        return 0 if self._busy else None  # busy: with a stage whose result is not needed any more
            now = time.monotonic()
            suspended, checked = self._timeouts.suspended(now - checked), now
            heard, self._deadline = min(now, heard + suspended), self._deadline + suspended
            if now - heard > self._timeouts.silent:
                return TEAM_LOST
            with contextlib.suppress(OSError):  # noticed by the next `receive`
                if now - last_heartbeat >= self._timeouts.heartbeat:
                    last_heartbeat = now
                    self._leader.send({"rss": peak_rss_bytes()}, wait=False)
                if self._stop() and not stop_sent:
                    stop_sent = True
                    self._leader.send({"stop": self._stop.signal})
                if now > self._deadline:
                    self._deadline = math.inf
                    self._leader.send({"stuck": self._within, "number": self._number})

    def _handle(self, message: Mapping[str, Any]) -> None:
        if "compute" in message:
            self._number, self._busy, self._shared = int(message["number"]), True, queue.Queue()
            self._board.clear_before(self._number)
            self._requests.put(message["compute"])
        if "stop" in message:
            self._stop.request(int(message["stop"]))
        if "posted" in message:
            key, value = message["posted"]
            self._board.put(int(message["number"]), str(key), str(value))
        if "shared" in message and message["number"] == self._number:
            self._shared.put(str(message["shared"]))
