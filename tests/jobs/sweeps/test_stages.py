"""Stages as tasks of a real Ray: computed once on assigned resources, stopped with a checkpoint, resumed after losses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.control.controller import Report, read_facts, run_local
from jobs.control.facts import Phase
from jobs.control.observe import PassContext
from jobs.errors import InternalError
from jobs.experiment.config import Resources
from jobs.store.failures import FailureClass
from jobs.store.records import Ending, read_outcome
from jobs.sweeps.ray.executor import fits, machines_of, needs_of, options_of
from jobs.sweeps.ray.task import capacity_given, in_order
from jobs.worker.machine import Capacity, Needs
from tests.jobs import fake_registry, local_launch
from tests.jobs.sweeps.stage_cases import (
    REPOSITORY,
    desired,
    executor,
    graph_of_one,
    layout_of,
    seen,
    submit,
    wait_until,
)

SMALL, LARGE = Capacity(4, (), 16.0), Capacity(8, ("0", "1"), 32.0)


def test_a_grid_with_failures_ends_complete(tmp_path: Path, ray_here: Capacity) -> None:
    """As with the local executor: the failure policy applies, and every stage succeeds once, as a child of a warm fork server."""
    failing = {"finetune vft 1 0": "comm:1", "finetune vft 1 1": "kill:1", "tapt tapt 1 0": "oom:1"}
    wanted = local_launch.desired(tmp_path, {"failing": failing})
    lines: list[str] = []
    with executor(tmp_path) as stages:
        report = run_local(wanted, stages, on_event=lambda event: lines.append(event.line))
        assert stages.idle
    assert report.complete
    starts, ends = (fake_registry.count(tmp_path / "corpus", what) for what in ("starts", "ends"))
    assert set(ends.values()) == {1}
    assert sorted(starts.values()) == [1] * 17 + [2, 2, 2]
    assert any("SIGKILL" in line and "tried again" in line for line in lines)
    found = seen(tmp_path).values()
    assert len(found) == len(wanted.graph.nodes) == 20
    assert {each["CUDA_VISIBLE_DEVICES"] for each in found} == {""}  # the GPUs are not theirs
    assert {each["OMP_NUM_THREADS"] for each in found} == {"1"}
    assert len({each["SER_GRID_JOB"] for each in found}) == 20
    assert len({each["server"] for each in found}) <= 2 + 1  # of two workers, one begun anew at the most


def test_stages_see_the_gpus_that_ray_assigned(tmp_path: Path, ray_here: Capacity) -> None:
    """By their physical names, one for each stage at a time, both for one that wants two; workers that had a GPU are used again."""
    recipe = {"failing": {"tapt tapt * *": "meet:2"}}
    graph = fake_registry.make_graph(recipe, methods=("tapt",), folds=("1", "2"), seeds=1)
    with executor(tmp_path, Resources(cpus=1, gpus=1, memory_gb=0.1, minutes=1)) as stages:
        assert run_local(desired(tmp_path, graph), stages).complete
    found = seen(tmp_path)
    assert {found[key]["CUDA_VISIBLE_DEVICES"] for key, node in graph.nodes.items() if node.stage == "tapt"} == {"5", "7"}
    assert len({each["server"] for each in found.values()}) <= 3
    both, folder = fake_registry.make_graph(methods=("vft",), folds=("1",), seeds=1), tmp_path / "both"
    with executor(folder, Resources(cpus=99, gpus=4, memory_gb=999.0, minutes=1, processes=1)) as stages:
        assert run_local(desired(folder, both), stages).complete
    (last,) = seen(folder).values()
    assert (last["CUDA_VISIBLE_DEVICES"], last["OMP_NUM_THREADS"]) == ("5,7", "2")  # cut to the machine


def test_two_executors_compute_a_stage_once(tmp_path: Path, ray_here: Capacity) -> None:
    """Two trials submit the same stages at the same time; the second waits for the results of the first without using a core."""
    graph = fake_registry.make_graph({"seconds": 0.2}, methods=("ptapt", "tapt"), folds=("1",), seeds=2)
    reports: list[Report] = []

    def trial() -> None:
        with executor(tmp_path) as stages:
            reports.append(_run(stages, tmp_path, graph))

    threads = [threading.Thread(target=trial) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(150)
    assert [report.complete for report in reports] == [True, True]
    assert set(fake_registry.count(tmp_path / "corpus", "starts").values()) == {1}
    assert len(fake_registry.count(tmp_path / "corpus", "ends")) == len(graph.nodes)


def test_waiting_for_a_stage_of_another_trial_uses_no_core(tmp_path: Path, ray_here: Capacity) -> None:
    """The other stage of the second trial runs meanwhile on the only core that is left."""
    graph = fake_registry.make_graph({"failing": {"tapt tapt 1 0": "sleep:60"}}, methods=("tapt", "vft"), folds=("1",), seeds=1)
    tapt = next(key for key, node in graph.nodes.items() if node.stage == "tapt")
    vft = next(run.key for run in graph.runs if run.method == "vft")
    with executor(tmp_path) as first, executor(tmp_path) as second:
        submit(first, graph, tapt)
        wait_until(lambda: bool(fake_registry.count(tmp_path / "corpus", "starts")), first)
        submit(second, graph, tapt)  # as if it had looked before the claim was there
        ended = _all_ended(second)
        assert [each.code for each in ended] == [3]
        assert second.departures([tapt]) == {}
        facts = read_facts(graph, layout_of(tmp_path))
        assert facts[tapt].executed_by
        submit(second, graph, vft)
        assert [each.code for each in _all_ended(second)] == [0]
        first.stop(grace=20)
    assert fake_registry.count(tmp_path / "corpus", "starts")[tapt] == 1


def test_a_stopped_stage_is_resumed_from_its_checkpoint(tmp_path: Path, ray_here: Capacity) -> None:
    """Waiting stages are returned, running ones write checkpoints and exit; nothing counts as a failure."""
    graph = fake_registry.make_graph({"failing": {"tapt tapt 1 0": "sleep:60"}}, methods=("tapt",), folds=("1",), seeds=1)
    (tapt, run) = graph.nodes
    with executor(tmp_path) as stages:
        submit(stages, graph)
        wait_until(lambda: stages.in_flight()[tapt].phase is Phase.running, stages)
        assert stages.in_flight()[run].phase is Phase.queued  # and Ray has not been told of it
        assert [(each.keys, each.code) for each in stages.stop(grace=20)] == [((tapt,), 3)]
        assert stages.idle
        stages.close()
    outcome = read_outcome(layout_of(tmp_path).stage("tapt", tapt).attempt(1))
    assert outcome is not None
    assert (outcome.ending, outcome.kind) == (Ending.interrupted, FailureClass.interrupted.name)
    with executor(tmp_path) as stages:
        assert _run(stages, tmp_path, graph).complete
    assert fake_registry.count(tmp_path / "corpus", "starts") == {tapt: 2, run: 1}


@pytest.mark.parametrize("hurried", [False, True])
def test_a_stage_that_ignores_stop_is_killed(tmp_path: Path, ray_here: Capacity, hurried: bool) -> None:
    """In both cases its attempt is recorded as interrupted."""
    graph = graph_of_one("deaf:60")
    (key,) = graph.nodes
    with executor(tmp_path) as stages:
        submit(stages, graph)
        wait_until(lambda: bool(fake_registry.count(tmp_path / "corpus", "starts")), stages)
        begun = time.monotonic()
        ended = stages.stop(grace=60.0 if hurried else 1.0, hurry=lambda: hurried and time.monotonic() > begun + 0.2)
        assert time.monotonic() - begun < 30
    assert [each.signal for each in ended] == [signal.SIGKILL]
    outcome = read_outcome(layout_of(tmp_path).stage("finetune", key).attempt(1))
    assert outcome is not None
    assert outcome.kind == FailureClass.interrupted.name
    assert not _left_over(tmp_path)


def test_a_repeated_request_to_stop_counts_once(tmp_path: Path, ray_here: Capacity) -> None:
    """A worker that needs time for a checkpoint is not killed."""
    graph = graph_of_one("deaf:2.7")
    with executor(tmp_path) as stages:
        submit(stages, graph)
        wait_until(lambda: bool(fake_registry.count(tmp_path / "corpus", "starts")), stages)
        assert [(each.code, each.signal) for each in stages.stop(grace=20)] == [(0, None)]


def test_a_worker_of_ray_that_is_killed_leaves_nothing_behind(
    tmp_path: Path, ray_here: Capacity, capfd: pytest.CaptureFixture[str]
) -> None:
    """The fork server notices it, the stage writes a checkpoint and is resumed; the loss is only in the log."""
    graph = graph_of_one("sleep:60")
    (key,) = graph.nodes
    with executor(tmp_path) as stages:
        submit(stages, graph)
        wait_until(lambda: key in seen(tmp_path), stages)
        server = seen(tmp_path)[key]["server"]
        job = stages.in_flight()[key].job
        os.kill(_parent(server), signal.SIGKILL)
        (ended,) = _all_ended(stages)
        assert (ended.code, ended.signal) == (None, None)
        assert [each.job for each in stages.departures([key])[key]] == [job]
        assert "WorkerCrashedError" in ended.log.read_text()
        wait_until(lambda: not Path(f"/proc/{server}").exists())
        assert not _left_over(tmp_path)
        assert (layout_of(tmp_path).stage("finetune", key).checkpoint / "state.json").exists()
        report = _run(stages, tmp_path, graph)
    assert report.complete
    assert report.facts[key].failures == 0
    assert fake_registry.count(tmp_path / "corpus", "starts") == {key: 2}
    assert capfd.readouterr() == ("", "")


def test_a_stage_that_cannot_start_is_given_up(tmp_path: Path, ray_here: Capacity) -> None:
    """Four tasks that end before they have claimed an attempt are enough."""
    graph = graph_of_one("")
    (key,) = graph.nodes
    folder = layout_of(tmp_path).stage("finetune", key)
    folder.path.mkdir(parents=True)
    folder.attempts.write_text("a file where a folder belongs")
    with executor(tmp_path) as stages:
        report = _run(stages, tmp_path, graph)
    assert report.plan.given_up == (key,)
    assert "4 jobs ended before the worker began" in report.facts[key].error


def test_waiting_stages_can_be_cancelled(tmp_path: Path, ray_here: Capacity) -> None:
    """Tasks in Ray's queue are cancelled; running ones stay."""
    recipe = {"failing": {"finetune vft * *": "sleep:60"}}
    graph = fake_registry.make_graph(recipe, methods=("vft",), folds=("1",), seeds=3)
    with executor(tmp_path) as stages:
        submit(stages, graph)
        wait_until(lambda: sum(each.phase is Phase.running for each in stages.in_flight().values()) == 2, stages)
        (withdrawn,) = stages.cancel(list(graph.nodes))
        assert set(stages.in_flight()) == set(graph.nodes) - {withdrawn}
        assert len(stages.stop(grace=30)) == 2
    assert set(fake_registry.count(tmp_path / "corpus", "starts")) == set(graph.nodes) - {withdrawn}


@pytest.mark.ray
@pytest.mark.slow
def test_a_stage_survives_the_loss_of_its_node(tmp_path: Path) -> None:
    """Ray of three nodes, two of them for stages: the one that computes is killed, and the other goes on from the checkpoint."""
    script = [sys.executable, "-m", "tests.jobs.sweeps.losing_node", str(tmp_path)]
    ran = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False, cwd=REPOSITORY)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert told["complete"]
    assert told["starts"] == [2]
    assert told["nodes"][0] != told["nodes"][1]
    assert told["departures"] == 1
    assert told["failures"] == 0
    assert not _left_over(tmp_path)


def test_a_remote_claim_ends_when_its_task_is_known_to_be_gone(tmp_path: Path) -> None:
    """45 seconds after its last heartbeat instead of 300, as the executor knows that its task has ended."""
    from jobs.control.facts import Departure
    from jobs.store.records import Claim, claim_attempt

    graph = graph_of_one("")
    (key,) = graph.nodes
    folder = layout_of(tmp_path).stage("finetune", key)
    claim = Claim(1, "node9", 4, "another-boot/pid:[1]/77", time.time() - 100, slurm_job="ray-abc-1")
    claim_attempt(folder, 1, claim)
    os.utime(folder.attempt(1).claim, (time.time() - 60, time.time() - 60))
    departure = Departure(key, "ray-abc-1", "", time.time() - 200, time.time())
    assert read_facts(graph, layout_of(tmp_path))[key].executed_by
    facts = read_facts(graph, layout_of(tmp_path), PassContext(departures=lambda keys: {key: (departure,)}))[key]
    assert not facts.executed_by
    assert facts.lost_jobs == ("ray-abc-1",)
    assert facts.failure is FailureClass.node
    assert not facts.stopped


def test_requests_are_limited_to_the_largest_machine() -> None:
    """GPUs count first, then cores; the share of a GPU is asked for as a part of it, and a whole one after memory ran out there."""
    assert needs_of(Resources(cpus=2, gpus=1, memory_gb=8.0), [SMALL, LARGE]) == Needs(2, 1, 8.0)
    assert needs_of(Resources(cpus=16, gpus=4, memory_gb=64.0), [SMALL, LARGE]) == Needs(8, 2, 32.0)
    assert needs_of(Resources(cpus=16, gpus=0, memory_gb=8.0), [LARGE, SMALL]) == Needs(8, 0, 8.0)
    assert needs_of(Resources(cpus=16, gpus=1, memory_gb=8.0), [SMALL]) == Needs(4, 0, 8.0)
    shared = Resources(cpus=1, gpus=1, memory_gb=1.0, at_once=4)
    assert options_of(needs_of(shared, [LARGE]))["num_gpus"] == 0.25
    assert options_of(needs_of(shared, [LARGE], alone=True))["num_gpus"] == 1
    assert options_of(Needs(2, 2, 1.5)) == {"num_cpus": 2, "num_gpus": 2, "memory": 3 << 29, "scheduling_strategy": "SPREAD"}


def test_machines_are_the_live_nodes() -> None:
    """And that have a core: a head that only coordinates computes nothing."""
    nodes: list[dict[str, Any]] = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0, "memory": float(32 << 30)}},
        {"Alive": True, "Resources": {"node:__internal_head__": 1.0}},
        {"Alive": False, "Resources": {"CPU": 64.0}},
    ]
    assert machines_of(nodes) == (LARGE,)
    assert fits(Needs(8, 2, 32.0), LARGE)
    assert not fits(Needs(8, 1, 1.0), SMALL)


def test_gpu_ids_are_sorted_and_must_match_the_request() -> None:
    assert in_order([10, 9]) == ("9", "10")
    assert in_order(["GPU-b", "3", "GPU-a"]) == ("3", "GPU-a", "GPU-b")
    assert capacity_given(Needs(3, 2, 4.0), ("5", "7")) == Capacity(3, ("5", "7"), 4.0)
    with pytest.raises(InternalError, match="assigned GPUs none, but 1"):
        capacity_given(Needs(1, 1, 1.0), ())


def _run(stages: Any, folder: Path, graph: Any) -> Report:
    """As `run_local`, in any thread: signal handlers belong to the main one."""
    from jobs.control.controller import look, reconcile

    wanted = desired(folder, graph)
    end = time.monotonic() + 120
    while not (report := reconcile(wanted, stages)).settled:
        stages.wait(0.2)
        if time.monotonic() > end:
            raise TimeoutError
    look(wanted, stages)
    return report


def _all_ended(stages: Any) -> list[Any]:
    ended: list[Any] = []
    end = time.monotonic() + 60
    while not stages.idle and time.monotonic() < end:
        ended.extend(stages.wait(0.1))
    return ended


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _left_over(folder: Path) -> list[str]:
    """Processes whose stdout is a log below a folder."""
    found: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str((process / "fd" / "1").readlink()).startswith(str(folder)):
                found.append(process.name)
        except OSError:
            continue
    return found
