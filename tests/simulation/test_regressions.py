"""Failures found by the simulation, each reduced to its shortest sequence."""

from __future__ import annotations

from pathlib import Path

from jobs.experiment.config import Policy
from jobs.store.failures import FailureClass
from tests.simulation.slurm import Reply
from tests.simulation.worker import Place, SimulatedWorker
from tests.simulation.world import Shape, World, world

ONE_RUN = Shape(methods=("vft",), folds=1, seeds=1)


def _submit_with_a_late_double(lab: World) -> None:
    """The first sbatch gives no reply, its array is submitted again, and will turn up as a double after 900 s."""
    lab.slurm.reply = Reply.very_late
    lab.run_pass()
    while not lab.slurm.arrays:
        lab.advance(65)
        lab.run_pass()


def test_what_is_cancelled_while_a_pass_is_under_way_is_not_submitted_by_it(folder: Path) -> None:
    """The pass had planned it before: its array is not submitted, or, if submitted at that moment, is withdrawn."""
    for at in range(1, 13):
        with world(folder / str(at), ONE_RUN) as lab:
            lab.interleave(0, at, lab.cancel)
            assert not [element for _, element in lab.slurm.elements() if element.live]


def test_a_site_all_of_whose_nodes_have_failed_twice_is_still_used(folder: Path) -> None:
    """Slurm rejects a request that excludes every node; without the exclusion it is accepted."""
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


def test_an_outage_of_most_nodes_at_once_excludes_none_of_them(folder: Path) -> None:
    """Five of six nodes fail and are up again: what is submitted then runs on all of them. Before: two at a time on the node left over."""
    with world(folder / "world", Shape(methods=("vft",), folds=1, seeds=12, nodes=6)) as lab:
        lab.run_pass()
        begun = lab.start(12)
        assert len(begun) == 12
        for worker in begun:
            while worker.place is not Place.work:
                worker.step()
        for node in list(lab.slurm.up)[1:]:
            lab.slurm.fail_node(node, requeue=False)
            lab.slurm.up[node] = True
        lab.advance(60)
        report = lab.run_pass()
        assert report is not None
        assert len(report.submitted) == 10
        assert len(lab.start(12)) == 10
        lab.finish_everything()


def test_nodes_that_lose_their_storage_one_after_another_stop_no_stage(folder: Path) -> None:
    """A run whose jobs end on six nodes before a worker begins is tried again as long as jobs of other runs begin; then it is done."""
    with world(folder / "world", Shape(methods=("vft",), folds=1, seeds=8, nodes=6)) as lab:
        unlucky = lab.graph.runs[0].key
        for _ in range(6):
            lab.run_pass()
            begun = lab.start(12)
            for worker in begun:
                if worker.key == unlucky:
                    lab.slurm.end(lab.slurm.find(worker.job), "FAILED")
            lab.advance(30)
            lab.finish(next(worker for worker in lab.running() if worker.key != unlucky))
            lab.advance(30)
        report = lab.run_pass()
        assert report is not None
        assert report.plan.given_up == ()
        lab.finish_everything()
        assert len([each for each in lab.executions if each.key == unlucky]) == 1


def test_a_job_that_turns_up_when_nothing_is_open_is_adopted(folder: Path) -> None:
    """Its sbatch was given up long ago, its replacement has ended, and the user launches again: no second job is submitted beside it."""
    with world(folder / "world", ONE_RUN) as lab:
        _submit_with_a_late_double(lab)
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


def test_a_run_that_its_owner_cancelled_stays_cancelled_when_a_late_double_is_withdrawn(folder: Path) -> None:
    """The double departs last, withdrawn by the program; the owner's earlier scancel still counts."""
    with world(folder / "world", ONE_RUN) as lab:
        _submit_with_a_late_double(lab)
        lab.start()
        (array,) = lab.slurm.arrays.values()
        lab.scancel_by_hand(array.elements[0], heard=True)
        lab.advance(1000)  # the double is in the queue
        for _ in range(3):
            report = lab.run_pass()
            lab.advance(65)
            assert report is not None
            assert list(report.plan.reasons.values()) == ["cancelled; launching again lifts that"]
            assert not report.submitted
        assert [element.state for array in lab.slurm.arrays.values() for element in array.elements] == ["CANCELLED by 1000"] * 2
        lab.launch()
        lab.finish_everything()
        assert lab.published.total() == 1


def test_a_launch_lifts_an_earlier_scancel_that_is_noticed_long_after_it(folder: Path) -> None:
    """Slurm did not answer for an hour around the launch: the end in accounting decides, not the first pass that missed the job."""
    for launches_after in (True, False):
        with world(folder / str(launches_after), ONE_RUN) as lab:
            lab.run_pass()
            lab.start()
            (array,) = lab.slurm.arrays.values()
            if not launches_after:
                lab.launch()
            lab.scancel_by_hand(array.elements[0], heard=True)
            lab.slurm.back_at = lab.clock() + 3600
            lab.advance(100)
            if launches_after:
                lab.launch()
            assert lab.run_pass() is None
            lab.advance(3600)
            report = lab.run_pass()
            assert report is not None
            assert bool(report.plan.reasons) is not launches_after
            lab.finish_everything()


def test_a_late_double_of_a_diverged_run_is_withdrawn(folder: Path) -> None:
    """Its slot has another seed, and the stage of the double is not needed: nothing waits for it."""
    with world(folder / "world", ONE_RUN) as lab:
        _submit_with_a_late_double(lab)
        (worker,) = lab.start()
        _diverge(lab, worker)
        report = lab.settle()
        assert report.judgements.generations == {("vft", "1", 0): 1}
        double = max(lab.slurm.arrays.values(), key=lambda array: array.number).elements[0]
        assert (double.state, double.begun) == ("CANCELLED by 1000", 0.0)
        lab.finish_everything()


def test_a_late_double_of_a_diverged_run_that_starts_before_any_pass_computes_nothing(folder: Path) -> None:
    """A slot never goes back to an earlier seed."""
    with world(folder / "world", ONE_RUN) as lab:
        _submit_with_a_late_double(lab)
        (worker,) = lab.start()
        _diverge(lab, worker)
        lab.run_pass()
        for worker in lab.start(2):
            lab.finish(worker)
        lab.advance(1000)
        (double,) = lab.start()
        lab.finish(double)
        report = lab.run_pass()
        assert report is not None
        assert report.judgements.generations == {("vft", "1", 0): 1}
        lab.finish_everything()
        assert lab.published.total() == 1


def test_what_is_queued_is_withdrawn_when_its_slots_are_given_up(folder: Path) -> None:
    """Launched again with fewer seeds, the experiment waits for none of the runs beyond them."""
    with world(folder / "world", Shape(methods=("vft",), folds=1, seeds=3)) as lab:
        lab.run_pass()
        lab.launch_with_seeds(1)
        lab.run_pass()
        assert len([element for _, element in lab.slurm.elements() if element.state == "PENDING"]) == 1
        lab.finish_everything()
        assert lab.published.total() == 1


def test_a_failure_of_a_stage_that_is_no_longer_in_the_experiment_costs_nothing(folder: Path) -> None:
    """Launched again with fewer seeds while a run beyond them is about to begin: its failure is not the new experiment's."""
    policy = Policy(max_failures=2, max_attempts=6)
    with world(folder / "world", Shape(methods=("vft",), folds=1, seeds=3, policy=policy)) as lab:
        lab.run_pass()
        kept, _, former = lab.start(3)
        lab.launch_with_seeds(2)
        lab.run_pass()
        for worker in (former, kept):
            _fail(lab, worker, FailureClass.disk)
        report = lab.run_pass()
        assert report is not None
        assert report.submitted == (kept.key,)
        lab.finish_everything()


def test_a_failure_of_a_reserve_seed_that_is_no_longer_needed_costs_nothing(folder: Path) -> None:
    """The result of its slot that diverged was damaged: it is computed again, and the slot has its first seed meanwhile."""
    policy = Policy(max_failures=2, max_attempts=6, max_seeds=2)
    with world(folder / "world", Shape(methods=("vft",), folds=1, seeds=1, policy=policy)) as lab:
        first = lab.graph.runs[0].key
        lab.next_ua = (0.25, "the loss never moved")
        lab.run_pass()
        lab.finish(lab.start()[0])
        lab.run_pass()
        _fail(lab, lab.start()[0], FailureClass.disk)
        lab.spoil(first, 0)
        lab.next_ua = (0.6, "")
        lab.alike.clear()
        lab.run_pass()
        lab.advance(70)
        lab.run_pass()
        (worker,) = lab.start()
        assert worker.key == first
        _fail(lab, worker, FailureClass.disk)
        report = lab.run_pass()
        assert report is not None
        assert report.submitted == (first,)
        lab.finish_everything()


def _fail(lab: World, worker: SimulatedWorker, failure: FailureClass, words: str = "it went wrong") -> None:
    while worker.place is not Place.work:
        worker.step()
    worker.fail(failure, words)
    lab.leave(worker)


def _diverge(lab: World, worker: SimulatedWorker) -> None:
    _fail(lab, worker, FailureClass.divergence)


def test_a_node_that_fails_every_stage_at_once_does_not_drain_the_grid(folder: Path) -> None:
    """As one without the corpus or with a broken GPU: always free, it takes one element after another, and each ends with the same error.

    Once a sibling has its result from another node, they are tried again without that node, and the user launches nothing again.
    Before: every stage that had started there was given up.
    """
    with world(folder / "world", Shape(methods=("vft",), folds=1, seeds=8)) as lab:
        lab.slurm.up["n1"] = False
        lab.run_pass()
        elsewhere = lab.start(4)
        lab.slurm.up["n1"] = True
        while begun := lab.start():
            _fail(lab, begun[0], FailureClass.refused, "no corpus at /data")
        assert [each.node for each in lab.executions] == ["n1"] * 4
        report = lab.run_pass()
        assert report is not None
        assert len(report.plan.given_up) == 4, "nothing tells the node from the program yet"
        lab.finish(elsewhere[0])
        report = lab.run_pass()
        assert report is not None
        assert [batch.request.exclude for batch in report.plan.batches] == [("n1",)]
        assert len(report.submitted) == 4
        for worker in [*elsewhere[1:], *lab.start(4)]:
            lab.finish(worker)
        assert lab.settle().complete
        assert len(lab.executions) == 12


def test_a_node_that_fails_more_stages_than_the_budget_of_the_experiment_does_not_drain_the_grid(folder: Path) -> None:
    """What failed there is tried elsewhere although `policy.max_failures` would allow for no further attempt; the node's failures are free.

    The failures that they have elsewhere count.
    """
    policy = Policy(max_failures=2, max_attempts=6)
    with world(folder / "world", Shape(methods=("vft",), folds=1, seeds=8, policy=policy)) as lab:
        lab.slurm.up["n1"] = False
        lab.run_pass()
        elsewhere = lab.start(4)
        lab.slurm.up["n1"] = True
        while begun := lab.start():
            _fail(lab, begun[0], FailureClass.code)
        assert [each.node for each in lab.executions] == ["n1"] * 4
        lab.finish(elsewhere[0])
        report = lab.run_pass()
        assert report is not None
        assert len(report.submitted) == 4
        assert report.plan.given_up == ()
        for left in (1, 0):
            (again,) = lab.start()
            _fail(lab, again, FailureClass.memory)
            report = lab.run_pass()
            assert report is not None
            assert len(report.submitted) == left
        assert set(report.plan.reasons.values()) == {"the experiment's budget of failed attempts is spent (policy.max_failures)"}
        lab.finish_everything()


def test_a_faulty_node_is_remembered_when_only_one_of_its_stages_is_left(folder: Path) -> None:
    """Those that have got their result elsewhere are evidence still. Before: the last one was withdrawn from the queue and given up."""
    with world(folder / "world", Shape(methods=("vft",), folds=1, seeds=4, nodes=2)) as lab:
        lab.slurm.up["n1"] = False
        lab.run_pass()
        elsewhere = lab.start(2)
        lab.slurm.up["n1"] = True
        for worker in lab.start(2):
            _fail(lab, worker, FailureClass.code)
        for worker in elsewhere:
            lab.finish(worker)
        report = lab.run_pass()
        assert report is not None
        assert len(report.submitted) == 2
        lab.finish(lab.start()[0])
        report = lab.run_pass()
        assert report is not None
        assert (report.plan.given_up, report.plan.withdrawn, len(report.plan.waiting)) == ((), (), 1)
        assert lab.settle().complete
        assert [each.node for each in lab.executions].count("n1") == 2


def test_an_error_that_stages_have_on_several_nodes_is_not_retried(folder: Path) -> None:
    """It is one of the code or the configuration, also if another stage of the kind succeeds."""
    with world(folder / "world", Shape(methods=("vft",), folds=1, seeds=5)) as lab:
        lab.run_pass()
        begun = lab.start(5)  # two on n1, two on n2
        for worker in begun[:3]:
            while worker.place is not Place.work:
                worker.step()
            worker.fail(FailureClass.code, "division by zero")
        for worker in begun:
            lab.finish(worker)
        report = lab.settle()
        assert len(report.plan.given_up) == 3
        assert len(lab.executions) == 5


def test_a_node_on_which_no_worker_begins_takes_one_job_of_each_stage_at_the_most(folder: Path) -> None:
    """It may take all that is queued before the next pass; every stage is then submitted again without it, and none is given up."""
    with world(folder / "world", Shape(methods=("vft",), folds=1, seeds=8)) as lab:
        lab.slurm.up["n1"] = False
        lab.run_pass()
        elsewhere = lab.start(4)
        lab.slurm.up["n1"] = True
        while begun := lab.start():
            lab.slurm.end(lab.slurm.find(begun[0].job), "FAILED")
        for worker in elsewhere:
            lab.finish(worker)
        assert lab.settle().complete
        assert len(lab.executions) == 8
        assert "n1" not in {each.node for each in lab.executions}
