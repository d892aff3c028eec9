"""Commands to run next: a shell and the command line parse them correctly."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.experiment.config import Policy, SlurmSite, load_experiment
from jobs.experiment.stored_config import resolved_values
from jobs.experiment.sweep_section import Search
from jobs.store.layout import valid_experiment_name
from jobs.sweeps.decisions import TrialState
from jobs.sweeps.records import Sweep
from jobs.sweeps.report.choice import Choice, choice_of, lines_of, overrides_between
from jobs.sweeps.report.scores import TrialRecord
from jobs.sweeps.report.summary import summarise
from tests.jobs.sweeps import report_cases as cases
from tests.jobs.sweeps.fake_registry import Recipe


def _choice(*trials: TrialRecord, sweep: Sweep | None = None, overrides: tuple[str, ...] = ()) -> Choice:
    return choice_of(summarise(sweep or cases.sweep(), trials, {}), overrides)


def _lines(*trials: TrialRecord, sweep: Sweep | None = None) -> str:
    summary = summarise(sweep or cases.sweep(), trials, {})
    return "\n".join(lines_of(summary, choice_of(summary)))


DIVIDED = (  # fold 1 is best with 16, the others with 64
    cases.trial([16], {"1": (70.0, 71.0), "2": (60.0, 61.0), "3": (60.0, 61.0)}),
    cases.trial([64], {"1": (60.0, 61.0), "2": (70.0, 71.0), "3": (70.0, 72.0)}),
)


def test_choice_has_grids_of_the_best_and_of_a_smaller_point() -> None:
    """Named after the point, of the experiment's own file, with the point's settings."""
    found = _choice(*cases.some())
    assert found.grid == "python launch.py grid exp name=exp-k16-64 'recipe.cluster.counts=[16,64]'"
    assert found.smaller == "python launch.py grid exp name=exp-k64 'recipe.cluster.counts=[64]'"
    assert "Smaller, and not distinguishable from it: 64, validation UA 65.0 ± 0.3." in _lines(*cases.some())


def test_choice_keeps_the_cluster_and_all_settings_of_the_point() -> None:
    """Every setting of the point is there, quoted for a shell."""
    record = cases.trial([16], dict.fromkeys(cases.FOLDS, (60.0, 61.0)), ptapt__learning_rate=0.0005)
    words = shlex.split(_choice(record, sweep=cases.on_slurm(cases.sweep())).grid)
    assert words[:7] == ["python", "launch.py", "grid", "exp", "--cluster", "slurm", f"name=exp-{record.point.name}"]
    assert words[7:] == ["recipe.cluster.counts=[16]", "recipe.ptapt.learning_rate=0.0005"]


def test_nested_choice_has_one_grid_per_fold() -> None:
    """An experiment has one configuration, so each fold is an experiment; their runs are joined to one table."""
    found = _choice(*DIVIDED)
    assert [(choice.fold, choice.point.point.label) for choice, _ in found.by_fold] == [("1", "16"), ("2", "64"), ("3", "64")]
    assert shlex.split(found.by_fold[0][1])[3:] == ["exp", "name=exp-nested-1", "recipe.cluster.counts=[16]", 'folds=["1"]']
    assert found.collect.endswith("> exp-nested.csv && python launch.py collect --from exp-nested.csv")
    text = _lines(*DIVIDED)
    assert "test speakers of other folds" in text
    assert text.index("# Fold 1: 16, validation UA 70.5") < text.index("name=exp-nested-1")


def test_folds_with_the_same_best_point_need_no_nested_grids() -> None:
    """One line says that the grid of the best is nested."""
    found = _choice(cases.trial([16], dict.fromkeys(cases.FOLDS, (60.0, 61.0))))
    assert (found.by_fold, found.collect) == ((), "")
    assert found.caveats[-1].endswith("here every fold chooses this point, so that its grid is nested.")
    assert "expect less" not in " ".join(found.caveats)  # nothing was chosen


def test_folds_that_were_not_evaluated_are_named() -> None:
    """A grid tests them with a point chosen on other folds, also if those agree."""
    sweep = replace(cases.sweep(), experiment=replace(cases.sweep().experiment, folds=[*cases.FOLDS, "4", "5"]))
    found = _choice(cases.trial([16], dict.fromkeys(cases.FOLDS, (60.0, 61.0))), sweep=sweep)
    assert "The sweep did not evaluate 4, 5: there a grid tests a point chosen on other folds." in found.caveats
    assert len(found.by_fold) == len(cases.FOLDS)
    assert "so that its grid is nested" not in " ".join(found.caveats)


def test_a_fixed_validation_part_is_tested_in_no_fold() -> None:
    """Then the choice has no caveat on nesting."""
    found = _choice(*DIVIDED, sweep=cases.sweep(cases.FIXED))
    assert (found.by_fold, len(found.caveats)) == ((), 1)
    assert "nested" not in _lines(*DIVIDED, sweep=cases.sweep(cases.FIXED))


def test_caveats_of_early_stopping_and_optuna() -> None:
    """The caveat names the settings without it."""
    stopped = cases.trial([256], {"1": (10.0, 11.0)}, TrialState.stopped)
    text = _lines(*DIVIDED, stopped)
    assert "Best of 2 complete points (3 tried)" in text
    assert "weak evidence" in text
    assert "strictly nested only with sweep.stopping=none" in text
    assert "sweep.stopping=none" not in _lines(*DIVIDED)
    assert "Optuna" in _lines(*DIVIDED, sweep=cases.sweep(search=Search.optuna))


def test_no_command_without_a_complete_point() -> None:
    """One comment with the states of the trials."""
    found = _lines(cases.trial([16], {"1": (60.0,)}, TrialState.running), cases.trial([64], {}, TrialState.failed, "no"))
    assert found == "# Nothing to choose yet: no point is complete (2 trials: 1 failed, 1 running)."
    assert "no trial has begun" in _lines()


def test_choice_of_an_unfinished_sweep_may_change() -> None:
    """While trials are running."""
    assert "may change" in _lines(*cases.some(), cases.trial([512], {}, TrialState.running))
    assert "may change" not in _lines(*cases.some())


def test_names_of_grids_are_valid_experiment_names() -> None:
    """With any names of folds, and with a long name of the experiment."""
    folds = ("a/b c", "ß" * 90)
    trials = (
        cases.trial([16], {folds[0]: (70.0,), folds[1]: (50.0,)}),
        cases.trial([64], {folds[0]: (60.0,), folds[1]: (60.0,)}),
    )
    sweep = cases.sweep(dict(zip(folds, (("x",), ("y",)), strict=True)), folds)
    sweep = replace(sweep, experiment=replace(sweep.experiment, name="n" * 64))
    found = _choice(*trials, sweep=sweep)
    for command in (found.grid, *(command for _, command in found.by_fold)):
        (name,) = (word.partition("=")[2] for word in shlex.split(command) if word.startswith("name="))
        assert valid_experiment_name(name)
        assert name != sweep.experiment.name
    assert f'folds=["{folds[0]}"]' in shlex.split(found.by_fold[0][1])


def test_folds_with_the_same_cleaned_name_are_numbered() -> None:
    """Two folds are never one experiment."""
    folds = ("a b", "a/b")
    trials = (
        cases.trial([16], {folds[0]: (70.0,), folds[1]: (50.0,)}),
        cases.trial([64], {folds[0]: (60.0,), folds[1]: (60.0,)}),
    )
    found = _choice(*trials, sweep=cases.sweep(dict(zip(folds, (("x",), ("y",)), strict=True)), folds))
    assert ["name=exp-nested-1" in found.by_fold[0][1], "name=exp-nested-2" in found.by_fold[1][1]] == [True, True]


def test_the_lines_are_a_shell_script_that_runs(tmp_path: Path) -> None:
    """Every line is a comment or a command, the joined table has one heading, and nothing else is done."""
    sweep = cases.sweep(root=tmp_path / "results of mine")
    for fold in cases.FOLDS:
        table = tmp_path / "results of mine" / f"exp-nested-{fold}" / "tables" / "runs.csv"
        table.parent.mkdir(parents=True)
        table.write_text(f"corpus,fold\ndemo,{fold}\n")
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$*" >> asked\n')
    program.chmod(0o755)
    script = _lines(*DIVIDED, sweep=sweep)
    subprocess.run(["sh", "-e", "-c", script], cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True)
    assert (tmp_path / "exp-nested.csv").read_text() == "corpus,fold\ndemo,1\ndemo,2\ndemo,3\n"
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.split()[1] for line in asked] == [*["grid"] * 5, "collect"]  # the best, a smaller one, each fold


def test_overrides_of_the_experiment_are_in_the_command(tmp_path: Path) -> None:
    """The command gives the recipe of the sweep, whatever overrides it was launched with, and the point's own keys once."""
    for folder in ("experiment", "site"):
        (tmp_path / folder).mkdir()
    (tmp_path / "site" / "default.yaml").write_text("{}\n")
    stated = "name: exp\ncorpus: demo\nmethods: [vft, ptapt]\nseeds: 3\nrecipe: {ptapt: {steps: 20}}\n"
    (tmp_path / "experiment" / "exp.yaml").write_text(stated)
    asked = ["seeds=4", "recipe.ptapt.steps=7", "recipe.cluster.counts=[8,9]", 'folds=["03"]', "sweep.seeds=3", "resources.ptapt.gpus=0"]
    given = [
        resolved_values(load_experiment("exp", overrides, configs=tmp_path, recipe_schema=Recipe))
        for overrides in ([], [*asked, "name=other"])
    ]
    overrides = overrides_between(*given)
    assert set(overrides) >= {"seeds=4", "recipe.ptapt.steps=7", 'folds=["03"]', "resources.ptapt.gpus=0"}
    assert not any(each.startswith(("name=", "sweep.")) for each in overrides)
    words = shlex.split(_choice(*cases.some(), overrides=overrides).grid)
    again = resolved_values(load_experiment("exp", words[4:], configs=tmp_path, recipe_schema=Recipe))
    assert again["recipe"] == {**given[1]["recipe"], "cluster": {"counts": [16, 64], "iterations": 20}}
    assert (again["folds"], again["seeds"], again["resources"]) == (["03"], 4, given[1]["resources"])
    assert sum(word.startswith("recipe.cluster.counts=") for word in words) == 1


def test_settings_that_may_hold_secrets_are_not_in_the_command() -> None:
    """A webhook and variables of the environment; the lines name them."""
    given = {"policy": {"webhook": "https://example.org/s3cret", "mail": "a@example.org"}, "slurm": {"environment": {"TOKEN": "s3cret"}}}
    overrides = overrides_between({}, given)
    assert overrides == ('policy.mail="a@example.org"',)
    sweep, trials = cases.sweep(), cases.some()
    assert "secrets" not in _lines(*trials, sweep=sweep)
    policy, slurm = Policy(webhook="https://example.org/s3cret"), SlurmSite(environment={"TOKEN": "s3cret"})
    private = replace(sweep, experiment=replace(sweep.experiment, policy=policy, slurm=slurm))
    lines = _lines(*trials, sweep=private)
    assert "leave out policy.webhook and slurm.environment" in lines
    assert "s3cret" not in lines


@pytest.mark.parametrize("value", [None, True, 1.5, "true", "two words", ["a", None], {}])
def test_any_value_of_a_configuration_survives_the_command_line(value: object) -> None:
    """As OmegaConf reads it."""
    from omegaconf import OmegaConf

    (override,) = overrides_between({"recipe": {}}, {"recipe": {"key": value}})
    read = OmegaConf.from_dotlist(shlex.split(shlex.join([override])))
    assert OmegaConf.to_container(read) == {"recipe": {"key": value}}
