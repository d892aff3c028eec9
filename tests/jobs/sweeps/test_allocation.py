"""The Slurm job of a sweep: its script, that there is never a second one, how it stands, its end."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.errors import UsageError
from jobs.experiment.config import SlurmSite
from jobs.experiment.sweep_section import SweepResources
from jobs.slurm.client import SlurmClient
from jobs.slurm.parse import QueuedElement
from jobs.slurm.script import SweepJob, render_script
from jobs.store.attempts import process_start
from jobs.store.records import write_json
from jobs.sweeps.allocation import CANCELLED, Phase, cancel, job_name, job_of, log_file, preview, state, submit
from jobs.sweeps.records import Sweep
from tests.jobs.slurm.test_script import COMMANDS, CONTAINER, UNIVERSITY
from tests.jobs.slurm_cases import until
from tests.jobs.sweeps.sweep_cases import ROOT, source_of, sweep_of
from tests.slurm_cluster import Cluster

TEMPLATES = ROOT / "slurm_templates"
GOLDEN = Path(__file__).parents[1] / "golden"
FOLDER = "/project/results/iemocap/sweep/0123456789ab"
JOB = SweepJob(
    name="iemocap.sweep.0123456789ab",
    resources=SweepResources(nodes=4, cpus=16, gpus=4, memory_gb=47.5, minutes=720),
    command=("/opt/venv/bin/python", "-m", "jobs.sweeps.ray.node", FOLDER, "--", "/opt/venv/bin/python", "launch.py", "tune", FOLDER),
    description=f"{FOLDER}/sweep.json",
    stop=f"{FOLDER}/stop",
    meetings=f"{FOLDER}/nodes",
    folder="/project/results/iemocap/snapshots/0123456789abcdef",
    output="/project/results/iemocap/logs/iemocap.sweep.0123456789ab.out",
    restarts=20,
    binds=("/project/results", "/project/data/iemocap"),
)
SMALL = replace(JOB, resources=SweepResources(nodes=1, cpus=4, gpus=0, memory_gb=4, minutes=60))
CASES = {"sweep": (SMALL, SlurmSite()), "sweep-university": (JOB, UNIVERSITY), "sweep-container": (JOB, CONTAINER)}


@pytest.mark.parametrize("name", CASES)
def test_the_script_is_the_golden_one(name: str) -> None:
    """A change of the template shows in a file that somebody reads, and bash takes it. SER_GRID_WRITE_GOLDEN=1 writes them anew."""
    text = render_script(*CASES[name], TEMPLATES)
    file = GOLDEN / f"{name}.sh"
    if os.environ.get("SER_GRID_WRITE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize("value", ["".join(COMMANDS), "'; touch pwned; '$(touch pwned)", "-o", "%j %u"])
def test_no_value_escapes(value: str, tmp_path: Path) -> None:
    """srun and the site's options get a value as it is; the shell makes nothing of it."""
    code = tmp_path / "code"
    code.mkdir()
    site = SlurmSite(partition=value, extra={"comment": value}, environment={"A": value}, container=value, container_arguments=[value])
    job = replace(JOB, command=("run", value), folder=str(code), description=str(code), stop=f"/none/{value}", meetings=f"/none/{value}")
    text = render_script(replace(job, binds=(value,)), site, TEMPLATES)
    header = [shlex.split(line.removeprefix("#SBATCH ")) for line in text.splitlines() if line.startswith("#SBATCH")]
    assert [f"--partition={value}"] in header
    assert [f"--comment={value}"] in header
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\0" "$@" "A=$A" >"$RECORD"\n')
    (tmp_path / "srun").chmod(0o755)
    record = tmp_path / "record"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(record), "SLURM_JOB_ID": "1"}
    done = subprocess.run(["bash", "--noprofile"], input=text, text=True, env=environment, cwd=tmp_path, check=False, timeout=20)
    assert done.returncode == 1, "nobody said how the sweep ended"
    calls = record.read_bytes().decode().split("\0")[:-1]
    assert calls[calls.index("apptainer") :] == [
        *("apptainer", "exec", "--nv", "--bind", value, "--pwd", str(code), value, value, "run", value, f"A={value}")
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["code", "record", "srun"]


@pytest.mark.parametrize(
    ("said", "restart", "back"),
    [
        ("", 0, True),  # the driver was told to stop, and nobody told the script: a job that is to be preempted
        (None, 0, False),  # the driver has come to its end, with trials that failed
        (CANCELLED, 0, False),
        ("", 20, False),
    ],
)
def test_a_sweep_that_was_interrupted_goes_back_into_the_queue(said: str | None, restart: int, back: bool, tmp_path: Path) -> None:
    """By its script, unless its user has ended it, or it has done so often enough; one that is incomplete for other reasons does not."""
    (tmp_path / "code").mkdir()
    stop = tmp_path / "stop"
    job = replace(SMALL, folder=str(tmp_path / "code"), description=str(tmp_path), stop=str(stop), meetings=str(tmp_path / "nodes"))
    asked = "" if said is None else f"echo {said} >{stop}\n"
    over = tmp_path / "nodes" / f"1.{restart}" / "over"
    (tmp_path / "srun").write_text(f"#!/bin/bash\n{asked}mkdir -p {over.parent}; echo 3 >{over}\n")
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "$@"\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": str(restart)}
    script = render_script(job, SlurmSite(), TEMPLATES)
    done = subprocess.run(
        ["bash", "--noprofile"], input=script, text=True, env=environment, capture_output=True, cwd=tmp_path, check=False, timeout=20
    )
    assert (done.returncode, done.stdout) == ((0, "requeue 1\n") if back else (3, ""))


def test_the_name_is_of_the_sweep_and_its_results_folder(tmp_path: Path) -> None:
    """Two trees of one user do not take each other's jobs."""
    here, there = sweep_of(tmp_path / "here"), sweep_of(tmp_path / "there")
    assert job_name(here) == job_name(sweep_of(tmp_path / "here"))
    assert job_name(here).startswith("trial.sweep.")
    assert len({job_name(here), job_name(there), job_name(replace(here, digest="f" * 12))}) == 3


def test_a_preview_touches_nothing(tmp_path: Path) -> None:
    """What `--dry-run` prints."""
    sweep = sweep_of(tmp_path, nodes=3)
    before = sorted(tmp_path.rglob("*"))
    assert "#SBATCH --nodes=3\n" in preview(sweep, ROOT)
    assert sorted(tmp_path.rglob("*")) == before


def sleeper(sweep: Sweep, seconds: int = 600) -> SweepJob:
    """The sweep's job, with nodes that only sleep."""
    return replace(job_of(sweep, ROOT), command=("sleep", str(seconds)))


def in_queue(cluster: Cluster, sweep: Sweep) -> list[str]:
    return cluster.run("squeue", "-h", "-n", job_name(sweep), "-o", "%i %T").splitlines()


@pytest.mark.slurm
def test_submitted_twice_it_is_one_job_and_cancelled_it_stays_away(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Pending or running it is found again. Cancelled it leaves the queue, says so in the file that stops it, and may be submitted anew."""
    sweep, client = sweep_of(tmp_path), SlurmClient()
    assert state(sweep, client).phase is Phase.none
    source = source_of(tmp_path)
    job = submit(sweep, source, client, job=sleeper(sweep))
    assert submit(sweep, source, client, job=sleeper(sweep)) == job
    until(lambda: state(sweep, client).phase is Phase.running)
    assert submit(sweep, source, client, job=sleeper(sweep)) == job
    assert len(in_queue(slurm_cluster, sweep)) == 1
    assert str(log_file(sweep)) in state(sweep, client).sentence
    assert cancel(sweep, client) == (job,)
    assert sweep.folder.stop.read_text().strip() == CANCELLED
    until(lambda: not in_queue(slurm_cluster, sweep))
    again = submit(sweep, source, client, job=sleeper(sweep))
    assert again != job
    assert not sweep.folder.stop.exists()
    assert cancel(sweep, client) == (again,)


@pytest.mark.slurm
def test_a_job_that_cannot_start_says_why(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """More GPUs than a node has are declined in one line; a job behind others says what it waits for."""
    client = SlurmClient()
    with pytest.raises(UsageError, match=r"Slurm rejects the sweep's job .*sweep\.resources") as caught:
        submit(sweep_of(tmp_path, gpus=9), source_of(tmp_path), client)
    assert "\n" not in str(caught.value)
    first, second = sweep_of(tmp_path, "first", nodes=3, cpus=4), sweep_of(tmp_path, "second", nodes=3, cpus=4)
    submit(first, source_of(tmp_path), client, job=sleeper(first))
    until(lambda: state(first, client).phase is Phase.running)
    job = submit(second, source_of(tmp_path), client, job=sleeper(second))
    until(lambda: "Resources" in state(second, client).sentence)
    assert state(second, client).phase is Phase.pending
    slurm_cluster.run("scontrol", "hold", job)
    until(lambda: "held by" in state(second, client).stuck)


def reply_lost(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An sbatch that gives no number; the script calls the real one `REAL`."""
    file = folder / "bin" / "sbatch"
    file.parent.mkdir(exist_ok=True)
    lost = 'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1'
    file.write_text(f"#!/bin/bash\nREAL={shutil.which('sbatch')}\nHERE={file.parent}\n{script}\n{lost}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{file.parent}:{os.environ['PATH']}")


@pytest.mark.slurm
def test_a_lost_reply_makes_no_second_job(slurm_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job that sbatch did not tell of is found under its name, also when it shows only later."""
    sweep, client = sweep_of(tmp_path), SlurmClient()
    source = source_of(tmp_path)
    with monkeypatch.context() as patch:
        reply_lost(tmp_path, 'cp "${!#}" "$HERE/late.sh"; { sleep 3; "$REAL" "$HERE/late.sh"; } >/dev/null 2>&1 &', patch)
        job = submit(sweep, source, client, job=sleeper(sweep))
    assert [line.split()[0] for line in in_queue(slurm_cluster, sweep)] == [job]
    assert submit(sweep, source, client, job=sleeper(sweep)) == job


@pytest.mark.slurm
def test_while_it_is_unknown_whether_there_is_a_job_nothing_is_submitted(
    slurm_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by who has lost the reply nor by the next one, until the job has had time enough to show."""
    sweep, client = sweep_of(tmp_path), SlurmClient()
    source = source_of(tmp_path)
    with monkeypatch.context() as patch:
        reply_lost(tmp_path, "", patch)
        with pytest.raises(UsageError, match="run the same command again") as caught:
            submit(sweep, source, client, job=sleeper(sweep), settle_seconds=0.5)
    assert "\n" not in str(caught.value)
    begun = time.time()
    file = sweep.folder.submission
    written = file.stat().st_mtime
    job = submit(sweep, source, client, job=sleeper(sweep), settle_seconds=4)
    assert time.time() - written >= 3.9
    assert time.time() - begun < 30
    assert [line.split()[0] for line in in_queue(slurm_cluster, sweep)] == [job]


KILLED = """\
import os, sys
from pathlib import Path

from jobs.store.attempts import process_start
from jobs.store.records import write_json
from jobs.slurm.client import SlurmClient
from jobs.slurm.parse import QueuedElement
from jobs.sweeps.allocation import submit
from tests.jobs.sweeps.sweep_cases import source_of, sweep_of
from tests.jobs.sweeps.test_allocation import sleeper

folder = Path(sys.argv[1])
(folder / "bin" / "launcher").write_text(str(os.getpid()))
sweep = sweep_of(folder)
submit(sweep, source_of(folder), SlurmClient(), job=sleeper(sweep))
"""


@pytest.mark.slurm
def test_an_sbatch_that_outlives_its_launcher_makes_the_only_job(
    slurm_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher is killed while sbatch runs: the next launcher waits for that sbatch, longer than the settle time, and finds its job."""
    sweep = sweep_of(tmp_path)
    with monkeypatch.context() as patch:
        reply_lost(tmp_path, 'kill -9 $(cat "$HERE/launcher"); sleep 4; exec "$REAL" "$@"', patch)
        command = [sys.executable, "-c", KILLED, str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    job = submit(sweep, source_of(tmp_path), SlurmClient(), job=sleeper(sweep), settle_seconds=0.5)
    time.sleep(4.5)  # by now the sbatch of the first launcher has ended
    assert [line.split()[0] for line in in_queue(slurm_cluster, sweep)] == [job]


def former_record(sweep: Sweep, created: float, job: str = "") -> None:
    """The record of a submission as the program wrote it before sweeps shared the guard of arrays; its writer has ended."""
    child = subprocess.Popen(["sleep", "60"])
    value = {"schema": 1, "name": job_name(sweep), "created": created, "host": socket.gethostname(), "pid": child.pid}
    write_json(sweep.folder.submission, {**value, "start": process_start(child.pid), "job": job})
    child.kill()
    child.wait()


class Interrupted(SlurmClient):
    """A client whose second look at the queue is followed by what another process does, before the caller sees the answer."""

    def __init__(self, then: Callable[[], object]) -> None:
        super().__init__()
        self.looks, self.then = 0, then

    def queue(self, *, name: str | None = None, patient: bool = True) -> tuple[QueuedElement, ...]:
        found = super().queue(name=name, patient=patient)
        self.looks += 1
        if self.looks == 2:
            self.then()
        return found


@pytest.mark.slurm
def test_a_record_made_by_another_process_is_not_removed(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Two launchers find the same lost intent; the slower one does not take the new record of the other for it, and one job is there."""
    sweep, source, made = sweep_of(tmp_path), source_of(tmp_path), []
    former_record(sweep, time.time() - 1000)

    def other() -> None:
        made.append(submit(sweep, source, SlurmClient(), job=sleeper(sweep), settle_seconds=0.5))

    job = submit(sweep, source, Interrupted(other), job=sleeper(sweep), settle_seconds=0.5)
    assert [line.split()[0] for line in in_queue(slurm_cluster, sweep)] == [job] == made


@pytest.mark.slurm
def test_a_job_that_a_former_version_submitted_is_the_only_one(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """It is found, not submitted again, and cancelled; when it has left the queue, its record is no obstacle."""
    sweep, source, client = sweep_of(tmp_path), source_of(tmp_path), SlurmClient()
    job = submit(sweep, source, client, job=sleeper(sweep))
    former_record(sweep, time.time(), job)
    assert submit(sweep, source, client, job=sleeper(sweep)) == job
    assert len(in_queue(slurm_cluster, sweep)) == 1
    assert cancel(sweep, client) == (job,)
    until(lambda: not in_queue(slurm_cluster, sweep))
    assert submit(sweep, source, client, job=sleeper(sweep)) != job
