"""One link of the controller chain: passes until the experiment is settled or the job's time is nearly up, a successor ensured before each.

passes ----> settled     tables and notice, then the successors are cancelled
  |  +-----> handed over the time limit, a new launch, five passes in a row that failed: the successor goes on
  |  +-----> budget      `policy.controller_days` are over
  |  +-----> stopped     its user said so
  +--------> broken      three links in a row had no good pass
"""

from __future__ import annotations

import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Generic, Protocol, TypeVar

from jobs.errors import SlurmUnavailableError
from jobs.signals import WARNING_SIGNAL, Interrupts
from jobs.slurm.chain import Chain, ControllerRecord, Phase, launched_at, read_record, record_file, write_record
from jobs.slurm.script import link_signal_seconds

MAX_FAILING = 5  # passes in a row, then the successor tries
MAX_FRUITLESS = 3  # links in a row without one good pass, then the chain ends
LONGEST_PAUSE = 600.0  # seconds between passes that fail; it doubles each time
LAST_SECONDS = 10.0  # before the time limit nothing more is tried


class Pass(Protocol):
    """What a link must know of one pass of the controller."""

    @property
    def settled(self) -> bool:
        """Nothing is under way and nothing can be submitted."""

    @property
    def complete(self) -> bool:
        """Every run has a result."""


PassT = TypeVar("PassT", bound=Pass)


class LinkEnd(Enum):
    """Why a link left."""

    handed_over = "handed over"  # to its successor
    settled = "settled"
    stopped = "stopped"  # by the user
    budget = "budget"  # `policy.controller_days` are over
    broken = "broken"


def run_link(
    one_pass: Callable[[], PassT],
    chain: Chain,
    *,
    poll_seconds: float,
    minutes: float,
    deadline: float,
    launched: float | None = None,
    on_end: Callable[[PassT], None] = lambda report: None,
    on_stop: Callable[[str], None] = lambda message: None,
    clock: Callable[[], float] = time.time,
    pause: Callable[[float], None] | None = None,
) -> LinkEnd:
    """One link of a chain: passes until the experiment is settled or the link's time is nearly up, a successor ensured before each.

    `minutes` is the job's time limit, `deadline` the end of the chain's budget in seconds since the epoch, `launched` the launch that
    `one_pass` was made from (None: the last one): the link leaves to its successor when there is a newer one. `on_end` is called with a
    pass that left nothing to do and may be called again by a successor; `on_stop` with the reason when the chain ends without that.
    """
    with Interrupts(numbers=(signal.SIGTERM, signal.SIGINT), warning=WARNING_SIGNAL) as signals:
        since = launched_at(chain.layout) if launched is None else launched
        link = _Link(one_pass, chain, poll_seconds, minutes, deadline, since, on_end, on_stop, clock, pause or signals.pause, signals)
        return link.run()


@dataclass
class _Link(Generic[PassT]):
    """The state of a link while it runs."""

    one_pass: Callable[[], PassT]
    chain: Chain
    poll_seconds: float
    minutes: float
    deadline: float
    launched: float
    on_end: Callable[[PassT], None]
    on_stop: Callable[[str], None]
    clock: Callable[[], float]
    pause: Callable[[float], None]
    signals: Interrupts

    def run(self) -> LinkEnd:
        self.layout = self.chain.layout
        self.begun = self.clock()
        self.limit = self.begun + 60 * self.minutes
        self.record = ControllerRecord("running", self.chain.own_job, socket.gethostname(), self.launched, self.begun)
        before = self._fruitless_before()
        if before >= MAX_FRUITLESS:
            former = read_record(self.layout)
            return self._break(f"{before} links in a row had no good pass; the last error: {former.last_error if former else ''}")
        self._note(fruitless=before + 1)
        while True:
            if self._stopped():
                return LinkEnd.stopped
            if launched_at(self.layout) != self.record.launched or not self.chain.code_is_current:
                return self._hand_over("launched anew")  # another configuration or other code: the successor begins with it
            if self.clock() >= self.deadline:
                return self._end(LinkEnd.budget, "policy.controller_days are over; `grid` again begins anew")
            if self._time_up():
                return self._hand_over("")
            report = self._pass(before)
            if report is not None and report.settled:
                said = "every run is in" if report.complete else "nothing left to do, but not every run is in"
                return self._end(LinkEnd.settled, said)
            if self.record.failing >= MAX_FAILING:
                if before + 1 >= MAX_FRUITLESS and not self.record.passes:
                    return self._break(f"{before + 1} links in a row had no good pass; the last error: {self.record.last_error}")
                return self._hand_over(f"{MAX_FAILING} passes in a row failed")
            self.pause(min(self.poll_seconds * 2**self.record.failing, LONGEST_PAUSE, max(0.0, self._leave - self.clock())))

    @property
    def _leave(self) -> float:
        return self.limit - link_signal_seconds(self.minutes)

    def _time_up(self) -> bool:
        return self.signals.count > 0 or self.signals.warned or self.clock() >= self._leave

    def _pass(self, before: int) -> PassT | None:
        """One pass, a successor first; None if it failed or Slurm did not answer."""
        try:
            self._ensure()
            report = self.one_pass()
            if report.settled:
                self.on_end(report)
        except SlurmUnavailableError as error:
            self._note(last_error=str(error), fruitless=self.record.fruitless if self.record.passes else before)
            return None
        except Exception as error:  # whatever it is, the next pass may do, and the chain must not end for it
            traceback.print_exc()
            self._note(last_error=_in_one_line(error), failing=self.record.failing + 1)
            return None
        self._note(passes=self.record.passes + 1, last_pass=self.clock(), failing=0, fruitless=0, last_error="")
        return report

    def _ensure(self) -> None:
        try:
            state = self.chain.ensure()
        except SlurmUnavailableError:
            raise
        except Exception as error:  # the pass is worth having all the same
            traceback.print_exc()
            self._note(problem=_in_one_line(error))
            return
        if (state.waiting, state.problem) != (self.record.successor, self.record.problem):
            self._note(successor=state.waiting, problem=state.problem)

    def _hand_over(self, message: str) -> LinkEnd:
        """Leave to the successor; where there is none yet, try for one as long as there is time.

        Not when asked to leave: that is `scancel`, and whoever cancelled the successor too wants neither.
        """
        while not self.signals.count and not self._stopped():
            self._note(successor="")
            try:
                self._ensure()
            except SlurmUnavailableError as error:
                self._note(last_error=str(error))
            if self.record.successor or self.clock() >= self.limit - LAST_SECONDS or self.chain.hopeless:
                break
            self.pause(min(5.0, self.poll_seconds))
        self._note(state=LinkEnd.handed_over.value, message=message)
        if not self.record.successor and not self.signals.count and not self._stopped() and self.chain.come_again():
            self._note(successor=self.record.job)
        return LinkEnd.handed_over

    def _end(self, end: LinkEnd, message: str) -> LinkEnd:
        """The chain ends here; unless the experiment was launched anew meanwhile, which nobody else would notice."""
        self._note(state=Phase.ended.value, message=message)
        if end is LinkEnd.budget:
            self._tell(message)
        try:
            self.chain.withdraw_successors()
        except SlurmUnavailableError as error:
            print(f"{error}; the successor will see for itself", file=sys.stderr)  # noqa: T201 - the log of the link
        if launched_at(self.layout) != self.record.launched:
            return self._hand_over("launched anew")
        self._note(successor="")
        return end

    def _break(self, message: str) -> LinkEnd:
        self._note(state=Phase.broken.value, message=message)
        self._tell(message)
        try:
            self.chain.withdraw_successors()
        except SlurmUnavailableError as error:
            print(f"{error}; the successor will see for itself", file=sys.stderr)  # noqa: T201
        return LinkEnd.broken

    def _tell(self, message: str) -> None:
        try:
            self.on_stop(message)
        except Exception:  # that nobody could be told must not keep the chain from ending
            traceback.print_exc()

    def _stopped(self) -> bool:
        found = read_record(self.layout)
        return found is not None and found.state == Phase.ended.value and not found.job and found.launched == self.record.launched

    def _fruitless_before(self) -> int:
        former = read_record(self.layout)
        if former is None or former.launched != self.record.launched or former.state == Phase.broken.value:
            return 0
        return former.fruitless

    def _note(self, **changes: Any) -> None:
        self.record = replace(self.record, **changes)
        if self._stopped():
            return
        try:
            write_record(self.layout, self.record)
        except OSError as error:  # a full disk: the log says it, and the pass will
            print(f"{record_file(self.layout)}: {error}", file=sys.stderr)  # noqa: T201


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
