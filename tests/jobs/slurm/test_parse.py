"""What Slurm prints is understood in full or not at all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.slurm.parse import (
    LONGEST_EXPRESSION,
    Accounted,
    QueuedElement,
    Refusal,
    array_expressions,
    classify_refusal,
    compress_indices,
    expand_indices,
    expand_job,
    failed_to_launch,
    is_final,
    largest_array,
    least_limit,
    parse_accounting,
    parse_queue,
    parse_site,
    site_number,
    why_stuck,
)

# Beside it sbatch prints the limit that is exceeded, on a line of its own.
POLICY = "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"


@given(st.sets(st.integers(0, 300), min_size=1))
def test_array_expressions_round_trip(indices: set[int]) -> None:
    """Whatever is compressed expands to itself, and is accepted inside a job id."""
    text = compress_indices(indices)
    assert expand_indices(text) == tuple(sorted(indices))
    assert expand_job(f"7_[{text}%2]") == tuple(f"7_{index}" for index in sorted(indices))


@pytest.mark.parametrize(
    ("text", "jobs"),
    [
        ("12", ("12",)),
        ("12_3", ("12_3",)),
        ("12_[3-5%2]", ("12_3", "12_4", "12_5")),
        ("12_[0,2-3]", ("12_0", "12_2", "12_3")),
        ("12_[2-9:3]", ("12_2", "12_5", "12_8")),
        ("12_[2-9:3%1]", ("12_2", "12_5", "12_8")),
        ("12+1", ("12",)),
        ("12_[3-5,...]", ()),
        ("twelve", ()),
    ],
)
def test_job_ids(text: str, jobs: tuple[str, ...]) -> None:
    """As squeue and sacct of Slurm 22.05 print them; an expression that was cut is not guessed at."""
    assert expand_job(text) == jobs


def test_a_queue() -> None:
    """One entry for each element; another job's name may hold the separator."""
    text = "@12_[1-2%5]|PENDING|JobArrayTaskLimit||a.b\n@12_0|RUNNING|None|n1|a.b\n@7|PENDING|(null)|n[1-2]|x|y z\n@8|REVOKED|None||a.b\n"
    assert parse_queue(text, "@") == (
        QueuedElement("12_1", "PENDING", "JobArrayTaskLimit", "a.b"),
        QueuedElement("12_2", "PENDING", "JobArrayTaskLimit", "a.b"),
        QueuedElement("12_0", "RUNNING", "None", "a.b", "n1"),
        QueuedElement("7", "PENDING", "(null)", "x|y z"),
    )
    assert parse_queue("", "@") == ()


def test_a_name_with_line_breaks_misleads_nobody() -> None:
    """Of another program's job: what looks like a job in its name is part of the name."""
    assert parse_queue("@7|RUNNING|None|n2|x\n12_0|RUNNING|None||ours\n@9|PENDING|None||y\n", "@") == (
        QueuedElement("7", "RUNNING", "None", "x\n12_0|RUNNING|None||ours", "n2"),
        QueuedElement("9", "PENDING", "None", "y"),
    )


@pytest.mark.parametrize("line", ["12_[1-4,...|PENDING|None||a", "12|RUNNING", "slurm_load_jobs error: x", "a|b|c|d|e", "12|RUNNING||a"])
def test_unexpected_output_of_squeue_is_an_error(line: str) -> None:
    """If a line were skipped, its job would be taken for ended."""
    with pytest.raises(ValueError, match="unexpected output of squeue"):
        parse_queue(f"@11|RUNNING|None|n1|a\n@{line}\n", "@")


def test_accounting() -> None:
    """Ranges, who cancelled, and when it ended; nonsense is left out."""
    ended = "12_0|COMPLETED|1700000000|n1|a|b\n12_3|CANCELLED by 1000|1700000009|None assigned|c\n13|OUT_OF_MEMORY|2026-01-01T00:00:00\n"
    text = f"{ended}12_[1-2]|PENDING|Unknown\nnonsense\n"
    expected = {
        "12_0": Accounted("COMPLETED", 1.7e9, "a|b", "n1"),
        "12_1": Accounted("PENDING"),
        "12_2": Accounted("PENDING"),
        "12_3": Accounted("CANCELLED by 1000", 1.7e9 + 9, "c"),
        "13": Accounted("OUT_OF_MEMORY"),
    }
    assert parse_accounting(text) == expected
    assert parse_accounting("14|\n15|CANCELLED\n16|FAILED|0") == {
        "14": Accounted(""),
        "15": Accounted("CANCELLED"),
        "16": Accounted("FAILED"),
    }


def test_final_states() -> None:
    """Accounting that lags may report a job that has left the queue as pending or running."""
    assert all(is_final(state) for state in ("COMPLETED", "CANCELLED by 0", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"))
    assert not any(is_final(state) for state in ("", "PENDING", "RUNNING", "REQUEUED", "SUSPENDED", "COMPLETING"))


@given(st.sets(st.tuples(st.integers(1, 3), st.integers(0, 9000)), max_size=60))
def test_expressions_name_every_element_once(elements: set[tuple[int, int]]) -> None:
    """Whatever arrays they are of."""
    names = {f"{array}_{index}" for array, index in elements}
    found = [element for text in array_expressions(names) for element in expand_job(text)]
    assert sorted(found) == sorted(names)


def test_a_long_expression_is_cut() -> None:
    """Elements far apart, as many as an array may have: every piece stays short enough for a command."""
    names = {f"12345_{index}" for index in range(0, 20000, 2)}
    pieces = array_expressions(names)
    assert len(pieces) > 5
    assert max(map(len, pieces)) < LONGEST_EXPRESSION + 20
    assert {element for text in pieces for element in expand_job(text)} == names


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("launch failed requeued held", "could not start it"),
        ("launch_failed_requeued_held", "could not start it"),
        ("user env retrieval failed requeued held", "could not start it"),
        ("JobHeldUser", "held by you"),
        ("job requeued in held state", "held by you"),
        ("JobHeldAdmin", "held by the site's administrator"),
        ("BadConstraints", "no node fits"),
        ("DependencyNeverSatisfied", "has failed"),
        ("PartitionTimeLimit", "time limit"),
        ("PartitionNodeLimit", "more nodes"),
        ("InvalidAccount", "account"),
        ("InvalidQOS", "QOS"),
        ("AccountNotAllowed", "account"),
        ("QOSNotAllowed", "QOS"),
        ("ReservationDeleted", "reservation"),
        *((reason, "above a limit") for reason in ("AssocMaxCpuPerJobLimit", "AssocMaxWallDurationPerJobLimit", "AssocMaxGRESPerJob")),
        *((reason, "above a limit") for reason in ("QOSMaxMemoryPerNode", "QOSMinCpuNotSatisfied", "MaxMemPerLimit", "QOSMinGRES")),
    ],
)
def test_reasons_that_need_intervention(reason: str, words: str) -> None:
    """Reasons as Slurm 22.05 gives them; of an element that runs already none counts."""
    assert words in why_stuck(QueuedElement("12_0", "PENDING", reason, "a"))
    assert why_stuck(QueuedElement("12_0", "RUNNING", reason, "a")) == ""
    assert failed_to_launch(QueuedElement("12_0", "PENDING", reason, "a")) == ("could not start" in words)


@pytest.mark.parametrize("state", ["REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"])
def test_states_in_which_a_job_is_held(state: str) -> None:
    """It has no node, and needs the user: neither running nor about to start."""
    assert "held" in why_stuck(QueuedElement("12_0", state, "None", "a"))
    assert failed_to_launch(QueuedElement("12_0", state, "launch failed requeued held", "a"))


@pytest.mark.parametrize(
    "reason",
    [
        *("None", "(null)", "Resources", "Priority", "Dependency", "JobArrayTaskLimit", "BeginTime", "Licenses", "Reservation", "Prolog"),
        *("ReqNodeNotAvail", "ReqNodeNotAvail, UnavailableNodes:n[1-2]", "PartitionDown", "PartitionInactive", "NodeDown", "Cleaning"),
        *("AssocMaxJobsLimit", "AssocGrpCPUMinutesLimit", "AssocGrpGRES", "QOSMaxJobsPerUserLimit", "QOSMaxCpuPerUserLimit"),
        *("QOSGrpNodeLimit", "MaxCpuPerAccount", "QOSUsageThreshold", "something that a later Slurm says"),
    ],
)
def test_reasons_that_are_temporary(reason: str) -> None:
    """It may start when others end, when nodes come back, when a period is over."""
    assert why_stuck(QueuedElement("12_0", "PENDING", reason, "a")) == ""


def test_site() -> None:
    """Numbers where the site gives some."""
    site = parse_site("Configuration data as of x\nMaxArraySize            = 1001\nMaxJobCount = 10000\nMaxStepCount = n/a\nA = b = c\n")
    assert site_number(site, "MaxArraySize") == 1001
    assert site_number(site, "MaxStepCount") == 0
    assert site_number(site, "Missing") == 0
    assert site["A"] == "b = c"


def test_the_largest_array() -> None:
    """MaxArraySize bounds the index, max_array_tasks the number of tasks; the smaller one counts."""
    assert largest_array({"MaxArraySize": "1001"}) == 1001
    assert largest_array({"MaxArraySize": "1001", "SchedulerParameters": "bf_interval=1,max_array_tasks=200,defer"}) == 200
    assert largest_array({"MaxArraySize": "100", "SchedulerParameters": "max_array_tasks=200"}) == 100
    assert largest_array({"SchedulerParameters": "bf_max_array_tasks=7"}) == 0


def test_least_limit() -> None:
    """Of the account that is asked for, or of all; empty means no limit."""
    text = "speech|500\nvision|20\nspeech|\n"
    assert least_limit(text, {0: "speech"}, 1) == 500
    assert least_limit(text, {}, 1) == 20
    assert least_limit(text, {0: "other"}, 1) == 0
    assert least_limit("", {}, 1) == 0


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("sbatch: error: Batch job submission failed: Invalid job array specification", Refusal.refused),
        ("sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: Invalid partition", Refusal.refused),
        ("sbatch: error: Batch job submission failed: Requested node configuration is not available", Refusal.refused),
        ("sbatch: unrecognized option '--x=1'", Refusal.refused),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", Refusal.unknown),
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)", Refusal.unknown),
        ("sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received", Refusal.unknown),
        ("sbatch timed out", Refusal.unknown),
        ("Could not make sense of sbatch output", Refusal.unknown),
        ("", Refusal.unknown),
        ("sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, ...)", Refusal.full),
        ("sbatch: error: AssocMaxSubmitJobLimit", Refusal.full),
        (f"sbatch: error: QOSMaxWallDurationPerJobLimit\n{POLICY}", Refusal.refused),
        (f"sbatch: error: QOSMaxCpuPerJobLimit\n{POLICY}", Refusal.refused),
        (f"sbatch: error: QOSMaxMemoryPerNode\n{POLICY}", Refusal.refused),
        (f"sbatch: error: QOSMinCpuNotSatisfied\n{POLICY}", Refusal.refused),
        (f"sbatch: error: AssocGrpSubmitJobsLimit\n{POLICY}", Refusal.full),
        (POLICY, Refusal.full),
        ("sbatch: error: Batch job submission failed: Unspecified error", Refusal.unknown),
        ("sbatch: error: Batch job submission failed: Slurm backup controller in standby mode", Refusal.unknown),
        ("sbatch: error: If munged is up, restart with --num-threads=10\nsbatch: error: Munge encode failed", Refusal.unknown),
        ("sbatch: error: Batch job submission failed: Protocol authentication error", Refusal.unknown),
        ("sbatch: error: QOSMaxSubmitJobPerUserLimit", Refusal.full),
        ("sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying", Refusal.full),
        ("sbatch: error: Batch job submission failed: Resource temporarily unavailable", Refusal.full),
    ],
)  # fmt: skip
def test_refusals(text: str, verdict: Refusal) -> None:
    """A call that may have made a job is never classified as refused."""
    assert classify_refusal(text) is verdict
