"""The files of a report, from records and results on disk."""

from __future__ import annotations

import csv
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.experiment.config import SlurmSite
from jobs.experiment.sweep_section import Stopping, SweepSettings
from jobs.store.layout import Layout
from jobs.sweeps.decisions import Decisions
from jobs.sweeps.report.write import changed_settings, folder_options, write_report
from tests.jobs.sweeps.fake_registry import Ptapt, Recipe, compute, make_sweep, ua_of

NAMES = {"table.tex", "table.md", "summary.json", "trials.csv", "runs.csv", "report.html", "plot.pdf", "plot.png", "choice.txt"}


@pytest.mark.slow
def test_report_of_a_computed_sweep(tmp_path: Path) -> None:
    """Scores of the runs, cost of the stages, the choice; all files, at any time, and the same again from the same records."""
    settings = SweepSettings(sets=[[16, 64], [16]], folds=["1"], stopping=Stopping.none)
    sweep = make_sweep(tmp_path, settings, Recipe(failing={"ptapt 16 1": "fail:9"}), folds=("1", "2"))
    decisions = Decisions(sweep)
    before = write_report(sweep, decisions.refill({}), decisions.trials)
    assert {path.name for path in before.paths} == NAMES
    assert before.choice_lines == ("# Nothing to choose yet: no point is complete (2 trials: 2 running).",)
    run = compute(sweep)
    report = write_report(sweep, run.report.graph, run.session.decisions.trials)
    assert all(path.is_file() and path.parent == sweep.layout.sweep for path in report.paths)
    value = json.loads((sweep.layout.sweep / "summary.json").read_text())
    assert (value["best"], value["under_way"]) == ("16+64", False)
    first, second = value["points"]
    assert first["mean_ua"] == pytest.approx(sum(ua_of([16, 64], "1", seed) for seed in (0, 1)) / 2)
    assert first["proxies"]["k"]["64"] == {"purity": 1 - 1 / 64, "nmi": 1 / 64, "inertia": 1 / 64, "entropy_share": pytest.approx(0.5)}
    assert first["proxies"]["ptapt_loss_share"] == pytest.approx(0.5)
    assert "made to fail" in second["error"]
    assert (value["cost"]["stages"], value["cost"]["stages_before"], value["cost"]["stages_unknown"]) == (6, 0, 0)
    assert value["cost"]["spent"]["cpu_hours"] > 0
    assert value["code"]["packages"]
    words = shlex.split(value["choice"]["grid"])
    assert words[3:] == ["exp", "name=exp-k16-64", "--results", str(sweep.layout.root), "recipe.cluster.counts=[16,64]"]
    with (sweep.layout.sweep / "runs.csv").open() as file:
        assert [row["seed"] for row in csv.DictReader(file)] == ["0", "1"]
    assert (sweep.layout.sweep / "choice.txt").read_text() == "".join(f"{line}\n" for line in report.choice_lines)
    written = {path: path.read_bytes() for path in report.paths}
    write_report(sweep, run.report.graph, run.session.decisions.trials)
    assert {path: path.read_bytes() for path in report.paths} == written


def test_overrides_of_the_launch_are_in_the_choice(tmp_path: Path) -> None:
    """Compared with the experiment's file beside the code; none if the file is missing."""
    sweep = make_sweep(tmp_path, recipe=Recipe(ptapt=Ptapt(steps=7)))
    assert changed_settings(sweep) == ()
    configs = tmp_path / "code" / "configs"
    files = {"experiment/exp": "corpus: fake\nmethods: [ptapt]\n", "site/default": "{}\n", "site/far": "partition: gpu\nqos: long\n"}
    for folder, text in files.items():
        (configs / folder).parent.mkdir(parents=True, exist_ok=True)
        (configs / f"{folder}.yaml").write_text(text)
    found = changed_settings(replace(sweep, code=tmp_path / "code"))
    assert "recipe.ptapt.steps=7" in found
    assert [each for each in found if not each.startswith("resources.")] == ["recipe.ptapt.steps=7"]
    assert not any(each.endswith("=null") for each in found)
    far = replace(sweep.experiment, site="far", slurm=SlurmSite(partition="gpu", qos="short"))
    found = changed_settings(replace(sweep, code=tmp_path / "code", experiment=far))
    assert [each for each in found if not each.startswith("resources.")] == ["site=far", "slurm.qos=short", "recipe.ptapt.steps=7"]


def test_options_name_folders_that_are_not_the_default(tmp_path: Path) -> None:
    """Default folders are not named, also if the sweep ran from a snapshot below the results or the corpus is a link."""
    made = make_sweep(tmp_path)
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    (home / "launch.py").touch()
    beside = replace(
        made,
        experiment=replace(made.experiment, corpus="demo"),
        corpus=replace(made.corpus, folder=str(home / "data" / "demo")),
        layout=Layout(home / "results", "exp"),
        code=home,
    )
    assert folder_options(beside) == ()
    assert folder_options(replace(beside, code=home / "results" / "exp" / "snapshots" / "0123")) == ()
    away = replace(beside, corpus=replace(beside.corpus, folder="/far/demo"), layout=Layout(tmp_path / "my results", "exp"))
    assert folder_options(away) == ("--data", "/far", "--results", str(tmp_path / "my results"))
    assert folder_options(replace(beside, corpus=replace(beside.corpus, folder="/far/demo-16k"))) == ()
