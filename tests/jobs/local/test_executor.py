"""The local executor with its real fork server: uses all cores and no more, survives its workers, leaves no process behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from jobs.control.controller import Desired, Report, read_facts, run_local
from jobs.control.executor_protocol import Batch, EndedTask, Task
from jobs.control.facts import Phase
from jobs.control.failure_policy import MAX_FAILED_STARTS, MEMORY_RETRIES
from jobs.local.executor import LocalExecutor
from jobs.store.failures import FailureClass
from jobs.store.layout import Layout
from jobs.store.records import Ending, read_outcome, read_result
from tests.jobs import fake_registry, local_launch
from tests.waiting import PATIENCE, until, wait_until

REPOSITORY = Path(__file__).resolve().parents[3]
STARTED = re.compile(r"attempt \d+ on \S+, process (\d+)")


def _run(folder: Path, recipe: dict[str, object]) -> tuple[Report, Desired, list[str]]:
    wanted = local_launch.desired(folder, recipe)
    lines: list[str] = []
    with local_launch.executor(folder) as executor:
        report = run_local(wanted, executor, on_event=lambda event: lines.append(event.line))
    return report, wanted, lines


def _gone(pids: list[int]) -> bool:
    return wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), step=0.02)


def _worker_pids(folder: Path) -> list[int]:
    logs = (folder / "results" / "exp" / "logs").glob("*-*.log")
    return [int(pid) for log in logs for pid in STARTED.findall(log.read_text())]


@pytest.fixture(autouse=True)
def _others() -> Iterator[None]:
    """Children that were there before the test: the session may run a Slurm."""
    OTHERS.update(_children())
    yield
    OTHERS.clear()


OTHERS: set[str] = set()


def _children() -> list[str]:
    """Processes that this test has begun and that are left."""
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in found if pid not in OTHERS]


@pytest.mark.slow
def test_a_grid_with_failures_ends_complete_and_a_second_launch_runs_nothing(tmp_path: Path) -> None:
    """20 stages on two cores: one loses a peer twice, one is killed by SIGKILL, one runs out of memory twice; each succeeds, once."""
    failing = {"finetune vft 1 0": "comm:2", "finetune vft 1 1": "kill:1", "tapt tapt 1 0": "oom:2"}
    report, wanted, lines = _run(tmp_path, {"failing": failing})
    assert report.complete
    assert all(fact.done for fact in report.facts.values())
    starts, ends = (fake_registry.count(tmp_path / "corpus", what) for what in ("starts", "ends"))
    assert len(ends) == len(wanted.graph.nodes) == 20
    assert set(ends.values()) == {1}
    assert sorted(starts.values()) == [1] * 17 + [2, 3, 3]
    assert sum("done in" in line for line in lines) == 20
    assert any("SIGKILL" in line and "tried again" in line for line in lines)
    assert lines[-1].startswith("[20/20]")
    assert _children() == []
    again, _, lines = _run(tmp_path, {})
    assert again.complete
    assert lines == []
    assert fake_registry.count(tmp_path / "corpus", "starts") == starts


@pytest.mark.slow
def test_workers_are_forked_from_a_preloaded_server(tmp_path: Path) -> None:
    """Modules that the server has loaded once are loaded in every worker; its log shows that, and its number of threads."""
    _run(tmp_path, {})
    logs = list((tmp_path / "results" / "exp" / "logs").glob("*-*.log"))
    assert len(logs) == 20
    assert all("start 1 with 1 threads, preloaded True" in log.read_text() for log in logs)


@pytest.mark.slow
def test_as_many_stages_as_cores(tmp_path: Path) -> None:
    """On two cores two stages run most of the time, and never three."""
    wanted = local_launch.desired(tmp_path, {"seconds": 0.1})
    at_once: list[int] = []
    with local_launch.executor(tmp_path) as executor:
        original = executor.wait

        def counting(seconds: float) -> tuple[EndedTask, ...]:
            ended = original(0.01)
            at_once.append(sum(flight.phase is Phase.running for flight in executor.in_flight().values()))
            return ended

        executor.wait = counting  # type: ignore[method-assign]  # the real one, watched
        assert run_local(wanted, executor).complete
    assert max(at_once) == 2
    assert at_once.count(2) > len(at_once) / 2


@pytest.mark.slow
def test_downstream_of_a_stopped_stage_nothing_starts_and_the_rest_finishes(tmp_path: Path) -> None:
    """A refused stage is not retried, nor is one with a code failure; their dependants never start; all others succeed."""
    report, wanted, lines = _run(tmp_path, {"failing": {"states ptapt 1 0": "fail:9", "tapt tapt 2 0": "refuse"}})
    assert not report.complete
    assert {wanted.graph.nodes[key].name.split(" [")[0] for key in report.plan.given_up} == {
        "states ptapt fold 1 seed 0",
        "tapt tapt fold 2 seed 0",
    }
    assert len(report.plan.blocked) == 6
    assert len(report.plan.reused) == 12 - 4
    assert sum("failed" in line for line in lines) == 2
    assert sum("given up" in line for line in lines) == 2
    starts = fake_registry.count(tmp_path / "corpus", "starts")
    assert not any(key in starts for key in report.plan.blocked)


@pytest.mark.slow
def test_launching_again_retries_stopped_stages(tmp_path: Path) -> None:
    """After the user has removed the cause, the same command continues."""
    recipe: dict[str, object] = {"failing": {"tapt tapt 1 0": "fail:1", "finetune vft 1 0": "comm:4"}}
    assert len(_run(tmp_path, recipe)[0].plan.given_up) == 2
    assert _run(tmp_path, recipe)[0].complete


@pytest.mark.slow
def test_a_worker_killed_by_a_signal_is_recorded(tmp_path: Path) -> None:
    """The executor records signal and log; SIGKILL on this machine counts as out of memory."""
    report, wanted, _ = _run(tmp_path, {"failing": {"finetune vft 1 0": "kill:9"}})
    (key,) = report.plan.given_up
    folder = wanted.layout.stage("finetune", key)
    outcome = read_outcome(folder.attempt(3))
    assert outcome is not None
    assert (outcome.ending, outcome.error, outcome.kind) == (Ending.failed, "SIGKILL", FailureClass.memory.name)
    assert "memory ran out 3 times" in report.plan.reasons[key]
    assert report.facts[key].attempts == MEMORY_RETRIES + 1
    assert f"finetune-{key}.log" in outcome.message


@pytest.mark.slow
def test_a_worker_that_exits_without_an_outcome_is_not_retried(tmp_path: Path) -> None:
    """The outcome names its exit code and its log."""
    report, wanted, _ = _run(tmp_path, {"failing": {"finetune vft 1 0": "exit:9"}})
    (key,) = report.plan.given_up
    outcome = read_outcome(wanted.layout.stage("finetune", key).attempt(1))
    assert outcome is not None
    assert (outcome.error, outcome.kind) == ("exit7", FailureClass.code.name)
    assert report.facts[key].attempts == 1


def test_waiting_tasks_can_be_cancelled(tmp_path: Path) -> None:
    """Running tasks stay; those that wait for an upstream stage or for free cores are removed."""
    graph = fake_registry.make_graph({"seconds": 0.5}, methods=("tapt",), folds=("1",), seeds=2)
    with local_launch.executor(tmp_path) as executor:
        for key, node in graph.nodes.items():
            executor.submit(Batch(node.stage, node.method, (Task((key,)),)), graph, executor.in_flight())
        executor.wait(0.0)
        runs = {run.key for run in graph.runs}
        assert set(executor.cancel(list(graph.nodes))) == runs
        assert set(executor.in_flight()) == set(graph.nodes) - runs


@pytest.mark.slow
def test_a_diverged_run_is_replaced_by_its_reserve_seed(tmp_path: Path) -> None:
    """At once, while others still run; all slots of the table have a run in the end."""
    report, _, lines = _run(tmp_path, {"failing": {"finetune vft 1 0": "diverge", "finetune tapt 2 1": "collapse"}})
    assert report.complete
    assert {run.seed for run in report.graph.runs if run.generation} == {1000, 1001}
    assert sum("dropped: " in line and "gets another seed" in line for line in lines) == 2


@pytest.mark.slow
def test_after_an_error_of_the_file_system_a_stage_is_retried_after_a_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three stages in a row with the same error hold nothing, and nothing is given up."""
    monkeypatch.setattr("jobs.control.failure_policy.STORAGE_SECONDS", 0.5)
    failing = {f"finetune vft 1 {seed}": "storage:2" for seed in range(2)} | {"finetune vft 2 0": "storage:1"}
    started = time.time()
    report, wanted, lines = _run(tmp_path, {"failing": failing})
    assert report.complete
    assert sum("Stale file handle" in line for line in lines) == 5
    assert not any("held" in line for line in lines)
    assert sum(fact.failures for fact in report.facts.values()) == 0
    twice = [
        wanted.layout.stage("finetune", run.key).attempt(3).claim for run in wanted.graph.runs if (run.method, run.fold) == ("vft", "1")
    ]
    assert all(claim.stat().st_mtime - started > 0.5 + 1.0 for claim in twice)


def test_tasks_whose_upstream_fails_are_returned(tmp_path: Path) -> None:
    """A waiting task leaves the executor when a stage upstream of it, directly or not, ends without a result."""
    graph = fake_registry.make_graph({"failing": {"states ptapt 1 0": "fail:1"}}, methods=("ptapt",), folds=("1",), seeds=1)
    with local_launch.executor(tmp_path) as executor:
        for key, node in graph.nodes.items():
            executor.submit(Batch(node.stage, node.method, (Task((key,)),)), graph, executor.in_flight())
        assert len(executor.in_flight()) == 4
        ended: list[EndedTask] = []
        while not executor.idle:
            ended.extend(executor.wait(5.0))
        assert [graph.nodes[one.keys[0]].stage for one in ended] == ["states"]


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    recipe = {
        "failing": {
            "tapt tapt 1 0": "sleep:60",
            "tapt tapt 2 0": "sleep:60",
            "states ptapt 1 0": "sleep:60",
            "states ptapt 2 0": "sleep:60",
        }
    }
    with _launch(tmp_path, recipe) as process:
        _wait_for_starts(tmp_path, 2)
        yield process
        if process.poll() is None:
            process.kill()


def _launch(folder: Path, recipe: Mapping[str, object], grace: float = 20.0) -> subprocess.Popen[str]:
    local_launch.workplace(folder)
    command = [sys.executable, "-m", "tests.jobs.local_launch", str(folder), json.dumps(recipe), str(grace)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)


def _wait_for_starts(folder: Path, number: int) -> None:
    until(lambda: len(fake_registry.count(folder / "corpus", "starts")) >= number, step=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_after_an_interrupt_the_next_launch_resumes_from_checkpoints(
    tmp_path: Path, launched: subprocess.Popen[str], number: signal.Signals
) -> None:
    """The workers are asked to stop and write checkpoints; nothing is left running; then the same launch finishes, each stage once."""
    launched.send_signal(number)
    output, error = launched.communicate()
    assert launched.returncode == 130
    assert "stopping 2" in output
    assert error == ""
    assert _gone(_worker_pids(tmp_path))
    report, wanted, _ = _run(tmp_path, {})
    assert report.complete
    assert set(fake_registry.count(tmp_path / "corpus", "ends").values()) == {1}
    assert sum(fake_registry.count(tmp_path / "corpus", "starts").values()) == len(wanted.graph.nodes) + 2
    assert not any(fact.failures for fact in report.facts.values())


@pytest.mark.slow
def test_a_worker_that_ignores_signals_is_killed_after_the_grace_period(tmp_path: Path) -> None:
    """SIGKILL, recorded as an interruption; no process is left."""
    recipe: dict[str, object] = {"failing": {"states ptapt 1 0": "deaf:60", "states ptapt 2 0": "deaf:60"}}
    with _launch(tmp_path, recipe, grace=0.5) as process:
        _wait_for_starts(tmp_path, 2)
        process.send_signal(signal.SIGINT)
        process.communicate()
        assert process.returncode == 130
    assert _gone(_worker_pids(tmp_path))
    wanted = local_launch.desired(tmp_path, recipe)
    outcomes = [
        read_outcome(wanted.layout.stage("states", key).attempt(1)) for key, node in wanted.graph.nodes.items() if node.stage == "states"
    ]
    assert [outcome.ending for outcome in outcomes if outcome] == [Ending.interrupted] * 2


@pytest.mark.slow
def test_a_second_interrupt_ends_the_grace_period(tmp_path: Path) -> None:
    """Ctrl-C twice does not wait."""
    with _launch(tmp_path, {"failing": {"states ptapt 1 0": "deaf:60", "states ptapt 2 0": "deaf:60"}}, grace=60) as process:
        _wait_for_starts(tmp_path, 2)
        process.send_signal(signal.SIGINT)
        time.sleep(0.6)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate()
        assert process.returncode == 130
    assert _gone(_worker_pids(tmp_path))


@pytest.mark.slow
def test_when_the_launcher_is_killed_the_workers_stop_and_the_next_launch_resumes(tmp_path: Path, launched: subprocess.Popen[str]) -> None:
    """SIGKILL of the launcher: the fork server notices, workers write checkpoints and exit."""
    launched.kill()
    launched.wait(10)
    assert _gone(_worker_pids(tmp_path))
    report, _, _ = _run(tmp_path, {})
    assert report.complete
    assert set(fake_registry.count(tmp_path / "corpus", "ends").values()) == {1}


@pytest.mark.slow
def test_two_launchers_share_the_work(tmp_path: Path) -> None:
    """A second launch at the same time computes nothing that the first is computing, and both end complete."""
    with _launch(tmp_path, {"seconds": 0.1}) as process:
        _wait_for_starts(tmp_path, 1)
        report, wanted, _ = _run(tmp_path, {"seconds": 0.1})
        output, _ = process.communicate()
        assert process.returncode == 0, output
    assert report.complete
    assert set(fake_registry.count(tmp_path / "corpus", "starts").values()) == {1}
    assert len(fake_registry.count(tmp_path / "corpus", "ends")) == len(wanted.graph.nodes)


@pytest.mark.slow
def test_a_stage_that_cannot_claim_an_attempt_is_stopped(tmp_path: Path) -> None:
    """A store that cannot be written ends the launch with a recorded error instead of a loop."""
    wanted = local_launch.desired(tmp_path, {})
    run = wanted.graph.runs[0].key
    folder = wanted.layout.stage("finetune", run)
    folder.path.mkdir(parents=True)
    folder.attempts.write_text("a file where a folder belongs")
    report, _, _ = _run(tmp_path, {})
    assert report.plan.given_up == (run,)
    assert f"{MAX_FAILED_STARTS} jobs ended before the worker began" in report.facts[run].error
    assert len(report.plan.reused) == 11


@pytest.mark.slow
def test_the_fork_server_survives_a_preload_that_fails(tmp_path: Path) -> None:
    """A module that cannot be imported is reported in the server's log; stages that do not need it run."""
    wanted = local_launch.desired(tmp_path, {})
    with local_launch.executor(tmp_path) as executor:
        executor.preload = ["no_such_module:preload"]
        assert run_local(wanted, executor).complete
    assert "no_such_module" in (wanted.layout.logs / "forkserver.log").read_text()


def test_a_dead_fork_server_is_an_error_that_names_its_log(tmp_path: Path) -> None:
    """It is not mistaken for long tasks."""
    wanted = local_launch.desired(tmp_path, {"failing": {"finetune vft 1 0": "sleep:60"}})
    with local_launch.executor(tmp_path) as executor:
        graph = wanted.graph
        key = graph.runs[0].key
        executor.submit(Batch("finetune", "vft", (Task((key,)),)), graph, {})
        _wait_in(executor, tmp_path)
        (server,) = _children()
        os.kill(int(server), signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"forkserver\.log"):
            executor.wait(10.0)
    assert _gone(_worker_pids(tmp_path))
    assert read_result(Layout(tmp_path / "results", "exp").stage("finetune", key), key) is None
    assert not read_facts(graph, wanted.layout)[key].executed_by


def _wait_in(executor: LocalExecutor, folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not fake_registry.count(folder / "corpus", "starts"):
        executor.wait(0.05)
        if time.monotonic() > deadline:
            raise TimeoutError("the worker did not start")
