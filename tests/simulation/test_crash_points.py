"""Every point at which a pass can be killed, or suspended while other processes act, one after another, in important situations."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.store.failures import FailureClass
from tests.simulation.crashes import kill
from tests.simulation.slurm import OWNER, Accounting, Reply
from tests.simulation.world import Shape, World, world

EVERYWHERE = "SER_GRID_EXAMPLES" in os.environ  # not only killed at each point
SHAPE = Shape(methods=("tapt",), folds=2, seeds=2)


def at_the_beginning(lab: World) -> None:
    """Nothing was submitted yet."""


def when_a_reply_was_lost(lab: World) -> None:
    lab.slurm.reply = Reply.lost
    lab.run_pass()


def when_there_was_no_job(lab: World) -> None:
    lab.slurm.reply = Reply.never
    lab.run_pass()
    lab.advance(70)
    lab.run_pass()
    lab.advance(70)


def when_a_lost_job_turns_up(lab: World) -> None:
    lab.slurm.reply = Reply.very_late
    lab.run_pass()
    for _ in range(3):
        lab.advance(70)
        lab.run_pass()
    lab.advance(900)


def when_both_of_a_double_may_start(lab: World) -> None:
    when_a_lost_job_turns_up(lab)
    lab.start(6)
    lab.check()


def when_refinements_were_refused(lab: World) -> None:
    lab.slurm.updates_work = False
    lab.run_pass()
    lab.slurm.updates_work = True


def when_elements_have_ended(lab: World) -> None:
    """One each: with a result, with a failure, cancelled by hand, on a node that died."""
    lab.run_pass()
    well, badly = lab.start(2)
    lab.finish(well)
    for _ in range(4):
        badly.step()
    badly.fail(FailureClass.memory)
    lab.leave(badly)
    lab.run_pass()
    started = lab.start(2)
    if started:
        lab.scancel_by_hand(lab.slurm.find(started[0].job), heard=False)
    if started[1:]:
        lab.slurm.fail_node(started[1].node, requeue=False)
    lab.advance(30)


def when_the_owner_has_cancelled_an_array(lab: World) -> None:
    """Accounting does not show it yet."""
    lab.run_pass()
    lab.slurm.accounting = Accounting.slow
    for element in lab.slurm.eligible():
        lab.scancel_by_hand(element, heard=False)
    lab.run_pass()
    lab.advance(30)


def when_a_launch_failed(lab: World) -> None:
    lab.run_pass()
    lab.slurm.fail_launch(lab.slurm.eligible()[0])


def when_some_are_cancelled(lab: World) -> None:
    """Recorded, but not yet cancelled in Slurm."""
    lab.run_pass()
    keys = [run.key for run in lab.graph.runs][:1]
    lab.slurm.back_at = lab.clock() + 1
    lab.cancel(keys)
    lab.advance(1)


def when_runs_are_out(lab: World) -> None:
    lab.run_pass()
    for number, worker in enumerate(lab.start(2)):
        lab.finish(worker)
        lab.next_ua = (0.2, "") if number else (0.25, "the loss never moved")
    for worker in lab.start(9):
        lab.finish(worker)
        lab.next_ua = (0.6, "")
    lab.advance(30)


SITUATIONS = (
    at_the_beginning,
    when_a_reply_was_lost,
    when_there_was_no_job,
    when_a_lost_job_turns_up,
    when_both_of_a_double_may_start,
    when_refinements_were_refused,
    when_elements_have_ended,
    when_the_owner_has_cancelled_an_array,
    when_a_launch_failed,
    when_some_are_cancelled,
    when_runs_are_out,
)


def other_pass(lab: World) -> None:
    lab.run_pass(1)


def other_pass_and_work(lab: World) -> None:
    lab.run_pass(1)
    for worker in lab.start(4):
        lab.finish(worker)
    lab.advance(5)


def die(lab: World) -> None:
    kill()


def cancel(lab: World) -> None:
    lab.cancel()


def scancel(lab: World) -> None:
    lab.slurm.cancel([element.name for _, element in lab.slurm.elements()], OWNER)
    lab.perhaps_cancelled.update(key for run in lab.graph.runs for key in (run.key, *lab.graph.nodes[run.key].upstream.values()))


@pytest.mark.slow
@pytest.mark.parametrize("happens", [die, other_pass, other_pass_and_work, cancel, scancel], ids=lambda each: each.__name__)
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda each: each.__name__)
def test_whatever_happens_at_a_point_is_made_good(
    folder: Path, situation: Callable[[World], None], happens: Callable[[World], None]
) -> None:
    """Every run that may get its result does, none twice, and none after its cancellation."""
    with world(folder / "undisturbed", SHAPE) as lab:
        situation(lab)
        points = lab.interleave(0, 0, lambda: None)
    for at in range(1, points + 1, 1 if happens is die or EVERYWHERE else 3):
        with world(folder / str(at), SHAPE) as lab:
            situation(lab)
            lab.interleave(0, at, functools.partial(happens, lab))
            lab.check()
            lab.finish_everything()


@pytest.mark.slow
@pytest.mark.parametrize("same_machine", [True, False])
def test_an_sbatch_that_outlives_its_caller_is_waited_for(folder: Path, same_machine: bool) -> None:
    """The job may appear long after its name was not found in the queue."""
    with world(folder / "world", Shape(methods=("tapt",), same_machine=same_machine)) as lab:
        lab.kill_at(0, 1, "during sbatch")
        while lab.slurm.under_way:
            lab.advance(21)
            lab.run_pass(0)
        lab.finish_everything()
        assert lab.slurm.calls.count("sbatch") == 1, "the tapt array came in by itself"
