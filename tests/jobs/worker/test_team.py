"""Teams of real processes: they compute together, and a lost process ends the attempt in time with the right class."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from jobs.control.controller import Desired, run_local
from jobs.experiment.config import Resources
from jobs.experiment.graph import Node
from jobs.local.executor import LocalExecutor
from jobs.store.attempts import own_node
from jobs.store.failures import FailureClass
from jobs.store.layout import Layout
from jobs.store.records import Ending, attempt_numbers, read_result
from jobs.worker.machine import Capacity
from jobs.worker.task import describe, write_description
from jobs.worker.team_channel import (
    SILENT_VARIABLE,
)
from tests.jobs import fake_registry, local_launch
from tests.jobs.worker.places import Place
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[3]
SILENT = 2.0  # seconds, of the workers below
ENDS_WITHIN = SILENT + 100.0  # silence, two seconds for the reason, five for the main thread, and a machine that is busy


def start(place: Place, *nodes: Node, size: int = 3) -> subprocess.Popen[str]:
    """A worker with a team, outside of Slurm."""
    file = place.layout.root.parent / "tasks.json"
    write_description(file, replace(describe(place.place, place.graph, [[node.key for node in nodes]]), team=size))
    values = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    values |= {SILENT_VARIABLE: str(SILENT), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jobs.worker.main", str(file), "0"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=values, start_new_session=True)


def end(process: subprocess.Popen[str], seconds: float = ENDS_WITHIN) -> tuple[int, str]:
    """Exit code and log; nothing of it is left."""
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_team_computes_stage_after_stage(tmp_path: Path) -> None:
    """All ranks compute, only the leader writes records, and provenance records the number of processes."""
    place = Place(tmp_path)
    code, said = end(start(place, place.tapt, place.runs[0]))
    assert code == 0, said
    for node in (place.tapt, place.runs[0]):
        assert place.starts(node) == 1
        provenance = place.result(node).provenance
        assert (provenance["processes"], provenance["hosts"]) == (3, [own_node()])
        assert provenance["peak_rss_bytes"] > 3 << 20
        for rank in (1, 2):
            assert f"rank {rank}: {node.name}: rank {rank} of 3, {rank} of its machine" in said
        assert list(place.folder(node).attempt(1).output.parent.glob("step2.*"))
    assert attempt_numbers(place.folder(place.tapt)) == (1,)


@dataclass(frozen=True)
class End:
    """What becomes of an attempt."""

    kind: FailureClass
    words: str
    node: bool  # it is known where the lost process was


LOST_ENDS = {
    "lost:1": End(FailureClass.communication, "rank 1 .* its connection closed", True),
    "frozen:2": End(FailureClass.communication, "rank 2 .* has sent no heartbeat for", True),
    "stuck:1": End(FailureClass.communication, "rank 1 .* made no progress within the 3 s it announced", False),
    "stuck:0": End(FailureClass.communication, "rank 0 made no progress", False),
    "full:2": End(FailureClass.memory, "CUDA out of memory", False),
    "wrong:1": End(FailureClass.code, "no such layer", False),
}


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Place, int, str]]:
    """Every way to be lost, all at the same time: teams on one machine do not meet."""
    places = {behaviour: Place(tmp_path_factory.mktemp("end"), {"failing": {"tapt tapt 1 0": behaviour}}) for behaviour in LOST_ENDS}
    started = {behaviour: start(place, place.tapt, place.runs[0]) for behaviour, place in places.items()}
    return {behaviour: (places[behaviour], *end(process)) for behaviour, process in started.items()}


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", LOST_ENDS)
def test_a_lost_process_ends_the_attempt(endings: Mapping[str, tuple[Place, int, str]], behaviour: str) -> None:
    """In time although the main thread hangs, with one class and the traceback of a rank's own error; no process is left."""
    (place, code, said), expected = endings[behaviour], LOST_ENDS[behaviour]
    assert code == 1, said
    outcome = place.outcome(place.tapt)
    assert outcome.kind == expected.kind.name
    assert outcome.ending is Ending.failed
    assert re.search(expected.words, outcome.message), outcome.message
    assert outcome.node == (own_node() if expected.node else "")
    if expected.kind is not FailureClass.communication:
        assert f"rank {behaviour[-1]} (process" in outcome.detail
        assert "_fall_out" in outcome.detail
    assert not place.folder(place.tapt).result.exists()
    assert attempt_numbers(place.folder(place.runs[0])) == (), "the rest of the task is left to another"


@pytest.mark.slow
def test_after_a_loss_the_next_attempt_succeeds(endings: Mapping[str, tuple[Place, int, str]]) -> None:
    """Nothing of the first attempt is in its way."""
    place, _, _ = endings["lost:1"]
    code, said = end(start(place, place.tapt))
    assert code == 0, said
    assert place.result(place.tapt).attempt == 2


def test_a_suspended_team_continues(tmp_path: Path) -> None:
    """All processes are stopped for longer than a heartbeat may be missing, as Slurm suspends a job, then continued: none is lost."""
    place = Place(tmp_path, {"failing": {"tapt tapt 1 0": "sleep:1"}})
    process = start(place, place.tapt)
    try:
        assert wait_until(lambda: place.starts(place.tapt) == 1, step=0.05)
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(SILENT + 0.5)
        os.killpg(process.pid, signal.SIGCONT)
    finally:
        code, said = end(process)
    assert code == 0, said
    assert place.result(place.tapt).attempt == 1


def test_followers_end_with_their_leader(tmp_path: Path) -> None:
    """Killed, it leaves no follower, not even a stopped one."""
    place = Place(tmp_path, {"failing": {"tapt tapt 1 0": "frozen:2"}})
    process = start(place, place.tapt)
    try:
        attempt = place.folder(place.tapt).attempt(1).path
        assert wait_until(lambda: len(list(attempt.glob("step1.*"))) == 2, step=0.05), "two wait for the stopped one"
        followers = children(process.pid)
        assert len(followers) == 2
        process.kill()
        assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in followers), step=0.05)
    finally:
        end(process)


def test_a_stop_request_ends_a_team_without_a_failure(tmp_path: Path) -> None:
    """The leader writes a checkpoint and records it; the rest of the task is interrupted."""
    place = Place(tmp_path, {"failing": {"tapt tapt 1 0": "sleep:30"}})
    process = start(place, place.tapt, place.runs[0])
    assert wait_until(lambda: place.starts(place.tapt) == 1, step=0.05)
    process.terminate()
    code, said = end(process)
    assert code == 3, said
    assert place.outcome(place.tapt).ending is Ending.interrupted


def test_the_local_executor_gives_a_stage_its_processes(tmp_path: Path) -> None:
    """Forked from the server like any worker, as many as the resources request."""
    resources = Resources(cpus=2, gpus=0, processes=2, memory_gb=0.1, minutes=1)
    layout = Layout(tmp_path / "results", "exp")
    graph = fake_registry.make_graph(methods=("tapt",), folds=("1",), seeds=1)
    with LocalExecutor(local_launch.workplace(tmp_path), layout, lambda stage: resources, Capacity(2, (), 8.0)) as local:
        report = run_local(Desired(graph, layout, since=time.time()), local)
    assert report.complete
    for node in graph.nodes.values():
        result = read_result(layout.stage(node.stage, node.key), node.key)
        assert result is not None
        assert (result.provenance["processes"], result.provenance["threads"]) == (2, 1)
        assert f"rank 1: {node.name}" in layout.log_of(node.stage, node.key).read_text()
