"""Which tasks fit on this machine: never more than it has, the most urgent first, none starved."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.experiment.config import Resources
from jobs.worker.machine import Capacity, Needs, capacity_here, needs_here, tasks_to_start

NEEDS = st.builds(Needs, cpus=st.integers(1, 4), gpus=st.integers(0, 2), memory_gb=st.sampled_from([1.0, 4.0, 8.0]))
SHARING = st.builds(Needs, cpus=st.just(1), gpus=st.integers(0, 2), memory_gb=st.just(0.5), share=st.integers(1, 4))


@given(st.lists(NEEDS, max_size=8))
@settings(max_examples=100, deadline=None)
def test_tasks_that_start_fit_together(waiting: list[Needs]) -> None:
    """Started tasks fit together, get as many GPUs as they request, and share none."""
    capacity = Capacity(4, ("0", "1"), 8.0)
    started = tasks_to_start(waiting, [], capacity)
    assert sum(waiting[index].cpus for index, _ in started) <= 4
    assert sum(waiting[index].memory_gb for index, _ in started) <= 8.0
    devices = [device for _, given_ in started for device in given_]
    assert len(devices) == len(set(devices))
    assert all(len(given_) == waiting[index].gpus for index, given_ in started)
    assert not waiting or started[0][0] == 0  # on an idle machine the most urgent always starts


@pytest.mark.slow
@given(st.lists(SHARING, max_size=12), st.lists(SHARING, max_size=3))
@settings(max_examples=200, deadline=None)
def test_no_gpu_is_shared_by_more_tasks_than_each_of_them_allows(waiting: list[Needs], begun: list[Needs]) -> None:
    """Whatever runs already: each of n tasks on one GPU allows n; a task that needs a GPU of its own has it."""
    capacity = Capacity(16, ("0", "1"), 8.0)
    in_use = [(begun[index], devices) for index, devices in tasks_to_start(begun, [], capacity)]
    found = [*in_use, *((waiting[index], devices) for index, devices in tasks_to_start(waiting, in_use, capacity))]
    for device in capacity.gpus:
        together = [needs for needs, devices in found if device in devices]
        assert sum(Fraction(1, needs.share) for needs in together) <= 1
        assert all(len(together) == 1 for needs in together if needs.share == 1)
    assert all(len(set(devices)) == needs.gpus for needs, devices in found)


def test_the_freest_gpu_first() -> None:
    """Two per GPU: four tasks are spread, a fifth waits; one that needs a whole GPU is not delayed for ever by those that share."""
    needs, two = Needs(1, 1, 1.0, share=2), Capacity(8, ("0", "1"), 8.0)
    assert [devices for _, devices in tasks_to_start([needs] * 5, [], two)] == [("0",), ("1",), ("0",), ("1",)]
    whole_one = Needs(1, 1, 1.0)
    in_use = [(needs, ("0",)), (needs, ("1",))]
    assert tasks_to_start([whole_one, needs, needs], in_use, two) == [(1, ("1",))], "GPU 0 is being emptied"


def test_a_large_urgent_task_is_not_passed_by_small_ones() -> None:
    """Resources that the first task waits for are reserved for it."""
    large, small = Needs(4, 0, 1.0), Needs(1, 0, 1.0)
    assert tasks_to_start([large, small, small], [(small, ())], Capacity(4, (), 8.0)) == []
    assert [index for index, _ in tasks_to_start([small, large, small], [], Capacity(4, (), 8.0))] == [0]


def test_tasks_without_gpu_pass_those_that_wait_for_one() -> None:
    """Cores that no task before them needs are used."""
    on_gpu, on_cpu = Needs(1, 1, 1.0), Needs(1, 0, 1.0)
    assert tasks_to_start([on_gpu, on_cpu], [(on_gpu, ("0",))], Capacity(4, ("0",), 8.0)) == [(1, ())]


def test_devices_in_use_are_not_handed_out() -> None:
    """A second task gets the other GPU."""
    needs = Needs(1, 1, 1.0)
    assert tasks_to_start([needs], [(needs, ("4",))], Capacity(8, ("4", "6"), 8.0)) == [(0, ("6",))]


def test_a_request_larger_than_the_machine_gets_the_machine() -> None:
    """A request made for a large node runs alone on a small one, on CPUs where there is no GPU."""
    assert needs_here(Resources(cpus=64, gpus=8, nodes=2, memory_gb=512), Capacity(2, (), 23.5)) == Needs(2, 0, 23.5)
    assert needs_here(Resources(cpus=1, gpus=1, nodes=2, memory_gb=2), Capacity(2, ("0", "1", "2"), 8)) == Needs(2, 2, 4)


@pytest.mark.parametrize(("visible", "gpus"), [("", ()), ("-1", ()), ("0", ("0",)), ("2, GPU-abc", ("2", "GPU-abc")), ("1,-1,2", ("1",))])
def test_cuda_visible_devices_limits_the_gpus(monkeypatch: pytest.MonkeyPatch, visible: str, gpus: tuple[str, ...]) -> None:
    """Everything from the first invalid name on is ignored, as CUDA does."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert capacity_here().gpus == gpus


def test_gpus_are_counted_by_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One GPU per line; MIG lines below them do not count; a driver that fails means none."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    command = tmp_path / "nvidia-smi"
    command.write_text(
        "#!/bin/sh\necho 'GPU 0: X (UUID: GPU-1)'\necho '  MIG 1g.10gb Device 0: (UUID: MIG-1)'\necho 'GPU 1: X (UUID: GPU-2)'\n"
    )
    command.chmod(0o755)
    assert capacity_here().gpus == ("0", "1")
    assert capacity_here().gpu_bytes is None, "no number among these words"
    command.write_text("#!/bin/sh\ncase $1 in -L) echo 'GPU 0: X'; echo 'GPU 1: X';; *) echo 81920; echo 40960;; esac\n")
    assert capacity_here().gpu_bytes == 40960 << 20
    command.write_text("#!/bin/sh\necho 'GPU 0: stale'\nexit 9\n")
    assert capacity_here().gpus == ()


def test_cpu_affinity_limits_the_cores() -> None:
    """Only cores of the affinity mask count."""
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert capacity_here().cpus == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert 1 <= capacity_here().cpus <= len(allowed)
    assert capacity_here().memory_gb > 0.1
