"""One link of the controller chain: it makes sure of its successors, makes one pass, and ends.

pass ----> handed over   the next link continues; also after a failed pass
  |  +---> settled       nothing is left to do: tables and notice, then the pending links are cancelled
  |  +---> budget        `policy.controller_days` are over
  |  +---> stopped       by the user
  |  +---> broken        `MAX_FAILING` links in a row without a successful pass
  +------> alone         no successor could be submitted: the job script submits the link again

A shared folder that cannot be read (OSError) and a Slurm that does not answer are waited out until the chain's budget is over: such a pass
counts neither as failed nor as successful.
"""

from __future__ import annotations

import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Generic, Protocol, TypeVar

from jobs.errors import SlurmUnavailableError
from jobs.slurm.chain import Chain, ControllerRecord, LinkState, read_record, record_file, write_record
from jobs.store.launches import launched_at
from jobs.text import counted, one_line

STUCK_SECONDS = 6 * 3600.0  # jobs may be unable to start for so long before a notice is sent
MAX_FAILING = 12  # links in a row whose pass failed, then the chain ends


class Pass(Protocol):
    """Result of one pass of the controller, as far as a link needs it."""

    @property
    def settled(self) -> bool:
        """Nothing is in flight and nothing can be submitted."""

    @property
    def complete(self) -> bool:
        """Every run has a result."""

    @property
    def stuck(self) -> Mapping[str, str]:
        """Key -> why its queued job will never start without intervention."""


PassT = TypeVar("PassT", bound=Pass)


class LinkEnd(Enum):
    """Why a link ended."""

    handed_over = "handed over"
    settled = "settled"
    stopped = "stopped"
    budget = "budget"
    broken = "broken"
    alone = "no successor"


def run_link(
    one_pass: Callable[[], PassT],
    chain: Chain,
    *,
    deadline: float,
    launched: float | None = None,
    on_end: Callable[[PassT], None] = lambda report: None,
    on_stop: Callable[[str], None] = lambda message: None,
    on_stuck: Callable[[PassT], None] = lambda report: None,
    clock: Callable[[], float] = time.time,
) -> LinkEnd:
    """Run one link of a chain.

    `deadline`: end of the chain's budget, seconds since the epoch. `launched`: time of the launch that `one_pass` belongs to (None: the
    last one). `on_end` is called with the settled pass, and possibly again by a successor; `on_stop` with the reason if the chain ends
    otherwise; `on_stuck` with a pass if for `STUCK_SECONDS` there were jobs that will never start, after each such pass.
    """
    since = launched_at(chain.layout) if launched is None else launched
    return _Link(one_pass, chain, deadline, since, on_end, on_stop, on_stuck, clock).run()


@dataclass
class _Link(Generic[PassT]):
    """The state of a link while it runs."""

    one_pass: Callable[[], PassT]
    chain: Chain
    deadline: float
    launched: float
    on_end: Callable[[PassT], None]
    on_stop: Callable[[str], None]
    on_stuck: Callable[[PassT], None]
    clock: Callable[[], float]

    def run(self) -> LinkEnd:
        former = self._former()
        own = ControllerRecord(LinkState.running, self.chain.own_job, socket.gethostname(), self.launched, self.clock())
        kept = {name: getattr(former, name) for name in ("passes", "last_pass", "failing", "stuck_since", "last_error")}
        self.record = replace(own, **kept)
        if self._stopped():
            self._withdraw()
            return LinkEnd.stopped
        if self.clock() >= self.deadline:
            return self._end(LinkEnd.budget, "policy.controller_days are over; `grid` starts a new chain")
        if former.failing >= MAX_FAILING:
            return self._end(
                LinkEnd.broken, f"{counted(former.failing, 'pass', 'passes')} in a row failed; the last error: {former.last_error}"
            )
        self._ensure()
        self._write(failing=former.failing + 1)  # until the pass has ended
        try:
            report = self.one_pass()
            stuck_since = (former.stuck_since or self.clock()) if report.stuck else 0.0
            if report.settled:
                self.on_end(report)
            elif stuck_since and self.clock() - stuck_since >= STUCK_SECONDS:
                self.on_stuck(report)
        except (SlurmUnavailableError, OSError) as error:
            return self._hand_over(failing=former.failing, last_error=_described(error))
        except Exception as error:  # the next pass may succeed: an error must not end the chain
            traceback.print_exc()
            return self._hand_over(last_error=_described(error))
        self.record = replace(
            self.record, passes=self.record.passes + 1, last_pass=self.clock(), failing=0, stuck_since=stuck_since, last_error=""
        )
        if report.settled:
            return self._end(
                LinkEnd.settled, "every run has a result" if report.complete else "nothing left to do, but not every run has a result"
            )
        return self._hand_over()

    def _ensure(self) -> None:
        """Make sure of successors, and note them in the record or why there are none."""
        try:
            state = self.chain.ensure()
        except Exception as error:  # the pass itself can still be made
            if not isinstance(error, (SlurmUnavailableError, OSError)):
                traceback.print_exc()
            self.record = replace(self.record, successor="", problem=_described(error))
        else:
            self.record = replace(self.record, successor=state.waiting, problem=state.problem)

    def _hand_over(self, **changes: Any) -> LinkEnd:
        self._write(state=LinkState.handed_over, **changes)
        return LinkEnd.handed_over if self.record.successor else LinkEnd.alone

    def _end(self, end: LinkEnd, message: str) -> LinkEnd:
        """End the chain, unless the experiment was launched again meanwhile, which no other link would notice."""
        self._write(state=LinkState.broken if end is LinkEnd.broken else LinkState.ended, message=message)
        if end is not LinkEnd.settled:
            try:
                self.on_stop(message)
            except Exception:  # a notice that could not be sent must not keep the chain from ending
                traceback.print_exc()
        self._withdraw()
        if _answer(lambda: launched_at(self.chain.layout), self.launched) != self.launched:
            self._ensure()
            return LinkEnd.handed_over if self.record.successor else LinkEnd.alone
        return end

    def _withdraw(self) -> None:
        try:
            self.chain.withdraw_successors()
        except SlurmUnavailableError as error:
            _log(f"{error}; the successor ends by itself")

    def _stopped(self) -> bool:
        found = _answer(lambda: read_record(self.chain.layout), None)
        return found is not None and found.state is LinkState.ended and not found.job and found.launched == self.launched

    def _former(self) -> ControllerRecord:
        """The record of the link before this one; a new one after another launch, after an end, or if it cannot be read."""
        found = _answer(lambda: read_record(self.chain.layout), None)
        known = found is not None and found.launched == self.launched and found.state in (LinkState.running, LinkState.handed_over)
        return found if found is not None and known else ControllerRecord()

    def _write(self, **changes: Any) -> None:
        self.record = replace(self.record, **changes)
        if self._stopped():
            return
        try:
            write_record(self.chain.layout, self.record)
        except OSError as error:  # a full disk, for instance: the record only informs
            _log(f"{record_file(self.chain.layout)}: {error}")


def _answer(read: Callable[[], Any], unknown: Any) -> Any:
    """What is read, or `unknown` if the shared folder cannot be read now."""
    try:
        return read()
    except OSError as error:
        _log(_described(error))
        return unknown


def _log(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201 - the log of the link


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
