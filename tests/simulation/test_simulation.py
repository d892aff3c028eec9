"""The simulated cluster behaves like Slurm as far as the program can observe; without faults an experiment completes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import SlurmUnavailableError, SubmissionFailedError
from jobs.experiment.config import SlurmSite
from jobs.store.attempts import QUIET_SECONDS
from jobs.store.failures import FailureClass
from jobs.store.records import read_outcome, read_result
from tests.simulation.client import SimulatedClient
from tests.simulation.crashes import Killed, Process, instrumented, kill, running
from tests.simulation.slurm import OWNER, Accounting, Clock, Element, Reply, SimulatedSlurm
from tests.simulation.world import Shape, World, world


@pytest.fixture
def slurm() -> SimulatedSlurm:
    return SimulatedSlurm(Clock(), nodes=2, slots=2)


@pytest.fixture
def lab(folder: Path) -> Iterator[World]:
    with world(folder, Shape(methods=("vft", "tapt"))) as made:
        yield made


def array_of(slurm: SimulatedSlurm, name: str, size: int = 1, dependency: str = "", **parameters: Any) -> list[Element]:
    request = {"job_name": name, "time": 60, "dependency": dependency, "additional_parameters": {"array": f"0-{size - 1}"}, **parameters}
    return slurm.arrays[slurm.submit(name, request)].elements


def test_a_queue_is_printed_as_squeue_prints_it(slurm: SimulatedSlurm) -> None:
    """Pending elements of an array share a line, running ones have their own, and the client reads all of them."""
    elements = array_of(slurm, "one", 4)
    slurm.start(elements[0])
    slurm.end(elements[0], "COMPLETED", completing=True)
    slurm.start(elements[1])
    client = SimulatedClient(slurm)
    seen = {element.job: element.state for element in client.queue()}
    assert seen == {"100_0": "COMPLETING", "100_1": "RUNNING", "100_2": "PENDING", "100_3": "PENDING"}
    assert client.queue(name="two") == ()
    slurm.moved_on()
    assert "100_0" not in {element.job for element in client.queue()}
    slurm.back_at = slurm.clock() + 1
    with pytest.raises(SlurmUnavailableError, match="Unable to contact"):
        client.queue()


def test_a_dependency_is_lifted_or_kills(slurm: SimulatedSlurm) -> None:
    """`afterok` waits for all it names, `aftercorr` for its own index, `singleton` for earlier arrays of the name."""
    parents = array_of(slurm, "parents", 2)
    all_of, one_of = array_of(slurm, "all", 1, "afterok:100")[0], array_of(slurm, "one", 1, "afterok:100_1,singleton")[0]
    each = array_of(slurm, "each", 2, "aftercorr:100")
    double = array_of(slurm, "parents", 1, "singleton")[0]
    assert slurm.eligible() == parents
    slurm.start(parents[1])
    slurm.end(parents[1], "COMPLETED")
    assert slurm.eligible() == [parents[0], one_of, each[1]]
    slurm.start(parents[0])
    slurm.end(parents[0], "FAILED")
    assert (all_of.state, each[0].state) == ("CANCELLED", "CANCELLED")
    assert slurm.eligible() == [one_of, each[1], double]


def test_an_update_changes_single_elements(slurm: SimulatedSlurm) -> None:
    """The dependency of a range of pending elements can be changed; that of a running one cannot."""
    array_of(slurm, "parents", 2)
    children = array_of(slurm, "children", 2, "afterok:100,singleton")
    client = SimulatedClient(slurm)
    assert client.set_dependency("103_[0]", "afterok:100_0")
    assert [child.waits for child in children] == ["afterok:100_0", "afterok:100,singleton"]
    slurm.updates_work = False
    assert not client.set_dependency("103_[1]", "afterok:100_1")


def test_limits_are_kept(slurm: SimulatedSlurm) -> None:
    """Too many elements, an index too high, or no node left to run on are rejected with Slurm's message."""
    slurm.max_submit, slurm.max_array_size = 2, 2
    for size, exclude, words in ((3, "", "Invalid job array"), (1, "n0,n1", "node configuration")):
        with pytest.raises(SubmissionFailedError, match=words):
            array_of(slurm, "large", size, exclude=exclude)
    array_of(slurm, "fits", 2)
    with pytest.raises(SubmissionFailedError, match="QOSMaxSubmitJobPerUserLimit"):
        array_of(slurm, "more")


def test_replies_get_lost(slurm: SimulatedSlurm, tmp_path: Path) -> None:
    """Without a reply of sbatch there may be a job at once, later or never."""
    client, site = SimulatedClient(slurm), SlurmSite()
    request = {"job_name": "one", "time": 60, "additional_parameters": {"array": "0-0"}}
    counts: list[int] = []
    for reply in (Reply.given, Reply.lost, Reply.never, Reply.late):
        slurm.reply = reply
        if reply is Reply.given:
            assert client.submit(tmp_path, "", request, site) == "100"
        else:
            with pytest.raises(SubmissionFailedError):
                client.submit(tmp_path, "", request, site)
        counts.append(len(slurm.arrays))
    assert counts == [1, 2, 2, 2]
    slurm.clock.now += 20
    slurm.moved_on()
    assert len(slurm.arrays) == 3


def test_accounting_answers_lags_or_is_unavailable(slurm: SimulatedSlurm) -> None:
    """The output of sacct for one element that was cancelled and one that was requeued."""
    first, second = array_of(slurm, "one", 2)
    for element in (first, second):
        slurm.start(element)
    slurm.requeue(second, "NODE_FAIL")
    slurm.cancel([first.name], OWNER)
    client = SimulatedClient(slurm)
    told = {}
    for accounting in Accounting:
        slurm.accounting = accounting
        found = client.accounting({"100": "one"})
        told[accounting] = None if found is None else {job: each.state for job, each in found.items()}
        assert not found or found["100_0"].end == (slurm.clock() if accounting is Accounting.fine else None)
    assert told == {
        Accounting.fine: {"100_0": "CANCELLED by 1000", "100_1": "PENDING"},
        Accounting.slow: {"100_0": "RUNNING", "100_1": "PENDING"},
        Accounting.stale: {"100_0": "RUNNING", "100_1": "PENDING"},
        Accounting.silent: {},
        Accounting.forgetful: {},
        Accounting.absent: None,
    }


def test_a_process_dies_at_the_given_point(tmp_path: Path) -> None:
    """Points are changes of files and calls of Slurm; what the process does in `finally` after that has no effect."""
    old, new, kept = tmp_path / "old", tmp_path / "new", tmp_path / "kept"
    for at, left in ((1, {"old", "kept"}), (2, {"new", "kept"}), (3, {"new", "kept"}), (4, {"new"})):
        for path in tmp_path.iterdir():
            path.unlink()
        old.touch()
        kept.touch()
        with instrumented(), pytest.raises(Killed):
            _rename_and_remove(Process("one", at, "", kill), old, new, kept)
        assert {path.name for path in tmp_path.iterdir()} == left


def _rename_and_remove(process: Process, old: Path, new: Path, kept: Path) -> None:
    with running(process):
        try:
            old.replace(new)
        finally:
            kept.unlink()


def test_a_simulated_worker_leaves_the_records_of_a_worker(lab: World) -> None:
    """It waits for a claim without heartbeat, exits at once if there is one with, and resumes where another worker died."""
    lab.run_pass()
    first = lab.start(1)[0]
    for _ in range(4):
        first.step()
    first.checkpoint()
    folder = first.folder(first.stage)
    lab.slurm.requeue(lab.slurm.find(first.job), "PREEMPTED")
    again = lab.start(1)[0]
    assert again.job == first.job
    again.step()
    again.step()
    again.step()
    assert again.number == 2, "the same job, requeued, waits for nobody"
    again.step()
    again.fail(FailureClass.memory)
    outcome = read_outcome(folder.attempt(2))
    assert outcome is not None
    assert outcome.kind == "memory"
    assert again.over
    lab.leave(again)
    lab.advance(QUIET_SECONDS)
    lab.run_pass()
    lab.finish(next(worker for worker in lab.start(9) if worker.key == first.key))
    result = read_result(folder, first.key)
    assert result is not None
    assert result.attempt == 3


@pytest.mark.parametrize("shape", [Shape(), Shape(runs_per_task=2, max_submit=3), Shape(max_array_size=2, nodes=1)], ids=str)
def test_without_faults_every_run_gets_its_result(folder: Path, shape: Shape) -> None:
    """Every stage is executed once, and the number of sbatch calls is that of the arrays."""
    with world(folder, shape) as lab:
        lab.finish_everything()
        assert set(lab.published.values()) == {1}
        assert len(lab.executions) == len(lab.graph.nodes)
        assert lab.slurm.calls.count("sbatch") == len(lab.slurm.arrays)
