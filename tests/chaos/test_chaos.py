"""The parts of a chaos run: its schedule, its preloaded errors, and its checks, each without Slurm."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from tests.chaos.check import overlaps
from tests.chaos.injection import build, set_clock, set_error
from tests.chaos.kinds import HOUR, KINDS, LOST_REPLY, missing
from tests.chaos.scene import Scene
from tests.chaos.schedule import schedule
from tests.chaos.storage_faults import hide_results, remount_read_only
from tests.slurm_cluster.cluster import Cluster, with_mounts_of
from tests.slurm_cluster.configuration import ClusterSettings
from tests.waiting import wait_until

WEIGHTS = {"a": 3, "b": 1}
PROBE = """
import json, os, sys, time
def tried(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return error.errno
    return 0
print(json.dumps([tried(os.stat, sys.argv[1]), tried(os.mkdir, sys.argv[1] + "/new"), tried(os.stat, "/"), time.time()]))
"""


def test_a_seed_gives_a_schedule_with_every_kind_in_each_round() -> None:
    first = list(islice(schedule(1, WEIGHTS), 12))
    assert first == list(islice(schedule(1, WEIGHTS), 12))
    assert first != list(islice(schedule(2, WEIGHTS), 12))
    for begin in (0, 4, 8):
        assert sorted(planned.kind for planned in first[begin : begin + 4]) == ["a", "a", "a", "b"]
    assert len({planned.seed for planned in first}) == 12
    assert 0 < sum(planned.pause == 0 for planned in first) < 12, "several at the same time, but not all"


def test_a_kind_that_never_struck_is_named() -> None:
    counts = dict.fromkeys((*KINDS, HOUR, LOST_REPLY), 1)
    assert missing(counts, root=True) == []
    assert missing({**counts, "disk full": 0, "worker killed": 0}, root=True) == ["worker killed", "disk full"]
    assert missing({**counts, "disk full": 0, "worker killed": 0}, root=False) == ["worker killed"]


def test_overlapping_attempts_are_found_but_for_those_of_a_node_that_was_cut_off(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("0001 1 10.0 n1 5\n0001 2 11.0 n1 5\n0002 1 12.0 n2 6\n0001 3 13.0 n1 5\n")
    assert len(overlaps(tmp_path)) == 1
    assert overlaps(tmp_path, [("n1", 10.5, 20.0)]) == []
    assert len(overlaps(tmp_path, [("n1", 0.0, 9.0), ("n3", 0.0, 20.0)])) == 1


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_errors_and_clocks_are_injected_into_the_named_target_alone(tmp_path: Path) -> None:
    """A stale handle for one job, no space for everything on one node, a clock an hour behind; other jobs and paths see nothing."""
    control, root = tmp_path / "control", tmp_path / "root"
    control.mkdir()
    root.mkdir()
    variables = build(control, root)
    set_error(control, "job-7", errno.ESTALE, 1000, 60)
    set_error(control, "node-n1", errno.ENOSPC, 1000, 60)
    set_error(control, "job-9", errno.EIO, 1000, -1)
    set_clock(control, "n2", -3600, 60)

    def probe(job: str, node: str) -> list[float]:
        environment = {**os.environ, **variables, "SLURM_JOB_ID": job, "SLURMD_NODENAME": node}
        command = [sys.executable, "-I", "-S", "-c", PROBE, str(root)]
        found: list[float] = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
        (root / "new").rmdir() if (root / "new").exists() else None
        return found

    *stale, now = probe("7", "n3")
    assert stale == [errno.ESTALE, errno.ESTALE, 0]
    assert abs(now - time.time()) < 60
    assert probe("8", "n1")[:3] == [0, errno.ENOSPC, 0]
    *none, behind = probe("9", "n2")
    assert none == [0, 0, 0], "the time of this error is over"
    assert abs(behind + 3600 - time.time()) < 60


@pytest.mark.skipif(os.getuid() != 0, reason="mounts need root")
@pytest.mark.parametrize(("fault", "seen_during"), [(hide_results, False), (remount_read_only, True)])
def test_what_covers_the_results_on_a_node_is_taken_away_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Scene, random.Random], bool], seen_during: bool
) -> None:
    """Otherwise every fault of these kinds costs a node for the rest of the run, and none is left in the end."""
    cluster = Cluster(tmp_path / "slurm", ClusterSettings(nodes=1))
    for folder in ("log", "processes"):
        (cluster.folder / folder).mkdir(parents=True)
    results = tmp_path / "results"
    results.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(results)], check=True)
    node = ["unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc", "sleep", "60"]
    try:
        (results / "file").touch()
        outer = cluster.processes.start("unshare-n1", node, os.environ)
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        assert wait_until(lambda: children.exists() and bool(children.read_text().split()))
        init = cluster.processes.record("init-n1", int(children.read_text().split()[0]))
        assert wait_until(lambda: Path(f"/proc/{init.pid}/comm").read_text().strip() == "sleep")

        def tried(*command: str) -> bool:
            return subprocess.run(with_mounts_of(init, *command), check=False, capture_output=True).returncode == 0

        scene = Scene(cluster, tmp_path, results, tmp_path)
        monkeypatch.setattr(scene, "busy_nodes", lambda: ["n1"])
        monkeypatch.setattr(scene, "waiting_link", lambda: "7")
        monkeypatch.setattr(scene, "quietly", lambda *command: "")
        monkeypatch.setattr(scene, "excluded_nodes", lambda job: ["n1"])
        assert not hide_results(scene, random.Random(1)), "no link can be sent there"
        monkeypatch.setattr(scene, "excluded_nodes", lambda job: [])
        assert fault(scene, random.Random(1))
        assert tried("ls", str(results / "file")) is seen_during
        assert not tried("touch", str(results / "file"))
        scene.work(everything=True)
        assert tried("touch", str(results / "file"))
        assert scene.mounted == set()
    finally:
        cluster.processes.stop(["init-n1", "unshare-n1"], signal.SIGKILL)
        subprocess.run(["umount", "--lazy", str(results)], check=True)


def test_a_command_that_fails_is_no_fault(tmp_path: Path) -> None:
    scene = Scene(Cluster(tmp_path / "slurm", ClusterSettings(nodes=1)), tmp_path, tmp_path, tmp_path)
    assert scene.succeeds("true")
    assert not scene.succeeds("false")
    scene.away = True
    assert not scene.succeeds("true"), "slurmctld is stopped"
