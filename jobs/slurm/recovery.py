"""Repairs the records of submissions after a crash or a lost reply: one pass compares them with Slurm's queue and corrects both.

Every step is recorded before it is taken, and none relies on the completion of the one before: after a kill at any point the next pass
finds the same record and the same queue, and repeats the step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from jobs.errors import SlurmUnavailableError
from jobs.slurm.client import SlurmClient
from jobs.slurm.parse import Accounted, QueuedElement, compress_indices, failed_to_launch, is_final
from jobs.slurm.queue import OwnElement, arrays_named, duplicates, own_elements
from jobs.slurm.submissions import FAILED, LAUNCH_FAILED, Guard, State, Submission, SubmissionBook, double_of

REFINEMENT_TRIES = 3
LATE_SECONDS = 6 * 3600.0  # for which accounting is asked for the final state of a job that has left the queue
_CANCELLED = "CANCELLED"
_log = logging.getLogger(__name__)


class Recovery:
    """Keeps the submission records of one experiment consistent with Slurm."""

    def __init__(
        self, book: SubmissionBook, guard: Guard, client: SlurmClient, *, settle_seconds: float, clock: Callable[[], float]
    ) -> None:
        self._book = book
        self._guard = guard
        self._client = client
        self._settle_seconds = settle_seconds
        self._clock = clock

    def update(
        self, records: Sequence[Submission], queue: Sequence[QueuedElement], abandoned: Collection[str]
    ) -> tuple[tuple[Submission, ...], tuple[OwnElement, ...]]:
        """One pass over all open records. Returns them, corrected, and their elements in the queue."""
        records = self.resolve(records, queue, abandoned)
        records = (*records, *self._adopt(records, queue))
        elements = own_elements(records, queue)
        self._withdraw_useless(elements)
        self._repeat_refinements(elements)
        self.record_departures(records, elements)
        return records, elements

    def resolve(self, records: Sequence[Submission], queue: Sequence[QueuedElement], abandoned: Collection[str]) -> tuple[Submission, ...]:
        """Find the job of every intent by its name; close an intent as lost if it has had none for the settle time."""
        missing = [record for record in records if record.state is State.intent and not arrays_named(record.name, queue)]
        ended: Mapping[str, str] = {}
        if missing:
            since = min(record.created for record in missing)
            ended = self._client.accounting_by_name([record.name for record in missing], since) or {}
        found: list[Submission] = []
        for record in records:
            current: Submission | None = record
            if record.state is State.intent:
                job = next(iter(arrays_named(record.name, queue)), ended.get(record.name, ""))
                current = self._guard.settle(record, job, abandoned=record.name in abandoned)
            if current is None:
                self._book.close(record, State.lost)
            else:
                found.append(current)
        return tuple(found)

    def refine(self, record: Submission, pending: Collection[int]) -> Submission:
        """Reduce the dependency of pending elements to their own upstream jobs, so that they start as early as they can."""
        left = [(tuple(index for index in indices if index in pending), own) for indices, own in record.refine]
        failed = tuple(
            (indices, own)
            for indices, own in left
            if indices and not self._client.set_dependency(f"{record.job}_[{compress_indices(indices)}]", own)
        )
        if failed and record.tries + 1 >= REFINEMENT_TRIES:
            _log.warning("%s: Slurm takes no dependency of single elements; they wait for the whole upstream array", record.name)
            failed = ()
        return self._book.change(record, refine=failed, tries=record.tries + 1)

    def withdraw(self, elements: Iterable[OwnElement], state: str = "") -> None:
        """Cancel elements. Recorded first: that the program does it, and `state`, their final state, if it is already known."""
        chosen = _by_record(elements)
        if not chosen:
            return
        self._record_withdrawal(chosen, state)
        self._client.cancel([own.element.job for each in chosen.values() for own in each])
        self._record_withdrawal(chosen, state)  # repeated: a concurrent writer may have overwritten the mark with a stale copy

    def record_departures(self, records: Sequence[Submission], elements: Sequence[OwnElement]) -> None:
        """Record which elements have left the queue and their final state; close a record of which everything is known.

        An element that is missing in the queue has left it only if slurmctld, asked for its job by number, does not show it as queued.
        """
        present = _by_record(elements)
        now = self._clock()
        known = self._known_jobs(records, present)
        seen: list[Submission] = []
        gone: dict[str, int] = {}
        for record in records:
            if record.state is State.submitted:
                queued = {own.index for own in present.get(record.name, ())}
                there = ((index, known.get(record.element(index))) for index in range(len(record.tasks)))
                queued |= {index for index, element in there if element is not None and not is_final(element.state)}
                left = {str(index): now for index in range(len(record.tasks)) if index not in queued}
                gone[record.name] = len(left)
                seen.append(replace(record, left={**left, **record.left}))
            else:
                seen.append(record)
        states, nodes = self._ask_accounting([record for record in seen if record.unexplained])
        for former, record in zip(records, seen, strict=True):
            ended, ends, places = dict(record.ended), dict(record.ended_at), dict(record.nodes)
            for index in record.unexplained:
                place, job = str(index), record.element(index)
                settled = now - record.left[place] >= self._settle_seconds
                if place in ended:
                    places.update({place: nodes.get(job, "")} if job in nodes or settled else {})
                elif (accounted := (states or {}).get(job)) and is_final(accounted.state):
                    ended[place] = accounted.state
                    ends.update({} if accounted.end is None else {place: accounted.end})
                    places.update({place: accounted.node} if accounted.state == FAILED and accounted.node else {})
                elif job in known and known[job].state != _CANCELLED:  # by whom a job was cancelled only accounting knows
                    ended[place] = known[job].state
                    places.update({place: known[job].node} if known[job].state == FAILED and known[job].node else {})
                elif states is None or now - record.left[place] >= (self._settle_seconds if index in record.cancelled else LATE_SECONDS):
                    ended[place] = ""
            current = replace(record, ended=ended, ended_at=ends, nodes=places)
            if gone.get(record.name) == len(record.tasks) and not current.unexplained:
                self._book.close(former, State.ended, left=current.left, ended=ended, ended_at=ends, nodes=places)
            elif current != former:
                self._book.change(former, left=current.left, ended=ended, ended_at=ends, nodes=places)

    def _known_jobs(self, records: Iterable[Submission], present: Mapping[str, Sequence[OwnElement]]) -> dict[str, QueuedElement]:
        """Element as slurmctld knows it, of the submitted records with elements that are not in the queue and whose end is not known."""
        missing = [
            record
            for record in records
            if record.state is State.submitted
            and (record.unexplained or len(record.tasks) > len({*record.left, *(str(own.index) for own in present.get(record.name, ()))}))
        ]
        if not missing:
            return {}
        names = {record.job: record.job_name for record in missing}
        found = self._client.jobs_known(names)
        return {each.job: each for each in found if each.name == names.get(each.ref.array)}

    def _record_withdrawal(self, chosen: Mapping[str, Sequence[OwnElement]], state: str) -> None:
        for each in chosen.values():
            indices = [own.index for own in each]
            self._book.change(each[0].record, cancelled=indices, ended=dict.fromkeys(map(str, indices), state) if state else {})

    def _ask_accounting(self, records: Iterable[Submission]) -> tuple[dict[str, Accounted] | None, dict[str, str]]:
        """Element -> state and end (None: no accounting on this site), and element -> node for elements that could not be started there."""
        jobs: dict[str, str] = {}
        unplaced: list[str] = []
        for record in records:
            places = [index for index in record.unexplained if record.unplaced(str(index))]
            unplaced.extend(record.element(index) for index in places)
            jobs.update({record.job: record.job_name} if len(places) < len(record.unexplained) else {})
        states = self._client.accounting(jobs) if jobs else {}
        return states, self._client.launch_nodes(unplaced) if unplaced else {}

    def _adopt(self, records: Sequence[Submission], queue: Sequence[QueuedElement]) -> tuple[Submission, ...]:
        """Record arrays that turned up: of a submission that was closed as lost, or a second one with the same name."""
        closed = self._book.closed()
        known = {record.job for record in (*records, *closed)}
        names = {record.name: record for record in (*closed, *records)}
        arrived = {(element.ref.array, element.name) for element in queue if element.name in names}
        found: list[Submission] = []
        taken = {record.name for record in (*records, *closed) if record.state is not State.lost}
        for array, name in sorted((each for each in arrived if each[0] not in known), key=lambda each: int(each[0])):
            record = replace(names[name], state=State.submitted, job=array)
            if name in taken:
                record = double_of(record, array, self._clock())
            taken.add(record.name)
            self._book.adopt(record)
            _log.warning("array %s turned up under the name %s; duplicate elements are withdrawn", array, name)
            found.append(record)
        return tuple(found)

    def _withdraw_useless(self, elements: Sequence[OwnElement]) -> None:
        """Withdraw elements that Slurm holds after a failed launch, duplicates, and those that an earlier cancel did not reach."""
        failed = [own for own in elements if failed_to_launch(own.element) and not own.withdrawn]
        again = [own for own in elements if own.pending and own.withdrawn]
        jobs = {own.element.job for own in failed}
        twice = duplicates(own for own in elements if own.element.job not in jobs)
        try:
            self.withdraw(failed, LAUNCH_FAILED)
            self.withdraw([*again, *twice])
        except SlurmUnavailableError as error:
            _log.warning("%s; withdrawn in the next pass", error)  # it is on record

    def _repeat_refinements(self, elements: Iterable[OwnElement]) -> None:
        """Refine what an earlier pass did not: it was interrupted, or Slurm refused."""
        for each in _by_record(own for own in elements if own.record.refine and own.pending).values():
            self.refine(each[0].record, {own.index for own in each})


def _by_record(elements: Iterable[OwnElement]) -> dict[str, list[OwnElement]]:
    """Name of the submission -> its elements."""
    found: dict[str, list[OwnElement]] = {}
    for own in elements:
        found.setdefault(own.record.name, []).append(own)
    return found
