"""What a pass makes good, against recorded replies of Slurm: accounting that lags or is away, dependencies refused, arrays that turn up."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from jobs.control.executor_protocol import Batch
from jobs.control.facts import Departure, Phase, Request
from jobs.errors import RequestRefusedError, SlurmUnavailableError, SubmissionFailedError, UsageError
from jobs.experiment.config import SlurmSite
from jobs.slurm.client import SlurmClient
from jobs.slurm.executor import SlurmArrays
from jobs.slurm.parse import Accounted, QueuedElement
from jobs.slurm.recovery import LATE_SECONDS, REFINEMENT_TRIES
from jobs.slurm.submissions import State, SubmissionBook, new_submission
from jobs.store.failures import FailureClass, class_of_state
from tests.jobs.slurm_cases import arrays_of, batch_of, experiment_of, graph_of, layout_of, node

LAUNCH = "launch failed requeued held"


@dataclass
class RecordedClient(SlurmClient):
    """Slurm's replies, set by a test; what it was told."""

    held: dict[str, tuple[str, str, str]] = field(default_factory=dict)  # element -> state, reason, name
    known: dict[str, tuple[str, str, str]] = field(default_factory=dict)  # the same, of jobs asked for by number
    states: dict[str, str] | None = field(default_factory=dict)
    ends: dict[str, float] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)
    takes_dependencies: bool = True
    answers: bool = True
    told: list[tuple[str, str]] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # of sbatch, in turn
    site_nodes: int = 9

    def queue(self, *, name: str | None = None, patient: bool = True) -> tuple[QueuedElement, ...]:
        found = (QueuedElement(job, *facts) for job, facts in self.held.items())
        return tuple(each for each in found if name is None or each.name == name)

    def jobs_known(self, jobs: Iterable[str]) -> tuple[QueuedElement, ...]:
        asked = set(jobs)
        return tuple(QueuedElement(job, *facts) for job, facts in self.known.items() if job.partition("_")[0] in asked)

    def accounting(self, jobs: Mapping[str, str]) -> dict[str, Accounted] | None:
        asked = set(jobs)
        self.told.append(("accounting", ",".join(sorted(asked))))
        if self.states is None:
            return None
        return {job: Accounted(state, self.ends.get(job)) for job, state in self.states.items() if job.partition("_")[0] in asked}

    def accounting_by_name(self, names: Iterable[str], since: float) -> dict[str, str] | None:
        return {}

    def launch_nodes(self, elements: Iterable[str]) -> dict[str, str]:
        return {job: self.nodes[job] for job in elements if job in self.nodes}

    def site(self) -> dict[str, str]:
        return {}

    def node_count(self, site: SlurmSite) -> int:
        return self.site_nodes

    def set_dependency(self, elements: str, dependency: str) -> bool:
        self.told.append((elements, dependency))
        return self.takes_dependencies

    def cancel(self, elements: Iterable[str]) -> None:
        if not self.answers:
            raise SlurmUnavailableError("scancel failed")
        for job in elements:
            self.told.append(("cancel", job))
            self.held.pop(job, None)

    def cancel_named(self, name: str) -> None:
        self.told.append(("cancel named", name))

    def submit(self, folder: Path, script: str, parameters: Mapping[str, Any], site: SlurmSite) -> str:
        self.scripts.append(script)
        if self.errors:
            raise SubmissionFailedError(self.errors.pop(0))
        number = str(11 + len(self.scripts))
        self.take(number, parameters["job_name"], int(str(parameters["additional_parameters"]["array"]).split("-")[-1]) + 1)
        return number

    def take(self, number: str, name: str, size: int) -> None:
        self.held.update({f"{number}_{index}": ("PENDING", "Resources", name) for index in range(size)})

    def become(self, job: str, state: str, reason: str = "None") -> None:
        self.held[job] = (state, reason, self.held[job][2])

    def cancelled(self) -> list[str]:
        return [text for what, text in self.told if what == "cancel"]


class Case:
    """An executor whose Slurm and clock a test moves."""

    def __init__(self, folder: Path) -> None:
        self.now = 1000.0
        self.client = RecordedClient()
        self.folder = folder
        self.arrays = self.fresh()
        self.book = SubmissionBook(layout_of(folder))

    def fresh(self) -> SlurmArrays:
        """As another process would have it."""
        return arrays_of(self.folder, experiment_of(), client=self.client, settle_seconds=60, clock=lambda: self.now, user=1000)

    def submit(self, *keys: str, request: Request | None = None, runs_per_task: int = 1) -> str:
        """Number of the array."""
        nodes = [node(key, "states") for key in keys]
        batch = replace(batch_of(nodes, runs_per_task), request=request or Request())
        return self.arrays.submit(batch, graph_of(nodes), {})[keys[0]].job.partition("_")[0]

    def gone(self, *jobs: str) -> None:
        for job in jobs:
            del self.client.held[job]

    def passes(self, seconds: float = 20.0) -> Mapping[str, Any]:
        self.now += seconds
        return self.arrays.in_flight()

    def departed(self, *keys: str) -> dict[str, tuple[Departure, ...]]:
        found = self.arrays.departures(keys)
        assert self.fresh().departures(keys) == found, "another process reads the same"
        assert all(each.asked is not None for left in found.values() for each in left)
        return {key: tuple(replace(each, asked=None) for each in left) for key, left in found.items()}


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    return Case(tmp_path)


def states_of(found: Mapping[str, Sequence[Departure]]) -> dict[str, list[str]]:
    return {key: [each.state for each in departures] for key, departures in found.items()}


def test_a_job_that_squeue_does_not_list_has_not_left_the_queue(case: Case) -> None:
    """Whatever hides it: slurmctld shows it when asked by number, and its stages stay in flight."""
    case.submit("a", "b")
    case.client.known = {job: ("PENDING", "Priority", case.client.held[job][2]) for job in ("12_0", "12_1")}
    case.gone("12_0", "12_1")
    for _ in range(5):
        case.passes()
    assert case.departed("a", "b") == {}
    case.client.known = {"12_0": ("RUNNING", "None", "of somebody else"), "12_1": ("OUT_OF_MEMORY", "None", case.book.open()[0].name)}
    case.client.states = None  # no accounting
    case.passes()
    assert states_of(case.departed("a", "b")) == {"a": [""], "b": ["OUT_OF_MEMORY"]}


def test_final_states_of_elements_that_left(case: Case) -> None:
    """While others still run, and when all are gone; the uid that cancelled is kept; accounting is queried once."""
    case.submit("a", "b", "c")
    case.gone("12_0", "12_1")
    case.client.states = {"12_0": "NODE_FAIL", "12_1": "CANCELLED by 1000", "12_2": "RUNNING"}
    case.client.ends = {"12_1": 1012.0}
    assert set(case.passes()) == {"c"}
    assert case.departed("a", "b", "c") == {
        "a": (Departure("a", "12_0", "NODE_FAIL", 1000.0, 1020.0),),
        "b": (Departure("b", "12_1", "CANCELLED by 1000", 1000.0, 1020.0, ended=1012.0),),
    }
    case.client.told.clear()
    case.passes()
    assert case.client.told == []
    case.gone("12_2")
    case.client.states["12_2"] = "COMPLETED"
    assert case.passes() == {}
    assert case.book.open() == ()
    assert states_of(case.departed("a", "c")) == {"a": ["NODE_FAIL"], "c": ["COMPLETED"]}
    case.submit("a")
    case.gone("13_0")
    case.client.states["13_0"] = "OUT_OF_MEMORY"
    case.passes()
    assert states_of(case.departed("a")) == {"a": ["NODE_FAIL", "OUT_OF_MEMORY"]}


@pytest.mark.parametrize("lagging", [{"12_0": "RUNNING"}, {"12_0": "PENDING"}, {}], ids=["running", "pending", "not at all"])
def test_lagging_accounting_is_queried_again(case: Case, lagging: dict[str, str]) -> None:
    """Until it reports a final state."""
    case.submit("a")
    case.gone("12_0")
    case.client.states = dict(lagging)
    for _ in range(2):
        assert case.passes() == {}
        assert case.departed("a") == {"a": (Departure("a", "12_0", "", 1000.0, 1020.0),)}
        assert case.arrays.settling() == {"a"}
    case.client.states = {"12_0": "TIMEOUT"}
    case.passes()
    assert case.departed("a") == {"a": (Departure("a", "12_0", "TIMEOUT", 1000.0, 1020.0),)}
    assert case.arrays.settling() == frozenset()
    assert case.book.open() == ()


def test_accounting_that_is_hours_late_is_still_asked(case: Case) -> None:
    """After the settle time the stage is retried, its end unknown; an end that is accounted two hours later is recorded."""
    case.submit("a")
    case.gone("12_0")
    for _ in range(3):
        case.passes()
        assert case.arrays.settling() == {"a"}
    case.passes()
    assert case.arrays.settling() == frozenset()
    assert states_of(case.departed("a")) == {"a": [""]}
    case.passes(7200)
    case.client.states = {"12_0": "OUT_OF_MEMORY"}
    case.passes()
    assert states_of(case.departed("a")) == {"a": ["OUT_OF_MEMORY"]}
    assert case.book.open() == ()


def test_accounting_that_never_answers_is_given_up(case: Case) -> None:
    """After `LATE_SECONDS` the record is closed, and accounting is not asked again."""
    case.submit("a")
    case.gone("12_0")
    case.passes()
    case.passes(LATE_SECONDS)
    assert case.book.open() == ()
    assert case.arrays.settling() == frozenset()
    case.client.states = {"12_0": "TIMEOUT"}
    case.passes()
    assert states_of(case.departed("a")) == {"a": [""]}


def test_without_accounting_the_state_is_unknown_at_once(case: Case) -> None:
    """There is nothing to wait for."""
    case.submit("a", "b")
    case.gone("12_0")
    case.client.states = None
    case.passes()
    assert states_of(case.departed("a", "b")) == {"a": [""]}
    assert case.arrays.settling() == frozenset()


def test_a_batch_is_submitted_again_while_accounting_lags(case: Case) -> None:
    """Under the next number; the final state of the first submission is still recorded."""
    case.submit("a")
    case.gone("12_0")
    case.passes()
    assert case.submit("a") == "13"
    case.client.states = {"12_0": "FAILED"}
    assert case.passes()["a"].job == "13_0"
    assert states_of(case.departed("a")) == {"a": ["FAILED"]}
    assert [record.name[-2:] for record in case.book.open()] == [".2"]


def test_another_request_is_another_submission(case: Case) -> None:
    """More memory and excluded nodes, in the script and in the name; the workers' description has the request too."""
    case.submit("a")
    case.gone("12_0")
    case.client.states = None
    case.passes()
    case.submit("a", request=Request(1, 1.5, ("n1", "n2")))
    assert "#SBATCH --mem=512M" in case.client.scripts[0]
    assert "#SBATCH --mem=768M\n#SBATCH --exclude=n1,n2\n" in case.client.scripts[1]
    first, second = (record.name for record in (*case.book.closed(), *case.book.open()))
    assert first.rpartition(".")[0] != second.rpartition(".")[0]
    assert second.endswith(".1")
    assert '"relief": 1' in case.book.tasks_file(second).read_text()


def test_a_rejected_request_is_kept_with_its_reason(case: Case) -> None:
    """For the passes of other processes too, until the stage is submitted again."""
    case.client.errors = ["sbatch: error: QOSMaxCpuPerJobLimit", "sbatch: error: QOSMaxCpuPerJobLimit"]
    for when in (1000.0, 1020.0):
        case.now = when
        with pytest.raises(RequestRefusedError, match="QOSMaxCpuPerJobLimit"):
            case.submit("a")
    expected = {"a": ((1000.0, "sbatch: error: QOSMaxCpuPerJobLimit"), (1020.0, "sbatch: error: QOSMaxCpuPerJobLimit"))}
    assert case.arrays.refusals(["a", "b"]) == case.fresh().refusals(["a"]) == expected
    assert case.passes() == {}
    case.submit("a")
    assert case.arrays.refusals(["a"]) == {}


def test_a_held_requeued_element_waits_and_can_be_withdrawn(case: Case) -> None:
    """In SPECIAL_EXIT and the like: queued, shown as stuck, not running for ever."""
    case.submit("a", "b")
    case.client.become("12_0", "SPECIAL_EXIT")
    found = case.passes()
    assert {key: flight.phase for key, flight in found.items()} == {"a": Phase.queued, "b": Phase.queued}
    assert set(case.arrays.stuck()) == {"a"}
    assert case.arrays.cancel(["a"]) == ("a",)


def test_a_cancellation_by_another_account_is_no_decision_of_the_owner(case: Case) -> None:
    """An operator's or a reaper's scancel counts as a lost job, which is retried within bounds; the owner's own is final."""
    case.submit("a", "b")
    case.gone("12_0", "12_1")
    case.client.states = {"12_0": "CANCELLED by 4711", "12_1": "CANCELLED by 1000"}
    case.passes()
    found = states_of(case.departed("a", "b"))
    assert found == {"a": ["CANCELLED by another account (4711)"], "b": ["CANCELLED by 1000"]}
    assert [class_of_state(state[0]) for state in found.values()] == [FailureClass.node, FailureClass.cancelled]


def test_excluded_nodes_that_slurm_does_not_know_are_dropped(case: Case) -> None:
    """Slurm would reject every submission that excludes a removed node; it is repeated once without these names."""
    unknown = "sbatch: error: Batch job submission failed: Invalid node name specified"
    case.client.errors = [unknown]
    assert case.submit("a", request=Request(exclude=("gone",))) == "13"
    assert ["--exclude=gone" in script for script in case.client.scripts] == [True, False]
    case.client.errors = [unknown, unknown]
    with pytest.raises(UsageError, match="Invalid node name"):
        case.submit("b", request=Request(exclude=("gone",)))


def test_a_withdrawal_is_recorded_before_scancel(case: Case) -> None:
    """Only pending elements that compute nothing else; a scancel without effect is repeated."""
    case.submit("a", "b", "c", "d", "e", runs_per_task=2)
    case.client.become("12_1", "RUNNING")
    case.passes()
    case.client.answers = False
    with pytest.raises(SlurmUnavailableError):
        case.arrays.cancel(["a", "b", "c", "d"])
    assert case.book.open()[0].cancelled == (0,)
    assert case.client.cancelled() == []
    assert set(case.passes()) == set("abcde"), "still in the queue"
    case.client.answers = True
    case.passes()
    assert case.client.cancelled() == ["12_0"]
    assert set(case.passes()) == set("cde")
    assert case.departed("a")["a"][0].withdrawn
    assert case.arrays.settling() == frozenset(), "nobody waits to hear how it ended"
    assert case.arrays.cancel(["c", "d"]) == ()
    assert case.arrays.cancel([]) == ()
    assert case.arrays.cancel(["e"]) == ("e",)
    assert set(case.arrays.cancel_all()) == {"c", "d"}
    assert case.passes() == {}
    assert case.book.open()[0].cancelled == (0, 1, 2)


def test_an_intent_is_cancelled_by_name_and_when_it_turns_up(case: Case) -> None:
    """Its job id is unknown, and its sbatch may still be running."""
    batch = batch_of([node("a", "states")])
    name = case.book.next_name(batch)
    case.book.begin(new_submission(name, batch, case.now))
    assert case.arrays.cancel_all() == ()
    assert case.client.told == [("cancel named", name)]
    assert set(case.passes()) == {"a"}
    case.client.take("12", name, 1)
    case.passes()
    assert case.client.cancelled() == ["12_0"]
    assert case.passes() == {}


def waiting_batch() -> tuple[Batch, Any]:
    nodes = [node(f"r{number}", "finetune", {"states": f"u{number % 2}"}) for number in range(4)]
    return batch_of(nodes), graph_of([node("u0", "states"), node("u1", "states"), *nodes])


def test_a_refused_refinement_is_tried_three_times(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    """Then one warning, and the elements start later than they could."""
    batch, graph = waiting_batch()
    held = case.arrays.submit(batch_of([graph.nodes["u0"], graph.nodes["u1"]]), graph, {})
    case.client.takes_dependencies = False
    with caplog.at_level(logging.WARNING):
        case.arrays.submit(batch, graph, held)
        for _ in range(5):
            case.passes()
    wanted = [("13_[0,2]", "afterok:12_0"), ("13_[1,3]", "afterok:12_1")]
    assert case.client.told == wanted * REFINEMENT_TRIES
    assert [record.getMessage() for record in caplog.records if "single elements" in record.getMessage()] == [
        caplog.records[-1].getMessage()
    ]


def test_an_interrupted_refinement_is_completed_in_the_next_pass(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between sbatch and scontrol: the next pass sets the dependency of the pending elements, once."""
    batch, graph = waiting_batch()
    held = case.arrays.submit(batch_of([graph.nodes["u0"], graph.nodes["u1"]]), graph, {})
    with monkeypatch.context() as killed:
        killed.setattr(RecordedClient, "set_dependency", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            case.arrays.submit(batch, graph, held)
    case.client.become("13_2", "RUNNING")
    for _ in range(2):
        case.arrays = case.fresh()
        case.passes()
    assert case.client.told == [("13_[0]", "afterok:12_0"), ("13_[1,3]", "afterok:12_1")]
    assert all(record.refine == () for record in case.book.open())


def test_pending_elements_of_a_second_array_with_the_same_name_are_withdrawn(case: Case) -> None:
    """It has its own record; its running elements are left, and their stages count as in flight."""
    case.submit("a", "b", "c")
    name = case.book.open()[0].name
    case.client.become("12_0", "RUNNING")
    case.client.take("15", name, 3)
    case.client.become("15_1", "RUNNING")
    found = case.passes()
    assert case.client.cancelled() == ["12_1", "15_0", "15_2"], "of b the one that runs is kept"
    assert {key: flight.job for key, flight in found.items()} == {"a": "12_0", "b": "15_1", "c": "12_2"}
    case.client.told.clear()
    case.gone("12_0", "12_2", "15_1")
    case.client.states = {"12_0": "COMPLETED", "12_2": "COMPLETED", "15_1": "NODE_FAIL"}
    for _ in range(5):
        assert case.passes() == {}
    assert case.book.open() == ()
    assert sorted((each.job, each.state, each.withdrawn) for each in case.departed("b")["b"]) == [
        ("12_1", "", True),
        ("15_1", "NODE_FAIL", False),
    ]
    assert case.submit("a", "b", "c") == "13"
    assert case.book.open()[0].name == f"{name[:-1]}2"


def test_a_lost_array_that_turns_up_after_its_resubmission(case: Case) -> None:
    """Under the same name or another: the older one is kept while both are pending, and no stage is in flight twice."""
    case.client.errors = [""]
    nodes = [node(key, "states") for key in "ab"]
    assert case.arrays.submit(batch_of(nodes), graph_of(nodes), {})["a"].job.startswith("?")
    name = case.book.open()[0].name
    for _ in range(5):
        case.passes()
    assert case.book.open() == ()
    assert case.book.closed()[0].state is State.lost
    assert case.submit("b", "c") == "13"
    case.client.take("12", name, 2)
    found = case.passes()
    assert {key: flight.job for key, flight in found.items()} == {"a": "12_0", "b": "12_1", "c": "13_1"}
    assert case.client.cancelled() == ["13_0"]
    assert [(record.job, record.state) for record in case.book.open()] == [("12", State.submitted), ("13", State.submitted)]
    assert case.book.closed() == ()


def test_a_failed_launch_is_withdrawn_and_its_node_excluded(case: Case) -> None:
    """Recorded as a failed launch although accounting reports it as cancelled; the next arrays exclude the node for a while."""
    case.submit("a", "b")
    case.client.become("12_0", "PENDING", LAUNCH)
    case.client.states = {"12_0": "CANCELLED by 0", "12_1": "RUNNING"}
    case.passes()
    assert case.client.cancelled() == ["12_0"]
    assert case.book.open()[0].ended == {"0": "LAUNCH_FAILED"}
    case.passes()
    assert case.arrays.settling() == {"a"}, "accounting does not know yet where that was"
    case.client.nodes = {"12_0": "n3"}
    case.passes()
    assert case.arrays.settling() == frozenset()
    assert case.departed("a") == {"a": (Departure("a", "12_0", "LAUNCH_FAILED", 1000.0, 1040.0, withdrawn=True),)}
    case.submit("a")
    assert "--exclude=n3\n" in case.client.scripts[-1]
    case.submit("d", request=Request(exclude=("n1", "n2")))
    assert "--exclude=n1,n2,n3\n" in case.client.scripts[-1]
    case.client.site_nodes, case.arrays = 4, case.fresh()
    case.submit("e", request=Request(exclude=("n1", "n2")))
    assert "--exclude=n1,n2\n" in case.client.scripts[-1], "three of four would be excluded"
    case.now += 7 * 3600
    case.submit("c")
    assert "--exclude" not in case.client.scripts[-1]


def test_stuck_elements_are_reported(case: Case) -> None:
    """And left in the queue: the user or the administrator may still correct the cause."""
    case.submit("a", "b", "c")
    case.client.become("12_0", "PENDING", "PartitionTimeLimit")
    case.client.become("12_1", "PENDING", "JobHeldUser")
    case.passes()
    assert set(case.arrays.stuck()) == {"a", "b"}
    assert case.arrays.stuck()["b"].startswith("held by you")
    assert case.client.told == []
    case.arrays.look_only()
    assert set(case.arrays.stuck()) == {"a", "b"}


def test_a_full_queue_defers_the_submission(case: Case) -> None:
    """A limit is reached: no error, no intent; the same batch is accepted later."""
    limit = "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates accounting/QOS policy"
    case.client.errors = [limit]
    nodes = [node("a", "states")]
    assert case.arrays.submit(batch_of(nodes), graph_of(nodes), {}) == {}
    assert case.book.open() == case.book.closed() == ()
    assert case.passes() == {}
    assert case.submit("a") == "13"
