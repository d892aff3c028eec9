"""What a `cancel` of single runs takes with it, and which code goes on with a launch."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.commands.session import Launcher, keys_to_cancel, whole_jobs
from jobs.control.controller import Report
from jobs.control.executor_protocol import Limits
from jobs.control.facts import InFlight, Phase, StageFacts
from jobs.control.plan import make_plan
from jobs.errors import UsageError
from jobs.experiment.config import Cluster, Experiment, Policy
from jobs.experiment.graph import Graph, Slot
from jobs.experiment.launched import Corpus, Launched, launch, store
from jobs.slurm.chain import link_name
from jobs.slurm.chain_link import LinkEnd
from jobs.store.cancellations import read_cancellations, record_cancellation
from jobs.store.layout import Layout
from jobs.store.records import write_json
from tests.jobs.fake_registry import REGISTRY, make_graph
from tests.jobs.local_launch import workplace


def seen(graph: Graph, facts: dict[str, StageFacts] | None = None) -> Report:
    known = {key: StageFacts() for key in graph.nodes} | (facts or {})
    return Report(make_plan(graph, known, {}, runs_per_task={}, limits=Limits()), graph, known, {})


def test_what_another_run_needs_is_not_cancelled_with_one() -> None:
    """One of two seeds takes its last stage; both take the pretraining they share; what is done is no matter of a cancellation."""
    graph = make_graph(methods=("tapt",), folds=("1",), seeds=2)
    first, second = (run.key for run in graph.runs)
    upstream = graph.nodes[first].upstream["backbone"]
    assert keys_to_cancel(seen(graph), [first]) == {first}
    assert keys_to_cancel(seen(graph), [first, second]) == {first, second, upstream}
    assert keys_to_cancel(seen(graph, {second: StageFacts(done=True)}), [first]) == {first, upstream}
    assert keys_to_cancel(seen(graph, {upstream: StageFacts(done=True)}), [first, second]) == {first, second}
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


def launcher_of(folder: Path, *, since: float = 1000.0, new: bool = False, user: int | None = None, controller: bool = True) -> Launcher:
    """A launcher on Slurm whose code is an ordinary folder."""
    source = folder / "source"
    source.mkdir(exist_ok=True)
    if not (source / "launch.py").exists():
        (source / "launch.py").write_text("first")
    graph, layout = make_graph(methods=("vft",), folds=("1",), seeds=1), Layout(folder / "results", "exp")
    experiment = Experiment(name="exp", corpus="fake", cluster=Cluster.slurm, policy=Policy(controller=controller))
    corpus = Corpus("fake", "d1", ("1",), str(folder))
    launched = Launched(experiment, corpus, graph, layout, since, lambda generations: graph, user=user)
    return Launcher(launched, workplace(folder), source, folder / "published.yaml", new=new)


def test_what_launches_it_again_names_its_file_and_its_name(tmp_path: Path) -> None:
    """An experiment under another name than its file's: the name alone would be no experiment."""
    launcher = launcher_of(tmp_path)
    assert launcher.command == "python launch.py grid exp --cluster slurm"
    launcher.launched = replace(launcher.launched, config="demo")
    assert launcher.command == "python launch.py grid demo name=exp --cluster slurm"


def test_tables_count_as_there_when_they_are_complete_and_of_this_launch(tmp_path: Path) -> None:
    """Not those of an earlier launch with fewer seeds, nor what was collected of an incomplete one."""
    folder = tmp_path / "results" / "exp" / "tables"
    launcher = launcher_of(tmp_path)
    assert launcher.tables_there() == ""
    write_json(folder / "summary.json", {"complete": False})
    assert launcher.tables_there() == ""
    write_json(folder / "summary.json", {"complete": True})
    assert launcher.tables_there() == str(folder)
    assert launcher_of(tmp_path, since=time.time() + 60).tables_there() == ""


def test_a_launch_without_a_controller_hands_on_its_code_too(tmp_path: Path) -> None:
    """What cron or a `status` submits later is the code of the last launch: neither what was edited since, nor that of a launch before."""
    for words in ("first", "second"):
        launcher = launcher_of(tmp_path, new=True, controller=False)
        (launcher.root / "launch.py").write_text(words)
        launcher.hand_on_code()
        (launcher.root / "launch.py").write_text("edited since")
        assert (launcher_of(tmp_path).source / "launch.py").read_text() == words


def test_of_an_earlier_launch_nothing_is_submitted(tmp_path: Path) -> None:
    """A `status --watch` that began before the experiment was launched again leaves it to who knows the new settings; so does a link."""
    earlier, last = launcher_of(tmp_path, since=1000.0), launcher_of(tmp_path, since=2000.0)
    store(last.launched)
    with pytest.raises(UsageError, match="launched anew, or moved, since this command began"):
        earlier.one_pass()


def test_a_link_looks_after_the_launch_that_it_has_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after one that came between its reading of the settings and its first pass."""
    seen: list[float | None] = []

    def link(*arguments: object, launched: float | None = None, **named: object) -> LinkEnd:
        seen.append(launched)
        return LinkEnd.handed_over

    monkeypatch.setattr("jobs.slurm.chain_link.run_link", link)
    launcher_of(tmp_path, since=1000.0).control()
    assert seen == [1000.0]


@pytest.mark.parametrize(("controller", "cluster"), [(False, Cluster.slurm), (True, Cluster.local)])
def test_the_chain_of_an_earlier_launch_ends_where_the_last_one_wants_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, controller: bool, cluster: Cluster
) -> None:
    """Launched again on this machine, or without a controller: a link that starts then submits nothing, and none follows it."""
    withdrawn: list[str] = []
    monkeypatch.setattr("jobs.slurm.chain.Chain.withdraw_successors", lambda chain: withdrawn.append(chain.name))
    launcher = launcher_of(tmp_path, controller=controller)
    launcher.launched.experiment.cluster = cluster
    assert launcher.control() is LinkEnd.stopped
    assert withdrawn == [link_name(launcher.launched.layout)]
    assert not launcher.launched.layout.submissions.exists()


def test_of_another_users_experiment_nothing_is_submitted_or_cancelled(tmp_path: Path) -> None:
    """Its jobs are not in the queue that we see, and would all be taken for gone. Who launched before users were noted is not known."""
    other = launcher_of(tmp_path, user=os.getuid() + 1)
    store(other.launched)
    assert "another user" in other.why_only_look()
    for act in (other.one_pass, other.control, lambda: other.cancel(())):
        with pytest.raises(UsageError, match="launched by another user"):
            act()
    assert not other.launched.layout.cancellations.exists()
    assert launcher_of(tmp_path, user=os.getuid()).why_only_look() == launcher_of(tmp_path).why_only_look() == ""


def test_a_cancellation_comes_after_the_launch_whatever_the_clock_says(tmp_path: Path) -> None:
    """The clock of the machine that cancels is behind that of the one that launched."""
    launcher = launcher_of(tmp_path, since=1000.0)
    launcher.launched.experiment.cluster = Cluster.local
    launcher.cancel((), now=990.0)
    assert read_cancellations(launcher.launched.layout, 1000.0).everything


def test_a_launch_comes_after_every_cancellation_whatever_the_clock_says(tmp_path: Path) -> None:
    """The clock of the machine that cancelled is ahead: launching again lifts it all the same."""
    layout = Layout(tmp_path, "exp")
    record_cancellation(layout, None, time.time() + 3600)
    experiment = Experiment(name="exp", corpus="fake", methods=["vft"], seeds=1, recipe={})
    since = launch(experiment, Corpus("fake", "d1", ("1",), str(tmp_path)), REGISTRY, layout).since
    assert not read_cancellations(layout, since).everything


def test_the_reserve_seeds_of_a_cancelled_run_are_cancelled_too(tmp_path: Path) -> None:
    """A run that is computed to its end all the same, and diverges, is not followed by the next seed of its slot; those of others are."""
    known = launcher_of(tmp_path).launched
    known.experiment.cluster = Cluster.local
    refill = functools.partial(refilled, 2)
    launcher = Launcher(replace(known, graph=refill({}), refill=refill), workplace(tmp_path), tmp_path, tmp_path / "published.yaml")
    assert launcher.cancel(["vft/1/0"]).stages == 1
    cancelled = read_cancellations(known.layout, known.since)
    later = refill({("vft", "1", 0): 1, ("vft", "1", 1): 1})
    assert [run.key in cancelled for run in (*later.superseded, *later.runs)] == [True, False, True, False]


def refilled(seeds: int, generations: Mapping[Slot, int]) -> Graph:
    return make_graph(methods=("vft",), folds=("1",), seeds=seeds, generations=generations)
