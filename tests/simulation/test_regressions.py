"""What the simulation has found, each as short as it was made."""

from __future__ import annotations

from pathlib import Path

from tests.simulation.slurm import Reply
from tests.simulation.world import Shape, world

ONE_RUN = Shape(methods=("vft",), folds=1, seeds=1)


def test_what_is_cancelled_while_a_pass_is_under_way_is_not_submitted_by_it(folder: Path) -> None:
    """The pass had planned it before: neither is its array made, nor, made at that very moment, left in the queue."""
    for at in range(1, 13):
        with world(folder / str(at), ONE_RUN) as lab:
            lab.interleave(0, at, lab.cancel)
            assert not [element for _, element in lab.slurm.elements() if element.live]


def test_a_site_all_of_whose_nodes_have_failed_twice_is_not_ruled_out(folder: Path) -> None:
    """Slurm declines a request that excludes every node; without the exclusion it is taken."""
    with world(folder / "world", Shape(methods=("vft",), folds=1, seeds=2, nodes=2)) as lab:
        for _ in range(3):
            lab.run_pass()
            for worker in lab.start(4):
                for _ in range(4):
                    worker.step()
                worker.checkpoint()
            for node in lab.slurm.up:
                lab.slurm.fail_node(node, requeue=False)
                lab.slurm.up[node] = True
            lab.advance(30)
        lab.finish_everything()
        assert all(execution.progress or execution.result for execution in lab.executions)


def test_a_job_that_turns_up_when_nothing_is_open_is_adopted(folder: Path) -> None:
    """Its sbatch was given up long ago, what replaced it is over, and the user launches again: it is not submitted beside it."""
    with world(folder / "world", ONE_RUN) as lab:
        lab.slurm.reply = Reply.very_late
        lab.run_pass()
        while not lab.slurm.arrays:
            lab.advance(65)
            lab.run_pass()
        lab.cancel()
        lab.run_pass()
        lab.advance(1000)
        assert [element.state for _, element in lab.slurm.elements()] == ["PENDING"]
        lab.launch()
        report = lab.run_pass()
        assert report is not None
        assert not report.submitted
        lab.finish_everything()
        assert len(lab.executions) == 1
