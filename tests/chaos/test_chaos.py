"""The parts of a chaos run: its schedule, its preloaded errors, and its checks, each without Slurm."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

from tests.chaos.check import overlaps
from tests.chaos.injection import build, set_clock, set_error
from tests.chaos.kinds import HOUR, KINDS, LOST_REPLY, missing
from tests.chaos.schedule import schedule

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
