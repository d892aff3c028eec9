"""What a `cancel` of single runs takes with it, and which code goes on with a launch."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.config import Cluster, Experiment
from jobs.controller import Report
from jobs.errors import UsageError
from jobs.experiment import Corpus, Launched
from jobs.graph import Graph
from jobs.launcher import Launcher, keys_to_cancel, whole_jobs
from jobs.layout import Layout
from jobs.plan import InFlight, Limits, NodeFacts, Phase, make_plan
from tests.jobs.fake_registry import make_graph
from tests.jobs.local_launch import workplace


def seen(graph: Graph, facts: dict[str, NodeFacts] | None = None) -> Report:
    known = {key: NodeFacts() for key in graph.nodes} | (facts or {})
    return Report(make_plan(graph, known, {}, runs_per_task={}, limits=Limits()), graph, known, {})


def test_what_another_run_needs_is_not_cancelled_with_one() -> None:
    """One of two seeds takes its last stage; both take the pretraining they share; what is done is no matter of a cancellation."""
    graph = make_graph(methods=("tapt",), folds=("1",), seeds=2)
    first, second = (run.key for run in graph.runs)
    upstream = graph.nodes[first].upstream["backbone"]
    assert keys_to_cancel(seen(graph), [first]) == {first}
    assert keys_to_cancel(seen(graph), [first, second]) == {first, second, upstream}
    assert keys_to_cancel(seen(graph, {second: NodeFacts(done=True)}), [first]) == {first, upstream}
    assert keys_to_cancel(seen(graph, {upstream: NodeFacts(done=True)}), [first, second]) == {first, second}
    assert keys_to_cancel(seen(graph), [upstream]) == {upstream}


def test_a_job_that_holds_another_stage_runs_on() -> None:
    """Elements that wait are the executor's; of those that run only what holds nothing else is ended."""
    flights = {
        "a": InFlight(Phase.running, "1_0"),
        "b": InFlight(Phase.running, "1_0"),
        "c": InFlight(Phase.running, "1_1"),
        "d": InFlight(Phase.queued, "1_2"),
    }
    assert whole_jobs(flights, {"a", "c", "d"}) == {"1_1": ("c",)}
    assert whole_jobs(flights, {"a", "b"}) == {"1_0": ("a", "b")}


def test_what_goes_on_with_a_launch_hands_on_its_code(tmp_path: Path) -> None:
    """A launch takes the code as it lies there; later passes take the snapshot that it left; code with other stages makes no pass."""
    graph, layout = make_graph(methods=("vft",), folds=("1",), seeds=1), Layout(tmp_path / "results", "exp")
    experiment = Experiment(name="exp", corpus="fake", cluster=Cluster.slurm)
    corpus = Corpus("fake", "d1", ("1",), str(tmp_path))
    snapshot = layout.snapshots / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (layout.snapshots / "current").symlink_to(snapshot.name)

    def launcher(*, new: bool, changed: bool = False) -> Launcher:
        launched = Launched(experiment, corpus, graph, layout, 0.0, lambda generations: graph, changed)
        return Launcher(launched, workplace(tmp_path), tmp_path, tmp_path / "published.yaml", new=new)

    assert launcher(new=True).source == tmp_path
    assert launcher(new=False).source == snapshot
    moved_on = launcher(new=False, changed=True)
    assert "computes other stages" in moved_on.why_only_look()
    with pytest.raises(UsageError, match="`cancel exp` ends it"):
        moved_on.one_pass()
