"""Slurm as an executor: batches become job arrays, and what Slurm holds of them is told by key.

What Slurm holds is the records of submissions joined with one look at its queue. A look that fails is an error and never an empty queue;
accounting only explains; whether a stage is finished, the files say. The number of calls does not grow with the number of runs.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs.config import Experiment, SlurmSite, resources_of
from jobs.dependencies import SLURM_JOB, Dependency, make_dependency, upstream_jobs, with_singleton
from jobs.errors import UsageError
from jobs.graph import Graph
from jobs.layout import Layout
from jobs.plan import Batch, InFlight, Limits, Phase
from jobs.sbatch import ArrayJob, array_expression, gpu_expression, launcher_python, render_script, signal_seconds
from jobs.slurm_client import UNDERWAY_SECONDS, SlurmClient
from jobs.slurm_text import (
    QueuedElement,
    Refusal,
    compress_indices,
    read_refusal,
    site_number,
)
from jobs.snapshot import Snapshot, plan_snapshot, snapshot_facts, take_snapshot
from jobs.submissions import State, Submission, SubmissionBook, new_submission
from jobs.tasks import Workplace, describe_batch, write_description

SETTLE_SECONDS = 60.0  # how long a submission of unknown outcome stays unfound before it is made again
_ENDINGS = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT")
)
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
        self._settle_seconds = settle_seconds
        self._clock = clock
        self._book = SubmissionBook(self._layout)
        self._snapshot: Snapshot | None = None
        self._most: Limits | None = None  # of the site, with an empty queue
        self._queue: tuple[QueuedElement, ...] | None = None
        self._blind = False  # looking only, and Slurm cannot be asked

    @property
    def _site(self) -> SlurmSite:
        return self._experiment.slurm

    # ---- what Slurm holds

    def limits(self) -> Limits:
        """Room under the site's limits, with what was last seen in the queue; `queue_room` -1: full."""
        if self._blind:
            return Limits(array_size=self._site.max_array_size, queue_room=self._site.max_submit)
        if self._most is None:
            self._most = self._read_limits()
        if not self._most.queue_room:
            return self._most
        queue = self._queue if self._queue is not None else self._look()
        room = self._most.queue_room - len(queue)
        return replace(self._most, queue_room=room if room > 0 else -1)

    def in_flight(self) -> Mapping[str, InFlight]:
        """Key -> element of every stage that Slurm holds, or may hold: a submission of unknown outcome counts until it is resolved.

        Raises SlurmUnavailableError if the queue cannot be seen.
        """
        records = self._book.open()
        if not records:
            self._queue = None
            return {}
        queue = self._look()
        records = self._resolve(records, queue)
        found: dict[str, InFlight] = {}
        for record in records:
            found.update(_elements(record, queue))
        self._close_ended(records, {element.job for element in queue})
        return found

    def look_only(self) -> Mapping[str, InFlight]:
        """The same for whoever only shows it: writes nothing, and where Slurm cannot be asked, what was submitted is taken for queued."""
        records = self._book.open()
        found: dict[str, InFlight] = {}
        try:
            queue = self._queue = self._client.queue(patient=False)
        except UsageError as error:
            _log.warning("%s; shown is what the files say", error)
            self._blind = True
            for record in records:
                known = record.state is State.submitted
                found.update(_held(record, range(len(record.tasks)), Phase.queued) if known else _unresolved(record))
            return found
        for record in records:
            jobs = _arrays_named(record.name, queue) if record.state is State.intent else []
            found.update(_elements(replace(record, state=State.submitted, job=jobs[0]) if jobs else record, queue))
        return found

    def live_jobs(self) -> frozenset[str] | None:
        """Every element of this user in the queue as last seen, `JOB` or `ARRAY_INDEX`, whatever experiment it is of; None if not known."""
        if self._blind:
            return None
        queue = self._queue if self._queue is not None else self._look()
        return frozenset(element.job for element in queue)

    def cancel(self, keys: Collection[str] | None = None) -> tuple[str, ...]:
        """Cancel the elements that hold some keys, or all of this experiment. Returns what was cancelled."""
        held = self.in_flight()
        jobs = {flight.job for key, flight in held.items() if (keys is None or key in keys) and SLURM_JOB.fullmatch(flight.job)}
        arrays: dict[str, list[int]] = {}
        for job in jobs:
            array, _, index = job.partition("_")
            arrays.setdefault(array, []).append(int(index))
        chosen = tuple(f"{array}_[{compress_indices(indices)}]" for array, indices in sorted(arrays.items()))
        self._client.cancel(chosen)
        self._queue = None
        return chosen

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
        script = render_script(job, self._site, snapshot.path / "slurm_templates")
        place = replace(self._place, code={**self._place.code, **snapshot_facts(snapshot)})
        write_description(self._book.tasks_file(name), describe_batch(place, graph, batch))
        self._layout.logs.mkdir(parents=True, exist_ok=True)  # without it Slurm fails the job and says so nowhere
        record = new_submission(name, batch, self._clock())
        if not self._book.begin(record):
            return _unresolved(record)  # another process was quicker
        try:
            found = _arrays_named(name, self._client.queue(name=name))
        except UsageError:
            self._book.withdraw(record)  # nothing was asked for
            raise
        number = found[0] if found else self._call_sbatch(record, job, script)
        self._queue = None
        if number is None:
            return {}
        if not number:
            return _unresolved(record)
        record = self._book.update(replace(record, state=State.submitted, job=number))
        for indices, own in dependency.refined:
            # singleton ends here: the number is known, and elements with dependencies of their own would wait for each other
            self._client.set_dependency(f"{number}_[{compress_indices(indices)}]", own)
        return _held(record, range(len(record.tasks)), Phase.queued)

    def preview(self, batch: Batch, graph: Graph, upstream: Mapping[str, InFlight], *, name: str | None = None) -> Preview:
        """The script that `submit` would hand in; touches neither disk nor Slurm (files are read to find the snapshot's digest)."""
        snapshot = self._snapshot = self._snapshot or plan_snapshot(self._source, self._layout)
        dependency = make_dependency(upstream_jobs(batch, graph, upstream))
        job = self._array_job(name or self._book.next_name(batch), batch, snapshot, dependency)
        refinements = tuple(
            f"scontrol update JobId=JOB_[{compress_indices(indices)}] Dependency={own}" for indices, own in dependency.refined
        )
        return Preview(job.name, render_script(job, self._site, self._source / "slurm_templates"), refinements)

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

    def _resolve(self, records: Sequence[Submission], queue: Sequence[QueuedElement]) -> tuple[Submission, ...]:
        """Find the job of every intent by its name; close the record of one that is long enough known to have none."""
        lost = [record for record in records if record.state is State.intent and not _arrays_named(record.name, queue)]
        ended = self._client.accounting_by_name([record.name for record in lost], min(record.created for record in lost)) if lost else None
        now = self._clock()
        open_records: list[Submission] = []
        for record in records:
            current = record
            if record.state is State.intent:
                jobs = _arrays_named(record.name, queue)
                number = jobs[0] if jobs else (ended or {}).get(record.name, "")
                begun = record.created if record.replied else record.created + UNDERWAY_SECONDS
                if number:
                    current = self._book.update(replace(record, state=State.submitted, job=number))
                elif not record.looked_up:
                    current = self._book.update(replace(record, looked_up=now))
                elif now - max(record.looked_up, begun) >= self._settle_seconds:
                    self._book.close(record, State.lost)
                    continue
            open_records.append(current)
        return tuple(open_records)

    def _close_ended(self, records: Sequence[Submission], queued: Collection[str]) -> None:
        """Write down how elements ended that have left the queue, and put records away of which none is left."""
        left = {record.name: _left(record, queued) for record in records if record.state is State.submitted}
        asked = sorted({record.job for record in records if any(str(index) not in record.ended for index in left.get(record.name, ()))})
        states = self._client.accounting(asked) if asked else {}
        now = self._clock()
        for record in records:
            gone = left.get(record.name, ())
            if not gone:
                continue
            known = {str(index): state for index in gone if (state := (states or {}).get(record.element(index), "")) in _ENDINGS}
            current = replace(record, ended={**record.ended, **known})
            if len(gone) == len(record.tasks):
                current = replace(current, gone=record.gone or now)
                if states is None or len(current.ended) == len(record.tasks) or now - current.gone >= self._settle_seconds:
                    self._book.close(current, State.ended)
                    continue
            if current != record:
                self._book.update(current)

    def _resume(self, record: Submission) -> Mapping[str, InFlight] | None:
        """What is in flight of a batch that was submitted before; None if all of it has ended, and it may be submitted anew."""
        queue = self._client.queue(name=record.name)
        (current,) = self._resolve([record], queue) or (None,)
        if current is None:
            return None
        held = _elements(current, queue)
        if held or current.state is State.intent:
            return held
        self._book.close(current, State.ended)
        return None

    def _call_sbatch(self, record: Submission, job: ArrayJob, script: str) -> str | None:
        """The array's number; "" if the outcome is unknown; None if there is no room, and no intent any more."""
        from jobs.template_executor import SubmissionFailedError

        try:
            return self._client.submit(self._book.scripts, script, _parameters(job, self._site), self._site)
        except SubmissionFailedError as error:
            text = " ".join(str(error).split())
            verdict = read_refusal(text)
            if verdict is Refusal.unknown:
                _log.warning(
                    "%s: %s; it is looked for under its name before anything is submitted again", record.name, text or "no reply of sbatch"
                )
                self._book.update(replace(record, replied=True))
                return ""
            self._book.withdraw(record)
            if verdict is Refusal.full:
                _log.warning("%s: %s; submitted later", record.name, text)
                return None
            raise UsageError(
                f"{record.stage} {record.method}: {text} (site profile `{self._experiment.site}`, resources of {record.stage})"
            ) from error
        except UsageError:
            self._book.withdraw(record)
            raise

    def _array_job(self, name: str, batch: Batch, snapshot: Snapshot, dependency: Dependency) -> ArrayJob:
        description = str(self._book.tasks_file(name))
        return ArrayJob(
            name=name,
            size=len(batch.tasks),
            resources=resources_of(self._experiment, batch.stage),
            stages_per_element=max(len(task.keys) for task in batch.tasks),
            command=(*self._worker, description),
            description=description,
            folder=str(snapshot.path),
            output=str(self._layout.logs),
            binds=(str(self._layout.root), str(self._place.corpus_folder)),
            dependency=with_singleton(dependency.initial),
        )


def _parameters(job: ArrayJob, site: SlurmSite) -> dict[str, Any]:
    """The request in submitit's words, for its own checks."""
    resources = job.resources
    found: dict[str, Any] = {
        "job_name": job.name,
        "time": job.minutes,
        "nodes": resources.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": resources.cpus,
        "signal_delay_s": signal_seconds(job.minutes, site),
        "dependency": job.dependency or None,
        "array_parallelism": resources.throttle or job.size,
        "additional_parameters": {"array": array_expression(job.size, resources.throttle), **site.extra},
    }
    if site.memory_requests:
        found["mem"] = f"{math.ceil(resources.memory_gb * 1024)}MB"
    if resources.gpus:
        found["gpus_per_node"] = gpu_expression(resources, site)
    found |= {key: getattr(site, key) for key in ("partition", "account", "qos", "constraint", "exclude")}
    return {key: value for key, value in found.items() if value is not None}


def _arrays_named(name: str, queue: Iterable[QueuedElement]) -> list[str]:
    """Numbers of the arrays of that name, oldest first."""
    return sorted({element.array for element in queue if element.name == name}, key=int)


def _elements(record: Submission, queue: Iterable[QueuedElement]) -> dict[str, InFlight]:
    """Keys of a submission that are in the queue; all of them while its outcome is unknown."""
    if record.state is State.intent:
        return _unresolved(record)
    found: dict[str, InFlight] = {}
    places = {record.element(index): index for index in range(len(record.tasks))}
    for element in queue:
        if element.job in places:
            phase = Phase.queued if element.state in ("PENDING", "CONFIGURING") else Phase.running
            found.update(_held(record, [places[element.job]], phase))
    return found


def _held(record: Submission, indices: Iterable[int], phase: Phase) -> dict[str, InFlight]:
    return {key: InFlight(phase, record.element(index)) for index in indices for key in record.tasks[index]}


def _unresolved(record: Submission) -> dict[str, InFlight]:
    """Of an unknown outcome: taken for queued, under a name that nothing can depend on."""
    return {key: InFlight(Phase.queued, f"?{record.name}") for keys in record.tasks for key in keys}


def _left(record: Submission, queued: Collection[str]) -> tuple[int, ...]:
    return tuple(index for index in range(len(record.tasks)) if record.element(index) not in queued)
