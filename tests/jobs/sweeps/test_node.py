"""The nodes of a sweep's allocation, on a real Slurm whose nodes have networks of their own: two sweeps at once, both ways to start Ray."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from jobs.experiment.config import SlurmSite
from jobs.slurm.client import SlurmClient
from jobs.store.snapshot import take_snapshot
from jobs.sweeps.allocation import job_of, log_file, submit
from jobs.sweeps.ray.containment import descendants, private_table, private_table_works
from jobs.sweeps.ray.start import NodeInfo, Rendezvous, Start, all_symmetric, free_ports, granted, head_options, options
from jobs.sweeps.records import Sweep
from tests.jobs.slurm_cases import until
from tests.jobs.sweeps.sweep_cases import noted, source_of, sweep_of
from tests.slurm_cluster import Cluster

# Ray misses a node that is cut off within seconds, the first one too.
HASTE = {f"RAY_health_check_{key}_ms": value for key, value in {"initial_delay": "0", "period": "500", "timeout": "1000"}.items()}
HASTE["RAY_gcs_rpc_server_reconnect_timeout_s"] = "3"
NODES = 2


@dataclass(frozen=True)
class Submitted:
    """A sweep in Slurm."""

    sweep: Sweep
    job: str

    def fact(self, cluster: Cluster, key: str) -> str:
        """What scontrol says of its job."""
        words = dict(word.partition("=")[::2] for word in cluster.run("scontrol", "show", "job", self.job).split())
        return words[key]

    @property
    def log(self) -> str:
        return log_file(self.sweep).read_text()


def begin(folder: Path, name: str, short: Path, *, own_start: bool = False, nodelist: str = "n[1-2]", restarts: int = 5) -> Submitted:
    """Submit a sweep whose driver is the stand-in."""
    site = SlurmSite(environment={**HASTE, "TMPDIR": str(short)}, extra={"nodelist": nodelist} if nodelist else {})
    sweep = sweep_of(folder, name, site, nodes=NODES, gpus=1)
    source = source_of(folder)
    job = replace(job_of(sweep, take_snapshot(source, sweep.layout).path), restarts=restarts)
    if own_start:
        place = job.command.index("--")
        job = replace(job, command=(*job.command[:place], "--own-start", *job.command[place:]))
    return Submitted(sweep, submit(sweep, source, SlurmClient(), job=job))


def processes(cluster: Cluster, node: str) -> list[str]:
    """Command lines of all that runs on a node and is neither Slurm's nor the node's own."""
    init = cluster.processes.get(f"init-{node}")
    found = []
    for pid in descendants(init.pid) if init else ():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
            found += [words] if words and not words.startswith(("slurmd", "slurmstepd")) else []
    return found


def completed(cluster: Cluster, one: Submitted) -> bool:
    return one.fact(cluster, "JobState") == "COMPLETED"


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder for temporary files whose name leaves room for those of sockets below it."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(slurm_networks: Cluster) -> Cluster:
    """The cluster of this module."""
    if not slurm_networks.settings.networks:
        pytest.skip("no network namespaces here: nodes of a test cluster cannot have addresses of their own")
    return slurm_networks


@pytest.mark.slurm
def test_two_sweeps_on_the_same_nodes(cluster: Cluster, tmp_path: Path, short: Path) -> None:
    """Each has a Ray of its own, of its own nodes and what they were given, however it was started. One is told that its time is up, goes
    back into the queue and goes on. Both go on when a node is lost, end with 0, and leave nothing on any node.
    """
    symmetric, own = begin(tmp_path, "symmetric", short, own_start=False), begin(tmp_path, "own", short, own_start=True)
    seen = {one.job: noted(one.sweep, "seen") for one in (symmetric, own)}
    assert "by `ray symmetric-run`" in symmetric.log
    assert "by `ray start`" in own.log
    assert seen[symmetric.job]["address"] != seen[own.job]["address"]
    for facts in seen.values():
        assert facts["ran"] == ["n1", "n2"]
        given = {name: (each["CPU"], each["GPU"], each["memory"] < 2**30) for name, each in facts["given"].items()}
        assert given == {"n1": (2.0, 1.0, True), "n2": (2.0, 1.0, True)}
        assert Path(facts["cwd"]).parent.name == "snapshots"

    cluster.run("scancel", "--batch", "--signal=USR1", symmetric.job)  # what Slurm does before the time limit
    until(lambda: symmetric.fact(cluster, "JobState") == "PENDING", 30)
    assert own.fact(cluster, "JobState") == "RUNNING"
    assert noted(symmetric.sweep, "seen", restart=1)["ran"] == ["n1", "n2"]
    assert not symmetric.sweep.folder.stop.exists()

    cluster.kill_node("n2")
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    assert noted(symmetric.sweep, "lost", restart=1)["ran"] == ["n1"]
    assert noted(own.sweep, "lost")["ran"] == ["n1"]
    for one in (symmetric, own):
        (one.sweep.folder.path / "finish").touch()
        until(functools.partial(completed, cluster, one), 30)
        assert one.fact(cluster, "ExitCode") == "0:0"
        assert not list((one.sweep.folder.path / "nodes").iterdir())
    assert own.fact(cluster, "Restarts") == "0"
    until(lambda: not processes(cluster, "n1"), 10)
    assert len(list(short.iterdir())) <= 2, "only of the node that was switched off"


@pytest.mark.slurm
def test_the_first_node_is_lost_and_the_last_restart_ends(
    slurm_cluster: Cluster, tmp_path: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other node puts the job back, and it goes on elsewhere. Told that its time is up, and without a restart left, it ends, and all
    nodes leave within seconds: no process and no folder is left. (These nodes share an address, so `ray symmetric-run` could not tell
    which is the first, and is not used.)
    """
    monkeypatch.setenv("SLURM_CONF", str(slurm_cluster.slurm_conf))
    one = begin(tmp_path, "shared", short, nodelist="", restarts=1)
    there = set(noted(one.sweep, "seen")["given"])
    assert len(there) == NODES
    assert "by `ray start`" in one.log
    first = one.fact(slurm_cluster, "BatchHost")
    slurm_cluster.kill_node(first)
    slurm_cluster.run("scontrol", "update", f"nodename={first}", "state=down", "reason=test")
    try:
        again = set(noted(one.sweep, "seen", restart=1)["given"])
        assert len(again) == NODES
        assert first not in again
        assert any("raylet" in words for node in again for words in processes(slurm_cluster, node))
        slurm_cluster.run("scancel", "--batch", "--signal=USR1", one.job)
        until(lambda: one.fact(slurm_cluster, "JobState") == "FAILED", 15)
        assert one.fact(slurm_cluster, "ExitCode") == "3:0"
        until(lambda: not [words for node in again for words in processes(slurm_cluster, node)], 5)
        assert len(list(short.iterdir())) <= 1, "only of the node that was switched off"
    finally:
        slurm_cluster.start_node(first)
        until(lambda: slurm_cluster.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N").count("n") == 3)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_CPUS_ON_NODE": "8"}, {"num-cpus": 8, "num-gpus": 0}),
        ({"SLURM_CPUS_PER_TASK": "4", "SLURM_CPUS_ON_NODE": "64", "CUDA_VISIBLE_DEVICES": "2,5"}, {"num-cpus": 4, "num-gpus": 2}),
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_GPUS_ON_NODE": "3"}, {"num-cpus": 8, "num-gpus": 3}),
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "3"}, {"num-cpus": 1, "num-gpus": 0}),
        ({"SLURM_CPUS_ON_NODE": "2", "SLURM_MEM_PER_NODE": "4096"}, {"num-cpus": 2, "num-gpus": 0, "memory": (4096 - 80) * 2**20}),
    ],
)
def test_a_node_offers_what_the_job_was_given(environment: dict[str, str], expected: dict[str, int]) -> None:
    """Not all resources of the machine."""
    assert granted(environment) == expected


def test_no_port_is_fixed() -> None:
    """Every option of the installed `ray start` that names a port is given, unless its default lets Ray choose."""
    from ray.scripts.scripts import start

    given = {word.partition("=")[0] for word in [*options({}, Path("/tmp/x")), *head_options(1234), "--port=1"]}  # noqa: S108
    fixed = [
        option.opts[0]
        for option in start.params
        if "port" in (option.name or "") and isinstance(option.default, int) and option.default and not isinstance(option.default, bool)
    ]
    assert set(fixed) <= given
    assert "--ray-client-server-port" in given, "its default is set later"
    assert len(set(free_ports("127.0.0.1", 20))) == 20


def test_when_symmetric_run_can_be_used() -> None:
    """With all nodes, a PID namespace on each, and distinct addresses."""
    first, second = NodeInfo("n1", ("10.0.0.1", "127.0.0.1"), True), NodeInfo("n2", ("10.0.0.2", "127.0.0.1"), True)
    assert all_symmetric([first, second], 2)
    assert all_symmetric([first], 1)
    assert not all_symmetric([first], 2)
    assert not all_symmetric([first, replace(second, symmetric=False)], 2)
    assert not all_symmetric([first, replace(second, addresses=("10.0.0.1",))], 2)
    assert not all_symmetric([first, replace(second, addresses=("127.0.0.1",))], 2)


def test_a_rendezvous(tmp_path: Path) -> None:
    """Its folder is private; announcements are found, and the first exit code counts."""
    rendezvous = Rendezvous(tmp_path / "nodes" / "1.0")
    assert rendezvous.start() is None
    assert rendezvous.code() is None
    rendezvous.open()
    rendezvous.open()
    assert rendezvous.folder.stat().st_mode & 0o777 == 0o700
    assert rendezvous.token.stat().st_mode & 0o777 == 0o600
    node = NodeInfo("n1", ("10.0.0.1",), True)
    rendezvous.join(node)
    rendezvous.announce(Start(1, "10.0.0.1", 1234, symmetric=True))
    assert rendezvous.nodes() == (node,)
    assert rendezvous.start() == Start(1, "10.0.0.1", 1234, symmetric=True)
    rendezvous.end(3)
    rendezvous.end(0)
    assert rendezvous.code() == 3


@pytest.fixture
def outside() -> Iterator[subprocess.Popen[bytes]]:
    """An unrelated process."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_a_pid_namespace_isolates_and_kills_its_processes(outside: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """It hides other processes, returns the command's exit code, and kills processes left in it."""
    if not private_table_works(os.environ):
        pytest.skip("this user may have no process table of its own here")
    mark = tmp_path / "pids"
    script = f"setsid sleep 97531 & ls /proc | grep -c '^[0-9]' >{mark}; sleep 0.2; exit 7"
    done = subprocess.run(private_table(["sh", "-c", script]), cwd=Path(__file__).parents[3], timeout=20, check=False)
    assert done.returncode == 7
    assert int(mark.read_text()) <= 6
    assert outside.poll() is None
    assert not [pid for pid in descendants(1) if _command(pid).endswith("97531")]


def test_descendants_are_killed(outside: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """Also those in other sessions and orphans; no other processes."""
    program = (
        "import json, os, subprocess, sys, time\n"
        "from jobs.sweeps.ray.containment import adopt_orphans, descendants, end_descendants\n"
        "adopt_orphans()\n"
        "subprocess.run(['sh', '-c', 'setsid sleep 86420 & setsid setsid sleep 86420 & exit 0'])\n"
        "time.sleep(0.5)\n"
        "found = descendants(os.getpid())\n"
        "print(json.dumps([found, end_descendants(), descendants(os.getpid())]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=30, check=True
    )
    found, gone, left = json.loads(done.stdout)
    assert len(found) >= 2
    assert gone
    assert left == []
    assert outside.poll() is None
    assert not any(_command(pid).endswith("86420") for pid in found)


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
    return ""
