"""Keeps the records of submissions in step with Slurm's queue: what was cut off, doubled or lost is made good in the next pass.

Every step is written down before it is taken, and none relies on the one before it having been finished: killed anywhere, the next pass
finds the same record and the same queue, and takes the step again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from jobs.errors import SlurmUnavailableError
from jobs.slurm.client import SlurmClient
from jobs.slurm.parse import QueuedElement, compress_indices, failed_to_launch, has_ended
from jobs.slurm.queue import Holding, arrays_named, find_holdings, held_twice, left_by
from jobs.slurm.submissions import LAUNCH_FAILED, Guard, State, Submission, SubmissionBook, double_of

REFINEMENT_TRIES = 3
_log = logging.getLogger(__name__)


class Upkeep:
    """The records of one experiment, and Slurm."""

    def __init__(
        self, book: SubmissionBook, guard: Guard, client: SlurmClient, *, settle_seconds: float, clock: Callable[[], float]
    ) -> None:
        self._book = book
        self._guard = guard
        self._client = client
        self._settle_seconds = settle_seconds
        self._clock = clock

    def catch_up(
        self, records: Sequence[Submission], queue: Sequence[QueuedElement], abandoned: Collection[str]
    ) -> tuple[tuple[Submission, ...], tuple[Holding, ...]]:
        """One pass over all open records; they, and the elements that the queue holds of them."""
        records = self.resolve(records, queue, abandoned)
        records = (*records, *self._adopt(records, queue))
        holdings = self._withdraw_hopeless(find_holdings(records, queue))
        self._refine_again(holdings)
        self.note_departures(records, holdings)
        return records, holdings

    def resolve(self, records: Sequence[Submission], queue: Sequence[QueuedElement], abandoned: Collection[str]) -> tuple[Submission, ...]:
        """Find the job of every intent by its name; close the record of one that is long enough known to have none."""
        lost = [record for record in records if record.state is State.intent and not arrays_named(record.name, queue)]
        ended = self._client.accounting_by_name([record.name for record in lost], min(record.created for record in lost)) if lost else None
        found: list[Submission] = []
        for record in records:
            current = record
            if record.state is State.intent:
                jobs = arrays_named(record.name, queue)
                number = jobs[0] if jobs else (ended or {}).get(record.name, "")
                settled = self._guard.settle(record, number, abandoned=record.name in abandoned)
                if settled is None:
                    self._book.close(record, State.lost)
                    continue
                current = settled
            found.append(current)
        return tuple(found)

    def refine(self, record: Submission, waiting: Collection[int]) -> Submission:
        """Let the elements that still wait wait for their own upstream alone, so that they start as early as they can."""
        left = [(tuple(index for index in indices if index in waiting), own) for indices, own in record.refine]
        failed = tuple(
            (indices, own)
            for indices, own in left
            if indices and not self._client.set_dependency(f"{record.job}_[{compress_indices(indices)}]", own)
        )
        if failed and record.tries + 1 >= REFINEMENT_TRIES:
            _log.warning("%s: Slurm takes no dependency of single elements; they wait for the whole upstream array", record.name)
            failed = ()
        return self._book.change(record, refine=failed, tries=record.tries + 1)

    def withdraw(self, holdings: Iterable[Holding], state: str = "") -> None:
        """Cancel elements; that it is our doing is on record first, and `state`, where their end is known already."""
        chosen: dict[str, list[Holding]] = {}
        for holding in holdings:
            chosen.setdefault(holding.record.name, []).append(holding)
        if not chosen:
            return
        self._mark(chosen, state)
        self._client.cancel([holding.element.job for each in chosen.values() for holding in each])
        self._mark(chosen, state)  # once more, for nothing as a rule: another process may have written what it read just before

    def note_departures(self, records: Sequence[Submission], holdings: Sequence[Holding]) -> None:
        """Write down which elements have left the queue and how they ended; put records away of which everything is known."""
        present: dict[str, list[Holding]] = {}
        for holding in holdings:
            present.setdefault(holding.record.name, []).append(holding)
        left = {record.name: left_by(record, present.get(record.name, ())) for record in records if record.state is State.submitted}
        now = self._clock()
        seen = [
            replace(record, left={**{str(index): now for index in left.get(record.name, ())}, **record.left})
            if record.name in left
            else record
            for record in records
        ]
        states, nodes = self._ask([record for record in seen if record.unexplained])
        for former, record in zip(records, seen, strict=True):
            ended, places = dict(record.ended), dict(record.nodes)
            for index in record.unexplained:
                place, job = str(index), record.element(index)
                settled = now - record.left[place] >= self._settle_seconds
                if place in ended:
                    places.update({place: nodes.get(job, "")} if job in nodes or settled else {})
                elif has_ended(state := (states or {}).get(job, "")):
                    ended[place] = state
                elif states is None or settled:
                    ended[place] = ""
            current = replace(record, ended=ended, nodes=places)
            if len(left.get(record.name, ())) == len(record.tasks) and not current.unexplained:
                self._book.close(former, State.ended, left=current.left, ended=ended, nodes=places)
            elif current != former:
                self._book.change(former, left=current.left, ended=ended, nodes=places)

    def _mark(self, chosen: Mapping[str, Sequence[Holding]], state: str) -> None:
        for each in chosen.values():
            indices = [holding.index for holding in each]
            self._book.change(each[0].record, cancelled=indices, ended=dict.fromkeys(map(str, indices), state) if state else {})

    def _ask(self, records: Iterable[Submission]) -> tuple[dict[str, str] | None, dict[str, str]]:
        """What accounting says now: how elements ended (None: there is no accounting), and where those ran that could not be started."""
        jobs: set[str] = set()
        unplaced: list[str] = []
        for record in records:
            places = [index for index in record.unexplained if record.unplaced(str(index))]
            unplaced.extend(record.element(index) for index in places)
            jobs.update([record.job] if len(places) < len(record.unexplained) else [])
        states = self._client.accounting(sorted(jobs, key=int)) if jobs else {}
        return states, self._client.launch_nodes(unplaced) if unplaced else {}

    def _adopt(self, records: Sequence[Submission], queue: Sequence[QueuedElement]) -> tuple[Submission, ...]:
        """Arrays that turned up: of a submission that counted as lost, or a second one under a name. Each gets a record of its own."""
        closed = self._book.closed()
        numbers = {record.job for record in (*records, *closed)}
        names = {record.name: record for record in (*closed, *records)}
        unknown = {(element.array, element.name) for element in queue if element.name in names and element.array not in numbers}
        found: list[Submission] = []
        taken = {record.name for record in (*records, *closed) if record.state is not State.lost}
        for array, name in sorted(unknown, key=lambda each: int(each[0])):
            record = replace(names[name], state=State.submitted, job=array)
            if name in taken:
                record = double_of(record, array, self._clock())
            taken.add(record.name)
            self._book.adopt(record)
            _log.warning("array %s turned up under the name %s; what is held twice is withdrawn", array, name)
            found.append(record)
        return tuple(found)

    def _withdraw_hopeless(self, holdings: tuple[Holding, ...]) -> tuple[Holding, ...]:
        """Withdraw what waits in vain: held by Slurm after a failed launch, held twice, or withdrawn before without effect."""
        failed = [holding for holding in holdings if failed_to_launch(holding.element) and not holding.withdrawn]
        again = [holding for holding in holdings if holding.waits and holding.withdrawn]
        jobs = {holding.element.job for holding in failed}
        twice = held_twice(holding for holding in holdings if holding.element.job not in jobs)
        try:
            self.withdraw(failed, LAUNCH_FAILED)
            self.withdraw([*again, *twice])
        except SlurmUnavailableError as error:
            _log.warning("%s; withdrawn in the next pass", error)  # it is on record
        return holdings

    def _refine_again(self, holdings: Iterable[Holding]) -> None:
        """What a pass that was cut off, or refused, left undone."""
        waiting: dict[str, list[Holding]] = {}
        for holding in holdings:
            if holding.record.refine and holding.waits:
                waiting.setdefault(holding.record.name, []).append(holding)
        for each in waiting.values():
            self.refine(each[0].record, {holding.index for holding in each})
