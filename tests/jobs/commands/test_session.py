"""Which stages a `cancel` of single runs cancels, which code later commands submit, and who may make a pass."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.commands.cancel import cancel, keys_to_cancel, whole_jobs
from jobs.commands.collect import Asked, write_tables
from jobs.commands.passes import one_pass, run_link
from jobs.commands.session import Session
from jobs.commands.status import complete_tables
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


def test_upstream_stages_of_another_run_are_not_cancelled() -> None:
    """One of two seeds: its last stage; both: also the pretraining they share. Stages with a result are never cancelled."""
    graph = make_graph(methods=("tapt",), folds=("1",), seeds=2)
    first, second = (run.key for run in graph.runs)
    upstream = graph.nodes[first].upstream["backbone"]
    assert keys_to_cancel(seen(graph), [first]) == {first}
    assert keys_to_cancel(seen(graph), [first, second]) == {first, second, upstream}
    assert keys_to_cancel(seen(graph, {second: StageFacts(done=True)}), [first]) == {first, upstream}
    assert keys_to_cancel(seen(graph, {upstream: StageFacts(done=True)}), [first, second]) == {first, second}
    assert keys_to_cancel(seen(graph), [upstream]) == {upstream}


def test_a_job_that_also_computes_another_stage_is_not_cancelled() -> None:
    """Pending elements are the executor's; of running ones only those are cancelled that compute nothing else."""
    flights = {
        "a": InFlight(Phase.running, "1_0"),
        "b": InFlight(Phase.running, "1_0"),
        "c": InFlight(Phase.running, "1_1"),
        "d": InFlight(Phase.queued, "1_2"),
    }
    assert whole_jobs(flights, {"a", "c", "d"}) == {"1_1": ("c",)}
    assert whole_jobs(flights, {"a", "b"}) == {"1_0": ("a", "b")}


def test_later_commands_submit_the_code_of_the_launch(tmp_path: Path) -> None:
    """A launch submits the working tree, later passes its snapshot; code that defines other stages makes no pass."""
    graph, layout = make_graph(methods=("vft",), folds=("1",), seeds=1), Layout(tmp_path / "results", "exp")
    experiment = Experiment(name="exp", corpus="fake", cluster=Cluster.slurm)
    corpus = Corpus("fake", "d1", ("1",), str(tmp_path))
    snapshot = layout.snapshots / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (layout.snapshots / "current").symlink_to(snapshot.name)

    def session(*, new: bool, changed: bool = False) -> Session:
        launched = Launched(experiment, corpus, graph, layout, 0.0, lambda generations: graph, changed)
        return Session(launched, workplace(tmp_path), tmp_path, tmp_path / "published.yaml", new=new)

    assert session(new=True).source == tmp_path
    assert session(new=False).source == snapshot
    moved_on = session(new=False, changed=True)
    assert "defines other stages" in moved_on.limits_of_look()
    with pytest.raises(UsageError, match="cancel exp` ends it"):
        one_pass(moved_on)


def session_of(folder: Path, *, since: float = 1000.0, new: bool = False, user: int | None = None, controller: bool = True) -> Session:
    """A session on Slurm; its code is an ordinary folder."""
    source = folder / "source"
    source.mkdir(exist_ok=True)
    if not (source / "launch.py").exists():
        (source / "launch.py").write_text("first")
    graph, layout = make_graph(methods=("vft",), folds=("1",), seeds=1), Layout(folder / "results", "exp")
    experiment = Experiment(name="exp", corpus="fake", cluster=Cluster.slurm, policy=Policy(controller=controller))
    corpus = Corpus("fake", "d1", ("1",), str(folder))
    launched = Launched(experiment, corpus, graph, layout, since, lambda generations: graph, user=user)
    return Session(launched, workplace(folder), source, folder / "published.yaml", new=new)


def test_hints_repeat_what_was_typed(tmp_path: Path) -> None:
    """The whole command of the launch; of one that did not record it: file and name, which may differ. `resume` needs no settings."""
    session = session_of(tmp_path)
    assert session.hints.launch == "`python launch.py grid exp --cluster slurm`"
    session.launched = replace(session.launched, config="demo")
    assert session.hints.launch == "`python launch.py grid demo name=exp --cluster slurm`"
    session.launched = replace(session.launched, typed=("grid", "exp", "site=my site", "--cluster", "slurm"))
    assert session.hints.launch == "`python launch.py grid exp 'site=my site' --cluster slurm`"
    assert session.resume_command == f"`python launch.py resume exp --results {tmp_path / 'results'}`"


def test_tables_are_reported_when_complete_and_of_this_launch(tmp_path: Path) -> None:
    """Not tables of an earlier launch with fewer seeds, nor of an incomplete experiment."""
    folder = tmp_path / "results" / "exp" / "tables"
    session = session_of(tmp_path)
    assert complete_tables(session) == ""
    write_json(folder / "summary.json", {"complete": False})
    assert complete_tables(session) == ""
    write_json(folder / "summary.json", {"complete": True})
    assert complete_tables(session) == str(folder)
    assert complete_tables(session_of(tmp_path, since=time.time() + 60)) == ""


def test_better_tables_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`collect` refuses and names the option; the end of an experiment prints the same line, then sends the notices."""
    session = session_of(tmp_path)
    session.published_file = Path(__file__).parents[3] / "configs" / "published.yaml"
    file = session.launched.layout.tables / "summary.json"
    write_json(file, {"schema": 1, "complete": True, "methods": [{"n": 5}]})
    before = file.read_bytes()
    report = session.look(ask_slurm=False)
    with pytest.raises(UsageError, match=r"tables: complete tables of 5 runs .* `python launch\.py collect exp --force`"):
        write_tables(session, report)
    assert not write_tables(session, report, announce=True)
    assert "collect exp --force" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert not write_tables(session, report, Asked(force=True))
    assert file.read_bytes() != before


def test_without_a_controller_the_code_of_the_launch_is_submitted_too(tmp_path: Path) -> None:
    """What cron or `reconcile` submits later is the code of the last launch: not later edits, nor an earlier launch."""
    for words in ("first", "second"):
        session = session_of(tmp_path, new=True, controller=False)
        (session.root / "launch.py").write_text(words)
        session.chain.point_to_code()
        (session.root / "launch.py").write_text("edited since")
        assert (session_of(tmp_path).source / "launch.py").read_text() == words


def test_nothing_is_submitted_for_an_earlier_launch(tmp_path: Path) -> None:
    """A `grid --wait` or controller job started before the experiment was launched again has outdated settings."""
    earlier, last = session_of(tmp_path, since=1000.0), session_of(tmp_path, since=2000.0)
    store(last.launched)
    with pytest.raises(UsageError, match="launched again, or moved, since this command began"):
        one_pass(earlier)


def test_a_controller_job_serves_the_launch_whose_settings_it_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that came between reading the settings and the first pass."""
    seen: list[float | None] = []

    def link(*arguments: object, launched: float | None = None, **named: object) -> LinkEnd:
        seen.append(launched)
        return LinkEnd.handed_over

    monkeypatch.setattr("jobs.slurm.chain_link.run_link", link)
    run_link(session_of(tmp_path, since=1000.0))
    assert seen == [1000.0]


def test_the_days_of_a_chain_are_counted_by_the_clock_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link on a node whose clock is 40 days ahead. Before: it ended the chain, as `policy.controller_days` were over by that clock."""
    left: list[float] = []

    def link(*arguments: object, deadline: float, clock: Callable[[], float] = lambda: time.time(), **named: object) -> LinkEnd:
        left.append(deadline - clock())
        return LinkEnd.handed_over

    monkeypatch.setattr("jobs.slurm.chain_link.run_link", link)
    session, now = session_of(tmp_path, since=time.time()), time.time
    session.launched.layout.root.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(time, "time", lambda: now() + 40 * 86400)
    run_link(session)
    assert left == [pytest.approx(86400 * session.launched.experiment.policy.controller_days, abs=3600)]


@pytest.mark.parametrize(("controller", "cluster"), [(False, Cluster.slurm), (True, Cluster.local)])
def test_the_chain_of_an_earlier_launch_ends_if_the_last_launch_wants_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, controller: bool, cluster: Cluster
) -> None:
    """Launched again on this machine, or without a controller: a controller job that starts then submits nothing, nor a successor."""
    withdrawn: list[str] = []
    monkeypatch.setattr("jobs.slurm.chain.Chain.withdraw_successors", lambda chain: withdrawn.append(chain.name))
    session = session_of(tmp_path, controller=controller)
    session.launched.experiment.cluster = cluster
    assert run_link(session) is LinkEnd.stopped
    assert withdrawn == [link_name(session.launched.layout)]
    assert not session.launched.layout.submissions.exists()


def test_nothing_of_another_users_experiment_is_submitted_or_cancelled(tmp_path: Path) -> None:
    """Its jobs are not in the queue we see, and would all count as lost. Old experiments do not record their user."""
    other = session_of(tmp_path, user=os.getuid() + 1)
    store(other.launched)
    assert "another user" in other.limits_of_look()
    for act in (one_pass, run_link, lambda session: cancel(session, ())):
        with pytest.raises(UsageError, match="launched by another user"):
            act(other)
    assert not other.launched.layout.cancellations.exists()
    assert session_of(tmp_path, user=os.getuid()).limits_of_look() == session_of(tmp_path).limits_of_look() == ""


def test_a_cancellation_is_later_than_the_launch_if_clocks_differ(tmp_path: Path) -> None:
    """The clock of the machine that cancels is behind the clock of the one that launched."""
    session = session_of(tmp_path, since=1000.0)
    session.launched.experiment.cluster = Cluster.local
    cancel(session, (), now=990.0)
    assert read_cancellations(session.launched.layout, 1000.0).everything


def test_a_launch_is_later_than_every_cancellation_if_clocks_differ(tmp_path: Path) -> None:
    """The clock of the machine that cancelled is ahead; launching again lifts the cancellation."""
    layout = Layout(tmp_path, "exp")
    record_cancellation(layout, None, time.time() + 3600)
    experiment = Experiment(name="exp", corpus="fake", methods=["vft"], seeds=1, recipe={})
    since = launch(experiment, Corpus("fake", "d1", ("1",), str(tmp_path)), REGISTRY, layout).since
    assert not read_cancellations(layout, since).everything


def test_the_reserve_seeds_of_a_cancelled_run_are_cancelled_too(tmp_path: Path) -> None:
    """A cancelled run that still completes, and diverges, gets no reserve seed; runs of other slots do."""
    known = session_of(tmp_path).launched
    known.experiment.cluster = Cluster.local
    refill = functools.partial(refilled, 2)
    session = Session(replace(known, graph=refill({}), refill=refill), workplace(tmp_path), tmp_path, tmp_path / "published.yaml")
    assert cancel(session, ["vft/1/0"]).stages == 1
    cancelled = read_cancellations(known.layout, known.since)
    later = refill({("vft", "1", 0): 1, ("vft", "1", 1): 1})
    assert [run.key in cancelled for run in (*later.superseded, *later.runs)] == [True, False, True, False]


def refilled(seeds: int, generations: Mapping[Slot, int]) -> Graph:
    return make_graph(methods=("vft",), folds=("1",), seeds=seeds, generations=generations)
