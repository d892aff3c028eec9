"""The test cluster itself: its nodes are nodes, and nothing of it outlives the session that asked for it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm_cluster import Cluster
from tests.slurm_cluster.cluster import missing_programs
from tests.slurm_cluster.processes import Process, ProcessBook, start_time
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slurm
def test_nodes_have_names_and_can_be_lost(slurm_cluster: Cluster) -> None:
    """Steps see their node's name; a node that is switched off takes its job along and comes back idle."""
    names = slurm_cluster.run("srun", "--nodes=3", "hostname").split()
    expected = set(slurm_cluster.settings.node_names) if slurm_cluster.settings.namespaces else {os.uname().nodename}
    assert set(names) == expected
    job = slurm_cluster.run("sbatch", "--parsable", "--no-requeue", "--nodelist=n2", "--output=/dev/null", "--wrap=sleep 60")
    assert wait_until(lambda: slurm_cluster.run("squeue", "-h", "-j", job, "-o", "%T") == "RUNNING")
    slurm_cluster.kill_node("n2")
    slurm_cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    assert wait_until(lambda: slurm_cluster.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T") == "NODE_FAIL")
    slurm_cluster.start_node("n2")
    assert wait_until(lambda: slurm_cluster.run("sinfo", "-h", "-n", "n2", "-p", "main", "-o", "%T") == "idle")


@pytest.mark.slurm
def test_a_killed_session_leaves_nothing(tmp_path: Path) -> None:
    """SIGKILL of pytest in the middle of a test: within seconds no process and no folder of its cluster is left."""
    test = tmp_path / "test_killed.py"
    lines = ["import os", "from pathlib import Path", "def test_killed(slurm_cluster):"]
    lines += ["    Path('where').write_text(str(slurm_cluster.folder))", "    os.kill(os.getpid(), 9)"]
    test.write_text("\n".join(lines))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-p", "tests.slurm_cluster.fixtures", "-p", "no:cacheprovider", "--rootdir=.", str(test)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=90, check=False)
    assert done.returncode == -9, done.stdout
    folder = (tmp_path / "where").read_text()
    assert wait_until(lambda: not Path(folder).exists())
    left = [pid for pid in os.listdir("/proc") if pid.isdigit() and folder in _command_line(pid)]
    assert wait_until(lambda: not any(folder in _command_line(pid) for pid in left)), "the guard is the last to go"


def _command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@pytest.mark.slow
def test_tests_of_slurm_are_left_out_only_on_request(tmp_path: Path) -> None:
    """With SER_GRID_SKIP_SLURM=1 they are deselected; a machine without Slurm fails them with one line that says what to do."""
    test = tmp_path / "test_one.py"
    test.write_text("import pytest\n@pytest.mark.slurm\ndef test_slurm(slurm_cluster): pass\ndef test_other(): pass\n")
    empty = tmp_path / "bin"
    empty.mkdir()
    command = [sys.executable, "-m", "pytest", "-p", "tests.slurm_cluster.fixtures", "-p", "no:cacheprovider", "--rootdir=.", str(test)]
    environment = {"PATH": str(empty), "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    skipped = subprocess.run(
        command, cwd=tmp_path, env={**environment, "SER_GRID_SKIP_SLURM": "1"}, capture_output=True, text=True, timeout=60, check=False
    )
    assert "1 passed, 1 deselected" in skipped.stdout
    if missing_programs(f"{empty}:/usr/sbin:/sbin"):
        failed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert "1 passed" in failed.stdout
        assert "1 error" in failed.stdout
        assert "run tests/install_packages.sh as root, or leave these tests out with SER_GRID_SKIP_SLURM=1" in failed.stdout


def test_missing_packages_are_named_in_one_line(tmp_path: Path) -> None:
    """`make test` without root and without Slurm: what to install, and how to do without."""
    for name in ("bash", "id", "apt-get"):
        (tmp_path / name).write_text("#!/bin/sh\necho 1000\n")
        (tmp_path / name).chmod(0o755)
    script = (ROOT / "tests" / "install_packages.sh").read_text().replace('export PATH="$PATH:/usr/sbin:/sbin"\n', "")
    done = subprocess.run(["/bin/bash", "-c", script], env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "have root run 'apt-get install texlive-latex-base" in done.stderr
    assert " munge slurmctld slurmd slurm-client slurmdbd mariadb-server-core mariadb-client-core'" in done.stderr
    assert "SER_GRID_SKIP_SLURM=1" in done.stderr


def test_a_pid_used_again_is_not_ours(tmp_path: Path) -> None:
    """Processes are known by pid and start time."""
    (tmp_path / "log").mkdir()
    book = ProcessBook(tmp_path)
    process = book.start("sleeper", ["sleep", "60"], {"PATH": os.environ["PATH"]})
    assert book.get("sleeper") == process
    assert not Process(process.pid, "1").alive
    assert Process(os.getpid(), start_time(os.getpid())).alive
    begun = time.monotonic()
    book.stop(["sleeper", "never started"])
    assert time.monotonic() - begun < 4
    assert not process.alive
    assert book.names() == []
