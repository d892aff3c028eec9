"""The script of a link, its time limit, and the line for cron that makes the same passes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.commands.doctor import cron_line
from jobs.errors import UsageError
from jobs.experiment.config import Experiment, Policy, SlurmSite
from jobs.slurm.chain import (
    Chain,
)
from jobs.slurm.script import LinkJob, render_script
from jobs.store.layout import Layout
from tests.jobs.slurm.chain_cases import TEMPLATES, chain_of, launch, layout_of
from tests.waiting import until

GOLDEN = Path(__file__).parents[1] / "golden"
JOB = LinkJob(
    name="iemocap.control.0123456789ab",
    minutes=60,
    command=("/opt/venv/bin/python", "launch.py", "control", "iemocap", "--results", "/project/results"),
    description="/project/results/iemocap/experiment.json",
    folder="/project/results/iemocap/snapshots/current",
    output="/project/results/iemocap/logs/100%.out",
    begin_seconds=600,
    again_seconds=300,
    binds=("/project/results",),
)
SITES = {
    "controller": SlurmSite(
        partition="gpu",
        controller_partition="cpu",
        account="speech-lab",
        qos="long",
        constraint="a100",
        gpu_type="a100",
        modules=["python/3.11"],
        environment={"NOTE": "it's fine"},
        prologue=["ulimit -n 4096"],
        extra={"reservation": "speech", "exclusive": ""},
    ),
    "controller-container": SlurmSite(partition="gpu", container="/images/ser grid.sif", memory_requests=False),
}


@pytest.mark.parametrize("cancelled", [True, False], ids=["the job is cancelled", "its command is killed"])
def test_a_link_that_is_cancelled_is_not_submitted_again(tmp_path: Path, cancelled: bool) -> None:
    """Slurm signals the processes of a job one after the other: the command may have ended before the script gets SIGTERM."""
    submitted, started = tmp_path / "submitted", tmp_path / "started"
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "sbatch").write_text(f"#!/bin/sh\ntouch {submitted}\n")
    (programs / "sbatch").chmod(0o755)
    command = ("bash", "-c", f"echo $$ > {started}.new; mv {started}.new {started}; exec sleep 600")
    job = dataclasses.replace(JOB, command=command, description=str(programs), folder=str(tmp_path), output=str(tmp_path / "log"))
    (tmp_path / "link.sh").write_text(render_script(job, SlurmSite(), TEMPLATES))
    path = f"{programs}:{os.environ['PATH']}"
    link = subprocess.Popen(["bash", str(tmp_path / "link.sh")], env={**os.environ, "PATH": path}, start_new_session=True)
    until(started.exists)
    os.kill(int(started.read_text()), signal.SIGTERM)
    if cancelled:
        until(lambda: not Path(f"/proc/{started.read_text().strip()}").exists())
        link.terminate()
    link.wait()
    assert submitted.exists() is not cancelled, (tmp_path / "log").read_text()


@pytest.mark.parametrize("name", SITES)
def test_link_script_equals_the_golden_file(name: str) -> None:
    """A small job in the controller's partition, without a GPU. SER_GRID_WRITE_GOLDEN=1 writes the files again."""
    text = render_script(JOB, SITES[name], TEMPLATES)
    file = GOLDEN / f"{name}.sh"
    if os.environ.get("SER_GRID_WRITE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_every_value_of_a_profile_is_quoted() -> None:
    """As in the scripts of stages."""
    with pytest.raises(UsageError, match="control character"):
        render_script(JOB, SlurmSite(environment={"A": "x\ntouch pwned"}), TEMPLATES)
    assert "'$(touch pwned)'" in render_script(JOB, SlurmSite(controller_partition="$(touch pwned)"), TEMPLATES)


def test_the_cron_line_runs_as_printed(tmp_path: Path) -> None:
    """In a shell as cron starts it, from a folder with special characters in its name: the command gets its arguments."""
    folder = tmp_path / "it's 100% $HOME"
    folder.mkdir()
    (folder / "launch.py").write_text("import json, os, sys\nprint(json.dumps([sys.argv[1:], os.getcwd(), os.environ['SLURM_CONF']]))\n")
    layout = Layout(folder / "results", "trial")
    layout.logs.mkdir(parents=True)
    line = cron_line(layout, folder=folder, python=sys.executable, environment={"SLURM_CONF": "/etc/a b.conf"})
    schedule, command = line[: len("*/10 * * * * ")], line[len("*/10 * * * * ") :]
    assert schedule == "*/10 * * * * "
    assert "%" not in command.replace("\\%", "")
    subprocess.run(["/bin/sh", "-c", command.replace("\\%", "%")], env={"PATH": "/usr/bin:/bin"}, check=True, cwd="/")
    said = json.loads((layout.logs / "cron.out").read_text())
    assert said == [["reconcile", "trial", "--results", str(folder / "results")], str(folder), "/etc/a b.conf"]
    with pytest.raises(UsageError, match="line break"):
        cron_line(layout, folder=tmp_path / "a\nb")


def test_the_time_limit_of_a_link_is_policy_controller_minutes(tmp_path: Path) -> None:
    """And the script that `grid --dry-run` shows is made without writing anything."""
    launch(tmp_path)
    chain_of(tmp_path)
    experiment = Experiment(name="trial", corpus="test", policy=Policy(controller_minutes=7))
    script = Chain(experiment, layout_of(tmp_path), source=tmp_path / "source").script()
    assert "#SBATCH --time=7\n" in script
    assert not layout_of(tmp_path).snapshots.exists()
