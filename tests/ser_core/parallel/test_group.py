"""Groups of real processes over gloo: sums, shared values, the rendezvous, and ends within a bounded time."""

from __future__ import annotations

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
from ser_core.parallel.group import DistributedGroup, Group, abort, buckets, process_group, stop_together, sum_gradients
from ser_core.parallel.rendezvous import TeamStore, rendezvous
from tests.ser_core.parallel.teams import FolderTeam, results, run_team

CPU = torch.device("cpu")
LISTEN = "0A"  # state of a socket in /proc/net/tcp


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
                    "shared": group.broadcast_json({"rank": team.rank}),
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


def listening(team: FolderTeam, how: str) -> list[str]:
    """IPv4 and IPv6 addresses on which this process listens while its group exists."""
    with process_group(team, CPU, 20.0) as group:
        group.barrier()
        inodes = {link.readlink().name for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
        rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]]
        found = sorted({row[1].partition(":")[0] for row in rows if row[3] == LISTEN and f"socket:[{row[9]}]" in inodes})
        group.barrier()
    return found


@pytest.mark.slow
def test_processes_of_one_machine_listen_on_loopback_only(tmp_path: Path) -> None:
    """Nobody outside of the machine can reach the connections of a team that needs none."""
    assert results(run_team(tmp_path / "team", 2, listening, "")) == [["0100007F"]] * 2  # 127.0.0.1 in /proc/net/tcp


def alone(team: FolderTeam, seconds: float) -> str:
    """What a process says whose team is not complete."""
    try:
        with process_group(team, CPU, seconds):
            return "a group"
    except ConnectionError as error:
        return str(error)


@pytest.mark.slow
def test_without_another_process_there_is_no_group(tmp_path: Path) -> None:
    """A communication error within the group's timeout."""
    (tmp_path / "team").mkdir()
    assert "process 0 of 2" in alone(FolderTeam(tmp_path / "team", 0, 2), 1.0)


def test_a_process_on_the_leaders_machine_uses_the_leaders_address(tmp_path: Path) -> None:
    """Which other machines can reach; without other machines the processes use loopback."""
    for leaders, own, used in (
        ("10.0.0.1", "127.0.0.1", "10.0.0.1"),
        ("10.0.0.1", "10.0.0.2", "10.0.0.2"),
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
    ):
        folder = tmp_path / f"{leaders}-{own}"
        folder.mkdir()
        assert rendezvous(FolderTeam(folder, 0, 2, address=leaders), 1.0)[1] == leaders
        assert rendezvous(FolderTeam(folder, 1, 2, address=own), 1.0)[1] == used


def test_a_store_has_what_any_process_has_set(tmp_path: Path) -> None:
    """Bytes arrive as they are; a key that nobody sets ends the wait with a communication error."""
    first, second = (TeamStore(FolderTeam(tmp_path, rank, 2), 0.1) for rank in range(2))
    first.set("a/b", bytes(range(256)))
    second.set("c", "text")
    assert (first.get("a/b"), second.get("a/b"), first.get("c")) == (bytes(range(256)), bytes(range(256)), b"text")
    assert (first.check(["a/b", "c"]), second.check(["c", "d"])) == (True, False)
    with pytest.raises(ConnectionError):
        first.get("d")
    with pytest.raises(ConnectionError):
        first.wait(["d"])


def test_values_travel_as_json(tmp_path: Path) -> None:
    """No value of another process is unpickled: what JSON does not have is an error."""
    group = DistributedGroup(FolderTeam(tmp_path, 0, 2), 1.0)
    assert group.broadcast_json({"step": (3, 0.1)}) == {"step": [3, 0.1]}
    with pytest.raises(TypeError):
        group.broadcast_json(Path("a"))


@given(sizes=st.lists(st.integers(0, 50), max_size=40), limit=st.integers(1, 60))
def test_buckets_are_consecutive_and_within_the_limit(sizes: list[int], limit: int) -> None:
    found = buckets(sizes, limit)
    assert [index for bucket in found for index in bucket] == list(range(len(sizes)))
    assert all(len(bucket) == 1 or sum(sizes[index] for index in bucket) <= limit for bucket in found)


def test_a_group_of_one_changes_nothing() -> None:
    group, parameter = Group(), nn.Parameter(torch.ones(2))
    shown, told = sum_gradients(group, [parameter], torch.ones(2), (3, True))
    assert (shown.tolist(), tuple(told), parameter.grad) == ([1.0, 1.0], (3, True), None)
    assert (group.is_leader, group.any(True), group.broadcast_json("token")) == (True, True, "token")
    assert [rows.tolist() for rows in group.gather(torch.ones(2, 1), [2])] == [[[1.0], [1.0]]]
