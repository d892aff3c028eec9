"""`explain`: the history of a run: its seeds, every attempt of every stage, the retry policy applied, its artifacts, and the next step.

`read_histories` reads records; the rest is pure.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.commands.console import print_lines, warn_if_changed
from jobs.control.estimates import asks_in_words
from jobs.control.facts import Asked, Departure, InFlight, Phase, Request, StageFacts
from jobs.control.failure_policy import (
    COMMUNICATION_RETRIES,
    DISK_RETRIES,
    MEMORY_RETRIES,
    MEMORY_STEP,
    STORAGE_RETRIES,
    EndedAttempt,
    ended_attempts,
)
from jobs.control.faulty_nodes import NOT_RETRIED
from jobs.control.observe import PassContext, read_attempts
from jobs.control.outliers import Verdict, verdict_in_words
from jobs.control.plan import NO_SEED_LEFT, Plan
from jobs.experiment.graph import Graph, Node, Run
from jobs.experiment.lookup import Target, find_target, stages_of
from jobs.store.attempts import GONE_SECONDS, AttemptFiles, is_slurm_job, modified_at, newest_checkpoint
from jobs.store.failures import FailureClass, cancelled_by_hand
from jobs.store.layout import Layout, StageFolder
from jobs.store.records import Claim, Result, damaged_records, read_result
from jobs.text import counted, duration, moment

if TYPE_CHECKING:
    from jobs.commands.session import Session
    from jobs.control.controller import Report
    from jobs.control.rounds import Judgements
    from jobs.experiment.config import Policy

POLICIES: Mapping[FailureClass, str] = {
    FailureClass.node: "resumes from its checkpoint with the same seed; costs no attempt while it makes progress",
    FailureClass.interrupted: "resumes from its checkpoint with the same seed; costs no attempt while it makes progress",
    FailureClass.time_limit: "resumes from its checkpoint; given up if two attempts make no progress",
    FailureClass.memory: f"same seed with half the work of a pass and {MEMORY_STEP:g} times the memory, at most {MEMORY_RETRIES} times",
    FailureClass.crowded: "resumes from its checkpoint, alone on its GPU from now on: memory was short for several stages together",
    FailureClass.communication: f"same seed on other nodes, at most {COMMUNICATION_RETRIES} times",
    FailureClass.storage: f"same seed from its checkpoint after a pause of 5 minutes to 6 hours, at most {STORAGE_RETRIES} times in a row",
    FailureClass.disk: f"same seed, at most {DISK_RETRIES} times",
    FailureClass.code: "not retried: fix the code or the configuration",
    FailureClass.refused: "not retried: fix the configuration or the data",
    FailureClass.divergence: "the slot of a run gets its next reserve seed; a stage that runs share is not tried again",
    FailureClass.cancelled: "not retried until the experiment is launched again",
}


@dataclass(frozen=True)
class AttemptHistory:
    """One attempt, as recorded."""

    files: AttemptFiles
    claim: Claim
    log: str
    seconds: float | None  # None: not recorded
    ended: EndedAttempt | None  # None: running, or its result counts
    state: str  # of its Slurm job, the last one reported
    asked: Asked | None  # time and memory requested from Slurm; None: not recorded


@dataclass(frozen=True)
class StageHistory:
    """Every record of one stage."""

    node: Node
    attempts: tuple[AttemptHistory, ...] = ()
    departures: tuple[Departure, ...] = ()  # jobs that left the queue before their worker started
    damaged: tuple[str, ...] = ()  # records that cannot be decoded, each with the reason
    artifacts: tuple[str, ...] = ()  # paths of the files and folders of its result; `(removed)` follows one that is not there
    warnings: tuple[str, ...] = ()  # of its result


def print_explanation(session: Session, run: str) -> None:
    """Print the history of a run or a stage."""
    warn_if_changed(session)
    report = session.look()
    target = find_target(report.graph, run)
    histories = read_histories(stages_of(report.graph, target.node), session.launched.layout, session.context())
    print_lines(explain_lines(target, report, histories, session.launched.experiment.policy, submitter=session.submitter))
    print_lines(f"damaged record, counts as missing: {each}" for each in damaged_records(session.launched.layout.folder))


def read_histories(nodes: Collection[Node], layout: Layout, context: PassContext) -> tuple[StageHistory, ...]:
    """The recorded history of some stages, in their order."""
    departures = context.departures([node.key for node in nodes])
    return tuple(_read_history(node, layout, context, departures.get(node.key, ())) for node in nodes)


def explain_lines(
    target: Target, report: Report, histories: Sequence[StageHistory], policy: Policy, *, submitter: str = "the next pass"
) -> list[str]:
    """The history of a run, one fact a line. `submitter`: what submits missing stages next."""
    lines = []
    if target.run is not None:
        lines.extend(_seed_lines(target.run, report.graph, report.facts, report.judgements, policy))
    for history in histories:
        lines.extend(_stage_lines(history, report.facts.get(history.node.key) or StageFacts(), report.in_flight, report.plan, submitter))
    return lines


def next_step(key: str, fact: StageFacts, in_flight: Mapping[str, InFlight], plan: Plan, submitter: str) -> str:
    """What happens next to a stage; "" if it has its result."""
    flight = in_flight.get(key)
    if fact.done and key not in plan.given_up:
        return ""
    if key in plan.given_up:
        seeds = ", or raise policy.max_seeds," if NO_SEED_LEFT in plan.reasons[key] else ""
        lifts = f"change the recipe{seeds}" if fact.diverged else "fix that"
        return f"given up: {plan.reasons[key]}; {lifts} and launch again"
    if key in plan.held_or_cancelled:
        return plan.reasons[key]
    executed_by = fact.executed_by or (f"job {flight.job}" if flight is not None and flight.phase is Phase.running else "")
    if fact.cancelled and executed_by:
        return f"cancelled, stopping: {executed_by} has not ended yet"
    if fact.settling and not fact.executed_by:
        return "waits: Slurm has not reported yet how the last job ended"
    if fact.executed_by:
        return f"running: {fact.executed_by} computes it"
    if flight is not None:
        job = "" if flight.job.startswith(("?", "local-")) else f" as {flight.job}"
        if flight.job.startswith("?"):
            return "submitted; its job number is not known yet and is looked up by the job's name"
        return f"running{job}" if flight.phase is Phase.running else f"in the queue{job}"
    if key in plan.blocked:
        return "blocked: an upstream stage is given up, held or cancelled"
    if key in plan.deferred and fact.not_before > time.time():
        return f"paused until {moment(fact.not_before)}: the file system failed under its last attempt"
    if key in plan.deferred:
        return f"deferred: no room in the queue now, or an upstream stage is computed by another process; {submitter} tries again"
    if any(key in batch.keys for batch in plan.batches):
        return f"will be submitted by {submitter}"
    return "not needed: every stage that reads it has its result, or its run was dropped"


def _seed_lines(run: Run, graph: Graph, facts: Mapping[str, StageFacts], judgements: Judgements, policy: Policy) -> list[str]:
    same_slot = (each for each in (*graph.superseded, *graph.runs) if each.slot_id == run.slot_id)
    tried = sorted(same_slot, key=lambda each: each.generation)
    seeds = f"{counted(len(tried), 'seed')} so far (at most {policy.max_seeds})"
    lines = [f"{run.name}: slot {run.slot} of {run.method} on fold {run.fold}, {seeds}"]
    last = judgements.rounds.get(run.method, ())
    for each in tried:
        which = f"  seed {each.seed} [{each.key[:8]}]"
        dropped = judgements.dropping(each)
        fact = facts.get(each.key) or StageFacts()
        if dropped is not None:
            when = f"dropped in round {dropped.round}" if dropped.round else "dropped"
            verdict = _verdict(judgements.rounds.get(run.method, ())[dropped.round - 1], each) if dropped.round else None
            lines.append(f"{which}: {when}: {verdict_in_words(policy.outliers, verdict, graph.score.label) if verdict else dropped.reason}")
            continue
        score = f", {graph.score.text(fact.ua)}" if fact.ua is not None else ""
        state = f"done{score}" if fact.done and not fact.diverged else fact.diverged or "no result yet"
        lines.append(f"{which}: fills the slot now; {state}")
        verdict = _verdict(last[-1], each) if last else None
        if verdict is not None:
            kept = run.slot_id in judgements.unresolved
            judged = "out, and kept: no round or no seed is left" if kept else "out" if verdict.out else "in"
            lines.append(f"    judged in round {len(last)}: {judged}: {verdict_in_words(policy.outliers, verdict, graph.score.label)}")
    return lines


def _stage_lines(history: StageHistory, fact: StageFacts, in_flight: Mapping[str, InFlight], plan: Plan, submitter: str) -> list[str]:
    node = history.node
    elsewhere = frozenset(fact.bad_nodes if not fact.stopped else ())
    attempts = [(each.claim.started, _attempt_lines(each, elsewhere)) for each in history.attempts]
    unstarted = [(each.gone, [_departure_line(each)]) for each in history.departures]
    events = [line for _, lines in sorted([*attempts, *unstarted], key=lambda item: item[0]) for line in lines]
    lines = [f"{node.name}: {'done' if fact.done else 'not done'}{'' if events else ', never started'}", *events]
    lines.extend(f"  warning: {each}" for each in history.warnings)
    lines.extend(f"  artifact: {each}" for each in history.artifacts)
    if fact.done and not history.attempts:
        lines.append("  the records of its attempt are gone; the result counts")
    lines.extend(f"  damaged record, counts as missing: {each}" for each in history.damaged)
    request = request_text(fact.request)
    if request and not fact.done:
        lines.append(f"  the next attempt requests {request}")
    following = next_step(node.key, fact, in_flight, plan, submitter)
    if fact.executed_by and any(each.files.alive and each.state for each in history.attempts):
        following = f"counted as ended when its worker has been silent for {GONE_SECONDS:.0f} s; the next pass then resumes it"
    return [*lines, f"  next: {following}"] if following else lines


def request_text(request: Request) -> str:
    """What an attempt requests beyond the resources of its stage; "" if nothing."""
    parts = []
    if request.relief:
        parts.append(f"1/{2**request.relief} of the work of one pass")
    if request.memory_factor != 1:
        parts.append(f"{request.memory_factor:g} times the memory")
    if request.exclude:
        parts.append(f"other nodes than {', '.join(request.exclude)}")
    return ", ".join(parts)


def _attempt_lines(each: AttemptHistory, faulty: Collection[str]) -> list[str]:
    """The lines of an attempt. `faulty`: nodes on which an error that is not retried was due to the node."""
    claim = each.claim
    where = claim.host if claim.node in ("", claim.host) else f"{claim.host} (node {claim.node})"
    job = f", Slurm job {claim.slurm_job}" if is_slurm_job(claim.slurm_job) else f", process {claim.pid}"
    lasted = "" if each.seconds is None else f", {duration(each.seconds)}"
    lasted += f" after {duration(claim.waited)} in the queue" if claim.submitted else ""
    slurm = f"; Slurm state {each.state}" if each.state and (each.ended is None or each.state not in each.ended.error) else ""
    head = f"  attempt {each.files.number}, {moment(claim.started)}, on {where}{job}{lasted}"
    lines = [f"{head}: {_ending(each)}{slurm}"]
    if claim.relief:
        lines[0] += f" (1/{2**claim.relief} of the work of one pass)"
    if each.asked is not None and (each.asked.less_time or each.asked.less_memory):
        lines.append(f"    its job {asks_in_words(each.asked)}, from finished siblings")
    if each.ended is not None:
        failure = each.ended.failure
        policy = "resumes from its checkpoint with the time and memory configured" if each.ended.short_of else POLICIES[failure]
        if failure in NOT_RETRIED and claim.node in faulty:
            policy = f"due to the node {claim.node}, on which other stages failed alike; free, and retried once on another node"
        lines.append(f"    {failure.value}: {policy}{'; this attempt wrote a newer checkpoint' if each.ended.progress else ''}")
    lines.append(f"    log: {each.log}")
    return lines


def _ending(each: AttemptHistory) -> str:
    if each.files.published:
        return "its result counts"
    if each.files.alive:
        return "silent since" if each.state else "running"
    if each.ended is not None:
        return each.ended.error
    outcome = each.files.outcome
    return f"{outcome.error}: {outcome.message}" if outcome else "ended"


def _departure_line(each: Departure) -> str:
    state = f"Slurm state {each.state}" if each.state else "no state in accounting"
    by = ", cancelled by the program" if each.withdrawn else ", cancelled by hand" if cancelled_by_hand(each.state) else ""
    left = f"submitted {moment(each.submitted)}, left the queue by {moment(each.gone)} before its worker started"
    return f"  job {each.job}, {left} ({state}{by})"


def _read_history(node: Node, layout: Layout, context: PassContext, departures: Sequence[Departure]) -> StageHistory:
    folder = layout.stage(node.stage, node.key)
    files = read_attempts(folder, context)
    states = {each.job: each.state for each in departures}
    asked = {each.job: each.asked for each in departures}
    ended = {each.started: each for each in ended_attempts(files, departures, newest_checkpoint(folder))}
    default = str(layout.log_of(node.stage, node.key))
    result = read_result(folder, node.key)
    found: list[AttemptHistory] = []
    for each in files:
        if each.claim is None:
            continue
        state = "" if each.published else states.get(each.job, "")
        seconds = result.provenance.get("seconds") if result and each.published else _recorded_seconds(folder, each)
        log, end = each.claim.log or default, ended.get(each.claim.started)
        found.append(AttemptHistory(each, each.claim, log, seconds, end, state, asked.get(each.job)))
    started = {each.claim.slurm_job for each in found}
    unstarted = tuple(each for each in departures if each.job not in started)
    artifacts, warnings = (_artifact_paths(folder, result), result.warnings) if result else ((), ())
    return StageHistory(node, tuple(found), unstarted, damaged_records(folder.path), artifacts, warnings)


def _artifact_paths(folder: StageFolder, result: Result) -> tuple[str, ...]:
    """Paths of what a result names: files, and folders (with `/` at the end) once; `(removed)` follows what is not there."""
    output = folder.attempt(result.attempt).output
    names = dict.fromkeys(f"{top}/" if rest else top for top, _, rest in (name.partition("/") for name in result.artifacts))
    return tuple(f"{output}/{name}{'' if (output / name).exists() else ' (removed)'}" for name in names)


def _recorded_seconds(folder: StageFolder, attempt: AttemptFiles) -> float | None:
    """Duration of an attempt by its outcome, else until its last heartbeat."""
    if attempt.outcome:
        return attempt.outcome.seconds
    heartbeat = modified_at(folder.attempt(attempt.number).claim)
    return max(0.0, heartbeat - attempt.claim.started) if heartbeat and attempt.claim else None


def _verdict(verdicts: Sequence[Verdict], run: Run) -> Verdict | None:
    return next((each for each in verdicts if (each.fold, each.slot, each.generation) == (run.fold, run.slot, run.generation)), None)
