"""`status --requests`: how often predicted time and memory were enough: what every task requested from Slurm, and what it used.

`read_tasks` reads records; the rest is pure. Tasks that were interrupted, lost or failed for another reason are not counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from jobs.commands.console import print_lines, say, warn_if_changed
from jobs.control.facts import Asked, Departure, Shortage, StageFacts
from jobs.control.failure_policy import ended_attempts, lacks_memory_of_host
from jobs.control.observe import PassContext, read_attempts
from jobs.errors import UsageError
from jobs.experiment.config import Resources, at_once_of, resources_of
from jobs.experiment.graph import Graph, Node
from jobs.slurm.submissions import Submission
from jobs.store.failures import FailureClass
from jobs.store.layout import Layout
from jobs.text import counted

if TYPE_CHECKING:
    from jobs.commands.session import Session

SCHEMA = 1


@dataclass(frozen=True)
class TaskUse:
    """One array element that completed, or ran out of time or memory."""

    stage: str
    method: str
    asked: Asked
    seconds: float
    memory: int = 0  # bytes on its node at the peak; 0: not known
    short_of: Shortage = Shortage.none  # both if it is not known which


@dataclass(frozen=True)
class RequestsRow:
    """Totals of the tasks of one stage and method, or of all tasks."""

    stage: str
    method: str
    tasks: int
    predicted_time: int  # tasks that requested less time than configured
    enough_time: int  # of them
    predicted_memory: int
    enough_memory: int
    time_asked: float  # hours requested per hour used; 0: nothing to compare
    time_configured: float  # the same if all had requested what is configured
    memory_asked: float  # GB requested per GB used
    memory_configured: float


def show_requests(session: Session, *, as_json: bool = False) -> None:
    """Print what finished tasks requested and used. UsageError for an experiment on this machine, where nothing is requested."""
    warn_if_changed(session)
    if not session.on_slurm:
        raise UsageError(f"{session.name} was launched on this machine, where nothing is requested")
    report, experiment = session.look(), session.launched.experiment
    tasks = read_tasks(
        session.arrays.submissions(),
        report.graph,
        report.facts,
        session.launched.layout,
        session.context(),
        lambda stage: resources_of(experiment, stage),
    )
    rows = rows_of(tasks)
    if as_json:
        say(json.dumps(requests_to_json(session.name, rows), indent=1))
    else:
        print_lines(requests_lines(session.name, rows))


def read_tasks(
    records: Iterable[Submission],
    graph: Graph,
    facts: Mapping[str, StageFacts],
    layout: Layout,
    context: PassContext,
    resources: Callable[[str], Resources],
) -> list[TaskUse]:
    """What array elements requested and used, of those whose stages belong to the experiment now."""
    departures = context.departures(list(graph.nodes))
    found = []
    for record in records:
        for place in record.left if record.asked is not None else ():
            keys, job = record.tasks[int(place)], record.element(int(place))
            if all(key in graph.nodes for key in keys):
                used = (
                    _used(graph.nodes[key], facts.get(key) or StageFacts(), departures.get(key, ()), layout, context, job) for key in keys
                )
                parts = [part for part in used if part is not None]
                task = _task(record, parts, resources(record.stage), whole=len(parts) == len(keys))
                found.extend([task] if task is not None else [])
    return found


def rows_of(tasks: Sequence[TaskUse]) -> tuple[RequestsRow, ...]:
    """A row per stage and method, and a last one for all."""
    kinds = dict.fromkeys((task.stage, task.method) for task in tasks)
    rows = [_row(stage, method, [task for task in tasks if (task.stage, task.method) == (stage, method)]) for stage, method in kinds]
    return (*rows, _row("all", "", tasks)) if len(rows) > 1 else tuple(rows)


def requests_lines(name: str, rows: Sequence[RequestsRow]) -> list[str]:
    """One line per row."""
    if not rows:
        return [f"{name}: no task has ended yet whose request is on record"]
    return [_row_line(row) for row in rows]


def requests_to_json(name: str, rows: Sequence[RequestsRow]) -> dict[str, Any]:
    """Stable, versioned JSON value: keys are only ever added."""
    return {"schema": SCHEMA, "experiment": name, "requests": [asdict(row) for row in rows]}


def _used(
    node: Node, fact: StageFacts, left: Sequence[Departure], layout: Layout, context: PassContext, job: str
) -> tuple[float, int, Shortage] | None:
    """Seconds, peak bytes of a process, and what a stage ran out of in a job (nothing: the job computed its result).

    None if the job did not start the stage, or the attempt ended for another reason.
    """
    if fact.done and fact.attempts == 1 and len(left) == 1:
        return fact.seconds, fact.memory, Shortage.none
    folder = layout.stage(node.stage, node.key)
    files = read_attempts(folder, context)
    if any(each.job == job and each.published for each in files):
        return fact.seconds, fact.memory, Shortage.none
    here = {each.claim.started: each for each in files if each.claim and each.job == job}
    for each in reversed([each for each in ended_attempts(files, left, 0.0) if each.started in here]):
        late, full = each.failure is FailureClass.time_limit, lacks_memory_of_host(each.failure, each.error)
        short = each.short_of or (Shortage.time if late else Shortage.memory if full else Shortage.none)
        if short:
            outcome = here[each.started].outcome
            return outcome.seconds if outcome else 0.0, 0, short
    return None


def _task(record: Submission, parts: Sequence[tuple[float, int, Shortage]], given: Resources, *, whole: bool) -> TaskUse | None:
    """Use of one array element. Stages computed at the same time share its seconds; what they used of its memory together is not known."""
    short = next((short for _, _, short in parts if short), Shortage.none)
    if record.asked is None or not (whole or short):
        return None
    together = min(at_once_of(given) or len(parts), len(parts))
    seconds = sum(seconds for seconds, _, _ in parts) / together
    if short is Shortage.time:
        seconds = record.asked.minutes * 60.0
    memory = max(memory for _, memory, _ in parts) * given.processes_per_node if at_once_of(given) == 1 else 0
    return TaskUse(record.stage, record.method, record.asked, seconds, memory, short)


def _row(stage: str, method: str, tasks: Sequence[TaskUse]) -> RequestsRow:
    less_time = [task for task in tasks if task.asked.less_time]
    less_memory = [task for task in tasks if task.asked.less_memory]
    hours = sum(task.seconds for task in tasks) / 3600
    known = [task for task in tasks if task.memory]
    used = sum(task.memory for task in known) / 2**20
    return RequestsRow(
        stage,
        method,
        len(tasks),
        len(less_time),
        sum(Shortage.time not in task.short_of for task in less_time),
        len(less_memory),
        sum(Shortage.memory not in task.short_of for task in less_memory),
        _ratio(sum(task.asked.minutes for task in tasks) / 60, hours),
        _ratio(sum(task.asked.configured_minutes for task in tasks) / 60, hours),
        _ratio(sum(task.asked.memory_mb for task in known), used),
        _ratio(sum(task.asked.configured_mb for task in known), used),
    )


def _ratio(asked: float, used: float) -> float:
    return round(asked / used, 2) if used else 0.0


def _row_line(row: RequestsRow) -> str:
    parts = [counted(row.tasks, "task")]
    for what, predicted, enough in (("time", row.predicted_time, row.enough_time), ("memory", row.predicted_memory, row.enough_memory)):
        parts.append(f"{what} predicted for {predicted}" + (f", enough for {enough} ({enough / predicted:.0%})" if predicted else ""))
    if row.time_asked:
        parts.append(f"requested {row.time_asked:g} times the time used (as configured: {row.time_configured:g} times)")
    if row.memory_asked:
        parts.append(f"requested {row.memory_asked:g} times the memory used ({row.memory_configured:g} times)")
    return f"{row.stage} {row.method}".rstrip() + f": {'; '.join(parts)}"
