"""Commands for the user to paste."""

from __future__ import annotations

import shlex
from pathlib import Path

from jobs.commands.hints import Hints, launch_words, next_after_prepare


def test_a_hint_is_quoted_and_names_the_folder_of_the_results() -> None:
    """Where it is not the default one: the command is pasted into a shell that may lack SER_GRID_RESULTS."""
    assert Hints("exp").of("logs", "tapt/1/0") == "`python launch.py logs exp tapt/1/0`"
    hints = Hints("exp", results="/project/my results")
    assert hints.resume == "`python launch.py resume exp --results '/project/my results'`"


def test_what_was_typed_comes_back_whole(tmp_path: Path) -> None:
    """Settings, site profile, cluster and folders; a shell reads the same words. Default folders and secrets are left out."""
    arguments = ["exp", "methods=[vft]", "site=mysite", "slurm.extra.comment=two words"]
    usual, other = tmp_path / "data", tmp_path / "other results"
    folders = (("--data", usual, usual), ("--results", other, tmp_path / "results"))
    secret = ("policy.webhook=https://example.org/s3cret", "slurm.environment.TOKEN=s3cret")
    words = launch_words("grid", [*arguments, *secret], cluster="slurm", wait=True, folders=folders)
    assert words == ("grid", *arguments, "--cluster", "slurm", "--wait", "--results", str(other))
    launch = Hints("exp", typed=words).launch
    assert shlex.split(launch.strip("`")) == ["python", "launch.py", *words]
    assert launch_words("grid", ["own.yaml"], cluster=None, wait=None, folders=()) == ("grid", str(Path("own.yaml").resolve()))


def test_prepare_names_the_next_command(tmp_path: Path) -> None:
    """`init` for a corpus without an experiment, else the dry run of its own; with the folder of the data if it is not the default one."""
    usual, other = tmp_path / "data", tmp_path / "other data"
    text = next_after_prepare("mine", [("--data", usual, usual)], has_experiment=False)
    assert text == "next: `python launch.py init mine --corpus mine` writes an experiment on it"
    text = next_after_prepare("savee", [("--data", other, usual)], has_experiment=True)
    assert f"`python launch.py grid savee --dry-run --data '{other}'`" in text
