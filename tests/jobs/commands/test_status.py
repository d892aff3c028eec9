"""Status: counts, runs and problems as plain data, table and JSON; and the estimated cost of a launch."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from jobs.commands.hints import Hints
from jobs.commands.status_list import ExperimentRow, list_to_json
from jobs.commands.status_report import State, Status, status_lines, status_of, status_table, status_to_json, table_states
from jobs.control.controller import Report
from jobs.control.estimates import Source, forecast, shape_in_words
from jobs.control.executor_protocol import Limits
from jobs.control.facts import InFlight, Phase, StageFacts
from jobs.control.plan import make_plan
from jobs.control.rounds import replay
from jobs.experiment.config import Policy, Resources
from jobs.experiment.graph import Graph, build_graph, seeds_of_slots
from jobs.store.failures import FailureClass
from jobs.store.scores import Score
from tests.jobs.fake_registry import REGISTRY, make_graph

REPOSITORY = Path(__file__).resolve().parents[3]


def _keys(graph: Graph, stage: str) -> list[str]:
    return [key for key, node in graph.nodes.items() if node.stage == stage]


def _report(
    graph: Graph, facts: dict[str, StageFacts], in_flight: dict[str, InFlight] | None = None, policy: Policy | None = None
) -> Report:
    held = in_flight or {}
    plan = make_plan(graph, facts, held, runs_per_task={}, limits=Limits())
    return Report(plan, graph, facts, held, replay(graph, facts, policy or Policy()))


@pytest.fixture
def status() -> Status:
    """Two folds of all methods: vft has every state, the states stage of P-TAPT is given up in one fold."""
    graph = make_graph()
    vft = [run.key for run in graph.runs if run.method == "vft"]
    facts = {key: StageFacts() for key in graph.nodes}
    facts[vft[0]] = StageFacts(done=True, seconds=5.0)
    facts[vft[1]] = StageFacts(attempts=1, failures=1, error="MemoryError: once", failure=FailureClass.memory)
    given_up = "3 attempts found the disk full: make room"
    facts[_keys(graph, "states")[0]] = StageFacts(
        attempts=3, failures=3, error="OSError: disk full", stopped=given_up, failure=FailureClass.disk
    )
    facts[_keys(graph, "tapt")[0]] = StageFacts(executed_by="process 5 on node1")
    in_flight = {vft[1]: InFlight(Phase.queued, "7_0"), vft[2]: InFlight(Phase.running, "7_1")}
    return status_of("exp", _report(graph, facts, in_flight))


def test_counts_by_method_and_stage(status: Status) -> None:
    """Every stage is counted once, in the state the planner sees."""
    counts = {(row.method, row.stage): {state: count for state, count in row.counts.items() if count} for row in status.stages}
    assert counts["vft", "finetune"] == {"done": 1, "queued": 1, "running": 1, "missing": 1}
    assert counts["tapt", "tapt"] == {"running": 1, "missing": 1}
    assert counts["ptapt", "states"] == {"failed": 1, "missing": 1}
    assert counts["ptapt", "cluster"] == {"blocked": 1, "missing": 1}
    assert counts["ptapt", "finetune"] == {"blocked": 2, "missing": 2}
    assert sum(row.total for row in status.stages) == 20
    assert not status.complete


def test_runs_have_the_state_of_their_last_stage(status: Status) -> None:
    """One row per run, in the order of the graph."""
    assert [run.state for run in status.runs if run.method == "vft"] == [State.done, State.queued, State.running, State.missing]
    assert len(status.runs) == 12


def test_problems_list_the_next_step(status: Status) -> None:
    """Stages with an error: failure class, number of attempts, error and next step."""
    lines = [line for line in status_lines(status) if "attempt" in line]
    assert len(lines) == 2
    assert any("failed, in the queue again (memory, attempt 1): MemoryError: once" in line for line in lines)
    assert any("given up (disk, attempt 3): 3 attempts found the disk full: make room (last: OSError: disk full)" in line for line in lines)


def test_many_stages_with_the_same_error_are_one_line() -> None:
    """Errors that differ in numbers only: one line with their count and the first of them."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=4)
    errors = [f"ValueError: cannot read clip {number}" for number in range(3)] + ["KeyError: other"]
    facts = {
        run.key: StageFacts(attempts=1, failures=1, error=error, stopped=error, failure=FailureClass.code)
        for run, error in zip(graph.runs, errors, strict=True)
    }
    lines = [line for line in status_lines(status_of("exp", _report(graph, facts))) if "given up" in line]
    assert len(lines) == 2
    assert lines[0].startswith("finetune vft, 3 stages: given up (code, attempt 1): ValueError: cannot read clip 0; first fold 1 seed 0 [")


def test_held_and_cancelled_stages_are_counted_separately() -> None:
    """Stages that the user cancelled, and stages held because the first of their kind all failed with the same error."""
    graph = make_graph(methods=("vft", "tapt"), folds=("1",), seeds=5)
    vft, tapt = ([run.key for run in graph.runs if run.method == method] for method in ("vft", "tapt"))
    alike = "ValueError: no such layer"
    facts = {key: StageFacts(attempts=1, failures=1, error=alike, stopped=alike, failure=FailureClass.code) for key in vft[:3]}
    facts |= {key: StageFacts(cancelled=True) for key in tapt}
    facts |= {key: StageFacts(done=True) for key in _keys(graph, "tapt")}
    now = status_of("exp", _report(graph, facts))
    counts = {row.method: row.counts for row in now.stages if row.stage == "finetune"}
    assert (counts["vft"]["failed"], counts["vft"]["held"]) == (3, 2)
    assert counts["tapt"]["cancelled"] == 5
    text = "\n".join(status_lines(now))
    assert "2 stages held: the first 3 of finetune vft all failed alike" in text
    assert "cancelled: `python launch.py resume exp` resumes" in text
    assert "`python launch.py explain exp vft/1/0`" in text


def test_a_cancelled_run_that_still_runs_is_stopping() -> None:
    """Neither failed nor pending, in the status and in tables, whether it has failed before, still runs, or was never started."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=4)
    keys = [run.key for run in graph.runs]
    before = {"attempts": 1, "failures": 1, "error": "MemoryError: once", "failure": FailureClass.memory}
    facts = {
        keys[0]: StageFacts(cancelled=True, executed_by="process 7 on n1"),
        keys[1]: StageFacts(cancelled=True, **before),  # type: ignore[arg-type]
        keys[2]: StageFacts(cancelled=True),
        keys[3]: StageFacts(done=True, ua=60.0),
    }
    now = status_of("exp", _report(graph, facts, {keys[1]: InFlight(Phase.running, "7_1")}))
    assert [run.state for run in now.runs] == [State.stopping, State.stopping, State.cancelled, State.done]
    assert table_states(now) == {**dict.fromkeys(keys[:3], "cancelled"), keys[3]: "accepted"}
    text = "\n".join(status_lines(now))
    assert "vft finetune: 1 done, 2 cancelled, stopping, 1 cancelled of 4" in text
    assert "cancelled, stopping (memory, attempt 1): MemoryError: once" in text
    assert "failed" not in text
    assert status_to_json(now)["stages"][0]["counts"]["stopping"] == 2


def test_a_dropped_run_is_superseded_and_stays_on_record() -> None:
    """Its stage counts as superseded, the new run of its slot as missing; in tables it is an outlier or diverged; a line counts them."""
    slots = seeds_of_slots(("vft",), ("1", "2"), seeds=5, first_seed=0, generations={("vft", "1", 0): 1, ("vft", "2", 1): 1})
    graph = build_graph(REGISTRY, {}, corpus="fake", corpus_digest="d1", methods=("vft",), folds=("1", "2"), seeds=slots)
    facts = {run.key: StageFacts(done=True, ua=60.0 + run.slot) for run in graph.runs}
    first, second = graph.superseded
    facts[first.key] = StageFacts(done=True, ua=25.0)
    facts[second.key] = StageFacts(attempts=1, error="the loss is nan", failure=FailureClass.divergence, diverged="the loss is nan")
    now = status_of("exp", _report(graph, facts))
    assert now.stages[0].counts["superseded"] == 2
    assert now.complete
    assert not now.problems
    assert [(row.kind, row.round, row.seed) for row in now.dropped] == [("outlier", 1, 0), ("diverged", 0, 1)]
    assert {key: state for key, state in table_states(now).items() if state != "accepted"} == {first.key: "outlier", second.key: "diverged"}
    assert "vft: 1 run dropped as outliers and rerun with other seeds, judged in 2 rounds; 1 run diverged" in "\n".join(status_lines(now))
    assert len(status_to_json(now)["runs"]) == 10


def test_a_complete_experiment_names_the_folder_of_its_tables() -> None:
    """Already written, about to be written by the controller, or to be written by `collect`."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=1)
    report = _report(graph, {graph.runs[0].key: StageFacts(done=True, ua=60.0)})
    assert status_of("exp", report).steps == ("complete: `python launch.py collect exp` writes the tables",)
    (next_pass,) = status_of("exp", report, watched=True).steps
    assert next_pass == "complete: the next pass of the controller writes the tables, `python launch.py collect exp` writes them now"
    (there,) = status_of("exp", report, tables="/results/exp/tables").steps
    assert there.startswith("complete: the tables are in /results/exp/tables; ")


def test_what_has_vanished_from_the_queue_is_reported() -> None:
    """Neither a task nor a controller is in Slurm's queue: the commands that act are named.

    Not where the queue could not be read, where one of them is there, nor for a cancelled experiment.
    """
    graph = make_graph(methods=("vft",), folds=("1",), seeds=2)
    one, two = (run.key for run in graph.runs)
    missing = {key: StageFacts() for key in graph.nodes}
    dying = missing | {one: StageFacts(executed_by="job 7_0 on node1")}  # its worker was killed, its heartbeat is recent
    for facts in (missing, dying):
        step, *more = status_of("exp", _report(graph, facts), hints=Hints("exp", "/results"), queue_read=True).steps
        unseen = (
            "no job of it has begun: can the nodes see /results? `python launch.py doctor exp --cluster slurm --results /results` tests it"
        )
        assert more == [unseen] * (facts is missing)
        assert step.startswith("no task and no controller of exp is in Slurm's queue")
        assert "`python launch.py resume exp --results /results` launches it again, `python launch.py reconcile exp " in step
    stopped = StageFacts(attempts=1, ended=1, error="stopped", failure=FailureClass.interrupted)
    ended = missing | {one: stopped, two: StageFacts(cancelled=True)}
    now = status_of("exp", _report(graph, ended), queue_read=True)
    text = "\n".join(status_lines(now))
    assert "not submitted again (interrupted, attempt 1): stopped" in text
    assert text.count("`python launch.py resume exp`") == 1
    assert "will be tried again (interrupted" in "\n".join(status_lines(status_of("exp", _report(graph, ended), watched=True)))
    queued = _report(graph, missing, {two: InFlight(Phase.queued, "7_1")})
    for now in (
        status_of("exp", queued, queue_read=True),
        status_of("exp", _report(graph, missing), queue_read=True, watched=True),
        status_of("exp", _report(graph, dying)),
        status_of("exp", _report(graph, missing), queue_read=True, cancelled=True),
    ):
        assert "no task and no controller" not in " ".join(now.steps)


def test_jobs_of_a_former_configuration_are_named() -> None:
    """After a launch with fewer seeds: what is still queued or running for the others is neither hidden nor counted as a stage."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=1)
    facts = {key: StageFacts() for key in graph.nodes}
    former = {
        "former1": InFlight(Phase.running, "41_0"),
        "former2": InFlight(Phase.queued, "41_1"),
        "former3": InFlight(Phase.queued, "41_1"),
    }
    status = status_of("exp", _report(graph, facts, former), queue_read=True)
    assert status.former == ("41_0", "41_1")
    (line,) = (line for line in status_lines(status) if "other settings" in line)
    assert line.startswith("2 jobs in Slurm's queue from a launch with other settings: 41_0, 41_1; the next pass withdraws")
    assert status_to_json(status)["former"] == ["41_0", "41_1"]
    assert not status_of("exp", _report(graph, facts), queue_read=True).former


def test_a_run_that_diverged_without_a_seed_left_has_failed() -> None:
    """It is given up, with the reason; in tables it is diverged."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=1)
    facts = {graph.runs[0].key: StageFacts(done=True, ua=25.0, diverged="loss at the class prior")}
    now = status_of("exp", _report(graph, facts, policy=Policy(max_seeds=1)))
    assert now.settled
    assert not now.complete
    assert table_states(now) == {graph.runs[0].key: "diverged"}
    assert "loss at the class prior, and no reserve seed is left" in "\n".join(status_lines(now))
    assert any(line.endswith("change the recipe, or raise policy.max_seeds: `python launch.py grid exp`") for line in now.steps)


def test_json_is_one_versioned_value(status: Status) -> None:
    """Plain JSON types only."""
    value = json.loads(json.dumps(status_to_json(status), allow_nan=False))
    assert value["schema"] == 1
    assert value["complete"] is False
    assert value["stages"][0]["total"] == 4
    assert value["runs"][0]["state"] == "done"


def test_json_names_another_score() -> None:
    """In the list of experiments; UA keeps its key."""
    rows = [ExperimentRow("digits", "complete", newest_ua=89.0, score=Score("accuracy", "accuracy", "Recognised digits"))]
    digits, speech = list_to_json([*rows, ExperimentRow("demo", "complete", newest_ua=61.0)], 0.0)["experiments"]
    assert (digits["newest_accuracy"], speech["newest_ua"]) == (89.0, 61.0)
    assert "newest_ua" not in digits


def test_the_table_shows_every_row(status: Status) -> None:
    """Columns for the states that occur."""
    stream = io.StringIO()
    Console(file=stream, width=120).print(status_table(status))
    text = stream.getvalue()
    for word in ("ptapt", "cluster", "running", "blocked", "not complete"):
        assert word in text
    assert "unneeded" not in text


def test_a_finished_experiment_whose_pretraining_is_gone_is_complete() -> None:
    """The pretraining counts as unneeded, and nothing is missing."""
    graph = make_graph(methods=("tapt",))
    facts = {run.key: StageFacts(done=True) for run in graph.runs}
    status = status_of("exp", _report(graph, facts))
    assert status.complete
    assert {row.stage: row.counts[State.unneeded.value] for row in status.stages} == {"tapt": 2, "finetune": 0}


def test_a_forecast_prefers_finished_siblings() -> None:
    """Median of the same stage and method, else of the same stage, else the time requested; GPU-hours count nodes and GPUs."""
    graph = make_graph(methods=("vft", "tapt"), folds=("1",), seeds=4)
    vft = [run.key for run in graph.runs if run.method == "vft"]
    facts = {key: StageFacts(done=True, seconds=seconds) for key, seconds in zip(vft, (60.0, 120.0, 600.0), strict=False)}
    resources = {"finetune": Resources(cpus=2, gpus=1, minutes=30), "tapt": Resources(cpus=8, gpus=4, nodes=2, minutes=90)}
    plan = make_plan(graph, facts, {}, runs_per_task={"finetune": 2}, limits=Limits())
    found = forecast(graph, facts, plan, resources.__getitem__)
    costs = {(cost.stage, cost.method): cost for cost in found.costs}
    assert costs["finetune", "vft"].source is Source.siblings
    assert costs["finetune", "vft"].gpu_hours == pytest.approx(120 / 3600)
    assert costs["finetune", "tapt"].tasks == 2
    assert costs["finetune", "tapt"].gpu_hours == pytest.approx(4 * 120 / 3600)
    assert costs["tapt", "tapt"].source is Source.requested
    assert costs["tapt", "tapt"].gpu_hours == pytest.approx(1.5 * 8)
    assert costs["tapt", "tapt"].cpu_hours == pytest.approx(1.5 * 16)
    assert (len(found.plan.reused), found.tasks) == (3, 4)
    assert found.gpu_hours == pytest.approx(12 + 5 * 120 / 3600)
    packed = forecast(graph, facts, plan, {**resources, "finetune": Resources(cpus=2, gpus=1, minutes=30, at_once=2)}.__getitem__)
    assert packed.gpu_hours == pytest.approx(12 + 3 * 120 / 3600), "two of a task share its GPU"


def test_status_loads_nothing_heavy() -> None:
    """The modules behind `status` import neither torch nor submitit, numpy, omegaconf or rich."""
    code = (
        "import sys, jobs.commands.status_report, jobs.control.observe, jobs.control.controller\n"
        "import jobs.control.estimates, jobs.worker.provenance\n"
        "heavy = {'torch', 'submitit', 'numpy', 'omegaconf', 'rich', 'pandas', 'ser_core'} & set(sys.modules)\n"
        "print(*sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("given", "stages", "words"),
    [
        (Resources(gpus=1), 4, ""),
        (Resources(gpus=1, at_once=4), 1, ""),
        (Resources(gpus=1, at_once=4), 3, "; 3 of 3 stages at once"),
        (Resources(gpus=1, at_once=0), 3, "; of 3 stages as many at once as memory allows"),
        (Resources(gpus=4, at_once=4), 3, "; 4 processes"),
        (Resources(gpus=0, nodes=2, processes=2), 1, "; 4 processes on 2 nodes, memory is that of each"),
    ],
)
def test_a_forecast_lists_processes_and_packing(given: Resources, stages: int, words: str) -> None:
    """Empty where one process computes one stage after another."""
    assert shape_in_words(given, stages) == words
