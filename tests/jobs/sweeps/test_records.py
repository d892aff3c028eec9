"""Records of a sweep are read back as written, or refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.errors import UsageError
from jobs.experiment.config import Cluster, Experiment, StageResources
from jobs.experiment.graph import with_upstream
from jobs.experiment.launched import last_place
from jobs.experiment.sweep_section import Search, Stopping, SweepSettings
from jobs.store.layout import Layout
from jobs.store.records import write_json
from jobs.sweeps.records import (
    Proposal,
    Sweep,
    began,
    latest_file,
    load_sweep,
    read_proposals,
    require_latest,
    store_sweep,
    write_proposals,
)
from jobs.sweeps.space import Point, listed_points
from jobs.sweeps.stages import SweepGraphs, every_stage, point_graph, sweep_digest
from tests.jobs.sweeps.fake_registry import REGISTRY, REPOSITORY, Recipe, launched_now, load, make_sweep


def test_a_sweep_is_read_back_as_it_was_launched(tmp_path: Path) -> None:
    """Also after the results were moved: the folder that is named counts. The time of the first launch is kept."""
    settings = SweepSettings(counts=[16, 64], settings={"ptapt.learning_rate": [1e-3, 1e-4]}, search=Search.random, folds=["2"])
    sweep = make_sweep(tmp_path / "a", settings)
    assert replace(load(sweep), user=None) == sweep
    assert require_latest(sweep.layout) == sweep.digest
    assert sweep.folds == ("2",)
    assert last_place(sweep.own_layout) == (Cluster.local, "default")
    later = launched_now(sweep)
    store_sweep(later)
    assert began(sweep.layout, sweep.digest) == sweep.launched < load(sweep).launched
    (tmp_path / "a").rename(tmp_path / "b")
    moved = load_sweep(Layout(tmp_path / "b" / "results", "exp"), sweep.digest, REGISTRY, Recipe, REPOSITORY)
    assert moved.own_layout.stage("states", "K").path == tmp_path / "b" / "results" / "store" / "states" / "K"
    assert moved.own_layout.logs == tmp_path / "b" / "results" / "exp" / "sweep" / sweep.digest / "logs"


@pytest.mark.parametrize("text", ["", "torn", "[]", '{"schema": 99}', '{"schema": 2}'])
def test_a_damaged_sweep_is_an_error_in_one_line(tmp_path: Path, text: str) -> None:
    sweep = make_sweep(tmp_path)
    sweep.own_layout.experiment_file.write_text(text)
    with pytest.raises(UsageError, match=r"experiment\.json: damaged.*launch `sweep` again to renew it; stages in the store are reused$"):
        load(sweep)
    with pytest.raises(UsageError, match="no such sweep"):
        load(replace(sweep, digest="0123456789ab"))
    assert began(sweep.layout, sweep.digest) == 0.0


def test_a_sweep_of_an_earlier_version_is_refused_in_one_line(tmp_path: Path) -> None:
    """Its record had another name, and its trials were records too; the same command launches it again."""
    sweep = make_sweep(tmp_path)
    sweep.own_layout.experiment_file.rename(sweep.folder / "sweep.json")
    with pytest.raises(
        UsageError, match=r"sweep\.json: launched by an earlier version; launch `sweep` again to renew it; stages in the"
    ) as told:
        load(sweep)
    assert "\n" not in str(told.value)


def test_the_last_sweep_is_the_one_launched_last(tmp_path: Path) -> None:
    """An error in one line without one, and if the file with its name is damaged."""
    first = make_sweep(tmp_path, SweepSettings(seed=1))
    second = make_sweep(tmp_path, SweepSettings(seed=2))
    assert first.digest != second.digest == require_latest(first.layout)
    with pytest.raises(UsageError, match=r"'other': no sweep was launched \(nothing in .*\); there are sweeps of: exp"):
        require_latest(Layout(tmp_path / "results", "other"))
    for damaged in (b"../..\n", b"\xff\xfe"):
        latest_file(first.layout).write_bytes(damaged)
        with pytest.raises(UsageError, match="latest: damaged"):
            require_latest(first.layout)


def test_proposals_are_read_back_as_written(tmp_path: Path) -> None:
    """Damaged ones count as none: they are proposed again."""
    sweep = make_sweep(tmp_path)
    batches = [[Proposal({"size": "1", "weight.16": 0.5}, Point((16,)))], [Proposal({}, Point((16, 64), (("ptapt.learning_rate", 1e-3),)))]]
    assert read_proposals(sweep) == ()
    write_proposals(sweep, batches)
    assert read_proposals(sweep) == tuple(map(tuple, batches))
    (sweep.folder / "proposals.json").write_text("torn")
    assert read_proposals(sweep) == ()


def test_the_graph_of_a_sweep_has_every_stage_once_under_its_usual_key(tmp_path: Path) -> None:
    """The stages of the graphs of its points, upstream first; every run belongs to its point."""
    sweep = make_sweep(tmp_path, SweepSettings(seeds=2))
    points = [Point((16,)), Point((16, 64)), Point((64, 256))]
    graph = SweepGraphs(sweep).graph([(point, 2) for point in points])
    single = {point.name: point_graph(sweep.experiment, sweep.corpus, point, ["1", "2"], sweep.validation, REGISTRY) for point in points}
    assert graph.nodes == {key: node for each in single.values() for key, node in each.nodes.items()}
    assert [node.stage for node in graph.nodes.values()].count("states") == 2
    places = {key: place for place, key in enumerate(graph.nodes)}
    assert all(places[parent] < places[key] for key, node in graph.nodes.items() for parent in node.upstream.values())
    assert {key: set(children) for key, children in graph.children.items()} == {
        key: {other for other, node in graph.nodes.items() if key in node.upstream.values()} for key in graph.nodes
    }
    for name, each in single.items():
        runs = [run for run in graph.runs if run.method == name]
        assert [(run.fold, run.slot, run.key) for run in runs] == [(run.fold, run.slot, run.key) for run in each.runs]
        assert set(with_upstream(graph, (run.key for run in runs))) == each.nodes.keys()
    again = SweepGraphs(sweep).graph([(point, 2) for point in points], {("k16", "2", 1): 1})
    assert [(run.method, run.fold, run.slot, run.generation) for run in again.superseded] == [("k16", "2", 1, 0)]
    assert [run.generation for run in again.runs if run.slot_id == ("k16", "2", 1)] == [1]


def _digest(sweep: Sweep, experiment: Experiment) -> str:
    return sweep_digest(experiment, sweep.corpus, sweep.validation, REGISTRY)


def test_the_digest_depends_on_what_determines_a_sweep_only(tmp_path: Path) -> None:
    """Machines and the number of concurrent trials do not change it."""
    sweep = make_sweep(tmp_path, SweepSettings(counts=[16, 64]))
    given, settings = sweep.experiment, sweep.experiment.sweep
    same = [
        replace(given, resources={"ptapt": StageResources(cpus=2)}),
        replace(given, sweep=replace(settings, at_once=3)),
        replace(given, recipe=Recipe(failing={"ptapt * *": "kill:1"})),
        replace(given, methods=["vft"], seeds=9),
    ]
    assert {_digest(sweep, each) for each in same} == {sweep.digest}
    slower = Recipe()
    slower.ptapt.steps = 20
    others = [
        replace(given, sweep=replace(settings, counts=[16, 32])),
        replace(given, sweep=replace(settings, sizes=[1])),
        replace(given, sweep=replace(settings, settings={"ptapt.learning_rate": [1e-4]})),
        replace(given, sweep=replace(settings, search=Search.optuna)),
        replace(given, sweep=replace(settings, seed=1)),
        replace(given, sweep=replace(settings, seeds=3)),
        replace(given, sweep=replace(settings, folds=["1"])),
        replace(given, sweep=replace(settings, stopping=Stopping.none)),
        replace(given, first_seed=5),
        replace(given, recipe=slower),
    ]
    digests = {_digest(sweep, each) for each in others} | {sweep_digest(given, sweep.corpus, {**sweep.validation, "1": ("x",)}, REGISTRY)}
    assert len(digests | {sweep.digest}) == len(others) + 2


def test_a_record_is_plain_json(tmp_path: Path) -> None:
    """Other programs may read it."""
    sweep = make_sweep(tmp_path)
    value = json.loads(sweep.own_layout.experiment_file.read_text())
    assert (value["schema"], value["corpus"]["name"], value["validation"]["1"]) == (2, "fake", ["speaker of 2"])
    write_json(sweep.own_layout.experiment_file, {**value, "validation": {**value["validation"], "1": ["other"]}})
    assert load(sweep).validation["1"] == ("other",)


def test_every_stage_of_a_sweep_is_known_without_its_search(tmp_path: Path) -> None:
    """All points on all folds; of a search by Optuna those that it has proposed, at first none."""
    sweep = make_sweep(tmp_path / "a", SweepSettings(counts=[16, 64], search=Search.grid))
    points = listed_points(sweep.experiment) or ()
    assert len(points) > 1
    assert set(every_stage(sweep).nodes) == set(SweepGraphs(sweep).graph([(point, len(sweep.folds)) for point in points]).nodes)
    sweep = make_sweep(tmp_path / "b", SweepSettings(counts=[16, 64], search=Search.optuna))
    assert not every_stage(sweep).nodes
    write_proposals(sweep, [[Proposal({"set": "16"}, Point((16,)))]])
    assert set(every_stage(sweep).nodes) == set(SweepGraphs(sweep).graph([(Point((16,)), len(sweep.folds))]).nodes)
