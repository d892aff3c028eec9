"""What is left of an experiment and when it ends, by finished siblings, running stages and requested times."""

from __future__ import annotations

import pytest

from jobs.control.executor_protocol import Limits
from jobs.control.facts import InFlight, Phase, StageFacts
from jobs.control.plan import make_plan
from jobs.control.remaining import Hours, Pace, Remaining, devices_of, remaining
from jobs.experiment.config import Resources
from jobs.experiment.graph import Graph
from tests.jobs.fake_registry import make_graph

REQUESTED = 600.0  # seconds, of any stage


def rest(graph: Graph, facts: dict[str, StageFacts], running: dict[str, Pace], given: Resources | None = None) -> Remaining:
    known = {key: StageFacts() for key in graph.nodes} | facts
    flights = {key: InFlight(Phase.running, f"7_{index}") for index, key in enumerate(running)}
    plan = make_plan(graph, known, flights, runs_per_task={}, limits=Limits())
    return remaining(graph, known, plan, running, lambda stage: REQUESTED, lambda stage: devices_of(given or Resources(), packed=True))


def test_stages_take_what_their_siblings_took() -> None:
    """Five runs: two done in 100 and 300 s, two running, one left. (200 + 150 + 50) s by two at once."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=5)
    keys = [run.key for run in graph.runs]
    done = {key: StageFacts(done=True, seconds=seconds, all_seconds=seconds) for key, seconds in zip(keys, (100.0, 300.0), strict=False)}
    found = rest(graph, done, {keys[2]: Pace(50.0), keys[3]: Pace(150.0)}, Resources(gpus=2))
    assert found.stages == 3
    assert found.seconds == pytest.approx(200.0)
    assert (found.left.gpu, found.used.gpu) == pytest.approx((2 * 400 / 3600, 2 * 400 / 3600))
    assert (found.left.cpu, found.used.cpu) == (0, 0)
    assert found.basis == "2 stages at once, as now; times by finished siblings"
    assert not found.at_most


def test_a_running_stage_states_what_is_left_of_it_and_of_its_siblings() -> None:
    """No sibling is finished: the log of one that runs states its time to go, which with the time so far is that of the others."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=2)
    first, _ = (run.key for run in graph.runs)
    found = rest(graph, {}, {first: Pace(40.0, 60.0)})
    assert found.seconds == pytest.approx(160.0)
    assert found.basis == "1 stage at once, as now; times by progress of running stages"


def test_the_longest_chain_bounds_the_end() -> None:
    """Stages that read one another cannot be computed at once, however many run; requested times make it an upper bound."""
    graph = make_graph(methods=("ptapt",), folds=("1", "2", "3", "4"), seeds=1)
    states = [key for key, node in graph.nodes.items() if node.stage == "states"]
    found = rest(graph, {}, {key: Pace(0.0) for key in states})
    assert found.seconds == pytest.approx(4 * REQUESTED)
    assert found.at_most
    assert "requested time" in found.basis


def test_nothing_runs_or_nothing_is_left() -> None:
    """Then the end is not known, or now."""
    graph = make_graph(methods=("vft",), folds=("1",), seeds=1)
    waiting = rest(graph, {}, {})
    assert (waiting.seconds, waiting.basis.partition(";")[0]) == (None, "nothing is running")
    complete = rest(graph, {graph.runs[0].key: StageFacts(done=True, seconds=9.0, all_seconds=9.0)}, {})
    assert (complete.stages, complete.seconds, complete.left) == (0, 0.0, Hours())


def test_what_is_given_up_is_not_left() -> None:
    """Nor are the stages that would read it."""
    graph = make_graph(methods=("tapt",), folds=("1",), seeds=3)
    upstream = next(key for key, node in graph.nodes.items() if node.stage == "tapt")
    assert rest(graph, {upstream: StageFacts(attempts=1, failures=1, error="ValueError: x", stopped="x")}, {}).stages == 0


@pytest.mark.parametrize(
    ("given", "packed", "gpus_used", "hours"),
    [
        (Resources(gpus=4, nodes=2, cpus=8), True, True, Hours(gpu=8.0)),
        (Resources(gpus=0, nodes=2, cpus=8), True, True, Hours(cpu=16.0)),
        (Resources(gpus=1, runs_per_task=8, at_once=4), True, True, Hours(gpu=0.25)),
        (Resources(gpus=1, runs_per_task=2, at_once=4), True, True, Hours(gpu=0.5)),
        (Resources(gpus=1, runs_per_task=8, at_once=4), False, True, Hours(gpu=1.0)),
        (Resources(gpus=1, cpus=3), True, False, Hours(cpu=3.0)),
    ],
)
def test_device_hours(given: Resources, packed: bool, gpus_used: bool, hours: Hours) -> None:
    """GPUs of all nodes, a share of them where stages are computed at once; cores where no GPU is configured or none is there."""
    assert devices_of(given, packed=packed, gpus_used=gpus_used).hours(3600.0) == hours
