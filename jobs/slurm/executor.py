"""The executor for Slurm: submits batches of stages as job arrays, and reports by stage key what is in the queue.

What is in flight follows from the records of submissions and one call of squeue. A squeue that fails is an error and never an empty queue;
accounting only explains; whether a stage is done is decided by the files. The number of Slurm calls does not grow with the number of runs.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from jobs.control.exclusions import unless_shared
from jobs.control.executor_protocol import Batch, Executor, Limits
from jobs.control.facts import Asked, Departure, InFlight, Pending, Phase
from jobs.errors import RequestRefusedError, SlurmUnavailableError, UsageError
from jobs.experiment.config import Experiment, Resources, SlurmSite, at_once_of, resources_of
from jobs.experiment.graph import Graph
from jobs.slurm.chain import LINKS, link_name
from jobs.slurm.client import SlurmClient
from jobs.slurm.dependencies import SLURM_JOB, Dependency, make_dependency, upstream_jobs, with_singleton
from jobs.slurm.parse import QueuedElement, Refusal, compress_indices, largest_array, site_number
from jobs.slurm.queue import (
    OwnElement,
    arrays_named,
    cancellable,
    departures_of,
    failed_launches,
    own_elements,
    pending_stages,
    refusals_of,
    stages_in_flight,
    stages_queued,
    stuck_keys,
)
from jobs.slurm.recovery import Recovery
from jobs.slurm.script import ArrayJob, check_site, launcher_python, render_script
from jobs.slurm.startable import Requests
from jobs.slurm.submissions import SETTLE_SECONDS, Guard, State, Submission, SubmissionBook, new_submission
from jobs.store.attempts import own_cluster
from jobs.store.clock import file_time
from jobs.store.layout import Layout, shared_path
from jobs.store.snapshot import Snapshot, plan_snapshot, snapshot_facts, take_snapshot
from jobs.worker.task import Description, Workplace, describe, write_description

ROOM_FOR_LINKS = 8  # smallest submit limit at which places in the queue are reserved for the controller
AVOIDED_SECONDS = 6 * 3600.0  # how long new arrays exclude a node on which Slurm could not start an element
AVOIDED_NODES = 5  # at most, the most recent; fewer in a small partition (jobs.control.exclusions)
# sbatch's messages if an excluded node is not known any more, or if too few nodes are left.
_EXCLUDED_TOO_MANY = ("invalid node name", "node configuration is not available")
_TEST: dict[str, Any] = {"name": "test", "command": ("true",), "description": "/", "folder": "/", "output": "/dev"}  # never submitted
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preview:
    """What would be submitted."""

    name: str
    script: str
    refinements: tuple[str, ...]  # command lines of the `scontrol update` calls that follow


class SlurmArrays(Executor):
    """Executor that submits one job array per batch.

    `source`: folder of the code; jobs run a snapshot of it. `worker`: command that gets the file with a batch's description as its last
    argument, by default `launch.py worker` of the snapshot. Not shared between threads; any number of processes may have one each.
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
        clock: Callable[[], float] | None = None,
        user: int | None = None,
    ) -> None:
        self._user = os.getuid() if user is None else user  # who launched the experiment: only they make passes
        self._experiment = experiment
        self._layout = replace(layout, root=shared_path(layout.root))
        self._place = place
        self._source = source
        self._worker = tuple(worker) if worker else (launcher_python(experiment.slurm, sys.executable), "launch.py", "worker")
        self._client = client or SlurmClient()
        clock = clock or partial(file_time, layout.root)
        self._clock = clock
        self._settle_seconds = settle_seconds
        self._book = SubmissionBook(self._layout)
        self._guard = Guard(self._book, self._client, settle_seconds=settle_seconds, clock=clock)
        self._recovery = Recovery(self._book, self._guard, self._client, settle_seconds=settle_seconds, clock=clock)
        self._most: Limits | None = None  # of the site, with an empty queue
        self._queue: tuple[QueuedElement, ...] | None = None  # the last reading of squeue
        self._elements: tuple[OwnElement, ...] | None = None  # of this experiment, in that reading
        self._blind = False  # Slurm did not answer `look_only`

    @property
    def _site(self) -> SlurmSite:
        return self._experiment.slurm

    @cached_property
    def _snapshot(self) -> Snapshot:
        return take_snapshot(self._source, self._layout, self._experiment.registry)

    @cached_property
    def _planned_snapshot(self) -> Snapshot:
        """The same, without writing it."""
        return plan_snapshot(self._source, self._layout, self._experiment.registry)

    # ---- state of the queue

    def limits(self) -> Limits:
        """What may still be submitted under the site's limits, minus the places of the controller's links; `queue_room` -1: none."""
        if self._blind:
            return Limits(array_size=self._site.max_array_size, queue_room=self._site.max_submit)
        if self._most is None:
            self._most = self._read_limits()
        if not self._most.queue_room:
            return self._most
        queue = self._last_queue()
        links = sum(element.name == link_name(self._layout) for element in queue)
        kept = max(0, LINKS + 1 - links) if self._experiment.policy.controller and self._most.queue_room >= ROOM_FOR_LINKS else 0
        room = self._most.queue_room - len(queue) - kept
        return replace(self._most, queue_room=room if room > 0 else -1)

    def check_options(self, batches: Sequence[Batch] = ()) -> None:
        """UsageError if a value of the site profile cannot be in a script, or if sbatch does not know an option of `slurm.extra`.

        What slurmctld rejects, such as a reservation that does not exist, is found by the submission. `batches`: sbatch is asked with the
        request of the first, which `impossible` then does not repeat.
        """
        check_site(self._site)
        if not self._site.extra:
            return
        small = ArrayJob(size=1, resources=Resources(gpus=0), stages_per_element=1, **_TEST)
        _, said = self._requests.accepted(self._test_jobs(batches[:1])[0] if batches else small)
        wrong = [name for name in self._site.extra if re.search(rf"--{name}\b", said)]
        if wrong:
            raise UsageError(f"slurm.extra.{wrong[0]} (site profile `{self._experiment.site}`): sbatch does not accept it: {said}")

    def in_flight(self) -> Mapping[str, InFlight]:
        """Key -> element of every stage in the queue; those of a submission of unknown outcome count until it is resolved.

        Also repairs the records. Raises SlurmUnavailableError if squeue fails.
        """
        records = self._book.open()
        if not (records or self._book.closed()):  # an array that was closed as lost may still turn up
            self._queue, self._elements = None, ()
            return {}
        abandoned = self._guard.abandoned(records)
        records, self._elements = self._recovery.update(records, self._read_queue(), abandoned)
        return stages_in_flight(records, self._elements)

    def look_only(self) -> Mapping[str, InFlight]:
        """The same for display: writes nothing, and if Slurm does not answer, everything that was submitted is shown as queued."""
        records = self._book.open()
        try:
            queue = self._queue = self._client.queue(patient=False)
        except (SlurmUnavailableError, UsageError) as error:
            _log.warning("%s; the state is shown from the files alone", error)
            self._blind = True
            found = stages_in_flight(records, ())
            for record in records:
                found.update(stages_queued(record) if record.state is State.submitted else {})
            return found
        known = [
            replace(record, state=State.submitted, job=jobs[0])
            if record.state is State.intent and (jobs := arrays_named(record.name, queue))
            else record
            for record in records
        ]
        self._elements = own_elements(known, queue)
        return stages_in_flight(known, self._elements)

    def departures(self, keys: Collection[str]) -> Mapping[str, tuple[Departure, ...]]:
        """Key -> elements of these stages that have left the queue, oldest first, from the records alone.

        The state is "" while accounting lags (`settling`), and stays "" without accounting, or if the element was cancelled while pending,
        which Slurm does not account.
        """
        return departures_of((*self._book.open(), *self._book.closed()), keys, self._user)

    def refusals(self, keys: Collection[str]) -> Mapping[str, tuple[tuple[float, str], ...]]:
        """Key -> (time, message) of each rejection of its request by Slurm since its last submission that was accepted, oldest first."""
        return refusals_of((*self._book.open(), *self._book.closed()), keys)

    def settling(self) -> frozenset[str]:
        """Keys of elements that have left the queue less than the settle time ago and whose final state is not known yet.

        Elements that the program withdrew are not waited for, unless the node on which they could not be started is still unknown.
        """
        waiting = (
            (record, index)
            for record in self._book.open()
            for index in record.unexplained
            if index not in record.cancelled or record.unplaced(str(index))
        )
        now = self._clock()
        recent = ((record, index) for record, index in waiting if now - record.left[str(index)] < self._settle_seconds)
        return frozenset(key for record, index in recent for key in record.tasks[index])

    def stuck(self) -> Mapping[str, str]:
        """Key -> why its pending element will never start without intervention; `held by you: ...` if the user holds it."""
        return stuck_keys(self._elements or ())

    def pending(self) -> Mapping[str, Pending]:
        """Key -> Slurm's reason and the time of submission, of stages that have no node yet, by the last reading of the queue."""
        return pending_stages(self._elements or ())

    def live_jobs(self) -> frozenset[str] | None:
        """`JOB` or `ARRAY_INDEX` of everything that this user has in the queue, of any experiment; None if not known."""
        return None if self._blind else frozenset(element.job for element in self._last_queue())

    def cluster(self) -> str:
        """Slurm's name of this cluster; "" if Slurm does not answer. Asked once per process, if a claim states a cluster."""
        return own_cluster() or self._cluster

    @cached_property
    def _cluster(self) -> str:
        try:
            return "" if self._blind else self._client.configuration().get("ClusterName", "")
        except (SlurmUnavailableError, UsageError) as error:
            _log.warning("the name of this cluster is not known: %s", error)
            return ""

    def nodes(self) -> int:
        """How many nodes the profile's partitions have; 0: not known. Asked once per process, if a node has failed."""
        return 0 if self._blind else self._nodes

    @cached_property
    def _nodes(self) -> int:
        return self._client.node_count(self._site)

    def cancel(self, keys: Collection[str]) -> tuple[str, ...]:
        """Cancel the pending elements that compute no other stages than these. Returns the keys that were withdrawn.

        An element that starts at this moment may be cancelled too: its worker writes a checkpoint or a result, and both are valid.
        """
        if not keys:
            return ()
        if self._elements is None:
            self.in_flight()
        wanted = frozenset(keys)
        for record in self._book.open():
            if record.state is State.intent:  # its elements are cancelled when the array turns up
                self._book.change(record, cancelled=[index for index, task in enumerate(record.tasks) if wanted.issuperset(task)])
        return self._cancel(cancellable(self._elements or (), wanted))

    def withdraw(self, keys: Collection[str]) -> tuple[str, ...]:
        """Cancel the pending and running elements that compute no other stages than these; running ones write a checkpoint.

        Returns the keys that were withdrawn.
        """
        pending = self.cancel(keys)
        self.in_flight()
        wanted = frozenset(keys)
        running = [own for own in self._elements or () if not own.withdrawn and wanted.issuperset(own.keys)]
        return tuple(dict.fromkeys((*pending, *self._cancel(running))))

    def cancel_all(self) -> tuple[str, ...]:
        """Cancel every pending and running element, and arrays whose sbatch may be under way. Returns the keys that were in the queue."""
        self.in_flight()
        for record in self._book.open():
            if record.state is State.intent:
                self._book.change(record, cancelled=range(len(record.tasks)))
                self._client.cancel_named(record.name)
        return self._cancel(self._elements or ())

    def _cancel(self, elements: Sequence[OwnElement]) -> tuple[str, ...]:
        self._recovery.withdraw(elements)
        if elements:
            self._queue = self._elements = None
        return tuple(dict.fromkeys(key for own in elements for key in own.keys))

    # ---- submission

    def submit(self, batch: Batch, graph: Graph, upstream: Mapping[str, InFlight]) -> Mapping[str, InFlight]:
        """Submit a batch unless it is submitted already. Returns its stages in flight; {} if it must be submitted in a later pass.

        Raises RequestRefusedError if Slurm rejects the request, SlurmUnavailableError if squeue fails.
        """
        waits = upstream_jobs(batch, graph, upstream)
        if not all(SLURM_JOB.fullmatch(job) for jobs in waits for job in jobs):
            return {}  # the outcome of an upstream submission is unknown, so there is no job id to depend on
        name = self._book.next_name(batch)
        record = self._book.find(name)
        if record is not None:
            resumed = self._resume(record)
            if resumed is not None:
                return resumed
            name = self._book.next_name(batch)
        dependency = make_dependency(waits)
        job = self._array_job(name, batch, self._snapshot, dependency)
        place = replace(self._place, code={**self._place.code, **snapshot_facts(self._snapshot)})
        resources, description = job.resources, describe_batch(place, graph, batch)
        known = replace(description, team=resources.team, at_once=at_once_of(resources), requested=job.requested(self._site, self._clock()))
        write_description(self._book.tasks_file(name), known)
        self._layout.logs.mkdir(parents=True, exist_ok=True)  # without the folder Slurm fails the job without any message
        return self._send(job, batch, dependency)

    def preview(self, batch: Batch, graph: Graph, upstream: Mapping[str, InFlight], *, name: str | None = None) -> Preview:
        """The script that `submit` would submit. Writes nothing and calls no Slurm command; reads the code for the snapshot's digest."""
        dependency = make_dependency(upstream_jobs(batch, graph, upstream))
        job = self._array_job(name or self._book.next_name(batch), batch, self._planned_snapshot, dependency)
        refinements = tuple(
            f"scontrol update JobId=JOB_[{compress_indices(indices)}] Dependency={own}" for indices, own in dependency.refined
        )
        return Preview(job.name, render_script(job, self._site, self._source / "slurm_templates"), refinements)

    def submissions(self) -> tuple[Submission, ...]:
        """All records of submissions, oldest first."""
        return tuple(sorted((*self._book.open(), *self._book.closed()), key=lambda record: record.created))

    def asked(self, batch: Batch) -> Asked:
        """Time and memory requested for each element of a batch."""
        return self._sized(batch).asked

    def impossible(self, batches: Sequence[Batch]) -> Mapping[Batch, str]:
        """Those of some batches whose tasks can never start at this site, each with the reason. Nothing is submitted."""
        reasons = self._requests.impossible(self._test_jobs(batches))
        return {batch: why for batch, why in zip(batches, reasons, strict=True) if why}

    @cached_property
    def _requests(self) -> Requests:
        return Requests(self._client, self._site, self._source / "slurm_templates")

    def _test_jobs(self, batches: Sequence[Batch]) -> list[ArrayJob]:
        """For each batch a job of one element with its request, to ask sbatch about."""
        return [replace(self._sized(batch), size=1, **_TEST) for batch in batches]

    def previews(self, batches: Sequence[Batch], graph: Graph, in_flight: Mapping[str, InFlight]) -> tuple[Preview, ...]:
        """Scripts of a whole plan; JOB1, JOB2, ... stand for the job ids of its arrays, which are not known yet."""
        upstream = dict(in_flight)
        found: list[Preview] = []
        for number, batch in enumerate(batches, 1):
            found.append(self.preview(batch, graph, upstream))
            elements = ((index, key) for index, task in enumerate(batch.tasks) for key in task.keys)
            upstream.update({key: InFlight(Phase.queued, f"JOB{number}_{index}") for index, key in elements})
        return tuple(found)

    # ---- inside

    def _read_queue(self) -> tuple[QueuedElement, ...]:
        self._queue = self._client.queue()
        return self._queue

    def _last_queue(self) -> tuple[QueuedElement, ...]:
        return self._queue if self._queue is not None else self._read_queue()

    def _read_limits(self) -> Limits:
        config = self._client.configuration()
        enforcement = config.get("AccountingStorageEnforce", "")
        enforced = "limits" in enforcement or "safe" in enforcement
        room = [site_number(config, "MaxJobCount"), self._site.max_submit, self._client.submit_limit(self._site) if enforced else 0]
        array = [largest_array(config), self._site.max_array_size]
        return Limits(array_size=min(filter(None, array), default=0), queue_room=min(filter(None, room), default=0))

    def _resume(self, record: Submission) -> Mapping[str, InFlight] | None:
        """Stages in flight of a batch that was submitted before; None if all of it has ended, and it may be submitted again."""
        abandoned = self._guard.abandoned([record])
        queue = self._client.queue(name=record.name)
        records = self._recovery.resolve([record], queue, abandoned)
        elements = own_elements(records, queue)
        in_flight = stages_in_flight(records, elements)
        if not in_flight:
            self._recovery.record_departures(records, elements)
        return in_flight or None

    def _send(self, job: ArrayJob, batch: Batch, dependency: Dependency) -> Mapping[str, InFlight]:
        """Submit an array. Returns its stages in flight; {} if the queue has no room for it."""
        record = new_submission(job.name, batch, self._clock(), dependency.refined, job.asked, self._place.launched)
        if not self._book.begin(record):
            self._book.check(job.name)
            return stages_in_flight([record], ())  # another process submits it
        look = partial(self._jobs_named, job.name)
        record, reply = self._guard.send(record, look, job, self._site, Path(job.folder) / "slurm_templates")
        self._queue = self._elements = None
        if reply.job:
            if record.refine:  # also drops singleton, under which the elements would wait for each other
                record = self._recovery.refine(record, range(len(record.tasks)))
            return stages_queued(record)
        if reply.refusal is Refusal.unknown:
            _log.warning("%s: %s; not submitted again before the queue was searched for its name", record.name, reply.text)
            return stages_in_flight([record], ())
        if reply.refusal is Refusal.full:
            _log.warning("%s: %s; submitted later", record.name, reply.text)
            return {}
        if any(message in reply.text.lower() for message in _EXCLUDED_TOO_MANY) and (job.request.exclude or job.avoided):
            _log.warning("%s: %s; submitted again without excluding nodes that failed", record.name, reply.text)
            return self._send(replace(job, request=replace(job.request, exclude=()), avoided=()), batch, dependency)
        self._book.close(record, State.refused, refused=reply.text)
        raise RequestRefusedError(
            f"{record.stage} {record.method}: {reply.text} (site profile `{self._experiment.site}`, resources of {record.stage})"
        )

    def _jobs_named(self, name: str) -> list[str]:
        return arrays_named(name, self._client.queue(name=name))

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
            avoided=self._avoided(batch.request.exclude),
        )

    def _sized(self, batch: Batch) -> ArrayJob:
        """An array of the batch's size and request, without name, command and folders."""
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

    def _avoided(self, excluded: Sequence[str]) -> tuple[str, ...]:
        """Nodes on which Slurm recently could not start an element, sorted. `excluded`: those that the array excludes anyway."""
        failed = failed_launches((*self._book.open(), *self._book.closed()), self._clock() - AVOIDED_SECONDS)
        latest = sorted(failed, key=lambda node: failed[node])[-AVOIDED_NODES:]
        return tuple(sorted(unless_shared(latest, excluded, self.nodes()))) if latest else ()


def describe_batch(place: Workplace, graph: Graph, batch: Batch) -> Description:
    """The description of a batch for its workers; array element i computes the i-th task."""
    return describe(place, graph, (task.keys for task in batch.tasks), batch.request.relief, batch.gone)
