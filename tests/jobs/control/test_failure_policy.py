"""Failures: every row of the policy's table, the class of real exceptions, and bounds that hold for any sequence of attempts."""

from __future__ import annotations

import errno
import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.control.facts import Departure, Request, StageFacts
from jobs.control.failure_policy import (
    COMMUNICATION_RETRIES,
    DISK_RETRIES,
    LONGEST_PAUSE,
    MAX_FAILED_STARTS,
    MAX_LOST,
    MEMORY_RETRIES,
    MEMORY_STEP,
    STORAGE_RETRIES,
    STORAGE_SECONDS,
    EndedAttempt,
    decide,
    folder_question,
)
from jobs.errors import UsageError
from jobs.store.failures import FailureClass, blames_node, cancelled_by_hand, class_of_exception, class_of_state
from ser_core.disk import STORAGE_ERRORS

LAUNCH = 1000.0
MAX_ATTEMPTS = 12


def ended(
    *failures: FailureClass, progress: bool = False, node: str = "n1", nodes_fault: bool = False, first: float = LAUNCH
) -> list[EndedAttempt]:
    return [
        EndedAttempt(first + number, failure, f"{failure.value} {number}", node, nodes_fault, progress)
        for number, failure in enumerate(failures)
    ]


def judged(
    attempts: Sequence[EndedAttempt], *, failed_starts: Sequence[Departure] = (), cancelled: bool = False, since: float = LAUNCH
) -> StageFacts:
    return decide(attempts, since=since, max_attempts=MAX_ATTEMPTS, failed_starts=failed_starts, cancelled=cancelled)


def silent(number: int, state: str = "FAILED") -> list[Departure]:
    return [Departure("k", f"{each}_0", state, LAUNCH + each, LAUNCH + each + 5) for each in range(number)]


def test_a_stage_without_attempts_may_be_submitted() -> None:
    """It requests nothing special."""
    assert judged([]) == StageFacts()


@pytest.mark.parametrize("failure", [FailureClass.node, FailureClass.interrupted, FailureClass.crowded])
def test_lost_and_interrupted_attempts_are_free_while_they_progress(failure: FailureClass) -> None:
    """They cost nothing; without a newer checkpoint a few in a row are allowed, and one that progressed resets the count."""
    allowed = judged(ended(*[failure] * MAX_LOST))
    assert (allowed.stopped, allowed.failures, allowed.request) == ("", 0, Request())
    assert "without a newer checkpoint" in judged(ended(*[failure] * (MAX_LOST + 1))).stopped
    between = [*ended(*[failure] * MAX_LOST), *ended(failure, progress=True), *ended(*[failure] * MAX_LOST)]
    assert not judged(between).stopped
    assert not judged(ended(*[failure] * 50, progress=True)).stopped


def test_a_node_is_blamed_only_if_slurm_reports_it() -> None:
    """Once per failure; attempts before the launch do not count."""
    attempts = [*ended(FailureClass.node, nodes_fault=True, first=1.0), *ended(*[FailureClass.node] * 2, nodes_fault=True)]
    assert judged([*attempts, *ended(FailureClass.node, node="n2")]).bad_nodes == ("n1", "n1")


def test_at_the_time_limit_progress_decides() -> None:
    """Resumed for as long as it comes further; the second time that it does not, it is stopped and told what to change."""
    limit = FailureClass.time_limit
    assert not judged(ended(limit)).stopped
    assert not judged(ended(*[limit] * 30, progress=True)).stopped
    assert "`minutes`" in judged(ended(limit, limit)).stopped
    assert not judged([*ended(limit), *ended(limit, progress=True)]).stopped
    assert "`minutes`" in judged([*ended(limit, progress=True), *ended(limit)]).stopped
    assert judged(ended(limit)).failures == 1
    assert judged(ended(limit, limit, progress=True)).failures == 0, "a stage longer than its limit does not use up the budget of others"


def test_memory_is_halved_and_raised_twice() -> None:
    """Half the work per pass and half as much memory again, each time; the third time it is stopped."""
    memory = FailureClass.memory
    assert [judged(ended(*[memory] * times)).request for times in range(4)] == [
        Request(),
        Request(1, MEMORY_STEP),
        Request(2, MEMORY_STEP**2),
        Request(2, MEMORY_STEP**2),
    ]
    assert not judged(ended(*[memory] * MEMORY_RETRIES)).stopped
    assert "memory ran out 3 times" in judged(ended(*[memory] * (MEMORY_RETRIES + 1))).stopped


def test_communication_failures_are_retried_on_other_nodes_three_times() -> None:
    """Each node it failed on is excluded for this stage from then on, without counting as a failed node."""
    attempts = [each for node in ("n3", "n1", "n1") for each in ended(FailureClass.communication, node=node)]
    facts = judged(attempts)
    assert not facts.stopped
    assert facts.request == Request(exclude=("n1", "n3"))
    assert facts.bad_nodes == ()
    assert "4 attempts failed in communication" in judged(ended(*[FailureClass.communication] * (COMMUNICATION_RETRIES + 1))).stopped


def test_damaged_artifacts_are_computed_again_twice() -> None:
    """Then it is the disk."""
    assert not judged(ended(*[FailureClass.disk] * DISK_RETRIES)).stopped
    assert "check the disk" in judged(ended(*[FailureClass.disk] * (DISK_RETRIES + 1))).stopped


def test_a_failing_file_system_is_given_time() -> None:
    """The same seed after a pause that doubles; costs nothing, is bounded, and starts over with progress or another launch."""
    pauses = []
    for number in range(1, STORAGE_RETRIES + 1):
        facts = judged(_storage(number))
        assert (facts.stopped, facts.failures, facts.request) == ("", 0, Request())
        pauses.append(facts.not_before - (LAUNCH + number))
    assert pauses[:3] == [STORAGE_SECONDS, 2 * STORAGE_SECONDS, 4 * STORAGE_SECONDS]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE
    assert 36 * 3600 < sum(pauses) < 72 * 3600
    assert "the file system failed under 15 attempts" in judged(_storage(STORAGE_RETRIES + 1)).stopped
    again = judged([*_storage(STORAGE_RETRIES), *ended(FailureClass.storage, progress=True), *_storage(1)])
    assert (again.stopped, again.not_before) == ("", LAUNCH + 1 + STORAGE_SECONDS)
    assert judged([*_storage(3), *ended(FailureClass.node)]).not_before == 0.0
    assert judged(_storage(3), since=LAUNCH + 100).not_before == 0.0


def _storage(number: int) -> list[EndedAttempt]:
    return [replace(each, ended=each.started + 1) for each in ended(*[FailureClass.storage] * number)]


@pytest.mark.parametrize("failure", [FailureClass.code, FailureClass.refused])
def test_code_and_configuration_are_not_retried(failure: FailureClass) -> None:
    """The first failure stops the stage, with the error as the reason."""
    facts = judged(ended(FailureClass.node, failure))
    assert facts.stopped == facts.error == f"{failure.value} 1"
    assert (facts.failure, facts.failures) == (failure, 1)


def test_divergence_is_not_retried_and_not_reset() -> None:
    """The same seed would diverge again: neither later attempts nor a new launch change that."""
    attempts = [*ended(FailureClass.divergence), *ended(FailureClass.node, first=LAUNCH + 5)]
    for since in (LAUNCH, LAUNCH + 100):
        facts = judged(attempts, since=since)
        assert facts.diverged == facts.error == "divergence 0"
        assert facts.failure is FailureClass.divergence
        assert facts.failures == 0


@pytest.mark.parametrize("failure", [each for each in FailureClass if each is not FailureClass.divergence])
def test_a_launch_resets_failures(failure: FailureClass) -> None:
    """Attempts started before it leave no trace, however many."""
    assert judged(ended(*[failure] * 20, first=1.0)) == StageFacts()


def test_a_cancellation_stops_until_the_next_launch() -> None:
    """By the program's own record or by Slurm's state of an attempt, whatever a second array of the same stage does later."""
    assert judged([], cancelled=True).cancelled
    assert judged(ended(FailureClass.cancelled)).cancelled
    assert judged(ended(FailureClass.cancelled, FailureClass.node)).cancelled
    assert not judged(ended(FailureClass.cancelled, first=1.0)).cancelled


def test_jobs_that_end_before_the_worker_starts_are_counted() -> None:
    """A failing prologue leaves no attempt; after a few such jobs the stage is stopped, with the last job and its Slurm state."""
    few = judged([], failed_starts=silent(MAX_FAILED_STARTS - 1))
    assert (few.stopped, few.failure) == ("", FailureClass.node)
    assert "before the worker began (last 2_0, Slurm says FAILED)" in few.error
    assert judged([], failed_starts=silent(MAX_FAILED_STARTS)).stopped


def test_a_node_on_which_no_worker_began_is_avoided() -> None:
    """At once by the stage whose job failed there, and by all others after a second failure; where Slurm names none, no node is."""
    facts = judged([], failed_starts=[replace(each, node=node) for each, node in zip(silent(3), ("n2", "n1", ""), strict=True)])
    assert (facts.request.exclude, facts.bad_nodes, facts.stopped) == (("n1", "n2"), ("n2", "n1"), "")


def test_after_two_jobs_that_never_began_the_user_is_asked_whether_nodes_see_the_folder() -> None:
    """Not of one job, of jobs whose node is to blame, or of processes of this machine."""
    assert folder_question(silent(2), "/results") == "; can the nodes see /results? run `doctor`"
    assert folder_question(silent(1), "/results") == ""
    assert folder_question([replace(each, state="NODE_FAIL") for each in silent(2)], "/results") == ""
    assert folder_question([replace(each, job=f"local-{each.job}") for each in silent(2)], "/results") == ""


RETRIED = [each for each in FailureClass if each not in (FailureClass.divergence, FailureClass.cancelled)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(RETRIED), min_size=MAX_ATTEMPTS))
def test_every_sequence_without_progress_ends(failures: list[FailureClass]) -> None:
    """Whatever fails in whatever order: retried only while the policy allows, at most `max_attempts` times plus storage errors."""
    for number in range(1, len(failures) + 1):
        facts = judged(ended(*failures[:number]))
        if facts.stopped:
            break
    assert facts.stopped or failures.count(FailureClass.storage) > len(failures) - MAX_ATTEMPTS
    assert sum(each is not FailureClass.storage for each in failures[:number]) <= MAX_ATTEMPTS
    assert number <= MAX_ATTEMPTS + STORAGE_RETRIES + 1
    assert facts.failures <= number


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(RETRIED), st.booleans()), max_size=40))
def test_failures_that_count_are_bounded_even_with_progress(steps: list[tuple[FailureClass, bool]]) -> None:
    """Only losses, interruptions and time limits with progress may continue; every other class has its number of retries."""
    attempts: list[EndedAttempt] = []
    for failure, progress in steps:
        attempts += ended(failure, progress=progress, first=LAUNCH + len(attempts))
        if judged(attempts).stopped:
            break
    free = (FailureClass.node, FailureClass.interrupted, FailureClass.crowded, FailureClass.time_limit, FailureClass.storage)
    costly = sum(each.failure not in free for each in attempts)
    assert costly <= MEMORY_RETRIES + COMMUNICATION_RETRIES + DISK_RETRIES + 1
    assert sum(not each.progress and each.failure is not FailureClass.storage for each in attempts) <= MAX_ATTEMPTS
    request = judged(attempts).request
    assert request.relief <= MEMORY_RETRIES
    assert request.memory_factor == MEMORY_STEP**request.relief


@pytest.mark.parametrize(
    ("state", "failure"),
    [
        ("NODE_FAIL", FailureClass.node),
        ("BOOT_FAIL", FailureClass.node),
        ("PREEMPTED", FailureClass.node),
        ("FAILED", FailureClass.node),
        ("COMPLETED", FailureClass.node),
        ("CANCELLED", FailureClass.node),
        ("CANCELLED by 0", FailureClass.node),
        ("", FailureClass.node),
        ("TIMEOUT", FailureClass.time_limit),
        ("DEADLINE", FailureClass.time_limit),
        ("OUT_OF_MEMORY", FailureClass.memory),
        ("CANCELLED by 1000", FailureClass.cancelled),
    ],
)
def test_the_class_of_a_slurm_state(state: str, failure: FailureClass) -> None:
    """Slurm itself cancels as user 0; only NODE_FAIL and the like blame the node."""
    assert class_of_state(state) is failure
    assert cancelled_by_hand(state) is (failure is FailureClass.cancelled)
    assert blames_node(state) is (state in ("NODE_FAIL", "BOOT_FAIL"))


class StoppedError(Exception):
    interrupted = True


class DivergedError(Exception):
    diverged = True


class RefusedError(Exception):
    problems = ("name another",)


class DistBackendError(RuntimeError):
    """By the name of torch's own, which needs NCCL to be raised."""


def _torch_out_of_memory() -> None:
    import torch

    torch.empty(1 << 60, dtype=torch.uint8)


def _cuda_out_of_memory() -> None:
    import torch

    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def _nobody_listens() -> None:
    import torch.distributed as dist

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        dist.TCPStore("127.0.0.1", taken.getsockname()[1], 2, is_master=False, timeout=timedelta(seconds=0.1))  # type: ignore[attr-defined]  # it is there, and not listed


def _nobody_writes() -> None:
    import torch.distributed as dist

    dist.HashStore().wait(["never"], timedelta(seconds=0.05))  # type: ignore[attr-defined]  # it is there, and not listed


def _numpy_out_of_memory() -> None:
    import numpy

    numpy.empty(1 << 60, numpy.uint8)


def _chained(first: BaseException, second: BaseException, *, cause: bool = False, hidden: bool = False) -> BaseException:
    try:
        try:
            raise first
        except BaseException as error:
            if cause:
                raise second from error
            if hidden:
                raise second from None
            raise second  # noqa: B904 - met while the first was handled
    except BaseException as error:
        return error


def _raised(call: Callable[[], None]) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - which one is what the test is about
        call()
    return caught.value


@pytest.mark.parametrize(
    ("call", "failure"),
    [
        (_torch_out_of_memory, FailureClass.memory),
        (_cuda_out_of_memory, FailureClass.memory),
        (_numpy_out_of_memory, FailureClass.memory),
        (_nobody_listens, FailureClass.communication),
        (_nobody_writes, FailureClass.communication),
    ],
)
def test_exceptions_of_the_libraries(call: Callable[[], None], failure: FailureClass) -> None:
    """As the libraries raise them."""
    assert class_of_exception(_raised(call)) is failure


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (MemoryError(), FailureClass.memory),
        (RuntimeError("CUDA error: out of memory"), FailureClass.memory),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), FailureClass.memory),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), FailureClass.memory),
        *((OSError(number, os.strerror(number)), FailureClass.storage) for number in STORAGE_ERRORS),
        (RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos; No space left on device"), FailureClass.storage),
        (ValueError("error while reading: I/O error: Input/output error (os error 5)"), FailureClass.storage),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)), FailureClass.code),
        (DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:2251"), FailureClass.communication),
        (RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:4242"), FailureClass.communication),
        (RuntimeError("Watchdog caught collective operation timeout"), FailureClass.communication),
        (RuntimeError("Application timeout caused pair closure"), FailureClass.communication),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation"), FailureClass.communication),
        (ConnectionResetError(104, "Connection reset by peer"), FailureClass.communication),
        (ValueError("NCCL is a word in a message of ours"), FailureClass.code),
        (ValueError("no such layer"), FailureClass.code),
        (FileNotFoundError(2, "No such file"), FailureClass.code),
        (SystemExit(3), FailureClass.code),
        (UsageError("corpus: not the one"), FailureClass.refused),
        (RefusedError(), FailureClass.refused),
        (DivergedError("the loss is nan"), FailureClass.divergence),
        (StoppedError("step 7"), FailureClass.interrupted),
    ],
)
def test_classes_of_exceptions(error: BaseException, failure: FailureClass) -> None:
    """By type, attribute, error number or message."""
    assert class_of_exception(error) is failure


def test_the_cause_of_an_exception_counts() -> None:
    """Its `__cause__` or `__context__`; not one suppressed by `from None`, nor a stop that was handled."""
    full = OSError(errno.ENOSPC, "No space left on device")
    assert class_of_exception(_chained(full, ValueError("cannot save"), cause=True)) is FailureClass.storage
    assert class_of_exception(_chained(MemoryError(), ValueError("cannot build"))) is FailureClass.memory
    assert class_of_exception(_chained(DivergedError("nan"), RuntimeError("rank 1 failed"), cause=True)) is FailureClass.divergence
    assert class_of_exception(_chained(MemoryError(), ValueError("no such layer"), hidden=True)) is FailureClass.code
    assert class_of_exception(_chained(StoppedError("step 7"), ValueError("cannot save"))) is FailureClass.code
    assert class_of_exception(_chained(ConnectionResetError(), full)) is FailureClass.storage


def _peer(rank: int, folder: str, found: multiprocessing.Queue[str]) -> None:
    import torch.distributed as dist

    try:  # the other may leave before this one has connected to it
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=20))
        if rank == 1:
            os._exit(1)
        for _ in range(3):  # the first may be over before the other has gone
            dist.barrier()
    except RuntimeError as error:
        found.put(class_of_exception(error).name)
        found.close()
        found.join_thread()
    os._exit(0)


def test_a_peer_that_dies_is_a_failure_of_communication(tmp_path: Path) -> None:
    """Two processes that have met over gloo; one leaves, the other waits at a barrier."""
    context = multiprocessing.get_context("fork")
    found: multiprocessing.Queue[str] = context.Queue()
    peers = [context.Process(target=_peer, args=(rank, str(tmp_path), found)) for rank in range(2)]
    for peer in peers:
        peer.start()
    ending = found.get()  # both import torch first
    assert ending == FailureClass.communication.name
    for peer in peers:
        peer.join()


def test_a_cycle_of_exceptions_is_followed_once() -> None:
    """A cause that leads back does not hang."""
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert class_of_exception(first) is FailureClass.code
