"""What happened to a run: its seeds, every attempt of every stage, the policy that followed, and what comes next.

`find_run` reads a name, `read_stories` the records; the rest is pure.
"""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.control.estimates import asks_in_words
from jobs.control.facts import Asked, Departure, InFlight, NodeFacts, Phase, Request
from jobs.control.failure_policy import COMMUNICATION_RETRIES, DISK_RETRIES, MEMORY_RETRIES, MEMORY_STEP, Ended, ended_attempts
from jobs.control.observe import Sight, read_attempts
from jobs.control.outliers import Verdict, verdict_in_words
from jobs.control.plan import Plan
from jobs.errors import UsageError
from jobs.experiment.graph import Graph, Node, Run
from jobs.store.attempts import GONE_SECONDS, is_slurms, newest_checkpoint
from jobs.store.failures import FailureClass, cancelled_by_hand
from jobs.store.layout import Layout
from jobs.store.records import Claim, Outcome, damaged_records, read_claim, read_result

if TYPE_CHECKING:
    from jobs.control.controller import Report
    from jobs.control.rounds import Judgements
    from jobs.experiment.config import Policy


LEAST_DIGITS = 6  # of a key, so that no word is taken for one
_KEY = re.compile(rf"[0-9a-f]{{{LEAST_DIGITS},}}")
POLICIES: Mapping[FailureClass, str] = {
    FailureClass.node: "goes on from its checkpoint with the same seed, free of charge while it makes progress",
    FailureClass.interrupted: "goes on from its checkpoint with the same seed, free of charge while it makes progress",
    FailureClass.time_limit: "goes on from its checkpoint; stopped where it makes no progress between two attempts",
    FailureClass.memory: f"same seed with half the work of a pass and {MEMORY_STEP:g} times the memory, {MEMORY_RETRIES} times at the most",
    FailureClass.crowded: "goes on from its checkpoint, with nothing beside it from now on: memory was short for several stages together",
    FailureClass.communication: f"same seed on other nodes, {COMMUNICATION_RETRIES} times at the most",
    FailureClass.disk: f"same seed, {DISK_RETRIES} times at the most",
    FailureClass.code: "not tried again by itself: code or configuration has to be mended",
    FailureClass.refused: "not tried again by itself: configuration or data has to be mended",
    FailureClass.divergence: "the slot gets its next reserve seed",
    FailureClass.cancelled: "not tried again until the experiment is launched again",
}


@dataclass(frozen=True)
class Target:
    """What a user asks about: a stage, and the run it ends if it does."""

    node: Node
    run: Run | None


@dataclass(frozen=True)
class AttemptStory:
    """One attempt as its records tell it."""

    number: int
    claim: Claim
    log: str
    result: bool = False
    alive: bool = False
    seconds: float | None = None  # None: nobody said
    outcome: Outcome | None = None
    ended: Ended | None = None
    state: str = ""  # Slurm's last word on its job
    asked: Asked | None = None  # of Slurm; None: nothing, or not on record


@dataclass(frozen=True)
class StageStory:
    """Everything on record of one stage."""

    node: Node
    attempts: tuple[AttemptStory, ...] = ()
    departures: tuple[Departure, ...] = ()  # of jobs whose worker never began
    damaged: tuple[str, ...] = ()  # its records that cannot be decoded, each with the reason


def names_run(text: str) -> bool:
    """Whether a word can name a run or a stage at all: an experiment's name seldom does."""
    return "/" in text or _KEY.fullmatch(text) is not None


def find_target(graph: Graph, text: str) -> Target:
    """The run `METHOD/FOLD/SLOT` that fills its slot now, or the stage whose key begins so. UsageError if there is none, or several."""
    if "/" in text:
        run = find_run(graph, text)
        return Target(graph.nodes[run.key], run)
    if not _KEY.fullmatch(text):
        raise UsageError(f"run {text!r}: write METHOD/FOLD/SLOT, for example {_example(graph)}, or at least {LEAST_DIGITS} digits of a key")
    keys = [key for key in graph.nodes if key.startswith(text)]
    if len(keys) != 1:
        several = f"begins {len(keys)} keys: write more of it" if keys else "begins no key of this experiment"
        raise UsageError(f"run {text!r}: {several}")
    runs = (run for run in (*graph.runs, *graph.superseded) if run.key == keys[0])
    return Target(graph.nodes[keys[0]], next(runs, None))


def find_run(graph: Graph, text: str) -> Run:
    """The run `METHOD/FOLD/SLOT` that fills its slot now."""
    method, _, rest = text.partition("/")
    fold, _, slot = rest.rpartition("/")
    for name, what, known in (
        (method, "method", dict.fromkeys(run.method for run in graph.runs)),
        (fold, "fold", dict.fromkeys(run.fold for run in graph.runs)),
        (slot, "slot", dict.fromkeys(str(run.slot) for run in graph.runs)),
    ):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            names = list(known)
            listed = ", ".join(names) if len(names) <= 12 else f"{names[0]} to {names[-1]}"
            hint = f"did you mean {near[0]!r}?" if near else f"there are {listed}"
            raise UsageError(f"run {text!r}: no {what} {name!r} in this experiment; {hint}")
    return next(run for run in graph.runs if (run.method, run.fold, str(run.slot)) == (method, fold, slot))


def stages_of(graph: Graph, node: Node) -> tuple[Node, ...]:
    """A stage and everything upstream of it, upstream first."""
    found: set[str] = set()
    stack = [node.key]
    while stack:
        key = stack.pop()
        if key not in found:
            found.add(key)
            stack.extend(graph.nodes[key].upstream.values())
    return tuple(graph.nodes[key] for key in graph.nodes if key in found)


def read_stories(nodes: Collection[Node], layout: Layout, sight: Sight) -> tuple[StageStory, ...]:
    """What the records say of some stages, in their order."""
    departures = sight.departures([node.key for node in nodes])
    return tuple(_read_story(node, layout, sight, departures.get(node.key, ())) for node in nodes)


def explain_lines(
    target: Target, report: Report, stories: Sequence[StageStory], policy: Policy, *, acts: str = "the next pass"
) -> list[str]:
    """The whole story, one fact a line. `acts`: who submits what is missing."""
    lines = []
    if target.run is not None:
        lines.extend(_seed_lines(target.run, report.graph, report.facts, report.judgements, policy))
    for story in stories:
        lines.extend(_stage_lines(story, report.facts.get(story.node.key) or NodeFacts(), report.in_flight, report.plan, acts))
    return lines


def next_words(key: str, fact: NodeFacts, in_flight: Mapping[str, InFlight], plan: Plan, acts: str) -> str:
    """What comes next for a stage."""
    flight = in_flight.get(key)
    if fact.done and key not in plan.given_up:
        return ""
    if key in plan.given_up:
        lifts = "change the recipe, or raise policy.max_seeds," if fact.diverged else "mend that"
        return f"given up: {plan.reasons[key]}; {lifts} and launch again"
    if key in plan.stayed:
        return plan.reasons[key]
    if fact.held:
        return f"running: {fact.held} works on it"
    if flight is not None:
        job = "" if flight.job.startswith(("?", "local-")) else f" as {flight.job}"
        if flight.job.startswith("?"):
            return "submitted, and Slurm has not said as what yet: it is looked for under its name"
        return f"running{job}" if flight.phase is Phase.running else f"in the queue{job}"
    if key in plan.blocked:
        return "blocked: something upstream of it is given up, held or cancelled"
    if key in plan.deferred:
        return f"deferred: there is no room in the queue now, or upstream of it somebody else works; {acts} looks again"
    if any(key in batch.keys for batch in plan.batches):
        return f"will be submitted by {acts}"
    return "not needed: everything that would read it is there, or its run was dropped"


def _seed_lines(run: Run, graph: Graph, facts: Mapping[str, NodeFacts], judgements: Judgements, policy: Policy) -> list[str]:
    slot = (run.method, run.fold, run.slot)
    tried = sorted(
        (each for each in (*graph.superseded, *graph.runs) if (each.method, each.fold, each.slot) == slot), key=lambda each: each.generation
    )
    lines = [
        f"{run.name}: slot {run.slot} of {run.method} on fold {run.fold}, {_count(len(tried), 'seed')} so far (at most {policy.max_seeds})"
    ]
    last = judgements.rounds.get(run.method, ())
    for each in tried:
        which = f"  seed {each.seed} [{each.key[:8]}]"
        dropped = judgements.dropping(each)
        fact = facts.get(each.key) or NodeFacts()
        if dropped is not None:
            when = f"dropped in round {dropped.round}" if dropped.round else "dropped"
            verdict = _verdict(judgements.rounds.get(run.method, ())[dropped.round - 1], each) if dropped.round else None
            lines.append(f"{which}: {when}: {verdict_in_words(policy.outliers, verdict) if verdict else dropped.reason}")
            continue
        ua = f", UA {fact.ua:.1f}" if fact.ua is not None else ""
        state = f"done{ua}" if fact.done and not fact.diverged else fact.diverged or "not in yet"
        lines.append(f"{which}: fills the slot now; {state}")
        verdict = _verdict(last[-1], each) if last else None
        if verdict is not None:
            judged = "out, and kept: no round or no seed is left" if slot in judgements.unresolved else "in" if not verdict.out else "out"
            lines.append(f"    judged in round {len(last)}: {judged}: {verdict_in_words(policy.outliers, verdict)}")
    return lines


def _stage_lines(story: StageStory, fact: NodeFacts, in_flight: Mapping[str, InFlight], plan: Plan, acts: str) -> list[str]:
    node = story.node
    attempts = [(each.claim.started, _attempt_lines(each)) for each in story.attempts]
    silent = [(each.gone, [_departure_line(each)]) for each in story.departures]
    told = [line for _, lines in sorted([*attempts, *silent], key=lambda item: item[0]) for line in lines]
    lines = [f"{node.name}: {'done' if fact.done else 'not done'}{'' if told else ', never begun'}", *told]
    if fact.done and not story.attempts:
        lines.append("  its attempt's records are gone; the result counts")
    lines.extend(f"  damaged record, counts as missing: {each}" for each in story.damaged)
    asked = request_words(fact.request)
    if asked and not fact.done:
        lines.append(f"  the next attempt asks for {asked}")
    following = next_words(node.key, fact, in_flight, plan, acts)
    if fact.held and any(each.alive and each.state for each in story.attempts):
        following = f"taken for ended when its worker has been silent for {GONE_SECONDS:.0f} s; the next pass then goes on with it"
    return [*lines, f"  next: {following}"] if following else lines


def request_words(request: Request) -> str:
    """What an attempt asks for beyond the resources of its stage; "" if nothing."""
    said = []
    if request.relief:
        said.append(f"1/{2**request.relief} of the work of one pass")
    if request.memory_factor != 1:
        said.append(f"{request.memory_factor:g} times the memory")
    if request.exclude:
        said.append(f"other nodes than {', '.join(request.exclude)}")
    return ", ".join(said)


def _attempt_lines(each: AttemptStory) -> list[str]:
    claim = each.claim
    where = claim.host if claim.node in ("", claim.host) else f"{claim.host} (node {claim.node})"
    job = f", Slurm job {claim.slurm_job}" if is_slurms(claim.slurm_job) else f", process {claim.pid}"
    lasted = "" if each.seconds is None else f", {_duration(each.seconds)}"
    slurm = f"; Slurm says {each.state}" if each.state and (each.ended is None or each.state not in each.ended.error) else ""
    head = f"  attempt {each.number}, {moment(claim.started)}, on {where}{job}{lasted}"
    lines = [f"{head}: {_ending(each)}{slurm}"]
    if claim.relief:
        lines[0] += f" (1/{2**claim.relief} of the work of one pass)"
    if each.asked is not None and (each.asked.less_time or each.asked.less_memory):
        lines.append(f"    its job {asks_in_words(each.asked)}, from finished siblings")
    if each.ended is not None:
        failure = each.ended.failure
        policy = "it goes on from its checkpoint with what is configured" if each.ended.short_of else POLICIES[failure]
        lines.append(f"    {failure.value}: {policy}{'; it left a newer checkpoint' if each.ended.progress else ''}")
    lines.append(f"    log: {each.log}")
    return lines


def _ending(each: AttemptStory) -> str:
    if each.result:
        return "its result counts"
    if each.alive:
        return "silent since" if each.state else "running"
    if each.ended is not None:
        return each.ended.error
    return f"{each.outcome.error}: {each.outcome.message}" if each.outcome else "ended"


def _departure_line(each: Departure) -> str:
    state = f"Slurm says {each.state}" if each.state else "accounting does not say how"
    by = ", withdrawn by the program itself" if each.ours else ", cancelled by hand" if cancelled_by_hand(each.state) else ""
    return (
        f"  job {each.job}, submitted {moment(each.submitted)}, left the queue by {moment(each.gone)} before its worker began ({state}{by})"
    )


def _read_story(node: Node, layout: Layout, sight: Sight, departures: Sequence[Departure]) -> StageStory:
    folder = layout.stage(node.stage, node.key)
    files = read_attempts(folder, sight)
    states = {each.job: each.state for each in departures}
    asked = {each.job: each.asked for each in departures}
    ended = {each.started: each for each in ended_attempts(files, departures, newest_checkpoint(folder))}
    default = str(layout.log_of(node.stage, node.key))
    found: list[AttemptStory] = []
    for each in files:
        if each.claim is None or each.published:
            continue
        over = ended.get(each.claim.started)
        seconds = each.outcome.seconds if each.outcome else _last_sign(folder.attempt(each.number).claim, each.claim)
        found.append(
            AttemptStory(
                number=each.number,
                claim=each.claim,
                log=each.claim.log or default,
                alive=each.alive,
                seconds=seconds,
                outcome=each.outcome,
                ended=over,
                state=states.get(each.job, ""),
                asked=asked.get(each.job),
            )
        )
    result = read_result(folder, node.key)
    claim = read_claim(folder.attempt(result.attempt)) if result else None
    if result is not None and claim is not None:
        seconds = result.provenance.get("seconds")
        request = asked.get(claim.slurm_job)
        found.append(AttemptStory(result.attempt, claim, claim.log or default, result=True, seconds=seconds, asked=request))
    begun = {each.claim.slurm_job for each in found}
    silent = tuple(each for each in departures if each.job not in begun)
    return StageStory(node, tuple(found), silent, damaged_records(folder.path))


def _last_sign(path: Path, claim: Claim) -> float | None:
    """Seconds from the start to the last heartbeat."""
    try:
        return max(0.0, path.stat().st_mtime - claim.started)
    except OSError:
        return None


def _verdict(verdicts: Sequence[Verdict], run: Run) -> Verdict | None:
    return next((each for each in verdicts if (each.fold, each.slot, each.generation) == (run.fold, run.slot, run.generation)), None)


def moment(seconds: float) -> str:
    """A time of the clock on the wall, where the user is."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _duration(seconds: float) -> str:
    from jobs.text import duration

    return duration(seconds)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _example(graph: Graph) -> str:
    return graph.runs[0].name if graph.runs else "vft/1/0"
