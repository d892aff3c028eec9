"""Teams of real processes: they compute together, whoever is lost ends it in time and by the right name, and no stranger gets in."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from jobs.control.controller import Desired, run_local
from jobs.control.facts import Departure
from jobs.control.failure_policy import decide, ended_attempts
from jobs.experiment.config import Resources
from jobs.experiment.graph import Node
from jobs.local.executor import LocalExecutor
from jobs.signals import StopRequest
from jobs.store.attempts import AttemptFiles, new_claim, own_node
from jobs.store.failures import FailureClass, class_of_exception
from jobs.store.layout import Layout
from jobs.store.records import Ending, Outcome, attempt_numbers, read_result
from jobs.worker.machine import Capacity, Needs, processes_here, whole
from jobs.worker.task import describe, write_description
from jobs.worker.team_channel import Meeting, Seat, TeamError, call, find, listen, meeting_file, publish, seat_in_step
from jobs.worker.team_follower import SILENT_VARIABLE, Follower, Loss, Patience, patience_of
from jobs.worker.team_leader import Leader
from jobs.worker.team_start import join
from tests.jobs import fake_registry, local_launch
from tests.jobs.test_worker import Place
from tests.slurm_cluster.processes import wait_until

ROOT = Path(__file__).resolve().parents[2]
QUICK = Patience(silent=1.2, join=1.0, settle=0.3, grace=0.2, finish=0.5, share=0.5)
SILENT = 2.0  # seconds, of the workers below
ENDS_WITHIN = SILENT + 20.0  # silence, two seconds for the reason, five for the main thread, and a machine that is busy


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
    """All ranks take part, the leader alone leaves records, and provenance says how many they were."""
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
    "frozen:2": End(FailureClass.communication, "rank 2 .* has said nothing for", True),
    "stuck:1": End(FailureClass.communication, "rank 1 .* does not get on: it had promised to within 3 s", False),
    "stuck:0": End(FailureClass.communication, "rank 0 does not get on", False),
    "full:2": End(FailureClass.memory, "CUDA out of memory", False),
    "wrong:1": End(FailureClass.code, "no such layer", False),
}


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Place, int, str]]:
    """Every way to be lost, all at the same time: teams on one machine do not meet."""
    places = {behaviour: Place(tmp_path_factory.mktemp("end"), {"failing": {"tapt tapt 1 0": behaviour}}) for behaviour in LOST_ENDS}
    started = {behaviour: start(place, place.tapt, place.runs[0]) for behaviour, place in places.items()}
    return {behaviour: (places[behaviour], *end(process)) for behaviour, process in started.items()}


@pytest.mark.parametrize("behaviour", LOST_ENDS)
def test_whoever_is_lost_ends_the_attempt(endings: Mapping[str, tuple[Place, int, str]], behaviour: str) -> None:
    """In time although the main thread waits for ever, in one class, with the traceback of a rank's own error; nothing is left behind."""
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


def test_after_a_loss_the_next_attempt_succeeds(endings: Mapping[str, tuple[Place, int, str]]) -> None:
    """The second attempt has nothing in its way."""
    place, _, _ = endings["lost:1"]
    code, said = end(start(place, place.tapt))
    assert code == 0, said
    assert place.result(place.tapt).attempt == 2


def test_a_team_that_is_suspended_goes_on(tmp_path: Path) -> None:
    """All of it stopped for longer than any of them may be silent, as Slurm does to make room, and continued: nobody is lost."""
    place = Place(tmp_path, {"failing": {"tapt tapt 1 0": "sleep:1"}})
    process = start(place, place.tapt)
    try:
        assert wait_until(lambda: place.starts(place.tapt) == 1, 20, 0.05)
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(SILENT + 0.5)
        os.killpg(process.pid, signal.SIGCONT)
    finally:
        code, said = end(process)
    assert code == 0, said
    assert place.result(place.tapt).attempt == 1


def test_followers_leave_with_their_leader(tmp_path: Path) -> None:
    """Killed, it leaves none behind, not even a stopped one."""
    place = Place(tmp_path, {"failing": {"tapt tapt 1 0": "frozen:2"}})
    process = start(place, place.tapt)
    try:
        attempt = place.folder(place.tapt).attempt(1).path
        assert wait_until(lambda: len(list(attempt.glob("step1.*"))) == 2, 20, 0.05), "two wait for the stopped one"
        followers = children(process.pid)
        assert len(followers) == 2
        process.kill()
        assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in followers), 10, 0.05)
    finally:
        end(process)


def test_asked_to_stop_a_team_leaves_without_a_failure(tmp_path: Path) -> None:
    """The leader saves and says so; the rest of the task is interrupted."""
    place = Place(tmp_path, {"failing": {"tapt tapt 1 0": "sleep:30"}})
    process = start(place, place.tapt, place.runs[0])
    assert wait_until(lambda: place.starts(place.tapt) == 1, 20, 0.05)
    process.terminate()
    code, said = end(process)
    assert code == 3, said
    assert place.outcome(place.tapt).ending is Ending.interrupted


def test_the_local_executor_gives_a_stage_its_processes(tmp_path: Path) -> None:
    """Forked from the server like any worker, and as many as the resources say."""
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


# ---- one leader and its followers in this process


def no_exit(code: int) -> None:
    """Where a follower's process would end, its thread does."""


@contextlib.contextmanager
def assembled(size: int, patience: Patience = QUICK) -> Iterator[tuple[Leader, list[Follower]]]:
    """A leader and its followers, each with a real connection."""
    server, meeting = listen(local=True)
    with Leader(size, server, meeting, patience=patience, tell=lambda line: None) as leader:
        lines = [(rank, call(meeting, Seat(rank, size, rank))) for rank in range(1, size)]
        followers = [Follower(Seat(rank, size, rank), line, patience=patience, leave=no_exit) for rank, line in lines if line]
        assert len(followers) == size - 1
        assert leader.gather() == ""
        yield leader, followers


def never(loss: Loss) -> None:
    pytest.fail(f"the attempt was ended: {loss}")


def test_what_the_leader_shares_arrives_in_order_and_only_where_it_belongs() -> None:
    """Values of an order that is over are not taken for those of the next; without a value the wait ends."""
    with assembled(3) as (leader, followers):
        orders = [follower.orders() for follower in followers]
        with leader.computing({"stage": 1}, never):
            assert [next(each) for each in orders] == [{"stage": 1}] * 2
            assert [leader.share("a"), leader.share("b"), leader.share("left over")] == ["a", "b", "left over"]
            assert [[follower.share(), follower.share()] for follower in followers] == [["a", "b"]] * 2
            for follower in followers:
                follower.done()
        assert leader.gather() == ""
        with leader.computing({"stage": 2}, never):
            assert [next(each) for each in orders] == [{"stage": 2}] * 2
            with pytest.raises(TeamError, match="given nothing"):
                followers[0].share()
            leader.share("c")
            assert followers[0].share() == followers[1].share() == "c"
            for follower in followers:
                follower.done()


def test_the_cause_is_told_and_not_its_echo() -> None:
    """A rank that runs out of memory makes the others fail in communication, and those may be heard first."""
    with assembled(4) as (leader, followers):
        with contextlib.suppress(ConnectionError), leader.computing({}, never):
            for follower in followers:
                next(follower.orders())
            followers[0].failed(RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
            followers[1].failed(MemoryError("cannot allocate memory"))
            raise ConnectionError("gloo, in the leader itself")
        reason = leader.reason()
        assert reason is not None
        assert (reason.kind, reason.error) == (FailureClass.memory, "MemoryError")
        assert "rank 2 (process" in reason.detail


def test_whoever_has_done_its_part_may_go() -> None:
    """A follower that is lost after its part does not spoil the stage, and the team takes no other."""
    with assembled(3) as (leader, followers):
        with leader.computing({}, never):
            for follower in followers:
                next(follower.orders())
                follower.done()
            assert wait_until(lambda: leader.gather() == "", 5)
            followers[0]._line.close()
            assert wait_until(lambda: "its connection closed" in leader.gather(), 5)
            time.sleep(QUICK.settle + QUICK.grace + 2 * QUICK.poll)
            leader.advance(0.0)
        assert "rank 1" in leader.gather()


def test_one_that_is_lost_between_two_stages_ends_the_next_at_once() -> None:
    """Idle when it was lost, while the leader looked at what it reads; by its name and machine, not by a time-out much later."""
    with assembled(3) as (leader, followers):
        followers[1]._line.close()
        assert wait_until(lambda: "rank 2" in leader.gather(), 5)
        with pytest.raises(TeamError, match=r"rank 2 .* its connection closed"), leader.computing({}, never):
            pytest.fail("the stage has begun")
        reason = leader.reason()
        assert reason is not None
        assert (reason.kind, reason.node) == (FailureClass.communication, own_node())


@pytest.mark.parametrize("asked", [0, 2])
def test_a_request_to_stop_reaches_all(asked: int) -> None:
    """Whoever got the signal, each process heeds it in the work that it does by itself; why is known to all."""
    with assembled(3) as (leader, followers):
        stops = [leader._stop, *(follower._stop for follower in followers)]
        stops[asked].ask(signal.SIGUSR1)
        assert wait_until(lambda: [stop.signal for stop in stops] == [signal.SIGUSR1] * 3, 5, 0.01)


def test_a_leader_that_has_left_the_stage_has_the_last_word() -> None:
    """Whatever is lost while it writes the result ends nothing."""
    with assembled(2) as (leader, followers):
        with leader.computing({}, never):
            next(followers[0].orders())
        followers[0]._line.close()
        time.sleep(QUICK.settle + QUICK.grace + 3 * QUICK.poll)
        assert leader.gather()


def test_a_leader_that_still_computes_hears_of_a_loss_when_it_gets_on() -> None:
    """`advance` and `share` raise, so that it need not be ended."""
    with assembled(2) as (leader, followers), leader.computing({}, never):
        next(followers[0].orders())
        leader.advance(5.0)
        followers[0]._line.close()
        assert wait_until(lambda: bool(leader.gather()), 5)
        for getting_on in (lambda: leader.advance(5.0), leader.share):
            with pytest.raises(TeamError, match="rank 1"):
                getting_on()


def test_the_leader_is_not_told_in_words_of_another_class() -> None:
    """Its own error stays one of communication, so that the reason is asked for and its detail kept."""
    with assembled(2) as (leader, followers), leader.computing({}, never):
        next(followers[0].orders())
        followers[0].failed(MemoryError("out of memory"))
        assert wait_until(lambda: bool(leader._losses), 5)
        with pytest.raises(TeamError) as caught:
            leader.advance(5.0)
        assert class_of_exception(caught.value) is FailureClass.communication


def test_a_follower_that_is_not_ready_is_waited_for_only_so_long() -> None:
    """After an attempt that failed in the leader, a follower may still be stuck in it."""
    with assembled(2) as (leader, followers):
        with leader.computing({}, never):
            next(followers[0].orders())
        assert "not ready" in leader.gather()


def test_missing_followers_are_waited_for_only_so_long() -> None:
    """And the leader says how many."""
    server, meeting = listen(local=True)
    with Leader(3, server, meeting, patience=QUICK, tell=lambda line: None) as leader:
        line = call(meeting, Seat(1, 3, 1))
        assert line is not None
        assert leader.gather() == "1 of 3 processes did not come"
        line.close()


def test_nobody_is_waited_for_who_was_asked_to_stop() -> None:
    """Neither those that have not come, nor by them: a job that is withdrawn while it begins leaves by itself, and nothing behind."""
    server, meeting = listen(local=True)
    stop = StopRequest()
    with Leader(2, server, meeting, tell=lambda line: None, stop=stop) as leader:
        stop.ask(signal.SIGTERM)
        assert leader.gather() == "asked to stop"
        assert join(Seat(1, 2, 1), lambda: None, Patience(), stop) is None


def test_strangers_and_doubles_are_turned_away() -> None:
    """Another word, a rank that is none, one that is taken, and a caller that says nothing sensible."""
    server, meeting = listen(local=True)
    with Leader(3, server, meeting, patience=QUICK, tell=lambda line: None) as leader:
        assert call(replace(meeting, token="0" * 64), Seat(1, 3, 1)) is None
        assert call(meeting, Seat(3, 3, 1)) is None
        with socket.create_connection(("127.0.0.1", meeting.port)) as rude:
            rude.sendall(b"GET / HTTP/1.0\r\n\r\n")
            followers = [line for rank in (1, 2) if (line := call(meeting, Seat(rank, 3, rank)))]
        assert len(followers) == 2
        assert wait_until(lambda: leader._server.fileno() == -1, 5, 0.01), "nobody else can call"
        double = call(meeting, Seat(2, 3, 2))
        assert double is None or double.receive() is None
        assert leader.gather() == ""
        for line in followers:
            line.close()


def test_a_leader_that_does_not_know_our_word_is_none_of_ours() -> None:
    """An address may lead to the leader of another job, which must not be obeyed."""
    server, meeting = listen(local=True)
    other = replace(meeting, token="f" * 64)
    with Leader(2, server, other, patience=QUICK, tell=lambda line: None):
        assert join(Seat(1, 2, 1), lambda: meeting, QUICK) is None


# ---- where it is written, and by whom


def test_the_meeting_is_private_complete_and_of_one_execution(tmp_path: Path) -> None:
    """Nobody else may read it; another job, a requeued one and another step have files of their own."""
    layout = Layout(tmp_path, "exp")
    values = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "SLURM_STEP_ID": "0"}
    file = meeting_file(layout, values)
    assert find(file) is None
    meeting = Meeting(("n1", "10.0.0.1"), 4242, "secret", "n1")
    publish(file, meeting)
    assert find(file) == meeting
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["7.1.0.json"]
    others = [meeting_file(layout, {**values, key: "9"}) for key in values]
    assert len({file, *others, meeting_file(layout, {"SLURM_JOB_ID": "7"})}) == 5


def test_seats_come_from_the_step() -> None:
    """Where there is a team and a step; the step says how many they are."""
    step = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "8"}
    assert seat_in_step(step, 4) == seat_in_step(step, 8) == Seat(3, 4, 1)
    assert seat_in_step(step, 1) is None
    assert seat_in_step({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, 4) is None


def test_a_site_may_be_more_patient() -> None:
    """By a variable; nonsense is not heeded."""
    assert patience_of({}) == patience_of({SILENT_VARIABLE: "soon"}) == patience_of({SILENT_VARIABLE: "0"}) == Patience()
    assert patience_of({SILENT_VARIABLE: "300"}).silent == 300.0


def test_processes_of_a_machine_are_as_many_as_fit() -> None:
    """One for each GPU that is there, or each core that is given; nodes become processes of this one."""
    here = Capacity(8, ("0", "1", "2"), 64.0)
    asked = Resources(cpus=4, gpus=4, nodes=2, memory_gb=16)
    assert (asked.processes_per_node, asked.team, asked.cpus_per_process) == (4, 8, 1)
    assert whole(asked, here) == Needs(8, 3, 32.0)
    assert processes_here(asked, whole(asked, here)) == 3
    assert processes_here(asked, whole(asked, replace(here, gpus=()))) == 1
    on_cpus = Resources(cpus=4, gpus=0, nodes=1, processes=2)
    assert processes_here(on_cpus, whole(on_cpus, here)) == 2
    assert processes_here(on_cpus, whole(on_cpus, replace(here, cpus=1))) == 1
    assert processes_here(Resources(), whole(Resources(), here)) == 1


def ended(outcome: Outcome, state: str = "", team: str = "n1,n2,n3") -> tuple[FailureClass, tuple[str, ...]]:
    """Class and the machines that the next attempt avoids."""
    claim = replace(new_claim(1, team=team), node="n1", slurm_job="5_0")
    departures = [Departure("key", "5_0", state, 0.0, 1.0)] if state else []
    attempts = ended_attempts([AttemptFiles(1, claim, outcome, False)], departures, 0.0)
    return attempts[0].failure, decide(attempts, since=0.0, max_attempts=9).request.exclude


def test_the_machine_of_the_lost_process_is_avoided() -> None:
    """Where it is known; else all of the team are suspect. One that Slurm says was killed for its memory ran out of it."""
    lost = Outcome(1, Ending.failed, "TeamError", "rank 3 is gone", "", "n1", 1.0, "5_0", "communication", "n2")
    assert ended(lost) == (FailureClass.communication, ("n2",))
    assert ended(replace(lost, node="")) == (FailureClass.communication, ("n1", "n2", "n3"))
    assert ended(replace(lost, node=""), team="") == (FailureClass.communication, ("n1",))
    assert ended(lost, "OUT_OF_MEMORY") == (FailureClass.memory, ())
