"""The status of an experiment as plain data: counts per method and stage, state of every run, failures, next steps. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from jobs.commands.activity import Activity, activity_lines
from jobs.commands.hints import Hints
from jobs.control.facts import InFlight, Phase, StageFacts
from jobs.control.plan import Plan
from jobs.control.rounds import DroppedRun, Judgements
from jobs.experiment.graph import Graph, Run
from jobs.store.failures import FailureClass
from jobs.store.scores import UNWEIGHTED, Score
from jobs.text import counted, listed

if TYPE_CHECKING:
    from rich.table import Table

    from jobs.control.controller import Report


SCHEMA = 1
_NUMBER = re.compile(r"0x[0-9a-f]+|[0-9]+")


class State(Enum):
    """State of a stage, in the order of a table's columns."""

    done = "done"
    running = "running"
    stopping = "stopping"  # cancelled by the user, and still running
    queued = "queued"
    missing = "missing"  # never started, or between two attempts
    held = "held"  # the first of its kind all failed alike, or its method does not learn
    cancelled = "cancelled"  # by the user
    blocked = "blocked"  # an upstream stage is given up, held or cancelled
    failed = "failed"  # given up
    superseded = "superseded"  # of a dropped run: its slot has another seed now
    unneeded = "unneeded"  # no result, and every stage that reads it has one

    @property
    def label(self) -> str:
        """In messages and tables."""
        return "cancelled, stopping" if self is State.stopping else self.value


@dataclass(frozen=True)
class StageRow:
    """Counts of one stage of a method; a stage shared by methods counts for the first of them."""

    method: str
    stage: str
    counts: Mapping[str, int]  # by name of State

    @property
    def total(self) -> int:
        return sum(self.counts.values())


@dataclass(frozen=True)
class RunRow(Run):
    """One run that fills a slot; its state is that of its last stage."""

    state: State = State.missing
    diverged: bool = False  # with no reserve seed left


@dataclass(frozen=True)
class DroppedRow(DroppedRun):
    """One run that was dropped; its slot has another seed."""

    key: str
    ua: float | None  # percent
    kind: str  # `outlier` or `diverged`


@dataclass(frozen=True)
class JudgedRow:
    """What the outlier rule decided for one method."""

    method: str
    rounds: int
    outliers: int  # runs dropped and run again with another seed
    diverged: int
    unresolved: tuple[str, ...]  # FOLD/SLOT of outliers that are kept


@dataclass(frozen=True)
class Problem:
    """A stage whose last attempt failed."""

    key: str
    stage: str
    method: str
    fold: str
    seed: int
    failures: int
    given_up: bool
    error: str
    failure: str = ""  # its class, a name of jobs.store.failures.FailureClass
    attempts: int = 0
    after: str = ""  # what happens to it next, for messages


@dataclass(frozen=True)
class Status:
    """An experiment at one point in time."""

    experiment: str
    complete: bool
    stages: tuple[StageRow, ...]
    runs: tuple[RunRow, ...]
    problems: tuple[Problem, ...]
    settled: bool = False
    dropped: tuple[DroppedRow, ...] = ()
    judged: tuple[JudgedRow, ...] = ()
    held: Mapping[str, int] = field(default_factory=dict)  # reason -> number of held stages
    stuck: Mapping[str, int] = field(default_factory=dict)  # reason -> number of queued stages whose job will never start
    controller: str = ""  # state of the controller chain, one sentence
    notices: tuple[str, ...] = ()  # notices of the end, sent or failed
    steps: tuple[str, ...] = ()  # commands for the user, one sentence each
    damaged: tuple[str, ...] = ()  # records that cannot be decoded and count as missing, each with the reason
    activity: Activity | None = None  # what runs and waits; None: not looked for
    former: tuple[str, ...] = ()  # jobs in the queue of stages that the experiment has no more, after a launch with other settings
    score: Score = UNWEIGHTED


def status_of(
    experiment: str,
    report: Report,
    *,
    hints: Hints | None = None,
    watched: bool = False,
    cancelled: bool = False,
    tables: str = "",
    queue_read: bool = False,
) -> Status:
    """The status by a pass's report; what the report does not contain (controller, stuck, notices, damaged) is empty.

    `hints`: commands for the user; `watched`: a controller job submits the rest, so nothing is asked of the user; `cancelled`:
    the whole experiment is; `tables`: folder of the complete tables; `queue_read`: the report has everything that Slurm's queue has.
    """
    graph, facts, plan = report.graph, report.facts, report.plan
    states = node_states(graph, plan, facts, report.in_flight)
    vanished = queue_read and not (report.in_flight or watched or cancelled)
    given_up = frozenset(plan.given_up)
    counts: dict[tuple[str, str], Counter[State]] = {}
    for node in graph.nodes.values():
        counts.setdefault((node.method, node.stage), Counter())[states[node.key]] += 1
    rows = [StageRow(method, stage, {state.value: found[state] for state in State}) for (method, stage), found in counts.items()]
    diverged = frozenset(key for key, fact in facts.items() if fact.diverged and states.get(key) is State.failed)
    runs = tuple(
        RunRow(run.method, run.fold, run.slot, run.seed, run.key, run.generation, states[run.key], run.key in diverged)
        for run in graph.runs
    )
    problems = tuple(
        _problem(graph, key, facts.get(key) or StageFacts(), states[key], plan, vanished=vanished and not plan.settled)
        for key in graph.nodes
        if states[key] is not State.superseded and (key in given_up or (key in facts and facts[key].error and not facts[key].done))
    )
    return Status(
        experiment=experiment,
        complete=plan.complete,
        stages=tuple(rows),
        runs=runs,
        problems=problems,
        settled=plan.settled,
        dropped=tuple(_dropped_row(graph, facts, report.judgements)),
        judged=tuple(_judged_rows(report.judgements)),
        former=tuple(sorted({flight.job for key, flight in report.in_flight.items() if key not in graph.nodes})),
        score=graph.score,
        held=Counter(plan.reasons[key] for key in plan.held_or_cancelled if states[key] is State.held),
        steps=_steps(
            hints or Hints(experiment),
            plan,
            list(states.values()),
            runs,
            watched=watched,
            cancelled=cancelled,
            tables=tables,
            vanished=vanished,
            begun=any(fact.attempts or fact.executed_by for fact in facts.values()),
        ),
    )


def node_states(graph: Graph, plan: Plan, facts: Mapping[str, StageFacts], in_flight: Mapping[str, InFlight]) -> dict[str, State]:
    """State of every stage of the graph."""
    found = {key: State.done if key in facts and facts[key].done else State.unneeded for key in graph.nodes}
    found.update({run.key: State.superseded for run in graph.superseded})
    for keys, state in ((plan.deferred, State.missing), (plan.blocked, State.blocked), (plan.given_up, State.failed)):
        found.update(dict.fromkeys(keys, state))
    found.update({key: State.cancelled if key in facts and facts[key].cancelled else State.held for key in plan.held_or_cancelled})
    found.update({key: State.missing for batch in plan.batches for key in batch.keys})
    for key in plan.waiting:
        queued = key in in_flight and in_flight[key].phase is Phase.queued and not facts[key].awaited
        found[key] = State.stopping if facts[key].cancelled else State.queued if queued else State.running
    return found


def status_to_json(status: Status) -> dict[str, Any]:
    """Stable, versioned JSON value: keys are only ever added. Those with `ua` have the name of the score where it is another one."""
    from pydantic_core import to_jsonable_python

    value = {"schema": SCHEMA, **to_jsonable_python(replace(status, held={}, stuck={}))}
    for row, each in zip(value["stages"], status.stages, strict=True):
        row["total"] = each.total
    for name, reasons in (("held", status.held), ("stuck", status.stuck)):
        value[name] = [{"reason": reason, "stages": count} for reason, count in reasons.items()]
    renamed: dict[str, Any] = status.score.renamed(value)
    return renamed


def status_lines(status: Status) -> list[str]:
    """Plain text without a terminal: a line per method and stage, then what runs and waits, outliers, failures and next steps."""
    lines = [f"{row.method} {row.stage}: {_counts_in_words(row)}" for row in status.stages]
    return [*lines, *now_lines(status), *judged_lines(status), *problem_lines(status), *closing_lines(status)]


def now_lines(status: Status) -> list[str]:
    """What runs and waits, and the time left."""
    return activity_lines(status.activity) if status.activity else []


def judged_lines(status: Status) -> list[str]:
    """One line per method with dropped or unresolved runs."""
    lines = []
    for row in status.judged:
        parts = []
        if row.outliers:
            rounds = counted(row.rounds, "round")
            parts.append(f"{counted(row.outliers, 'run')} dropped as outliers and rerun with other seeds, judged in {rounds}")
        if row.diverged:
            parts.append(f"{counted(row.diverged, 'run')} diverged and rerun with other seeds")
        if row.unresolved:
            parts.append(f"unresolved: {listed(row.unresolved)} still out after the last round, kept and reported")
        if parts:
            lines.append(f"{row.method}: {'; '.join(parts)}")
    return lines


def problem_lines(status: Status) -> list[str]:
    """One line per error: stages, cause and what happens next. Stages whose errors differ in numbers only share a line."""
    groups: dict[tuple[str, str, str, str, str], list[Problem]] = {}
    for problem in status.problems:
        same = _NUMBER.sub("#", problem.error)
        groups.setdefault((problem.stage, problem.method, problem.failure, problem.after, same), []).append(problem)
    lines = []
    for group in groups.values():
        first = group[0]
        which = f"fold {first.fold} seed {first.seed} [{first.key[:8]}]"
        often = f", attempt {first.attempts}" if first.attempts else ""
        why = f" ({FailureClass[first.failure].value}{often})" if first.failure in FailureClass.__members__ else ""
        if len(group) > 1:
            lines.append(f"{first.stage} {first.method}, {counted(len(group), 'stage')}: {first.after}{why}: {first.error}; first {which}")
        else:
            lines.append(f"{first.stage} {first.method} {which}: {first.after}{why}: {first.error}")
    lines.extend(f"{counted(count, 'stage')} {reason}" for reason, count in status.held.items())
    lines.extend(f"{counted(count, 'stage')} in the queue will not start: {reason}" for reason, count in status.stuck.items())
    if status.former:
        lines.append(
            f"{counted(len(status.former), 'job')} in Slurm's queue from a launch with other settings: {listed(status.former)}; "
            "the next pass withdraws those that have not started, `scancel JOB` ends the others"
        )
    lines.extend(f"damaged record, counts as missing: {each}" for each in status.damaged)
    return lines


def closing_lines(status: Status) -> list[str]:
    """State of the controller, notices sent, and commands for the user."""
    return [*filter(None, [status.controller]), *status.notices, *status.steps]


def table_states(status: Status) -> dict[str, str]:
    """Key of each run, dropped ones included -> its state in a table (a name of jobs.tables.summary.Status)."""
    found = {run.key: "diverged" if run.diverged else _OF_TABLE.get(run.state, "pending") for run in status.runs}
    return found | {row.key: row.kind for row in status.dropped}


def status_table(status: Status) -> Table:
    """The counts as a table for a terminal."""
    from rich.table import Table

    shown = [state for state in State if state is State.done or any(row.counts[state.value] for row in status.stages)]
    table = Table(title=f"{status.experiment}: {'complete' if status.complete else 'not complete'}")
    for name in ("method", "stage"):
        table.add_column(name)
    for state in shown:
        table.add_column(state.label, justify="right", style=STYLES[state])
    table.add_column("total", justify="right")
    for row in status.stages:
        numbers = [str(row.counts[state.value] or "") for state in shown]
        table.add_row(row.method, row.stage, *numbers, str(row.total))
    return table


STYLES = {
    State.done: "green",
    State.running: "cyan",
    State.stopping: "yellow",
    State.queued: "blue",
    State.missing: "",
    State.held: "yellow",
    State.cancelled: "yellow",
    State.blocked: "yellow",
    State.failed: "red",
    State.superseded: "dim",
    State.unneeded: "dim",
}
_OF_TABLE: Mapping[State, str] = {
    State.done: "accepted",
    State.running: "running",
    **dict.fromkeys((State.cancelled, State.stopping), "cancelled"),
    **dict.fromkeys((State.failed, State.blocked), "failed"),
}


def _dropped_row(graph: Graph, facts: Mapping[str, StageFacts], judgements: Judgements) -> list[DroppedRow]:
    reasons: dict[tuple[str, str, int, int], DroppedRun] = {
        (each.method, each.fold, each.slot, each.generation): each for each in judgements.dropped
    }
    found = []
    for run in graph.superseded:
        each = reasons.get((run.method, run.fold, run.slot, run.generation))
        if each is not None:
            kind = "outlier" if each.round else "diverged"
            ua = facts[run.key].ua if run.key in facts else None
            found.append(DroppedRow(**vars(each), key=run.key, ua=ua, kind=kind))
    return found


def _judged_rows(judgements: Judgements) -> list[JudgedRow]:
    found = []
    for method, rounds in judgements.rounds.items():
        dropped = [each for each in judgements.dropped if each.method == method]
        out = sorted((fold, slot) for name, fold, slot in judgements.unresolved if name == method)
        outliers = sum(each.round > 0 for each in dropped)
        found.append(JudgedRow(method, len(rounds), outliers, len(dropped) - outliers, tuple(f"{fold}/{slot}" for fold, slot in out)))
    return found


def _problem(graph: Graph, key: str, fact: StageFacts, state: State, plan: Plan, *, vanished: bool) -> Problem:
    node = graph.nodes[key]
    reason = plan.reasons.get(key, "")
    last = f" (last: {fact.error})" if fact.error and fact.error not in reason else ""
    error = f"{reason}{last}" if state is State.failed and reason else fact.error or reason
    given_up, failure = state is State.failed, fact.failure.name if fact.failure else ""
    ending = state is State.running and not fact.awaited  # its job is still in the queue, or is requeued
    idle = "not submitted again" if vanished else "will be tried again"
    after = "ended, its job is still in the queue" if ending else _AFTER.get(state, idle)
    return Problem(key, node.stage, node.method, node.fold, node.seed, fact.failures, given_up, error, failure, fact.attempts, after)


_AFTER = {
    State.failed: "given up",
    State.queued: "failed, in the queue again",
    State.running: "failed, running again",
    State.stopping: "cancelled, stopping",
    State.cancelled: "cancelled",
    State.held: "held",
    State.blocked: "failed, and blocked upstream",
}


def _steps(
    hints: Hints,
    plan: Plan,
    states: Sequence[State],
    runs: Sequence[RunRow],
    *,
    watched: bool,
    cancelled: bool,
    tables: str,
    vanished: bool,
    begun: bool,
) -> tuple[str, ...]:
    if plan.complete:
        collect = hints.of("collect")
        there = f"the tables are in {tables}; {collect} prints and writes them again" if tables else f"{collect} writes the tables"
        if watched and not tables:
            return (f"complete: the next pass of the controller writes the tables, {collect} writes them now",)
        return (f"complete: {there}",)
    steps = []
    cancelled = cancelled or State.cancelled in states or State.stopping in states
    if cancelled and (plan.settled or not vanished):  # otherwise a line below names the command
        steps.append(f"cancelled: {hints.resume} resumes")
    bad = [run for run in runs if run.state in (State.failed, State.blocked, State.held)]
    if bad:
        run = f"{bad[0].method}/{bad[0].fold}/{bad[0].slot}"
        hopeless = all(each.diverged for each in bad)  # launching again repeats failures, but the same seeds would diverge again
        then = f"change the recipe, or raise policy.max_seeds: {hints.launch}" if hopeless else _once_fixed(hints)
        steps.append(f"{hints.of('explain', run)} says what happened, {hints.of('logs', run)} shows its log; {then}")
    if plan.settled and any(run.state is State.done for run in runs):
        steps.append(f"{hints.of('collect', '--allow-incomplete')} writes tables of the results so far")
    if vanished and not plan.settled:
        steps.append(
            f"no task and no controller of {hints.experiment} is in Slurm's queue, so nothing more is submitted by itself: "
            f"{hints.resume} launches it again, {hints.of('reconcile')} makes one pass and starts the controller"
        )
        if not begun:
            where = hints.results or "the results folder"
            steps.append(f"no job of it has begun: can the nodes see {where}? {hints.of('doctor', '--cluster', 'slurm')} tests it")
    elif not (plan.settled or plan.waiting or watched or cancelled):
        steps.append(f"nothing is queued or running: {hints.resume} resumes")
    return tuple(steps)


def _once_fixed(hints: Hints) -> str:
    return f"once that is fixed, {hints.resume} tries again with the same settings, {hints.launch} with those of its file"


def _counts_in_words(row: StageRow) -> str:
    return ", ".join(f"{count} {State[name].label}" for name, count in row.counts.items() if count) + f" of {row.total}"
