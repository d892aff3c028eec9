"""Requests from experience: bounds of the rule, which siblings count, and what follows if a prediction was not enough."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.control.controller import desired_of, read_facts
from jobs.control.estimates import (
    CONFIGURED,
    GIB,
    SPARE_GB,
    START_SECONDS,
    Bounds,
    Experience,
    Prediction,
    asks_in_words,
    predict,
    upper_bound,
)
from jobs.control.executor_protocol import Limits
from jobs.control.facts import OUTSIDE, Asked, Departure, Request, Shortage, StageFacts
from jobs.control.failure_policy import EndedAttempt, decide, ended_attempts, shortage
from jobs.control.observe import PassContext, read_attempts
from jobs.control.plan import make_plan
from jobs.control.result_index import ResultIndex, facts_of
from jobs.errors import UsageError
from jobs.experiment.config import Resources, load_experiment
from jobs.experiment.graph import Graph
from jobs.experiment.launched import Corpus, launch
from jobs.slurm.submissions import SubmissionBook, base_name, double_of, new_submission
from jobs.store.attempts import seconds_before
from jobs.store.failures import FailureClass
from jobs.store.layout import Layout
from jobs.store.records import Claim, Ending, Outcome, Result, claim_attempt, write_outcome, write_result
from ser_core.registry import REGISTRY as REGISTRY_OF_DEMO
from ser_core.settings.recipe import Recipe
from tests.jobs.fake_registry import make_graph
from tests.jobs.slurm_cases import batch_of, layout_of, node

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
GIVEN = Resources(cpus=2, gpus=0, memory_gb=32.0, minutes=90)
SECONDS = st.lists(st.floats(0.01, 1e6), min_size=1, max_size=60)


def done(seconds: float, gigabytes: float = 1.0, *, on_gpu: bool = False, processes: int = 1) -> StageFacts:
    return StageFacts(
        done=True, attempts=1, seconds=seconds, all_seconds=seconds, memory=int(gigabytes * GIB), on_gpu=on_gpu, processes=processes
    )


def experience(graph: Graph, facts: dict[str, StageFacts], given: Resources = GIVEN, siblings: int = 3) -> Experience:
    return Experience(graph, facts, Bounds({"finetune": given, "tapt": given}, siblings, 120.0))


@given(SECONDS, st.data())
def test_a_longer_sibling_never_lowers_the_request(values: list[float], data: st.DataObject) -> None:
    """Whichever takes longer; the request covers nearly all of them with a margin of at least a quarter."""
    place, more = data.draw(st.integers(0, len(values) - 1)), data.draw(st.floats(1, 10))
    longer = [value * more if index == place else value for index, value in enumerate(values)]
    assert upper_bound(longer) >= upper_bound(values)
    covered = sum(value * 1.25 <= upper_bound(values) for value in values)
    assert covered >= 0.95 * len(values) - 1e-9
    assert upper_bound([value * 7 for value in values]) == pytest.approx(7 * upper_bound(values))


@given(SECONDS, st.integers(1, 10_000), st.floats(0.1, 500), st.booleans())
def test_no_request_is_beyond_what_is_configured_or_below_the_start(
    values: list[float], minutes: int, gigabytes: float, any_method: bool
) -> None:
    """Where it would be, it is as configured: None."""
    given = replace(GIVEN, minutes=minutes, memory_gb=gigabytes)
    found = predict([done(value, value / 1000) for value in values], given, START_SECONDS + 120, any_method=any_method)
    assert found.minutes is None or 5 < found.minutes < minutes
    assert found.memory_gb is None or SPARE_GB <= found.memory_gb < gigabytes
    assert found.siblings == len(values)


def test_the_rule_in_figures() -> None:
    """The largest of few, the 0.95 quantile of many; the margin shrinks from two and a half to a quarter."""
    assert upper_bound([100.0]) == pytest.approx(250)
    assert upper_bound([10.0, 20.0, 100.0, 30.0]) == pytest.approx(100 * 1.25 * 1.5)
    assert upper_bound([*[100.0] * 95, *[9000.0] * 5]) == pytest.approx(100 * 1.25 * 1.1)
    assert upper_bound([*[100.0] * 94, *[9000.0] * 6]) == pytest.approx(9000 * 1.25 * 1.1)


def test_siblings_of_the_same_method_count_first() -> None:
    """Below the least number those of any method do, with more margin; below it for them too, nothing is predicted."""
    graph = make_graph(methods=("vft", "tapt"), folds=("1",), seeds=4)
    vft, tapt = ([run.key for run in graph.runs if run.method == method] for method in ("vft", "tapt"))
    facts = {key: done(600.0) for key in vft[:3]}
    both = experience(graph, facts)
    own, other = both("finetune", "vft"), both("finetune", "tapt")
    assert own.minutes == math.ceil((600 * 1.25 * (1 + 3**-0.5) + START_SECONDS + 120) / 60)
    assert (own.siblings, own.any_method, other.siblings, other.any_method) == (3, False, 3, True)
    assert other.minutes is not None
    assert other.minutes > own.minutes
    assert experience(graph, {key: done(600.0) for key in vft[:2]})("finetune", "vft") is CONFIGURED
    assert both("tapt", "tapt") is CONFIGURED, "none of its own name"
    assert both("states", "ptapt") is CONFIGURED, "nothing is configured for it"
    facts |= {key: done(60.0) for key in tapt[:3]}
    assert experience(graph, facts)("finetune", "tapt").siblings == 3


def test_only_siblings_with_the_same_processes_and_device_count() -> None:
    """A process group of the same size; on a GPU if one is requested, on any device if none of them used one."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=6)
    keys = [run.key for run in graph.runs]
    mixed = dict(zip(keys, [*[done(6000.0)] * 3, *[done(60.0, on_gpu=True)] * 3], strict=True))
    assert experience(graph, mixed, replace(GIVEN, gpus=1))("finetune", "vft").seconds == 60.0
    assert experience(graph, mixed)("finetune", "vft").seconds == 6000.0
    assert experience(graph, {key: done(60.0) for key in keys}, replace(GIVEN, gpus=1))("finetune", "vft").siblings == 6
    assert experience(graph, mixed, replace(GIVEN, nodes=2))("finetune", "vft") is CONFIGURED


def test_other_partitions_and_more_threads_do_not_count() -> None:
    """Siblings computed outside of Slurm, in other partitions or with more threads do not count; those without a record do."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=9)
    keys = [run.key for run in graph.runs]
    kinds = [*[done(60.0)] * 3, *[replace(done(600.0), partition="v100", threads=2)] * 3, *[replace(done(6.0), partition=OUTSIDE)] * 3]
    facts = dict(zip(keys, kinds, strict=True))

    def siblings(given: Resources, *partitions: str) -> int:
        return Experience(graph, facts, Bounds({"finetune": given}, 3, 120.0, frozenset(partitions)))("finetune", "vft").siblings

    assert (siblings(GIVEN), siblings(GIVEN, "v100", "a100"), siblings(GIVEN, "a100")) == (6, 6, 3)
    assert siblings(replace(GIVEN, cpus=1)) == 3
    assert siblings(replace(GIVEN, runs_per_task=4, at_once=2)) == 3, "in company each has half of them"
    assert siblings(replace(GIVEN, cpus=4, runs_per_task=4, at_once=2)) == 6


def test_an_unfinished_sibling_counts_on_a_gpu_too() -> None:
    """Where it is computed is not known before it has ended."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=4)
    keys = [run.key for run in graph.runs]
    facts = {key: done(600.0, on_gpu=True) for key in keys[:3]}
    given = replace(GIVEN, gpus=1)
    plain = experience(graph, facts, given)("finetune", "vft").minutes
    longer = experience(graph, {**facts, keys[3]: StageFacts(all_seconds=1500.0)}, given)("finetune", "vft").minutes
    assert plain is not None
    assert longer is not None
    assert longer > plain


def test_file_pages_are_requested_once() -> None:
    """They get no margin; only the private memory of a process does."""
    mapped = [replace(done(60.0, 4.0), mapped=3 * GIB)] * 100
    found = predict(mapped, GIVEN, 300.0)
    assert found.memory_gb == 5.0, "1.25 * 1.1 + 3 + 0.5, in quarters"
    assert found.memory_bytes == 4 * GIB
    assert predict([done(60.0, 4.0)] * 100, GIVEN, 300.0).memory_gb == 6.0
    assert " GB, and" not in replace(found, memory_bytes=0.0).source


def test_memory_is_that_of_all_processes_of_a_node() -> None:
    """A team of two nodes with four processes each; and none is predicted where several stages share it, or nobody measured it."""
    team = replace(GIVEN, nodes=2, processes=4)
    found = predict([done(60.0, 1.0, processes=8)] * 100, team, 300.0)
    assert found.memory_gb == pytest.approx(4 * 1.25 * 1.1 + SPARE_GB)
    assert predict([done(60.0)] * 5, replace(GIVEN, at_once=2), 300.0).memory_gb is None
    assert predict([done(60.0, 0.0)] * 5, GIVEN, 300.0).memory_gb is None


def test_a_request_that_was_not_enough_is_a_lower_bound() -> None:
    """An unfinished sibling that exceeded all others raises the request; one that only started does not."""
    siblings = [done(600.0)] * 5
    plain = predict(siblings, GIVEN, 300.0)
    assert predict([*siblings, StageFacts(all_seconds=3.0)], GIVEN, 300.0) == plain
    longer = predict([*siblings, StageFacts(all_seconds=1800.0, memory=4 * GIB)], GIVEN, 300.0)
    assert longer.minutes is not None
    assert longer.minutes > 1800 * 1.25 / 60
    assert longer.memory_gb is not None
    assert longer.memory_gb > 4 * 1.25


def test_a_plan_requests_the_prediction_until_it_was_not_enough() -> None:
    """Stages of a kind share one batch; time or memory that was not enough is requested as configured, with relief both are."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=6)
    keys = [run.key for run in graph.runs]
    facts = {keys[2]: StageFacts(attempts=1, short_of=Shortage.time), keys[3]: StageFacts(attempts=1, short_of=Shortage.memory)}
    facts[keys[4]] = StageFacts(attempts=1, request=Request(1, 1.5))
    told = Prediction(12, 2.5, 9)
    plan = make_plan(graph, facts, {}, runs_per_task={}, limits=Limits(), predict=lambda stage, method: told)
    assert {batch.keys: batch.request for batch in plan.batches} == {
        (keys[0], keys[1], keys[5]): Request(minutes=12, memory_gb=2.5),
        (keys[2],): Request(memory_gb=2.5),
        (keys[3],): Request(minutes=12),
        (keys[4],): Request(1, 1.5),
    }
    plain = make_plan(graph, facts, {}, runs_per_task={}, limits=Limits())
    assert all((batch.request.minutes, batch.request.memory_gb) == (None, None) for batch in plain.batches)


def test_a_changed_prediction_does_not_change_a_submission() -> None:
    """Two controllers that have read different siblings submit the same job, under one name."""
    layout, batch = layout_of(Path("/nowhere")), batch_of([node("a", "finetune")])
    names = {base_name(layout, replace(batch, request=request)) for request in (Request(), Request(minutes=7), Request(memory_gb=1.5))}
    assert len(names) == 1
    assert base_name(layout, replace(batch, request=Request(1, 1.5))) not in names


ASKED = Asked(minutes=12, memory_mb=2048, configured_minutes=90, configured_mb=32768)
PLAIN = Asked(90, 32768, 90, 32768)


@pytest.mark.parametrize(
    ("asked", "failure", "error", "killed", "what"),
    [
        (ASKED, FailureClass.time_limit, "ended without an outcome", False, Shortage.time),
        (ASKED, FailureClass.memory, "MemoryError: no message", False, Shortage.memory),
        (ASKED, FailureClass.memory, "ended without an outcome on n1 (Slurm says OUT_OF_MEMORY)", False, Shortage.memory),
        (ASKED, FailureClass.memory, "OutOfMemoryError: CUDA out of memory", False, Shortage.none),
        (ASKED, FailureClass.node, "ended without an outcome on n1 (Slurm says FAILED)", True, Shortage.memory),
        (ASKED, FailureClass.code, "ValueError: 3", False, Shortage.none),
        (PLAIN, FailureClass.time_limit, "", False, Shortage.none),
        (PLAIN, FailureClass.memory, "MemoryError", False, Shortage.none),
        (replace(ASKED, memory_mb=32768), FailureClass.memory, "MemoryError", False, Shortage.none),
        (None, FailureClass.time_limit, "", False, Shortage.none),
    ],
)
def test_which_failures_are_due_to_a_prediction(
    asked: Asked | None, failure: FailureClass, error: str, killed: bool, what: Shortage
) -> None:
    """Only of time or memory requested below the configuration, and never of the memory of a GPU."""
    assert shortage(asked, failure, error, killed=killed) == what


def test_without_accounting_time_or_memory_may_have_been_short(tmp_path: Path) -> None:
    """Without accounting a worker that exceeds a predicted limit leaves no trace: the next attempt is as configured."""
    node_failed = FailureClass.node
    assert shortage(ASKED, node_failed, "", killed=True, state_known=False) == Shortage.time | Shortage.memory
    assert shortage(replace(ASKED, minutes=90), node_failed, "", killed=True, state_known=False) == Shortage.memory
    assert shortage(PLAIN, node_failed, "", killed=True, state_known=False) == Shortage.none
    graph, layout = make_graph(methods=("vft",), folds=("1",), seeds=1), Layout(tmp_path, "exp")
    key = graph.runs[0].key
    attempt(layout, key, 1, 700.0, word=False)
    departure = Departure(key, "7_1", "", 0.0, 1.0, asked=ASKED)
    fact = read_facts(graph, layout, PassContext(departures=lambda keys: {key: (departure,)}))[key]
    assert (fact.short_of, fact.failures, fact.stopped) == (Shortage.time | Shortage.memory, 0, "")
    assert fact.memory == 0, "nobody said that memory was short"


def test_after_failed_starts_stages_are_requested_as_configured() -> None:
    """A program that takes longer to load than before must not be stopped by a prediction: the last two of four jobs get all of it."""
    silent = [Departure("k", f"7_{number}", "TIMEOUT", float(number), 2.0, asked=ASKED) for number in range(4)]
    assert not decide([], since=0.0, max_attempts=12, failed_starts=silent[:1]).short_of
    twice = decide([], since=0.0, max_attempts=12, failed_starts=silent[:2])
    assert (twice.short_of, twice.stopped) == (Shortage.time | Shortage.memory, "")
    assert decide([], since=0.0, max_attempts=12, failed_starts=silent).stopped


def test_a_prediction_that_was_not_enough_costs_nothing() -> None:
    """It is not one of the two time limits after which a stage is stopped, nor an out-of-memory that halves the work of a pass."""
    limit, memory = FailureClass.time_limit, FailureClass.memory
    short = [EndedAttempt(1.0, limit, "late", short_of=Shortage.time), EndedAttempt(2.0, memory, "full", short_of=Shortage.memory)]
    facts = decide(short, since=0.0, max_attempts=12)
    assert (facts.failures, facts.stopped, facts.request) == (0, "", Request())
    assert facts.short_of == Shortage.time | Shortage.memory
    once = decide([*short, EndedAttempt(3.0, limit, "late")], since=0.0, max_attempts=12)
    assert (once.failures, once.stopped) == (1, "")
    assert decide([*short, EndedAttempt(3.0, limit, "late"), EndedAttempt(4.0, limit, "late")], since=0.0, max_attempts=12).stopped
    assert decide(short, since=100.0, max_attempts=12).short_of, "launching again does not make it enough"


def attempt(layout: Layout, key: str, number: int, seconds: float, *, checkpoint: float = 0.0, word: bool = True) -> None:
    folder = layout.stage("finetune", key)
    claim_attempt(folder, number, Claim(number, "elsewhere", 1, "", 1000.0 * number, f"7_{number}", "n1", checkpoint=checkpoint))
    os.utime(folder.attempt(number).claim, (1000.0 * number + seconds,) * 2)
    if word:
        outcome = Outcome(number, Ending.interrupted, "Stop", "asked", "", "elsewhere", seconds, kind=FailureClass.time_limit.name)
        write_outcome(folder.attempt(number), outcome)


def test_a_resumed_stage_takes_the_time_of_its_attempts(tmp_path: Path) -> None:
    """Of the last one that found no checkpoint and all after it; a killed one lasted until its last heartbeat."""
    graph, layout = make_graph(methods=("vft",), folds=("1",), seeds=1), Layout(tmp_path, "exp")
    key = graph.runs[0].key
    attempt(layout, key, 1, 40.0)
    attempt(layout, key, 2, 300.0)
    attempt(layout, key, 3, 20.0, checkpoint=5.0, word=False)
    attempt(layout, key, 4, 7.0, checkpoint=5.0)
    folder = layout.stage("finetune", key)
    assert [seconds_before(folder, number) for number in (1, 2, 3, 4)] == [0.0, 0.0, 300.0, 320.0]
    departure = Departure(key, "7_4", "FAILED", 0.0, 1.0, asked=ASKED)
    fact = read_facts(graph, layout, PassContext(departures=lambda keys: {key: (departure,)}))[key]
    assert (fact.all_seconds, fact.short_of, fact.failures) == (327.0, Shortage.time, 1), "the first alone: then progress, and a prediction"
    ended = ended_attempts(read_attempts(folder, PassContext()), [departure], 0.0)
    assert [each.short_of for each in ended] == [Shortage.none, Shortage.none, Shortage.none, Shortage.time]
    told = {"seconds": 7.0, "seconds_before": 320.0, "peak_rss_bytes": GIB, "device": "1 x GPU", "processes": 4}
    result = Result(key, "finetune", 1, "1", 0, "fake", "d1", {}, {}, 4, {}, told)
    write_result(folder, result)
    expected = StageFacts(done=True, attempts=4, seconds=7.0, all_seconds=327.0, memory=GIB, on_gpu=True, processes=4)
    assert replace(facts_of(result, 0), finished=0.0) == expected
    index = ResultIndex(layout.index)
    told |= {"processes": 1, "peak_own_bytes": GIB // 4, "threads": 3, "slurm": {"job_partition": "gpu"}}
    write_result(folder, replace(result, provenance=told))
    first = index.facts(key, str(folder.path))
    assert first is not None
    assert (first.memory, first.mapped, first.threads, first.partition) == (GIB, GIB * 3 // 4, 3, "gpu")
    assert facts_of(replace(result, provenance={**told, "slurm": {}}), 0).partition == OUTSIDE
    assert facts_of(replace(result, provenance={**told, "processes": 4}), 0).mapped == 0, "of a team only one peak is known"
    index._changes = 100
    index.store()
    assert ResultIndex(layout.index).facts(key, str(folder.path)) == first


def test_requests_are_recorded(tmp_path: Path) -> None:
    """With the submission, with one that is adopted twice, and for every element that leaves; an older record has none."""
    layout, batch = layout_of(tmp_path), batch_of([node("a", "finetune")])
    book = SubmissionBook(layout)
    record = new_submission(book.next_name(batch), batch, 1.0, asked=ASKED)
    assert book.begin(record)
    assert book.find(record.name) == record
    assert double_of(record, "8", 2.0).asked == ASKED
    other = new_submission("trial.finetune.vft.0.1", batch, 1.0)
    assert book.begin(other)
    assert book.find(other.name) == other


@pytest.mark.slow
def test_requests_are_predicted_only_on_slurm(tmp_path: Path) -> None:
    """Predictions are the default there; the configuration turns them off, and is validated."""

    def bounds(*overrides: str) -> Bounds | None:
        experiment = load_experiment("demo", ["methods=[vft]", "seeds=1", *overrides], configs=CONFIGS, recipe_schema=Recipe)
        launched = launch(experiment, Corpus("fake", "d1", ("1",), "/nowhere"), REGISTRY_OF_DEMO, Layout(tmp_path, "exp"))
        return desired_of(launched).bounds

    found = bounds("cluster=slurm", "slurm.signal_seconds=300", "policy.min_siblings=7")
    assert found is not None
    assert (found.most["finetune"].minutes, found.siblings, found.warning_seconds) == (15, 7, 300)
    assert bounds() is None
    assert bounds("cluster=slurm", "policy.requests=configured") is None
    sent = bounds("cluster=slurm", "slurm.partition='gpu,long'")
    assert sent is not None
    assert not found.partitions
    assert sent.partitions == {"gpu", "long"}
    with pytest.raises(UsageError, match=r"policy\.min_siblings out of range"):
        bounds("policy.min_siblings=0")
    with pytest.raises(UsageError, match=r"policy\.requests"):
        bounds("policy.requests=guess")


def test_the_text_of_a_request() -> None:
    """What is requested, what is configured if that is more, and what the prediction is based on."""
    told = Prediction(12, 2.0, 37, seconds=300.0, memory_bytes=1.5 * GIB)
    expected = "requests 12 min and 2 GB a task (configured: 90 min, 32 GB), from 37 finished siblings: 95% took at most 5.0 min and 1.5 GB"
    assert asks_in_words(ASKED, told) == f"{expected}, and a margin"
    assert asks_in_words(PLAIN, told) == "requests 90 min and 32 GB a task, as configured"
    assert "of any method" in asks_in_words(ASKED, replace(told, any_method=True))
