"""Status: counts, runs and problems as plain data, a table and JSON; and what a launch will cost."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from jobs.config import Resources
from jobs.forecast import Source, forecast
from jobs.graph import Graph
from jobs.plan import InFlight, Limits, NodeFacts, Phase, make_plan
from jobs.status import State, Status, status_lines, status_of, status_table, status_to_json
from tests.jobs.fake_registry import make_graph

REPOSITORY = Path(__file__).resolve().parents[2]


def _keys(graph: Graph, stage: str) -> list[str]:
    return [key for key, node in graph.nodes.items() if node.stage == stage]


@pytest.fixture
def status() -> Status:
    """Two folds of all methods: vft has every state, the states stage of P-TAPT is given up in one fold."""
    graph = make_graph()
    vft = [run.key for run in graph.runs if run.method == "vft"]
    facts = {key: NodeFacts() for key in graph.nodes}
    facts[vft[0]] = NodeFacts(done=True, seconds=5.0)
    facts[vft[1]] = NodeFacts(failures=1, error="ValueError: once")
    facts[_keys(graph, "states")[0]] = NodeFacts(failures=3, error="OSError: disk full")
    facts[_keys(graph, "tapt")[0]] = NodeFacts(held="process 5 on node1")
    in_flight = {vft[1]: InFlight(Phase.queued, "7_0"), vft[2]: InFlight(Phase.running, "7_1")}
    return status_of("exp", graph, facts, in_flight, max_attempts=3)


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


def test_problems_say_what_comes_next(status: Status) -> None:
    """Stages with an error, with the number of failures and whether they are tried again."""
    lines = [line for line in status_lines(status) if "attempt" in line]
    assert len(lines) == 2
    assert any(line.endswith("1 attempt failed, will be tried again: ValueError: once") for line in lines)
    assert any("3 attempts failed, given up" in line and line.endswith("OSError: disk full") for line in lines)


def test_json_is_one_versioned_value(status: Status) -> None:
    """Plain JSON types only."""
    value = json.loads(json.dumps(status_to_json(status), allow_nan=False))
    assert value["schema"] == 1
    assert value["complete"] is False
    assert value["stages"][0]["total"] == 4
    assert value["runs"][0]["state"] == "done"


def test_the_table_shows_every_row(status: Status) -> None:
    """Columns for the states that occur."""
    stream = io.StringIO()
    Console(file=stream, width=120).print(status_table(status))
    text = stream.getvalue()
    for word in ("ptapt", "cluster", "running", "blocked", "not complete"):
        assert word in text
    assert "unneeded" not in text


def test_a_finished_experiment_whose_pretraining_is_gone_is_complete() -> None:
    """What nobody needs any more is shown as such, and nothing is missing."""
    graph = make_graph(methods=("tapt",))
    facts = {run.key: NodeFacts(done=True) for run in graph.runs}
    status = status_of("exp", graph, facts, {}, max_attempts=3)
    assert status.complete
    assert {row.stage: row.counts[State.unneeded.value] for row in status.stages} == {"tapt": 2, "finetune": 0}


def test_a_forecast_prefers_finished_siblings() -> None:
    """The median of the same stage and method, else of the same stage, else the time asked for; GPU-hours count nodes and GPUs."""
    graph = make_graph(methods=("vft", "tapt"), folds=("1",), seeds=4)
    vft = [run.key for run in graph.runs if run.method == "vft"]
    facts = {key: NodeFacts(done=True, seconds=seconds) for key, seconds in zip(vft, (60.0, 120.0, 600.0), strict=False)}
    resources = {"finetune": Resources(cpus=2, gpus=1, minutes=30), "tapt": Resources(cpus=8, gpus=4, nodes=2, minutes=90)}
    plan = make_plan(graph, facts, {}, runs_per_task={"finetune": 2}, limits=Limits(), max_attempts=3)
    found = forecast(graph, facts, plan, resources.__getitem__)
    costs = {(cost.stage, cost.method): cost for cost in found.costs}
    assert costs["finetune", "vft"].source is Source.siblings
    assert costs["finetune", "vft"].gpu_hours == pytest.approx(120 / 3600)
    assert costs["finetune", "tapt"].tasks == 2
    assert costs["finetune", "tapt"].gpu_hours == pytest.approx(4 * 120 / 3600)
    assert costs["tapt", "tapt"].source is Source.requested
    assert costs["tapt", "tapt"].gpu_hours == pytest.approx(1.5 * 8)
    assert costs["tapt", "tapt"].cpu_hours == pytest.approx(1.5 * 16)
    assert (found.reused, found.tasks) == (3, 4)
    assert found.gpu_hours == pytest.approx(12 + 5 * 120 / 3600)


def test_status_loads_nothing_heavy() -> None:
    """The modules behind `status` import neither torch nor submitit, numpy, omegaconf or rich."""
    code = (
        "import sys, jobs.status, jobs.observe, jobs.controller, jobs.forecast, jobs.provenance\n"
        "heavy = {'torch', 'submitit', 'numpy', 'omegaconf', 'rich', 'pandas', 'ser_core'} & set(sys.modules)\n"
        "print(*sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
