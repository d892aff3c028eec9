"""Where an experiment stands, as plain data: counts per method and stage, the state of every run, what went wrong, what comes next."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from jobs.control.facts import InFlight, NodeFacts, Phase
from jobs.control.plan import Plan
from jobs.control.rounds import Dropped, Judgements
from jobs.experiment.graph import Graph, Run
from jobs.store.failures import FailureClass

if TYPE_CHECKING:
    from rich.table import Table

    from jobs.control.controller import Report


SCHEMA = 1
LONGEST_LIST = 5  # names in one line
_NUMBER = re.compile(r"0x[0-9a-f]+|[0-9]+")


class State(Enum):
    """Where a stage stands, in the order in which a table shows them."""

    done = "done"
    running = "running"
    queued = "queued"
    missing = "missing"  # not begun, or between two attempts
    held = "held"  # the first of its kind all failed alike
    cancelled = "cancelled"  # by the user
    blocked = "blocked"  # something upstream is given up, held or cancelled
    failed = "failed"  # given up
    superseded = "superseded"  # of a run that was dropped: its slot has another seed now
    unneeded = "unneeded"  # not there, and everything that would read it is


@dataclass(frozen=True)
class StageRow:
    """The stages of one name that a method was the first to ask for."""

    method: str
    stage: str
    counts: Mapping[str, int]  # every State by name

    @property
    def total(self) -> int:
        return sum(self.counts.values())


@dataclass(frozen=True)
class RunRow:
    """One run that fills a slot: its state is that of its last stage."""

    method: str
    fold: str
    slot: int
    seed: int
    key: str
    state: State
    generation: int = 0
    diverged: bool = False  # and no reserve seed is left


@dataclass(frozen=True)
class DroppedRow:
    """One run that counts no more; its slot has another seed."""

    method: str
    fold: str
    slot: int
    seed: int
    generation: int
    key: str
    ua: float | None  # percent
    kind: str  # `outlier` or `diverged`
    round: int  # of judgement; 0: diverged, before any
    reason: str


@dataclass(frozen=True)
class JudgedRow:
    """What the outlier rule has done to one method."""

    method: str
    rounds: int
    outliers: int  # dropped, each rerun with another seed
    diverged: int
    unresolved: tuple[str, ...]  # FOLD/SLOT of runs that are out and stay


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
    after: str = ""  # what becomes of it


@dataclass(frozen=True)
class Status:
    """An experiment at one moment."""

    experiment: str
    complete: bool
    stages: tuple[StageRow, ...]
    runs: tuple[RunRow, ...]
    problems: tuple[Problem, ...]
    settled: bool = False
    dropped: tuple[DroppedRow, ...] = ()
    judged: tuple[JudgedRow, ...] = ()
    held: Mapping[str, int] = field(default_factory=dict)  # why stages are held -> how many
    stuck: Mapping[str, int] = field(default_factory=dict)  # why jobs in the queue will never start -> how many stages they hold
    controller: str = ""  # how the chain stands, in words
    notices: tuple[str, ...] = ()  # whom an end was told to, or could not be
    steps: tuple[str, ...] = ()  # what the user can do next
    damaged: tuple[str, ...] = ()  # files that cannot be decoded and count as missing, each with the reason


def status_of(
    experiment: str,
    report: Report,
    *,
    command: str = "",
    controller: str = "",
    watched: bool = False,
    stuck: Mapping[str, str] | None = None,
    cancelled: bool = False,
    notices: Sequence[str] = (),
    tables: str = "",
    damaged: Sequence[str] = (),
) -> Status:
    """The status from what the planner sees and decided.

    `command` launches the experiment again; `watched`: somebody goes on with it, so that nothing is asked of the user; `stuck` says of
    stages in the queue why they will never start; `cancelled`: the user has cancelled everything; `tables`: where those of the end lie;
    `damaged`: records that cannot be decoded.
    """
    graph, facts, plan = report.graph, report.facts, report.plan
    states = node_states(graph, plan, facts, report.in_flight)
    given_up = frozenset(plan.given_up)
    counts: dict[tuple[str, str], Counter[State]] = {}
    for node in graph.nodes.values():
        counts.setdefault((node.method, node.stage), Counter())[states[node.key]] += 1
    rows = [StageRow(method, stage, {state.value: found[state] for state in State}) for (method, stage), found in counts.items()]
    runs = tuple(_run_row(run, states, facts) for run in graph.runs)
    problems = tuple(
        _problem(graph, key, facts.get(key) or NodeFacts(), states[key], plan)
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
        held=Counter(plan.reasons[key] for key in plan.stayed if states[key] is State.held),
        stuck=Counter((stuck or {}).values()),
        controller=controller,
        notices=tuple(notices),
        steps=_steps(experiment, plan, list(states.values()), runs, command, watched, cancelled, tables),
        damaged=tuple(damaged),
    )


def node_states(graph: Graph, plan: Plan, facts: Mapping[str, NodeFacts], in_flight: Mapping[str, InFlight]) -> dict[str, State]:
    """State of every stage of the graph."""
    found = {key: State.done if key in facts and facts[key].done else State.unneeded for key in graph.nodes}
    found.update({run.key: State.superseded for run in graph.superseded})
    for keys, state in ((plan.deferred, State.missing), (plan.blocked, State.blocked), (plan.given_up, State.failed)):
        found.update(dict.fromkeys(keys, state))
    found.update({key: State.cancelled if key in facts and facts[key].cancelled else State.held for key in plan.stayed})
    found.update({key: State.missing for batch in plan.batches for key in batch.keys})
    for key in plan.waiting:
        queued = key in in_flight and in_flight[key].phase is Phase.queued and not facts[key].held
        found[key] = State.queued if queued else State.running
    return found


def status_to_json(status: Status) -> dict[str, Any]:
    """Stable, versioned JSON value: keys are only ever added."""
    return {
        "schema": SCHEMA,
        "experiment": status.experiment,
        "complete": status.complete,
        "stages": [{**asdict(row), "total": row.total} for row in status.stages],
        "runs": [{**asdict(run), "state": run.state.value} for run in status.runs],
        "problems": [asdict(problem) for problem in status.problems],
        "settled": status.settled,
        "dropped": [asdict(row) for row in status.dropped],
        "judged": [{**asdict(row), "unresolved": list(row.unresolved)} for row in status.judged],
        "held": [{"reason": reason, "stages": count} for reason, count in status.held.items()],
        "stuck": [{"reason": reason, "stages": count} for reason, count in status.stuck.items()],
        "controller": status.controller,
        "notices": list(status.notices),
        "steps": list(status.steps),
        "damaged": list(status.damaged),
    }


def status_lines(status: Status) -> list[str]:
    """Plain lines, for what is not a terminal: one per method and stage, then what there is to say."""
    lines = [f"{row.method} {row.stage}: {_counts_in_words(row)}" for row in status.stages]
    return [*lines, *judged_lines(status), *problem_lines(status), *closing_lines(status)]


def judged_lines(status: Status) -> list[str]:
    """One line per method of which runs were dropped, or would have been."""
    lines = []
    for row in status.judged:
        said = []
        if row.outliers:
            rounds = "1 round" if row.rounds == 1 else f"{row.rounds} rounds"
            said.append(f"{_runs(row.outliers)} dropped as outliers and rerun with other seeds, judged in {rounds}")
        if row.diverged:
            said.append(f"{_runs(row.diverged)} diverged and rerun with other seeds")
        if row.unresolved:
            said.append(f"unresolved: {_named(row.unresolved)} still out after the last round, kept and reported")
        if said:
            lines.append(f"{row.method}: {'; '.join(said)}")
    return lines


def problem_lines(status: Status) -> list[str]:
    """One line per kind of failure: which stages, why, and what becomes of them. Many with the same error are one line."""
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
            lines.append(f"{first.stage} {first.method}, {len(group)} stages: {first.after}{why}: {first.error}; first {which}")
        else:
            lines.append(f"{first.stage} {first.method} {which}: {first.after}{why}: {first.error}")
    lines.extend(f"{count} stages {reason}" for reason, count in status.held.items())
    lines.extend(f"{count} stages in the queue will not start: {reason}" for reason, count in status.stuck.items())
    lines.extend(f"damaged record, counts as missing: {each}" for each in status.damaged)
    return lines


def closing_lines(status: Status) -> list[str]:
    """Who looks after the experiment, who was told of its end, and what the user can do."""
    return [*filter(None, [status.controller]), *status.notices, *status.steps]


def table_states(status: Status) -> dict[str, str]:
    """Key of each run, dropped ones included -> what a table calls its state (a name of jobs.tables.summary.Status)."""
    found = {run.key: "diverged" if run.diverged else _OF_TABLE.get(run.state, "pending") for run in status.runs}
    return found | {row.key: row.kind for row in status.dropped}


def status_table(status: Status) -> Table:
    """The counts for a terminal."""
    from rich.table import Table

    shown = [state for state in State if state is State.done or any(row.counts[state.value] for row in status.stages)]
    table = Table(title=f"{status.experiment}: {'complete' if status.complete else 'not complete'}")
    for name in ("method", "stage"):
        table.add_column(name)
    for state in shown:
        table.add_column(state.value, justify="right", style=STYLES[state])
    table.add_column("total", justify="right")
    for row in status.stages:
        numbers = [str(row.counts[state.value] or "") for state in shown]
        table.add_row(row.method, row.stage, *numbers, str(row.total))
    return table


STYLES = {
    State.done: "green",
    State.running: "cyan",
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
    **dict.fromkeys((State.failed, State.blocked), "failed"),
}


def _run_row(run: Run, states: Mapping[str, State], facts: Mapping[str, NodeFacts]) -> RunRow:
    diverged = states[run.key] is State.failed and run.key in facts and bool(facts[run.key].diverged)
    return RunRow(run.method, run.fold, run.slot, run.seed, run.key, states[run.key], run.generation, diverged)


def _dropped_row(graph: Graph, facts: Mapping[str, NodeFacts], judgements: Judgements) -> list[DroppedRow]:
    reasons: dict[tuple[str, str, int, int], Dropped] = {
        (each.method, each.fold, each.slot, each.generation): each for each in judgements.dropped
    }
    found = []
    for run in graph.superseded:
        each = reasons.get((run.method, run.fold, run.slot, run.generation))
        if each is not None:
            kind = "outlier" if each.round else "diverged"
            ua = facts[run.key].ua if run.key in facts else None
            found.append(DroppedRow(run.method, run.fold, run.slot, run.seed, run.generation, run.key, ua, kind, each.round, each.reason))
    return found


def _judged_rows(judgements: Judgements) -> list[JudgedRow]:
    found = []
    for method, rounds in judgements.rounds.items():
        dropped = [each for each in judgements.dropped if each.method == method]
        out = sorted((fold, slot) for name, fold, slot in judgements.unresolved if name == method)
        outliers = sum(each.round > 0 for each in dropped)
        found.append(JudgedRow(method, len(rounds), outliers, len(dropped) - outliers, tuple(f"{fold}/{slot}" for fold, slot in out)))
    return found


def _problem(graph: Graph, key: str, fact: NodeFacts, state: State, plan: Plan) -> Problem:
    node = graph.nodes[key]
    reason = plan.reasons.get(key, "")
    last = f" (last: {fact.error})" if fact.error and fact.error not in reason else ""
    error = f"{reason}{last}" if state is State.failed and reason else fact.error or reason
    given_up = state is State.failed
    ending = state is State.running and not fact.held  # Slurm has not let go of the job yet, or begins it once more
    after = "failed, its job is still in the queue" if ending else _AFTER.get(state, "will be tried again")
    return Problem(key, node.stage, node.method, node.fold, node.seed, fact.failures, given_up, error, fact.failure, fact.attempts, after)


_AFTER = {
    State.failed: "given up",
    State.queued: "failed, in the queue again",
    State.running: "failed, running again",
    State.cancelled: "cancelled",
    State.held: "held",
    State.blocked: "failed, and blocked upstream",
}


def _steps(
    name: str, plan: Plan, states: Sequence[State], runs: Sequence[RunRow], command: str, watched: bool, cancelled: bool, tables: str
) -> tuple[str, ...]:
    again = f"`{command or f'python launch.py grid {name}'}` with the same settings"
    if plan.complete:
        collect = f"`python launch.py collect {name}`"
        there = f"the tables are in {tables}; {collect} prints and writes them again" if tables else f"{collect} writes the tables"
        return (f"complete: {'the controller writes the tables now' if watched and not tables else there}",)
    steps = []
    cancelled = cancelled or State.cancelled in states
    if cancelled:
        steps.append(f"cancelled: {again} goes on")
    bad = [run for run in runs if run.state in (State.failed, State.blocked, State.held)]
    if bad:
        run = f"{bad[0].method}/{bad[0].fold}/{bad[0].slot}"
        hopeless = all(each.diverged for each in bad)  # what diverged is not forgiven: the same seeds would end the same way
        then = "change the recipe, or raise policy.max_seeds, and launch again" if hopeless else f"mended, {again} tries again"
        steps.append(f"`python launch.py explain {name} {run}` says what happened, `logs {name} {run}` shows its log; {then}")
    if plan.settled and any(run.state is State.done for run in runs):
        steps.append(f"`python launch.py collect {name} --allow-incomplete` writes tables of what is there")
    if not (plan.settled or plan.waiting or watched or cancelled):
        steps.append(f"nothing is under way: {again} goes on")
    return tuple(steps)


def _counts_in_words(row: StageRow) -> str:
    return ", ".join(f"{count} {name}" for name, count in row.counts.items() if count) + f" of {row.total}"


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - LONGEST_LIST} more" if len(names) > LONGEST_LIST else ""
    return ", ".join(names[:LONGEST_LIST]) + more
