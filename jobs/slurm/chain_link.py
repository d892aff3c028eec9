"""The loop of one link of the controller chain: `Chain.ensure` and a pass, until the experiment is settled or the time limit is near.

passes ----> settled      tables and notice, then the pending links are cancelled
  |  +-----> handed over  time limit, new launch, or five failed passes in a row: the successor continues
  |  +-----> budget       `policy.controller_days` are over
  |  +-----> stopped      by the user
  +--------> broken       three links in a row without a successful pass
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
from jobs.slurm.chain import Chain, ControllerRecord, LinkState, launched_at, read_record, record_file, write_record
from jobs.slurm.script import link_signal_seconds
from jobs.text import one_line

MAX_FAILING = 5  # failed passes in a row, then the link hands over
MAX_FRUITLESS = 3  # links in a row without a successful pass, then the chain ends
LONGEST_PAUSE = 600.0  # seconds; the pause between failed passes doubles up to this
RELAUNCHED = "the experiment was launched again"
LAST_SECONDS = 10.0  # before the time limit, in which no more submission is tried


class Pass(Protocol):
    """Result of one pass of the controller, as far as a link needs it."""

    @property
    def settled(self) -> bool:
        """Nothing is in flight and nothing can be submitted."""

    @property
    def complete(self) -> bool:
        """Every run has a result."""


PassT = TypeVar("PassT", bound=Pass)


class LinkEnd(Enum):
    """Why a link ended."""

    handed_over = "handed over"
    settled = "settled"
    stopped = "stopped"
    budget = "budget"
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
    """Run one link of a chain to its end.

    `minutes`: time limit of the job. `deadline`: end of the chain's budget, seconds since the epoch. `launched`: time of the launch that
    `one_pass` belongs to (None: the last one); the link hands over when there is a newer one. `on_end` is called with the settled pass, and
    possibly again by a successor; `on_stop` with the reason if the chain ends otherwise.
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
        self.record = ControllerRecord(LinkState.running, self.chain.own_job, socket.gethostname(), self.launched, self.begun)
        before = self._fruitless_before()
        if before >= MAX_FRUITLESS:
            former = read_record(self.layout)
            return self._break(before, former.last_error if former else "")
        self._record(fruitless=before + 1)
        while True:
            if self._stopped():
                return LinkEnd.stopped
            if launched_at(self.layout) != self.record.launched or not self.chain.code_is_current:
                return self._hand_over(RELAUNCHED)  # other settings or other code: the successor starts with them
            if self.clock() >= self.deadline:
                return self._end(LinkEnd.budget, "policy.controller_days are over; `grid` starts a new chain")
            if self._time_up():
                return self._hand_over("")
            report = self._pass(before)
            if report is not None and report.settled:
                message = "every run has a result" if report.complete else "nothing left to do, but not every run has a result"
                return self._end(LinkEnd.settled, message)
            if self.record.failing >= MAX_FAILING:
                if before + 1 >= MAX_FRUITLESS and not self.record.passes:
                    return self._break(before + 1, self.record.last_error)
                return self._hand_over(f"{MAX_FAILING} passes in a row failed")
            self.pause(min(self.poll_seconds * 2**self.record.failing, LONGEST_PAUSE, max(0.0, self._leave - self.clock())))

    @property
    def _leave(self) -> float:
        return self.limit - link_signal_seconds(self.minutes)

    def _time_up(self) -> bool:
        return self.signals.count > 0 or self.signals.warned or self.clock() >= self._leave

    def _pass(self, before: int) -> PassT | None:
        """One pass after making sure of a successor; None if it failed or Slurm did not answer."""
        try:
            self._ensure()
            report = self.one_pass()
            if report.settled:
                self.on_end(report)
        except SlurmUnavailableError as error:
            self._record(last_error=str(error), fruitless=self.record.fruitless if self.record.passes else before)
            return None
        except Exception as error:  # the next pass may succeed: an error must not end the chain
            traceback.print_exc()
            self._record(last_error=_described(error), failing=self.record.failing + 1)
            return None
        self._record(passes=self.record.passes + 1, last_pass=self.clock(), failing=0, fruitless=0, last_error="")
        return report

    def _ensure(self) -> None:
        try:
            state = self.chain.ensure()
        except SlurmUnavailableError:
            raise
        except Exception as error:  # the pass itself can still be made
            traceback.print_exc()
            self._record(problem=_described(error))
            return
        if (state.waiting, state.problem) != (self.record.successor, self.record.problem):
            self._record(successor=state.waiting, problem=state.problem)

    def _hand_over(self, message: str) -> LinkEnd:
        """Leave the experiment to the successor; if there is none yet, try to submit one while there is time.

        Not after SIGTERM: that is `scancel`, and a user who cancelled the successor too wants neither.
        """
        while not self.signals.count and not self._stopped():
            self._record(successor="")
            try:
                self._ensure()
            except SlurmUnavailableError as error:
                self._record(last_error=str(error))
            if self.record.successor or self.clock() >= self.limit - LAST_SECONDS or self.chain.cannot_submit:
                break
            self.pause(min(5.0, self.poll_seconds))
        self._record(state=LinkState.handed_over, message=message)
        if not self.record.successor and not self.signals.count and not self._stopped() and self.chain.requeue_self():
            self._record(successor=self.record.job)
        return LinkEnd.handed_over

    def _end(self, end: LinkEnd, message: str) -> LinkEnd:
        """End the chain, unless the experiment was launched again meanwhile, which no other link would notice."""
        self._end_chain(LinkState.ended, message, notify=end is LinkEnd.budget)
        if launched_at(self.layout) != self.record.launched:
            return self._hand_over(RELAUNCHED)
        self._record(successor="")
        return end

    def _break(self, links: int, error: str) -> LinkEnd:
        self._end_chain(LinkState.broken, f"{links} links in a row had no successful pass; the last error: {error}", notify=True)
        return LinkEnd.broken

    def _end_chain(self, state: LinkState, message: str, *, notify: bool) -> None:
        self._record(state=state, message=message)
        try:
            if notify:
                self.on_stop(message)
        except Exception:  # a notice that could not be sent must not keep the chain from ending
            traceback.print_exc()
        try:
            self.chain.withdraw_successors()
        except SlurmUnavailableError as error:
            print(f"{error}; the successor ends by itself", file=sys.stderr)  # noqa: T201 - the log of the link

    def _stopped(self) -> bool:
        found = read_record(self.layout)
        return found is not None and found.state is LinkState.ended and not found.job and found.launched == self.record.launched

    def _fruitless_before(self) -> int:
        former = read_record(self.layout)
        if former is None or former.launched != self.record.launched or former.state is LinkState.broken:
            return 0
        return former.fruitless

    def _record(self, **changes: Any) -> None:
        self.record = replace(self.record, **changes)
        if self._stopped():
            return
        try:
            write_record(self.layout, self.record)
        except OSError as error:  # a full disk, for instance: logged here, and the pass reports it
            print(f"{record_file(self.layout)}: {error}", file=sys.stderr)  # noqa: T201


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
