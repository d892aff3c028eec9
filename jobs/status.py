"""Where an experiment stands, as plain data: counts per method and stage, the state of every run, what went wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from jobs.graph import Graph, Run
from jobs.plan import InFlight, Limits, NodeFacts, Phase, Plan, make_plan

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1


class State(Enum):
    """Where a stage stands, in the order in which a table shows them."""

    done = "done"
    running = "running"
    queued = "queued"
    missing = "missing"  # not begun, or between two attempts
    blocked = "blocked"  # something upstream is given up
    failed = "failed"  # given up
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
    """One run: its state is that of its last stage."""

    method: str
    fold: str
    slot: int
    seed: int
    key: str
    state: State


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


@dataclass(frozen=True)
class Status:
    """An experiment at one moment."""

    experiment: str
    complete: bool
    stages: tuple[StageRow, ...]
    runs: tuple[RunRow, ...]
    problems: tuple[Problem, ...]


def status_of(
    experiment: str, graph: Graph, facts: Mapping[str, NodeFacts], in_flight: Mapping[str, InFlight], *, max_attempts: int
) -> Status:
    """The status from what the planner sees."""
    plan = make_plan(graph, facts, in_flight, runs_per_task={}, limits=Limits(), max_attempts=max_attempts)
    states = node_states(graph, plan, facts, in_flight)
    counts: dict[tuple[str, str], Counter[State]] = {}
    for node in graph.nodes.values():
        counts.setdefault((node.method, node.stage), Counter())[states[node.key]] += 1
    rows = [StageRow(method, stage, {state.value: found[state] for state in State}) for (method, stage), found in counts.items()]
    problems = [_problem(graph, key, fact, states[key]) for key, fact in facts.items() if fact.error and not fact.done]
    return Status(experiment, plan.complete, tuple(rows), tuple(_run_row(run, states) for run in graph.runs), tuple(problems))


def node_states(graph: Graph, plan: Plan, facts: Mapping[str, NodeFacts], in_flight: Mapping[str, InFlight]) -> dict[str, State]:
    """State of every stage of the graph."""
    found = {key: State.done if key in facts and facts[key].done else State.unneeded for key in graph.nodes}
    for keys, state in ((plan.deferred, State.missing), (plan.blocked, State.blocked), (plan.given_up, State.failed)):
        found.update(dict.fromkeys(keys, state))
    found.update({key: State.missing for batch in plan.batches for key in batch.keys})
    for key in plan.waiting:
        queued = key in in_flight and in_flight[key].phase is Phase.queued and not facts[key].held
        found[key] = State.queued if queued else State.running
    return found


def status_to_json(status: Status) -> dict[str, Any]:
    """Stable, versioned JSON value."""
    return {
        "schema": SCHEMA,
        "experiment": status.experiment,
        "complete": status.complete,
        "stages": [{**asdict(row), "total": row.total} for row in status.stages],
        "runs": [{**asdict(run), "state": run.state.value} for run in status.runs],
        "problems": [asdict(problem) for problem in status.problems],
    }


def status_lines(status: Status) -> list[str]:
    """Plain lines, for what is not a terminal: one per method and stage, then one per problem."""
    lines = [f"{row.method} {row.stage}: {_counts_in_words(row)}" for row in status.stages]
    return lines + problem_lines(status)


def problem_lines(status: Status) -> list[str]:
    """One line per stage that failed: which, how often, why, and what comes next."""
    lines = []
    for problem in status.problems:
        times = f"{problem.failures} {'attempt' if problem.failures == 1 else 'attempts'} failed"
        after = "given up; launch again to try again" if problem.given_up else "will be tried again"
        which = f"{problem.stage} {problem.method} fold {problem.fold} seed {problem.seed} [{problem.key[:8]}]"
        lines.append(f"{which}: {times}, {after}: {problem.error}")
    return lines


def status_table(status: Status) -> Table:
    """The same counts for a terminal."""
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
    State.blocked: "yellow",
    State.failed: "red",
    State.unneeded: "dim",
}


def _run_row(run: Run, states: Mapping[str, State]) -> RunRow:
    return RunRow(run.method, run.fold, run.slot, run.seed, run.key, states[run.key])


def _problem(graph: Graph, key: str, fact: NodeFacts, state: State) -> Problem:
    node = graph.nodes[key]
    return Problem(key, node.stage, node.method, node.fold, node.seed, fact.failures, state is State.failed, fact.error)


def _counts_in_words(row: StageRow) -> str:
    return ", ".join(f"{count} {name}" for name, count in row.counts.items() if count) + f" of {row.total}"
