"""Joins the records of submissions with one reading of Slurm's queue: where each stage is, what has left, what is duplicated. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from jobs.control.facts import Departure, InFlight, Pending, Phase
from jobs.slurm.parse import WAITING_STATES, QueuedElement, reason_given, why_stuck
from jobs.slurm.submissions import FAILED, State, Submission

Rank = tuple[bool, bool, int, int]


@dataclass(frozen=True)
class OwnElement:
    """An array element in the queue that belongs to a submission of this experiment."""

    record: Submission
    index: int
    element: QueuedElement

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the stages that it computes."""
        return self.record.tasks[self.index]

    @property
    def pending(self) -> bool:
        """It has no node yet."""
        return self.element.state in WAITING_STATES

    @property
    def withdrawn(self) -> bool:
        """The program wants it cancelled."""
        return self.index in self.record.cancelled

    @property
    def phase(self) -> Phase:
        """CONFIGURING counts as queued: the nodes are still booting."""
        return Phase.queued if self.pending or self.element.state == "CONFIGURING" else Phase.running

    @property
    def rank(self) -> Rank:
        """Of several elements with the same stage the one of the lowest rank is kept: running before pending, then the oldest."""
        return (self.withdrawn, self.pending, int(self.record.job), self.index)


def arrays_named(name: str, queue: Iterable[QueuedElement]) -> list[str]:
    """Job ids of the arrays of that name, oldest first."""
    return sorted({element.ref.array for element in queue if element.name == name}, key=int)


def own_elements(records: Iterable[Submission], queue: Iterable[QueuedElement]) -> tuple[OwnElement, ...]:
    """Every element of the submitted records that is in the queue.

    Job id and name must both match: a slurmctld that was killed may lose its last jobs and give their ids to others.
    """
    by_job = {record.job: record for record in records if record.state is State.submitted}
    found: list[OwnElement] = []
    for element in queue:
        ref = element.ref
        record = by_job.get(ref.array)
        if record is not None and element.name == record.job_name and ref.index is not None and ref.index < len(record.tasks):
            found.append(OwnElement(record, ref.index, element))
    return tuple(found)


def stages_in_flight(records: Iterable[Submission], elements: Iterable[OwnElement]) -> dict[str, InFlight]:
    """Key -> the element that computes it. Stages of an intent count as queued, with `?NAME` in place of a job id."""
    found: dict[str, InFlight] = {}
    for record in records:
        if record.state is State.intent:
            found.update({key: InFlight(Phase.queued, f"?{record.name}") for keys in record.tasks for key in keys})
    for own in sorted(elements, key=lambda each: each.rank, reverse=True):
        found.update({key: InFlight(own.phase, own.element.job) for key in own.keys})
    return found


def stages_queued(record: Submission) -> dict[str, InFlight]:
    """Key -> element of a submission that was just made, or whose state in the queue cannot be read."""
    return {key: InFlight(Phase.queued, record.element(index)) for index, keys in enumerate(record.tasks) for key in keys}


def duplicates(elements: Iterable[OwnElement]) -> tuple[OwnElement, ...]:
    """Pending elements each of whose stages another element of lower rank computes. The element kept for a stage is never among them."""
    elements = tuple(own for own in elements if not own.withdrawn)
    kept: dict[str, Rank] = {}
    for own in elements:
        for key in own.keys:
            kept[key] = min(own.rank, kept.get(key, own.rank))
    return tuple(own for own in elements if own.pending and all(kept[key] < own.rank for key in own.keys))


def cancellable(elements: Iterable[OwnElement], keys: Collection[str]) -> tuple[OwnElement, ...]:
    """Pending elements that compute no other stages than these."""
    wanted = frozenset(keys)
    return tuple(own for own in elements if own.pending and wanted.issuperset(own.keys))


def stuck_keys(elements: Iterable[OwnElement]) -> dict[str, str]:
    """Key -> why its pending element will never start without intervention."""
    return {key: why for own in elements if (why := why_stuck(own.element)) for key in own.keys}


def pending_stages(elements: Iterable[OwnElement]) -> dict[str, Pending]:
    """Key -> Slurm's reason and the time of submission, of stages whose element has no node yet."""
    return {key: Pending(reason_given(own.element), own.record.created) for own in elements if own.pending for key in own.keys}


def departures_of(records: Iterable[Submission], keys: Collection[str], user: int) -> dict[str, tuple[Departure, ...]]:
    """Key -> its elements that have left the queue, oldest submission first. `user`: uid whose scancel is a decision of the owner."""
    wanted = frozenset(keys)
    found: dict[str, list[Departure]] = {}
    for record in sorted(records, key=lambda each: (each.created, each.name)):
        ours = frozenset(record.cancelled)
        for place, gone in record.left.items():
            index = int(place)
            for key in wanted.intersection(record.tasks[index]):
                departure = Departure(
                    key,
                    record.element(index),
                    _state_for(record.ended.get(place, ""), user),
                    record.created,
                    gone,
                    withdrawn=index in ours,
                    asked=record.asked,
                    ended=record.ended_at.get(place),
                    launch=record.launch,
                    node=record.nodes.get(place, "") if record.ended.get(place) == FAILED else "",
                )
                found.setdefault(key, []).append(departure)
    return {key: tuple(each) for key, each in found.items()}


def _state_for(state: str, user: int) -> str:
    """A final state as the owner `user` has to read it: a job that another account cancelled was lost, not given up by its owner."""
    by = state.removeprefix("CANCELLED by ")
    return f"CANCELLED by another account ({by})" if by != state and by not in ("0", str(user)) else state


def refusals_of(records: Iterable[Submission], keys: Collection[str]) -> dict[str, tuple[tuple[float, str], ...]]:
    """Key -> (time, message) of each rejection of its request by Slurm since its last submission that was accepted, oldest first."""
    wanted = frozenset(keys)
    found: dict[str, list[tuple[float, str]]] = {}
    for record in sorted(records, key=lambda each: (each.created, each.name)):
        for key in wanted.intersection(key for task in record.tasks for key in task):
            if record.state is State.refused:
                found.setdefault(key, []).append((record.created, record.refused))
            else:
                found.pop(key, None)
    return {key: tuple(each) for key, each in found.items()}


def failed_launches(records: Sequence[Submission], since: float) -> Mapping[str, float]:
    """Node -> time (seconds since the epoch) at which an element last left the queue because Slurm could not start it there."""
    found: dict[str, float] = {}
    for record in records:
        for place, node in record.nodes.items():
            when = record.left.get(place, record.created)
            if node and when >= since and record.ended.get(place) != FAILED:
                found[node] = max(when, found.get(node, when))
    return found
