"""History of a run: seeds, attempts, retry policies and next step, from real records of runs on this machine."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.commands.explain import explain_lines, next_step, read_histories, request_text
from jobs.control.controller import Desired, Report, context_of, read_facts, run_local
from jobs.control.executor_protocol import Limits
from jobs.control.facts import Departure, InFlight, Phase, Request, StageFacts
from jobs.control.observe import PassContext
from jobs.control.plan import make_plan
from jobs.control.rounds import replay
from jobs.experiment.config import Policy, Resources
from jobs.experiment.graph import build_graph, seeds_of_slots
from jobs.experiment.lookup import find_target, stages_of
from jobs.local.executor import LocalExecutor
from jobs.store.failures import FailureClass
from jobs.store.layout import Layout
from jobs.store.records import Claim, Ending, Outcome, claim_attempt, write_json, write_outcome
from jobs.worker.machine import Capacity
from jobs.worker.task import Workplace
from tests.jobs import fake_registry
from tests.jobs.fake_registry import REGISTRY, make_graph

RESOURCES = Resources(cpus=1, gpus=0, memory_gb=0.1, minutes=1)


def launch(folder: Path, recipe: dict[str, Any], **experiment: Any) -> tuple[Desired, Report]:
    """Run a small experiment to its end on this machine."""
    corpus = fake_registry.make_corpus(folder / "corpus")
    place = Workplace(fake_registry.NAME, str(folder / "results"), "exp", "fake", str(corpus), "d1", fake_registry.DIGEST_OF)
    layout = Layout(folder / "results", "exp")
    desired = Desired(make_graph(recipe, **experiment), layout, Policy(), since=time.time())
    with LocalExecutor(place, layout, lambda stage: RESOURCES, Capacity(2, (), 8.0)) as executor:
        return desired, run_local(desired, executor)


def explained(desired: Desired, report: Report, name: str) -> str:
    """The lines of a run, as one text."""
    target = find_target(report.graph, name)
    stories = read_histories(stages_of(report.graph, target.node), desired.layout, context_of(desired, None))
    return "\n".join(explain_lines(target, report, stories, desired.policy))


def test_a_failed_run_lists_every_attempt_and_the_next_step(tmp_path: Path) -> None:
    """Upstream first; host and duration, failure class and policy, an existing log; it is given up, and how to retry."""
    desired, report = launch(tmp_path, {"failing": {"finetune tapt 1 0": "fail:9"}}, methods=("tapt",), folds=("1",), seeds=1)
    text = explained(desired, report, "tapt/1/0")
    upstream, last = re.search(r"^tapt tapt fold 1.*$", text, re.MULTILINE), re.search(r"^finetune tapt fold 1.*$", text, re.MULTILINE)
    assert upstream is not None
    assert last is not None
    assert upstream.start() < last.start()
    assert upstream[0].endswith("done")
    assert re.search(rf"attempt 1, \d{{4}}-.*, on {re.escape(socket.gethostname())}, process \d+, .* s: its result counts", text)
    assert "ValueError: made to fail, start 1" in text
    assert "code: not retried: fix the code or the configuration" in text
    assert "next: given up: ValueError: made to fail, start 1; fix that and launch again" in text
    logs = [Path(line.partition("log: ")[2]) for line in text.splitlines() if "log: " in line]
    assert len(logs) == 2
    assert all("attempt 1 on" in log.read_text() for log in logs)


def test_out_of_memory_lists_the_request_of_the_next_attempt(tmp_path: Path) -> None:
    """Each attempt lists its share of the work of one pass; the last one has a result."""
    desired, report = launch(tmp_path, {"failing": {"finetune vft 1 0": "oom:2"}}, methods=("vft",), folds=("1",), seeds=1)
    text = explained(desired, report, "vft/1/0")
    assert report.complete
    output = desired.layout.stage("finetune", report.graph.runs[0].key).attempt(3).output
    assert [line for line in text.splitlines() if "artifact" in line] == [f"  artifact: {output}/parts/", f"  artifact: {output}/sum.json"]
    assert [line for line in text.splitlines() if "warning" in line] == ["  warning: computed with relief 2"]
    claim = output.parent / "claim.json"
    write_json(claim, {**json.loads(claim.read_text()), "submitted": 100.0, "eligible": 200.0, "job_started": 320.0})
    (output / "sum.json").unlink()
    assert re.search(r"attempt 3.* s after 2 min 0 s in the queue: its result counts", explained(desired, report, "vft/1/0"))
    assert f"artifact: {output}/sum.json (removed)" in explained(desired, report, "vft/1/0")
    assert text.count("memory: same seed with half the work of a pass and 1.5 times the memory, at most 2 times") == 2
    assert re.search(r"attempt 2.*CUDA out of memory.*\(1/2 of the work of one pass\)", text)
    assert re.search(r"attempt 3.*its result counts \(1/4 of the work of one pass\)", text)
    assert "next:" not in text


def test_seeds_are_listed_with_the_verdict_that_dropped_them() -> None:
    """For each dropped seed of the slot: round, rule and distance; for the current one: its last verdict."""
    slots = seeds_of_slots(("vft",), ("1", "2"), seeds=5, first_seed=0, generations={("vft", "1", 0): 2})
    graph = build_graph(REGISTRY, {}, corpus="fake", corpus_digest="d1", methods=("vft",), folds=("1", "2"), seeds=slots)
    facts = {run.key: StageFacts(done=True, ua=60.0 + run.slot) for run in graph.runs}
    outlier, diverged = graph.superseded
    facts[outlier.key] = StageFacts(done=True, ua=25.0)
    facts[diverged.key] = StageFacts(diverged="training loss 1.386 is still at the class prior, 1.386", done=True, ua=25.0)
    plan = make_plan(graph, facts, {}, runs_per_task={}, limits=Limits())
    report = Report(plan, graph, facts, {}, replay(graph, facts, Policy()))
    lines = explain_lines(find_target(graph, "vft/1/0"), report, (), Policy())
    assert lines[0] == "vft/1/0: slot 0 of vft on fold 1, 3 seeds so far (at most 6)"
    assert re.search(r"seed 0 \[\w{8}\]: dropped in round 1: UA 25.0 lies [\d.]+ sigmas below the median [\d.]+ of its cell", lines[1])
    assert re.search(r"seed 1000 \[\w{8}\]: dropped: training loss 1.386 is still at the class prior", lines[2])
    assert re.search(r"seed 2000 \[\w{8}\]: fills the slot now; done, UA 60.0", lines[3])
    assert re.search(r"judged in round 2: in: UA 60.0 lies [\d.]+ sigmas below the median", lines[4])


def test_an_error_that_is_due_to_the_node(tmp_path: Path) -> None:
    """It is not called final as long as the stage is tried again elsewhere, and is when it is not."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=1)
    key = graph.runs[0].key
    folder = Layout(tmp_path, "exp").stage("finetune", key)
    assert claim_attempt(folder, 1, Claim(1, "login", os.getpid(), "elsewhere", 1000.0, "12_0", "node3"))
    write_outcome(folder.attempt(1), Outcome(1, Ending.failed, "OSError", "no GPU", "", "", 1.0, "12_0", "code"))
    stories = read_histories([graph.nodes[key]], Layout(tmp_path, "exp"), PassContext())

    def text(fact: StageFacts) -> str:
        plan = make_plan(graph, {key: fact}, {}, runs_per_task={}, limits=Limits())
        return "\n".join(explain_lines(find_target(graph, key[:6]), Report(plan, graph, {key: fact}, {}), stories, Policy()))

    due = "code: due to the node node3, on which other stages failed alike; free, and retried once on another node"
    assert due in text(StageFacts(attempts=1, failure=FailureClass.node, bad_nodes=("node3",)))
    stopped = text(StageFacts(attempts=2, failure=FailureClass.code, stopped="no GPU", failures=1, bad_nodes=("node3",)))
    assert "code: not retried: fix the code" in stopped
    assert due not in stopped


def test_slurm_states_of_jobs_without_an_outcome(tmp_path: Path) -> None:
    """A killed worker, and a job whose worker never started: Slurm's state of each, failure class, excluded nodes."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=1)
    key = graph.runs[0].key
    layout = Layout(tmp_path, "exp")
    folder = layout.stage("finetune", key)
    claim = Claim(1, "login", os.getpid(), "elsewhere", 1000.0, "12_0", "node3", str(tmp_path / "a.out"))
    assert claim_attempt(folder, 1, claim)
    os.utime(folder.attempt(1).claim, (1090.0, 1090.0))
    departures = {
        key: (
            Departure(key, "12_0", "NODE_FAIL", 990.0, 1100.0),
            Departure(key, "13_0", "BOOT_FAIL", 1110.0, 1200.0),
        )
    }
    context = PassContext(departures=lambda keys: departures, live_jobs=frozenset(), clock=lambda: 2000.0)
    facts = read_facts(graph, layout, context)
    plan = make_plan(graph, facts, {}, runs_per_task={}, limits=Limits())
    stories = read_histories(stages_of(graph, graph.nodes[key]), layout, context)
    text = "\n".join(explain_lines(find_target(graph, key[:6]), Report(plan, graph, facts, {}), stories, Policy()))
    assert "on login (node node3), Slurm job 12_0, 1 min 30 s: ended without an outcome on node3 (Slurm says NODE_FAIL)" in text
    assert "node: resumes from its checkpoint with the same seed; costs no attempt while it makes progress" in text
    assert re.search(r"job 13_0, submitted .*, left the queue by .* before its worker started \(Slurm state BOOT_FAIL\)", text)
    assert text.index("12_0") < text.index("13_0")
    assert f"log: {tmp_path / 'a.out'}" in text
    assert text.endswith("next: will be submitted by the next pass")

    early = PassContext(departures=lambda keys: departures, live_jobs=frozenset(), clock=lambda: 1110.0)  # heartbeat 20 s ago
    facts = read_facts(graph, layout, early)
    plan = make_plan(graph, facts, {}, runs_per_task={}, limits=Limits())
    stories = read_histories(stages_of(graph, graph.nodes[key]), layout, early)
    text = "\n".join(explain_lines(find_target(graph, key[:6]), Report(plan, graph, facts, {}), stories, Policy()))
    assert "Slurm job 12_0, 1 min 30 s: silent since; Slurm state NODE_FAIL" in text
    assert text.endswith("next: counted as ended when its worker has been silent for 45 s; the next pass then resumes it")


@pytest.mark.parametrize(
    ("fact", "flight", "expected"),
    [
        (StageFacts(), InFlight(Phase.queued, "123_4"), "in the queue as 123_4"),
        (StageFacts(), InFlight(Phase.running, "123_4"), "running as 123_4"),
        (StageFacts(), InFlight(Phase.queued, "?exp.finetune.vft.1"), "submitted; its job number is not known yet"),
        (StageFacts(executed_by="Slurm job 9_1"), None, "running: Slurm job 9_1 computes it"),
        (StageFacts(settling=True), None, "waits: Slurm has not reported yet how the last job ended"),
        (StageFacts(cancelled=True), None, "cancelled; launching again lifts that"),
        (StageFacts(cancelled=True, executed_by="process 7 on n1"), None, "cancelled, stopping: process 7 on n1 has not ended yet"),
        (StageFacts(cancelled=True), InFlight(Phase.running, "123_4"), "cancelled, stopping: job 123_4 has not ended yet"),
        (StageFacts(stopped="two attempts ended at the time limit", failures=2), None, "given up: two attempts ended at the time limit"),
        (StageFacts(done=True), None, ""),
    ],
)
def test_next_step(fact: StageFacts, flight: InFlight | None, expected: str) -> None:
    """One phrase for each state of a stage."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=1)
    key = graph.runs[0].key
    in_flight = {key: flight} if flight else {}
    plan = make_plan(graph, {key: fact}, in_flight, runs_per_task={}, limits=Limits())
    found = next_step(key, fact, in_flight, plan, "the next pass")
    assert found.startswith(expected)
    assert bool(found) == bool(expected)


def test_only_a_run_has_reserve_seeds() -> None:
    """Where a stage that runs share diverged, more seeds of a slot would not help: its seed is another one's."""
    graph = make_graph(methods=("tapt",), folds=("1",), seeds=1)
    run = graph.runs[0].key
    shared = graph.nodes[run].upstream["backbone"]
    facts = {shared: StageFacts(diverged="NaN at step 7", attempts=1)}
    plan = make_plan(graph, facts, {}, runs_per_task={}, limits=Limits())
    found = next_step(shared, facts[shared], {}, plan, "the next pass")
    assert found == "given up: NaN at step 7, and its seed is that of all its runs; change the recipe and launch again"
    facts = {shared: StageFacts(done=True), run: StageFacts(diverged="NaN at step 7", attempts=1)}
    plan = make_plan(graph, facts, {}, runs_per_task={}, limits=Limits())
    found = next_step(run, facts[run], {}, plan, "the next pass")
    assert found == "given up: NaN at step 7, and no reserve seed is left; change the recipe, or raise policy.max_seeds, and launch again"


def test_the_request_of_an_attempt_as_text() -> None:
    """Half the work, more memory, other nodes; empty without earlier failures."""
    assert request_text(Request(1, 1.5, ("n1", "n2"))) == "1/2 of the work of one pass, 1.5 times the memory, other nodes than n1, n2"
    assert request_text(Request()) == ""
