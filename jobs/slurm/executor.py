"""Slurm as an executor: batches become job arrays, and what Slurm holds of them is told by key.

What Slurm holds is the records of submissions joined with one look at its queue. A look that fails is an error and never an empty queue;
accounting only explains; whether a stage is finished, the files say. The number of calls does not grow with the number of runs.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jobs.control.executor_protocol import Batch, Limits
from jobs.control.facts import Asked, Departure, InFlight, Phase
from jobs.errors import SlurmUnavailableError, UsageError
from jobs.experiment.config import Experiment, SlurmSite, at_once_of, resources_of
from jobs.experiment.graph import Graph
from jobs.slurm.chain import LINKS, link_name
from jobs.slurm.client import SlurmClient
from jobs.slurm.dependencies import SLURM_JOB, Dependency, make_dependency, upstream_jobs, with_singleton
from jobs.slurm.parse import QueuedElement, Refusal, compress_indices, site_number
from jobs.slurm.queue import (
    Holding,
    all_queued,
    arrays_named,
    departures_of,
    failed_launches,
    find_holdings,
    flights,
    stuck_keys,
    withdrawable,
)
from jobs.slurm.recovery import Upkeep
from jobs.slurm.script import ArrayJob, launcher_python, parameters, render_script
from jobs.slurm.submissions import SETTLE_SECONDS, Guard, State, Submission, SubmissionBook, new_submission
from jobs.store.layout import Layout
from jobs.store.snapshot import Snapshot, plan_snapshot, snapshot_facts, take_snapshot
from jobs.worker.task import Description, Workplace, describe, write_description

ROOM_FOR_LINKS = 8  # where fewer may be in the queue, none is kept free for the controller
AVOIDED_SECONDS = 6 * 3600.0  # no new array is sent to a node for so long after Slurm could not start an element there
AVOIDED_NODES = 5  # at most, the last ones: where more fail, it is not the nodes
# Slurm knows a node that was ruled out no more; or too few are left, all the site's nodes having failed at some time.
_FOR_WANT_OF_NODES = ("invalid node name", "node configuration is not available")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preview:
    """What would be submitted."""

    name: str
    script: str
    refinements: tuple[str, ...]  # calls that follow, as they would be typed


class SlurmArrays:
    """Executor that submits one job array per batch.

    `source` is the folder of the code (a snapshot of it is what jobs run), `worker` the command that is given the file with a batch's
    description; by default `launch.py worker` of the snapshot. One object serves one process; any number of processes may have one.
    """

    def __init__(
        self,
        experiment: Experiment,
        layout: Layout,
        place: Workplace,
        *,
        source: Path,
        worker: Sequence[str] | None = None,
        client: SlurmClient | None = None,
        settle_seconds: float = SETTLE_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._experiment = experiment
        self._layout = replace(layout, root=layout.root.resolve())
        self._place = place
        self._source = source
        self._worker = tuple(worker) if worker else (launcher_python(experiment.slurm, sys.executable), "launch.py", "worker")
        self._client = client or SlurmClient()
        self._clock = clock
        self._book = SubmissionBook(self._layout)
        self._guard = Guard(self._book, self._client, settle_seconds=settle_seconds, clock=clock)
        self._upkeep = Upkeep(self._book, self._guard, self._client, settle_seconds=settle_seconds, clock=clock)
        self._snapshot: Snapshot | None = None
        self._most: Limits | None = None  # of the site, with an empty queue
        self._queue: tuple[QueuedElement, ...] | None = None
        self._holdings: tuple[Holding, ...] | None = None  # of this experiment, when last looked at
        self._blind = False  # looking only, and Slurm cannot be asked

    @property
    def _site(self) -> SlurmSite:
        return self._experiment.slurm

    # ---- what Slurm holds

    def limits(self) -> Limits:
        """Room under the site's limits, with what was last seen in the queue and what the controller needs; `queue_room` -1: full."""
        if self._blind:
            return Limits(array_size=self._site.max_array_size, queue_room=self._site.max_submit)
        if self._most is None:
            self._most = self._read_limits()
        if not self._most.queue_room:
            return self._most
        queue = self._queue if self._queue is not None else self._look()
        links = sum(element.name == link_name(self._layout) for element in queue)
        kept = max(0, LINKS - links) if self._experiment.policy.controller and self._most.queue_room >= ROOM_FOR_LINKS else 0
        room = self._most.queue_room - len(queue) - kept
        return replace(self._most, queue_room=room if room > 0 else -1)

    def in_flight(self) -> Mapping[str, InFlight]:
        """Key -> element of every stage that Slurm holds, or may hold: a submission of unknown outcome counts until it is resolved.

        Raises SlurmUnavailableError if the queue cannot be seen.
        """
        records = self._book.open()
        if not (records or self._book.closed()):  # what counted as lost may still turn up
            self._queue, self._holdings = None, ()
            return {}
        abandoned = self._guard.abandoned(records)
        records, self._holdings = self._upkeep.catch_up(records, self._look(), abandoned)
        return flights(records, self._holdings)

    def look_only(self) -> Mapping[str, InFlight]:
        """The same for whoever only shows it: writes nothing, and where Slurm cannot be asked, what was submitted is taken for queued."""
        records = self._book.open()
        try:
            queue = self._queue = self._client.queue(patient=False)
        except (SlurmUnavailableError, UsageError) as error:
            _log.warning("%s; shown is what the files say", error)
            self._blind = True
            found = flights(records, ())
            for record in records:
                found.update(all_queued(record) if record.state is State.submitted else {})
            return found
        known = [
            replace(record, state=State.submitted, job=jobs[0])
            if record.state is State.intent and (jobs := arrays_named(record.name, queue))
            else record
            for record in records
        ]
        self._holdings = find_holdings(known, queue)
        return flights(known, self._holdings)

    def departures(self, keys: Collection[str]) -> Mapping[str, tuple[Departure, ...]]:
        """Key -> elements of these stages that have left the queue, oldest first, from the records alone.

        A state is "" while accounting lags (`settling`), and for good where it never said: there is none, or the element was cancelled
        before it began, of which Slurm keeps no trace.
        """
        return departures_of((*self._book.open(), *self._book.closed()), keys)

    def settling(self) -> frozenset[str]:
        """Keys of elements that have left the queue and whose end accounting is still asked for: never longer than the settle time.

        What the program withdrew itself is not waited for, except for the node on which it could not be started.
        """
        waiting = (
            (record, index)
            for record in self._book.open()
            for index in record.unexplained
            if index not in record.cancelled or record.unplaced(str(index))
        )
        return frozenset(key for record, index in waiting for key in record.tasks[index])

    def stuck(self) -> Mapping[str, str]:
        """Key -> why its element, as last seen, will never start unless somebody interferes; `held by you: ...` if that is the user."""
        return stuck_keys(self._holdings or ())

    def live_jobs(self) -> frozenset[str] | None:
        """Every element of this user in the queue as last seen, `JOB` or `ARRAY_INDEX`, whatever experiment it is of; None if not known."""
        if self._blind:
            return None
        queue = self._queue if self._queue is not None else self._look()
        return frozenset(element.job for element in queue)

    def cancel(self, keys: Collection[str]) -> tuple[str, ...]:
        """Withdraw the elements that wait in the queue and hold none but these keys. Returns the keys that were withdrawn.

        One that begins, or ends, at this moment is cancelled or not: its worker leaves a checkpoint or a result, and either is right.
        """
        if not keys:
            return ()
        if self._holdings is None:
            self.in_flight()
        wanted = frozenset(keys)
        for record in self._book.open():
            if record.state is State.intent:  # withdrawn when it turns up
                self._book.change(record, cancelled=[index for index, task in enumerate(record.tasks) if wanted.issuperset(task)])
        return self._cancel(withdrawable(self._holdings or (), wanted))

    def cancel_all(self) -> tuple[str, ...]:
        """Cancel everything of this experiment that waits or runs, and what may be under way. Returns the keys that Slurm held."""
        self.in_flight()
        for record in self._book.open():
            if record.state is State.intent:
                self._book.change(record, cancelled=range(len(record.tasks)))
                self._client.cancel_named(record.name)
        return self._cancel(self._holdings or ())

    def _cancel(self, holdings: Sequence[Holding]) -> tuple[str, ...]:
        self._upkeep.withdraw(holdings)
        if holdings:
            self._queue = self._holdings = None
        return tuple(dict.fromkeys(key for holding in holdings for key in holding.keys))

    # ---- submission

    def submit(self, batch: Batch, graph: Graph, upstream: Mapping[str, InFlight]) -> Mapping[str, InFlight]:
        """Submit a batch unless it is submitted already. Returns what is in flight of it: {} if it has to wait for another pass.

        Raises UsageError if Slurm declines the request.
        """
        waits = upstream_jobs(batch, graph, upstream)
        if not all(SLURM_JOB.fullmatch(job) for jobs in waits for job in jobs):
            return {}  # upstream of it a submission of unknown outcome: what to wait for is not known yet
        name = self._book.next_name(batch)
        record = self._book.find(name)
        if record is not None:
            resumed = self._resume(record)
            if resumed is not None:
                return resumed
            name = self._book.next_name(batch)
        snapshot = self._snapshot = self._snapshot or take_snapshot(self._source, self._layout)
        dependency = make_dependency(waits)
        job = self._array_job(name, batch, snapshot, dependency)
        place = replace(self._place, code={**self._place.code, **snapshot_facts(snapshot)})
        resources, description = job.resources, describe_batch(place, graph, batch)
        write_description(self._book.tasks_file(name), replace(description, team=resources.team, at_once=at_once_of(resources)))
        self._layout.logs.mkdir(parents=True, exist_ok=True)  # without it Slurm fails the job and says so nowhere
        return self._send(job, batch, dependency)

    def preview(self, batch: Batch, graph: Graph, upstream: Mapping[str, InFlight], *, name: str | None = None) -> Preview:
        """The script that `submit` would hand in; touches neither disk nor Slurm (files are read to find the snapshot's digest)."""
        snapshot = self._snapshot = self._snapshot or plan_snapshot(self._source, self._layout)
        dependency = make_dependency(upstream_jobs(batch, graph, upstream))
        job = self._array_job(name or self._book.next_name(batch), batch, snapshot, dependency)
        refinements = tuple(
            f"scontrol update JobId=JOB_[{compress_indices(indices)}] Dependency={own}" for indices, own in dependency.refined
        )
        return Preview(job.name, render_script(job, self._site, self._source / "slurm_templates"), refinements)

    def submissions(self) -> tuple[Submission, ...]:
        """Everything on record that was submitted, oldest first."""
        return tuple(sorted((*self._book.open(), *self._book.closed()), key=lambda record: record.created))

    def asked(self, batch: Batch) -> Asked:
        """What Slurm is asked for each element of a batch."""
        return self._sized(batch).asked

    def previews(self, batches: Sequence[Batch], graph: Graph, in_flight: Mapping[str, InFlight]) -> tuple[Preview, ...]:
        """Scripts of a whole plan; the numbers of its own earlier arrays, not known yet, are written JOB1, JOB2, ..."""
        held = dict(in_flight)
        found: list[Preview] = []
        for number, batch in enumerate(batches, 1):
            found.append(self.preview(batch, graph, held))
            elements = ((index, key) for index, task in enumerate(batch.tasks) for key in task.keys)
            held.update({key: InFlight(Phase.queued, f"JOB{number}_{index}") for index, key in elements})
        return tuple(found)

    # ---- inside

    def _look(self) -> tuple[QueuedElement, ...]:
        self._queue = self._client.queue()
        return self._queue

    def _read_limits(self) -> Limits:
        site = self._client.site()
        enforced = "limits" in site.get("AccountingStorageEnforce", "") or "safe" in site.get("AccountingStorageEnforce", "")
        room = [site_number(site, "MaxJobCount"), self._site.max_submit, self._client.submit_limit(self._site) if enforced else 0]
        array = [site_number(site, "MaxArraySize"), self._site.max_array_size]
        return Limits(
            array_size=min((size for size in array if size), default=0), queue_room=min((limit for limit in room if limit), default=0)
        )

    def _resume(self, record: Submission) -> Mapping[str, InFlight] | None:
        """What is in flight of a batch that was submitted before; None if all of it has ended, and it may be submitted anew."""
        abandoned = self._guard.abandoned([record])
        queue = self._client.queue(name=record.name)
        records = self._upkeep.resolve([record], queue, abandoned)
        holdings = find_holdings(records, queue)
        held = flights(records, holdings)
        if not held:
            self._upkeep.note_departures(records, holdings)
        return held or None

    def _send(self, job: ArrayJob, batch: Batch, dependency: Dependency) -> Mapping[str, InFlight]:
        """Submit an array. Returns what is in flight of it then: {} if the queue has no room for it."""
        script = render_script(job, self._site, Path(job.folder) / "slurm_templates")
        record = new_submission(job.name, batch, self._clock(), dependency.refined, job.asked)
        if not self._book.begin(record):
            self._book.check(job.name)
            return flights([record], ())  # another process was quicker
        request = parameters(job, self._site)
        record, reply = self._guard.send(
            record, lambda: arrays_named(job.name, self._client.queue(name=job.name)), script, request, self._site
        )
        self._queue = self._holdings = None
        if reply.job:
            if record.refine:  # singleton ends here: elements with dependencies of their own would wait for each other
                record = self._upkeep.refine(record, range(len(record.tasks)))
            return all_queued(record)
        if reply.refusal is Refusal.unknown:
            _log.warning("%s: %s; it is looked for under its name before anything is submitted again", record.name, reply.text)
            return flights([record], ())
        if reply.refusal is Refusal.full:
            _log.warning("%s: %s; submitted later", record.name, reply.text)
            return {}
        if any(words in reply.text.lower() for words in _FOR_WANT_OF_NODES) and (job.request.exclude or job.avoided):
            _log.warning("%s: %s; submitted without ruling out nodes that failed", record.name, reply.text)
            return self._send(replace(job, request=replace(job.request, exclude=()), avoided=()), batch, dependency)
        raise UsageError(
            f"{record.stage} {record.method}: {reply.text} (site profile `{self._experiment.site}`, resources of {record.stage})"
        )

    def _array_job(self, name: str, batch: Batch, snapshot: Snapshot, dependency: Dependency) -> ArrayJob:
        description = str(self._book.tasks_file(name))
        return replace(
            self._sized(batch),
            name=name,
            command=(*self._worker, description),
            description=description,
            folder=str(snapshot.path),
            output=str(self._layout.logs),
            binds=(str(self._layout.root), str(self._place.corpus_folder)),
            dependency=with_singleton(dependency.initial),
            avoided=self._avoided(),
        )

    def _sized(self, batch: Batch) -> ArrayJob:
        """An array without a place."""
        return ArrayJob(
            name="",
            size=len(batch.tasks),
            resources=resources_of(self._experiment, batch.stage),
            stages_per_element=max(len(task.keys) for task in batch.tasks),
            command=(),
            description="",
            folder="",
            output="",
            request=batch.request if self._site.memory_requests else replace(batch.request, memory_gb=None),
        )

    def _avoided(self) -> tuple[str, ...]:
        failed = failed_launches((*self._book.open(), *self._book.closed()), self._clock() - AVOIDED_SECONDS)
        return tuple(sorted(sorted(failed, key=lambda node: failed[node])[-AVOIDED_NODES:]))


def describe_batch(place: Workplace, graph: Graph, batch: Batch) -> Description:
    """The description of a batch; array element i computes its i-th task."""
    return describe(place, graph, (task.keys for task in batch.tasks), batch.request.relief, batch.gone)
