"""Groups of real processes over gloo: sums, shared values, the rendezvous, and ends within a bounded time."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ser_core.errors import Interrupted
from ser_core.parallel.group import Group, abort, buckets, process_group, stop_together, sum_gradients
from ser_core.parallel.rendezvous import addresses, rendezvous
from tests.ser_core.parallel.teams import FolderTeam, results, run_team

CPU = torch.device("cpu")


def test_a_group_is_aborted_without_the_other_processes(tmp_path: Path) -> None:
    """And a group that could not be destroyed is a communication error in the next stage."""
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    with pytest.raises(ConnectionError, match="could not be destroyed"), process_group(FolderTeam(tmp_path, 0, 2), CPU, 1.0):
        pass
    abort()
    assert not dist.is_initialized()


def stopping(team: FolderTeam, kind: str) -> str:
    """Work without communication during which process 1 is asked to stop."""
    with process_group(team, CPU, 20.0) as group:
        try:
            with stop_together(group):
                if team.rank == 1 and kind == "stop":
                    raise Interrupted("asked")
        except Interrupted as ending:
            return str(ending)
    return f"{team.promises[-1]:g}"


@pytest.mark.slow
def test_work_without_communication_is_interrupted_in_all_processes(tmp_path: Path) -> None:
    assert results(run_team(tmp_path / "stop", 2, stopping, "stop")) == ["another process was asked to stop", "asked"]
    assert results(run_team(tmp_path / "none", 2, stopping, "none")) == ["0", "0"]


def talking(team: FolderTeam, count: int) -> list[Any]:
    """Results of all collective operations in groups one after the other, as stages of one task create them."""
    told: list[Any] = []
    for number in range(count):
        with process_group(team, CPU, 20.0) as group:
            tensors = [torch.full((3, 2), float(team.rank)), torch.arange(4.0).reshape(2, 2).T]
            group.all_reduce_(tensors)
            own = torch.full((team.rank, 2), float(team.rank))
            copied = torch.full((3,), team.rank + number, dtype=torch.int64)
            group.broadcast_([copied, torch.zeros(0)])
            told.append(
                {
                    "sums": [tensor.tolist() for tensor in tensors],
                    "any": [group.any(team.rank == 1), group.any(False)],
                    "exact": group.all_reduce(np.array([1 / 3 if team.rank == 1 else 0.0]))[0] == 1 / 3,
                    "shared": group.broadcast_object({"rank": team.rank}),
                    "copied": copied.tolist(),
                    "collected": [rows.tolist() for rows in group.gather(own, range(group.size))],
                }
            )
    return told


def test_collective_operations(tmp_path: Path) -> None:
    """In two groups one after the other, on ports chosen by the kernel."""
    for rank, told in enumerate(results(run_team(tmp_path / "team", 3, talking, 2))):
        for number, each in enumerate(told):
            assert each["sums"] == [[[3.0, 3.0]] * 3, [[0.0, 6.0], [3.0, 9.0]]]
            assert each["any"] == [True, False]
            assert each["exact"]
            assert each["shared"] == {"rank": 0}
            assert each["copied"] == [number] * 3
            assert each["collected"] == ([[], [[1.0, 1.0]], [[2.0, 2.0]] * 2] if rank == 0 else [])


def test_the_store_of_another_job_is_detected(tmp_path: Path) -> None:
    """An address of the leader may lead to another job's store, which does not have the token, or to nothing."""
    other_job = TCPStore("127.0.0.1", 0, None, True, timeout=timedelta(seconds=5), wait_for_workers=False)
    team = FolderTeam(tmp_path, 1, 2)
    (tmp_path / "shared-0").write_text(json.dumps({"addresses": ["127.0.0.1", "127.0.0.2"], "port": other_job.port, "token": "mine"}))
    with pytest.raises(ConnectionError, match=r"no way to the leader.*127\.0\.0\.1: the store of another job"):
        rendezvous(team, 5.0)


def test_loopback_is_tried_last() -> None:
    found = addresses()
    assert found[-1] == "127.0.0.1"
    assert len(set(found)) == len(found)


@given(sizes=st.lists(st.integers(0, 50), max_size=40), limit=st.integers(1, 60))
def test_buckets_are_consecutive_and_within_the_limit(sizes: list[int], limit: int) -> None:
    found = buckets(sizes, limit)
    assert [index for bucket in found for index in bucket] == list(range(len(sizes)))
    assert all(len(bucket) == 1 or sum(sizes[index] for index in bucket) <= limit for bucket in found)


def test_a_group_of_one_changes_nothing() -> None:
    group, parameter = Group(), nn.Parameter(torch.ones(2))
    shown, told = sum_gradients(group, [parameter], torch.ones(2), (3, True))
    assert (shown.tolist(), tuple(told), parameter.grad) == ([1.0, 1.0], (3, True), None)
    assert (group.is_leader, group.any(True), group.broadcast_object("token")) == (True, True, "token")
    assert [rows.tolist() for rows in group.gather(torch.ones(2, 1), [2])] == [[[1.0], [1.0]]]
