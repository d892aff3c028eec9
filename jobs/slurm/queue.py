"""What the records of submissions and one look at the queue say together: who holds a stage, what has left, what is held twice. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from jobs.control.facts import Departure, InFlight, Phase
from jobs.slurm.parse import QueuedElement, why_stuck
from jobs.slurm.submissions import State, Submission


@dataclass(frozen=True)
class Holding:
    """An element of a submission that is in the queue."""

    record: Submission
    index: int
    element: QueuedElement

    @property
    def keys(self) -> tuple[str, ...]:
        return self.record.tasks[self.index]

    @property
    def waits(self) -> bool:
        """It has not been given a node."""
        return self.element.state == "PENDING"

    @property
    def withdrawn(self) -> bool:
        """The program wants it cancelled."""
        return self.index in self.record.cancelled

    @property
    def phase(self) -> Phase:
        return Phase.queued if self.element.state in ("PENDING", "CONFIGURING") else Phase.running

    @property
    def rank(self) -> tuple[bool, bool, int, int]:
        """Who keeps a stage that two hold: the lowest. What runs before what waits, then the oldest."""
        return (self.withdrawn, self.waits, int(self.record.job), self.index)


def arrays_named(name: str, queue: Iterable[QueuedElement]) -> list[str]:
    """Numbers of the arrays of that name, oldest first."""
    return sorted({element.array for element in queue if element.name == name}, key=int)


def find_holdings(records: Iterable[Submission], queue: Iterable[QueuedElement]) -> tuple[Holding, ...]:
    """Every element of submitted records that is in the queue.

    The name counts too: a controller of Slurm that was killed forgets its last jobs and gives their numbers to others.
    """
    by_job = {record.job: record for record in records if record.state is State.submitted}
    found: list[Holding] = []
    for element in queue:
        array, _, index = element.job.partition("_")
        record = by_job.get(array)
        if record is not None and element.name == record.job_name and index and int(index) < len(record.tasks):
            found.append(Holding(record, int(index), element))
    return tuple(found)


def flights(records: Iterable[Submission], holdings: Iterable[Holding]) -> dict[str, InFlight]:
    """Key -> who holds it; all keys of a submission of unknown outcome are taken for queued, under a name that nothing can depend on."""
    found: dict[str, InFlight] = {}
    for record in records:
        if record.state is State.intent:
            found.update({key: InFlight(Phase.queued, f"?{record.name}") for keys in record.tasks for key in keys})
    for holding in sorted(holdings, key=lambda each: each.rank, reverse=True):
        found.update({key: InFlight(holding.phase, holding.element.job) for key in holding.keys})
    return found


def all_queued(record: Submission) -> dict[str, InFlight]:
    """Key -> element of a submission that was made just now, or that nobody can look at."""
    return {key: InFlight(Phase.queued, record.element(index)) for index, keys in enumerate(record.tasks) for key in keys}


def left_by(record: Submission, holdings: Iterable[Holding]) -> tuple[int, ...]:
    """Elements of a submitted record that are not in the queue."""
    present = {holding.index for holding in holdings if holding.record.name == record.name}
    return tuple(index for index in range(len(record.tasks)) if index not in present)


def held_twice(holdings: Iterable[Holding]) -> tuple[Holding, ...]:
    """Waiting elements each of whose stages another element holds that runs, or is older. Whoever keeps a stage is never among them."""
    holdings = tuple(holding for holding in holdings if not holding.withdrawn)
    keeps: dict[str, tuple[bool, bool, int, int]] = {}
    for holding in holdings:
        for key in holding.keys:
            keeps[key] = min(holding.rank, keeps.get(key, holding.rank))
    return tuple(each for each in holdings if each.waits and all(keeps[key] < each.rank for key in each.keys))


def withdrawable(holdings: Iterable[Holding], keys: Collection[str]) -> tuple[Holding, ...]:
    """Waiting elements that hold none but these keys."""
    wanted = frozenset(keys)
    return tuple(holding for holding in holdings if holding.waits and wanted.issuperset(holding.keys))


def stuck_keys(holdings: Iterable[Holding]) -> dict[str, str]:
    """Key -> why its waiting element will never start unless somebody interferes."""
    return {key: why for holding in holdings if (why := why_stuck(holding.element)) for key in holding.keys}


def departures_of(records: Iterable[Submission], keys: Collection[str]) -> dict[str, tuple[Departure, ...]]:
    """Key -> elements that held it and have left the queue, oldest first."""
    wanted = frozenset(keys)
    found: dict[str, list[Departure]] = {}
    for record in sorted(records, key=lambda each: (each.created, each.name)):
        ours = frozenset(record.cancelled)
        for place, gone in record.left.items():
            index = int(place)
            for key in record.tasks[index]:
                if key in wanted:
                    state = record.ended.get(place, "")
                    left = Departure(key, record.element(index), state, record.created, gone, index in ours, record.asked)
                    found.setdefault(key, []).append(left)
    return {key: tuple(sorted(each, key=lambda one: one.submitted)) for key, each in found.items()}


def failed_launches(records: Sequence[Submission], since: float) -> Mapping[str, float]:
    """Node -> when an element last left the queue because Slurm could not start it there, as far as that is known."""
    found: dict[str, float] = {}
    for record in records:
        for place, node in record.nodes.items():
            when = record.left.get(place, record.created)
            if node and when >= since:
                found[node] = max(when, found.get(node, when))
    return found
