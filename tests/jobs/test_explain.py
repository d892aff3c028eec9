"""The story of a run: its seeds, attempts, policies, and what comes next, from real records of runs on this machine."""

from __future__ import annotations

import os
import re
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.commands.explain import explain_lines, find_target, next_words, read_stories, request_words, stages_of
from jobs.control.controller import Desired, Report, context_of, read_facts, run_local
from jobs.control.executor_protocol import Limits
from jobs.control.facts import Departure, InFlight, Phase, Request, StageFacts
from jobs.control.observe import PassContext
from jobs.control.plan import make_plan
from jobs.control.rounds import replay
from jobs.errors import UsageError
from jobs.experiment.config import Policy, Resources
from jobs.experiment.graph import Graph, build_graph, seeds_of_slots
from jobs.local.executor import LocalExecutor
from jobs.store.layout import Layout
from jobs.store.records import Claim, claim_attempt
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
    stories = read_stories(stages_of(report.graph, target.node), desired.layout, context_of(desired, None))
    return "\n".join(explain_lines(target, report, stories, desired.policy))


def test_a_failed_run_tells_every_attempt_and_what_follows(tmp_path: Path) -> None:
    """Upstream first; where and how long; the class and its policy; the log, which is there; that it is given up, and what lifts that."""
    desired, report = launch(tmp_path, {"failing": {"finetune tapt 1 0": "fail:9"}}, methods=("tapt",), folds=("1",), seeds=1)
    text = explained(desired, report, "tapt/1/0")
    upstream, last = re.search(r"^tapt tapt fold 1.*$", text, re.MULTILINE), re.search(r"^finetune tapt fold 1.*$", text, re.MULTILINE)
    assert upstream is not None
    assert last is not None
    assert upstream.start() < last.start()
    assert upstream[0].endswith("done")
    assert re.search(rf"attempt 1, \d{{4}}-.*, on {re.escape(socket.gethostname())}, process \d+, .* s: its result counts", text)
    assert "ValueError: made to fail, start 1" in text
    assert "code: not tried again by itself: code or configuration has to be mended" in text
    assert "next: given up: ValueError: made to fail, start 1; mend that and launch again" in text
    logs = [Path(line.partition("log: ")[2]) for line in text.splitlines() if "log: " in line]
    assert len(logs) == 2
    assert all("attempt 1 on" in log.read_text() for log in logs)


def test_memory_that_ran_out_tells_what_the_next_attempt_asked_for(tmp_path: Path) -> None:
    """Each attempt says how much of a pass it did at once; the result counts."""
    desired, report = launch(tmp_path, {"failing": {"finetune vft 1 0": "oom:2"}}, methods=("vft",), folds=("1",), seeds=1)
    text = explained(desired, report, "vft/1/0")
    assert report.complete
    assert text.count("memory: same seed with half the work of a pass and 1.5 times the memory, 2 times at the most") == 2
    assert re.search(r"attempt 2.*CUDA out of memory.*\(1/2 of the work of one pass\)", text)
    assert re.search(r"attempt 3.*its result counts \(1/4 of the work of one pass\)", text)
    assert "next:" not in text


def test_seeds_are_told_with_the_verdict_that_dropped_them() -> None:
    """Of each seed of the slot: which round, how far out by which rule; of the one that fills it now, how it was judged."""
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


def test_what_slurm_says_of_a_job_that_left_no_word(tmp_path: Path) -> None:
    """A worker that was killed, and a job whose worker never began: Slurm's state of each, the class, and nodes that are avoided."""
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
    stories = read_stories(stages_of(graph, graph.nodes[key]), layout, context)
    text = "\n".join(explain_lines(find_target(graph, key[:6]), Report(plan, graph, facts, {}), stories, Policy()))
    assert "on login (node node3), Slurm job 12_0, 1 min 30 s: ended without an outcome on node3 (Slurm says NODE_FAIL)" in text
    assert "node: goes on from its checkpoint with the same seed, free of charge while it makes progress" in text
    assert re.search(r"job 13_0, submitted .*, left the queue by .* before its worker began \(Slurm says BOOT_FAIL\)", text)
    assert text.index("12_0") < text.index("13_0")
    assert f"log: {tmp_path / 'a.out'}" in text
    assert text.endswith("next: will be submitted by the next pass")

    early = PassContext(departures=lambda keys: departures, live_jobs=frozenset(), clock=lambda: 1110.0)  # heartbeat: 20 s ago
    facts = read_facts(graph, layout, early)
    plan = make_plan(graph, facts, {}, runs_per_task={}, limits=Limits())
    stories = read_stories(stages_of(graph, graph.nodes[key]), layout, early)
    text = "\n".join(explain_lines(find_target(graph, key[:6]), Report(plan, graph, facts, {}), stories, Policy()))
    assert "Slurm job 12_0, 1 min 30 s: silent since; Slurm says NODE_FAIL" in text
    assert text.endswith("next: taken for ended when its worker has been silent for 45 s; the next pass then goes on with it")


@pytest.mark.parametrize(
    ("fact", "flight", "expected"),
    [
        (StageFacts(), InFlight(Phase.queued, "123_4"), "in the queue as 123_4"),
        (StageFacts(), InFlight(Phase.running, "123_4"), "running as 123_4"),
        (StageFacts(), InFlight(Phase.queued, "?exp.finetune.vft.1"), "submitted, and Slurm has not said as what yet"),
        (StageFacts(executed_by="Slurm job 9_1"), None, "running: Slurm job 9_1 works on it"),
        (StageFacts(settling=True), None, "waits: Slurm has not reported yet how the last job ended"),
        (StageFacts(cancelled=True), None, "cancelled; launching again lifts that"),
        (StageFacts(stopped="two attempts ended at the time limit", failures=2), None, "given up: two attempts ended at the time limit"),
        (StageFacts(done=True), None, ""),
    ],
)
def test_what_comes_next(fact: StageFacts, flight: InFlight | None, expected: str) -> None:
    """One phrase for each place a stage can be in."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=1)
    key = graph.runs[0].key
    in_flight = {key: flight} if flight else {}
    plan = make_plan(graph, {key: fact}, in_flight, runs_per_task={}, limits=Limits())
    found = next_words(key, fact, in_flight, plan, "the next pass")
    assert found.startswith(expected)
    assert bool(found) == bool(expected)


def test_what_an_attempt_asks_for_is_told_in_words() -> None:
    """Half the work, more memory, other nodes; nothing where nothing was learnt."""
    assert request_words(Request(1, 1.5, ("n1", "n2"))) == "1/2 of the work of one pass, 1.5 times the memory, other nodes than n1, n2"
    assert request_words(Request()) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vfd/1/0", "did you mean 'vft'"),
        ("vft/9/0", "no fold '9'"),
        ("vft/1/7", "no slot '7'"),
        ("vft", "METHOD/FOLD/SLOT"),
        ("abc", "at least 6 digits"),
        ("ffffff", "begins no key"),
        ("/", "no method ''"),
    ],
)
def test_a_name_that_is_none_is_one_line(text: str, expected: str) -> None:
    """What is wrong with it, and what there is."""
    graph = _small()
    with pytest.raises(UsageError) as caught:
        find_target(graph, text)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_fold_may_hold_a_slash_and_a_key_names_an_upstream_stage() -> None:
    """Method and slot are the first and the last part; a key finds stages that end no run, too."""
    slots = seeds_of_slots(("tapt",), ("a/b",), seeds=2, first_seed=0)
    graph = build_graph(REGISTRY, {}, corpus="fake", corpus_digest="d1", methods=("tapt",), folds=("a/b",), seeds=slots)
    target = find_target(graph, "tapt/a/b/1")
    assert target.run is not None
    assert (target.run.fold, target.run.slot) == ("a/b", 1)
    upstream = next(key for key, node in graph.nodes.items() if node.stage == "tapt")
    found = find_target(graph, upstream[:8])
    assert found.run is None
    assert found.node.stage == "tapt"


def test_keys_that_begin_alike_are_told_apart() -> None:
    """A prefix of two keys is refused rather than guessed."""
    graph = _small()
    (first, node), (_, other) = list(graph.nodes.items())[:2]
    nodes = {f"{first[:7]}0": node, f"{first[:7]}1": other}
    with pytest.raises(UsageError, match="begins 2 keys"):
        find_target(replace(graph, nodes=nodes), first[:7])


def _small() -> Graph:
    return make_graph(methods=("vft",), folds=("1",), seeds=2)
