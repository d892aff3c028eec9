"""A leader and its followers in one process: what they tell each other, who may join, and whom an attempt blames."""

from __future__ import annotations

import contextlib
import signal
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from jobs.control.facts import Departure
from jobs.control.failure_policy import decide, ended_attempts
from jobs.errors import UsageError
from jobs.experiment.config import Resources
from jobs.signals import StopRequest
from jobs.store.attempts import AttemptFiles, new_claim, own_node
from jobs.store.failures import FailureClass, class_of_exception
from jobs.store.layout import Layout
from jobs.store.records import Ending, Outcome, write_json
from jobs.store.snapshot import check_snapshot, snapshot_facts, take_snapshot
from jobs.worker.machine import Capacity, Needs, needs_here, processes_here
from jobs.worker.task import stage_request
from jobs.worker.team_channel import (
    SILENT_VARIABLE,
    ProcessRank,
    Rendezvous,
    TeamError,
    TeamFailure,
    Timeouts,
    connect_to_leader,
    listen,
    rank_in_step,
    read_rendezvous,
    rendezvous_file,
    timeouts_of,
)
from jobs.worker.team_follower import Follower
from jobs.worker.team_leader import Leader
from jobs.worker.team_start import compute_request, join
from tests.jobs.worker.places import Place
from tests.waiting import wait_until

QUICK = Timeouts(silent=1.2, join=1.0, settle=0.3, grace=0.2, finish=0.5, share=0.5)


def no_exit(code: int) -> None:
    """Where a follower's process would end, its thread does."""


@contextlib.contextmanager
def assembled(size: int, timeouts: Timeouts = QUICK) -> Iterator[tuple[Leader, list[Follower]]]:
    """A leader and its followers, each with a real connection."""
    server, rendezvous = listen(local=True)
    with Leader(size, server, rendezvous, timeouts=timeouts, report=lambda line: None) as leader:
        lines = [(rank, connect_to_leader(rendezvous, ProcessRank(rank, size, rank))) for rank in range(1, size)]
        followers = [Follower(ProcessRank(rank, size, rank), line, timeouts=timeouts, exit_process=no_exit) for rank, line in lines if line]
        assert len(followers) == size - 1
        assert leader.wait_until_ready() == ""
        yield leader, followers


def never(failure: TeamFailure) -> None:
    pytest.fail(f"the attempt was ended: {failure}")


def test_a_follower_refuses_changed_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may see other files than the leader. It verifies the snapshot once, before it imports the registry, and names the file."""
    place, said = Place(tmp_path), list[str]()
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "launch.py").write_text("print(1)\n")
    snapshot = take_snapshot(tmp_path / "source", place.layout)
    workplace = replace(place.place, code=snapshot_facts(snapshot))
    output = tmp_path / "output"
    output.mkdir()
    request = stage_request(place.tapt, workplace, upstream={}, output=output, checkpoint=output, relief=0, attempt=1)
    check_snapshot.cache_clear()
    (snapshot.path / "launch.py").write_text("print(2)\n")
    monkeypatch.setitem(request["place"], "registry", "no_such_module:REGISTRY")
    with assembled(2) as (_, (team,)):
        with pytest.raises(UsageError, match=r"changed since the launch \(launch\.py\)"):
            compute_request(request, team, StopRequest(), said.append)
        (snapshot.path / "launch.py").unlink()
        with pytest.raises(UsageError, match=r"\(launch\.py is missing\)"):
            compute_request(request, team, StopRequest(), said.append)


def test_shared_values_arrive_in_order_and_only_in_their_stage() -> None:
    """Values of an order that is over are not taken for those of the next; without a value the wait ends."""
    with assembled(3) as (leader, followers):
        requests = [follower.requests() for follower in followers]
        with leader.computing({"stage": 1}, never):
            assert [next(each) for each in requests] == [{"stage": 1}] * 2
            assert [leader.share("a"), leader.share("b"), leader.share("left over")] == ["a", "b", "left over"]
            assert [[follower.share(), follower.share()] for follower in followers] == [["a", "b"]] * 2
            for follower in followers:
                follower.done()
        assert leader.wait_until_ready() == ""
        with leader.computing({"stage": 2}, never):
            assert [next(each) for each in requests] == [{"stage": 2}] * 2
            with pytest.raises(TeamError, match="shared nothing"):
                followers[0].share()
            leader.share("c")
            assert followers[0].share() == followers[1].share() == "c"
            for follower in followers:
                follower.done()


def test_the_root_cause_is_recorded_and_not_its_consequences() -> None:
    """A rank that runs out of memory makes the others fail in communication, which may be reported first."""
    with assembled(4) as (leader, followers):
        with contextlib.suppress(ConnectionError), leader.computing({}, never):
            for follower in followers:
                next(follower.requests())
            followers[0].failed(RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
            followers[1].failed(MemoryError("cannot allocate memory"))
            raise ConnectionError("gloo, in the leader itself")
        reason = leader.root_cause()
        assert reason is not None
        assert (reason.kind, reason.error) == (FailureClass.memory, "MemoryError")
        assert "rank 2 (process" in reason.detail


def test_a_follower_that_has_finished_its_part_may_be_lost() -> None:
    """The stage succeeds, but the team cannot start another."""
    with assembled(3) as (leader, followers):
        with leader.computing({}, never):
            for follower in followers:
                next(follower.requests())
                follower.done()
            assert wait_until(lambda: leader.wait_until_ready() == "")
            followers[0]._leader.close()
            assert wait_until(lambda: "its connection closed" in leader.wait_until_ready())
            time.sleep(QUICK.settle + QUICK.grace + 2 * QUICK.poll)
            leader.advance(0.0)
        assert "rank 1" in leader.wait_until_ready()


def test_a_follower_lost_between_two_stages_ends_the_next_at_once() -> None:
    """It was idle when it was lost; the failure names it and its machine, without waiting for a time-out."""
    with assembled(3) as (leader, followers):
        followers[1]._leader.close()
        assert wait_until(lambda: "rank 2" in leader.wait_until_ready())
        with pytest.raises(TeamError, match=r"rank 2 .* its connection closed"), leader.computing({}, never):
            pytest.fail("the stage has begun")
        reason = leader.root_cause()
        assert reason is not None
        assert (reason.kind, reason.node) == (FailureClass.communication, own_node())


@pytest.mark.parametrize("asked", [0, 2])
def test_a_stop_request_reaches_all_processes(asked: int) -> None:
    """Whichever process got the signal, all have the same reason."""
    with assembled(3) as (leader, followers):
        stops = [leader._stop, *(follower._stop for follower in followers)]
        stops[asked].request(signal.SIGUSR1)
        assert wait_until(lambda: [stop.signal for stop in stops] == [signal.SIGUSR1] * 3, step=0.01)


def test_a_loss_after_the_stage_is_ignored() -> None:
    """A follower lost while the leader writes the result ends nothing."""
    with assembled(2) as (leader, followers):
        with leader.computing({}, never):
            next(followers[0].requests())
        followers[0]._leader.close()
        time.sleep(QUICK.settle + QUICK.grace + 3 * QUICK.poll)
        assert leader.wait_until_ready()


def test_advance_and_share_raise_after_a_loss() -> None:
    """So the leader can fail by itself instead of being killed."""
    with assembled(2) as (leader, followers), leader.computing({}, never):
        next(followers[0].requests())
        leader.advance(5.0)
        followers[0]._leader.close()
        assert wait_until(lambda: bool(leader.wait_until_ready()))
        for getting_on in (lambda: leader.advance(5.0), leader.share):
            with pytest.raises(TeamError, match="rank 1"):
                getting_on()


def test_the_error_in_the_leader_stays_a_communication_error() -> None:
    """Its message is not that of another class, so that the root cause is queried and its detail recorded."""
    with assembled(2) as (leader, followers), leader.computing({}, never):
        next(followers[0].requests())
        followers[0].failed(MemoryError("out of memory"))
        assert wait_until(lambda: bool(leader._failures))
        with pytest.raises(TeamError) as caught:
            leader.advance(5.0)
        assert class_of_exception(caught.value) is FailureClass.communication


def test_waiting_for_a_busy_follower_ends_in_time() -> None:
    """After an attempt that failed in the leader, a follower may still be stuck in it."""
    with assembled(2) as (leader, followers):
        with leader.computing({}, never):
            next(followers[0].requests())
        assert "not ready" in leader.wait_until_ready()


def test_waiting_for_missing_followers_ends_in_time() -> None:
    """The leader reports how many are missing."""
    server, rendezvous = listen(local=True)
    with Leader(3, server, rendezvous, timeouts=QUICK, report=lambda line: None) as leader:
        line = connect_to_leader(rendezvous, ProcessRank(1, 3, 1))
        assert line is not None
        assert leader.wait_until_ready() == "1 of 3 processes did not connect"
        line.close()


def test_after_a_stop_request_no_process_waits() -> None:
    """Neither leader nor followers: a job that is cancelled while it starts exits by itself and leaves nothing."""
    server, rendezvous = listen(local=True)
    stop = StopRequest()
    with Leader(2, server, rendezvous, report=lambda line: None, stop=stop) as leader:
        stop.request(signal.SIGTERM)
        assert leader.wait_until_ready() == "asked to stop"
        assert join(ProcessRank(1, 2, 1), lambda: None, Timeouts(), stop) is None


def test_wrong_tokens_and_duplicate_ranks_are_rejected() -> None:
    """A wrong token, an invalid rank, a rank that is taken, and a peer that does not follow the protocol."""
    server, rendezvous = listen(local=True)
    with Leader(3, server, rendezvous, timeouts=QUICK, report=lambda line: None) as leader:
        assert connect_to_leader(replace(rendezvous, token="0" * 64), ProcessRank(1, 3, 1)) is None
        assert connect_to_leader(rendezvous, ProcessRank(3, 3, 1)) is None
        with socket.create_connection(("127.0.0.1", rendezvous.port)) as rude:
            rude.sendall(b"GET / HTTP/1.0\r\n\r\n")
            followers = [line for rank in (1, 2) if (line := connect_to_leader(rendezvous, ProcessRank(rank, 3, rank)))]
        assert len(followers) == 2
        assert wait_until(lambda: leader._server.fileno() == -1, step=0.01), "no other process can connect"
        double = connect_to_leader(rendezvous, ProcessRank(2, 3, 2))
        assert double is None or double.receive() is None
        assert leader.wait_until_ready() == ""
        for line in followers:
            line.close()


def test_a_leader_with_another_token_is_rejected() -> None:
    """An address may lead to the leader of another job, whose requests must not be executed."""
    server, rendezvous = listen(local=True)
    other = replace(rendezvous, token="f" * 64)
    with Leader(2, server, other, timeouts=QUICK, report=lambda line: None):
        assert join(ProcessRank(1, 2, 1), lambda: rendezvous, QUICK) is None


def test_the_rendezvous_is_private_complete_and_of_one_execution(tmp_path: Path) -> None:
    """Only this user may read it; another job, a requeued one and another step have other files."""
    layout = Layout(tmp_path, "exp")
    values = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "SLURM_STEP_ID": "0"}
    file = rendezvous_file(layout, values)
    assert read_rendezvous(file) is None
    rendezvous = Rendezvous(("n1", "10.0.0.1"), 4242, "secret", "n1")
    write_json(file, asdict(rendezvous), private=True)
    assert read_rendezvous(file) == rendezvous
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["7.1.0.json"]
    others = [rendezvous_file(layout, {**values, key: "9"}) for key in values]
    assert len({file, *others, rendezvous_file(layout, {"SLURM_JOB_ID": "7"})}) == 5


def test_ranks_come_from_the_step() -> None:
    """Where there is a team and a step; the step defines the number of processes."""
    step = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "8"}
    assert rank_in_step(step, 4) == rank_in_step(step, 8) == ProcessRank(3, 4, 1)
    assert rank_in_step(step, 1) is None
    assert rank_in_step({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, 4) is None


def test_a_site_can_set_the_heartbeat_timeout() -> None:
    """By an environment variable; invalid values are ignored."""
    assert timeouts_of({}) == timeouts_of({SILENT_VARIABLE: "soon"}) == timeouts_of({SILENT_VARIABLE: "0"}) == Timeouts()
    assert timeouts_of({SILENT_VARIABLE: "300"}).silent == 300.0


def test_number_of_processes_on_this_machine() -> None:
    """One per GPU that exists, or per core; processes of several nodes are counted together."""
    here = Capacity(8, ("0", "1", "2"), 64.0)
    asked = Resources(cpus=4, gpus=4, nodes=2, memory_gb=16)
    assert (asked.processes_per_node, asked.team, asked.cpus_per_process) == (4, 8, 1)
    assert needs_here(asked, here) == Needs(8, 3, 32.0)
    assert processes_here(asked, needs_here(asked, here)) == 3
    assert processes_here(asked, needs_here(asked, replace(here, gpus=()))) == 1
    on_cpus = Resources(cpus=4, gpus=0, nodes=1, processes=2)
    assert processes_here(on_cpus, needs_here(on_cpus, here)) == 2
    assert processes_here(on_cpus, needs_here(on_cpus, replace(here, cpus=1))) == 1
    assert processes_here(Resources(), needs_here(Resources(), here)) == 1


def ended(outcome: Outcome, state: str = "", team: str = "n1,n2,n3") -> tuple[FailureClass, tuple[str, ...]]:
    """Class and the machines that the next attempt avoids."""
    claim = replace(new_claim(1, team=team), node="n1", slurm_job="5_0")
    departures = [Departure("key", "5_0", state, 0.0, 1.0)] if state else []
    attempts = ended_attempts([AttemptFiles(1, claim, outcome, False)], departures, 0.0)
    return attempts[0].failure, decide(attempts, since=0.0, max_attempts=9).request.exclude


def test_the_machine_of_the_lost_process_is_avoided() -> None:
    """If it is known, else all machines of the team. OUT_OF_MEMORY from Slurm takes precedence: class memory."""
    lost = Outcome(1, Ending.failed, "TeamError", "rank 3 is gone", "", "n1", 1.0, "5_0", "communication", "n2")
    assert ended(lost) == (FailureClass.communication, ("n2",))
    assert ended(replace(lost, node="")) == (FailureClass.communication, ("n1", "n2", "n3"))
    assert ended(replace(lost, node=""), team="") == (FailureClass.communication, ("n1",))
    assert ended(lost, "OUT_OF_MEMORY") == (FailureClass.memory, ())
