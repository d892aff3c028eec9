"""What the processes of a team post for one another, over real connections."""

from __future__ import annotations

import threading

import pytest

from jobs.experiment.registry import Team
from jobs.worker.team_board import Board
from jobs.worker.team_channel import TeamError
from tests.jobs.worker.test_team_channel import assembled, never


def test_what_one_process_posts_all_find() -> None:
    """Also if they look before it is posted."""
    with assembled(4) as (leader, followers), leader.computing({"stage": 1}, never):
        for follower in followers:
            next(follower.requests())
        early: list[str] = []
        looking = threading.Thread(target=lambda: early.append(followers[2].find("of 1", 20.0)))
        looking.start()
        leader.post("of 0", "a")
        followers[0].post("of 1", "b")
        followers[1].post("of 2", "c")
        team: list[Team] = [leader, *followers]
        for process in team:
            assert [process.find(f"of {rank}", 20.0) for rank in range(3)] == ["a", "b", "c"]
        looking.join()
        assert early == ["b"]
        with pytest.raises(TeamError, match="nobody"):
            followers[0].find("nobody", 0.05)
        for follower in followers:
            follower.done()


def test_what_was_posted_for_a_stage_is_not_found_in_the_next() -> None:
    """The same keys are used in every stage of a task."""
    with assembled(2) as (leader, followers):
        requests = followers[0].requests()
        for number in (1, 2):
            with leader.computing({"stage": number}, never):
                next(requests)
                with pytest.raises(TeamError):
                    followers[0].find("address", 0.05)
                with pytest.raises(TeamError):
                    leader.find("address", 0.05)
                followers[0].post("address", str(number))
                assert leader.find("address", 20.0) == str(number)
                followers[0].done()
            assert leader.wait_until_ready() == ""


def test_a_value_that_arrives_before_its_stage_is_kept() -> None:
    """Another process may have been told of the stage first; what belongs to earlier stages is dropped."""
    board = Board()
    board.put(1, "address", "former")
    board.put(2, "address", "early")
    board.clear_before(2)
    assert board.find(2, "address", 0.0) == "early"
    with pytest.raises(TeamError):
        board.find(1, "address", 0.0)


def test_a_wait_ends_when_a_process_is_lost() -> None:
    """Long before its time is up."""

    def lost() -> None:
        raise TeamError("rank 1 is lost")

    with pytest.raises(TeamError, match="rank 1 is lost"):
        Board().find(1, "address", 600.0, lost)


def test_processes_of_one_machine_reach_each_other_by_loopback() -> None:
    with assembled(3) as (leader, followers):
        team: list[Team] = [leader, *followers]
        assert [process.address for process in team] == ["127.0.0.1"] * 3
