"""`grid --wait`: outages are waited out, Ctrl-C ends the wait and leaves the jobs."""

from __future__ import annotations

import errno
import signal
import threading
import time
from pathlib import Path

import pytest

from jobs.control.controller import Report, wait_for
from jobs.errors import SlurmUnavailableError
from jobs.signals import Interrupts
from tests.jobs import local_launch
from tests.jobs.control.queue_of_threads import QueueOfThreads


@pytest.fixture
def executor(tmp_path: Path) -> QueueOfThreads:
    return QueueOfThreads(tmp_path)


def test_an_outage_of_slurm_or_of_the_file_system_is_waited_out(tmp_path: Path, executor: QueueOfThreads) -> None:
    """`--wait` survives any number of passes without an answer, in pauses that grow, and ends with the same results."""
    reported: list[tuple[str, float]] = []
    executor.unseen, executor.unseen_error = 60, SlurmUnavailableError("squeue did not answer")
    desired = local_launch.desired(tmp_path, {})
    looks = iter([OSError(errno.ESTALE, "Stale file handle")] * 40)

    def after_pass(report: Report) -> None:
        if (error := next(looks, None)) is not None:
            raise error
        executor.run(report)

    report = wait_for(
        desired,
        executor,
        poll_seconds=1e-9,
        longest_pause=1e-3,
        on_pass=after_pass,
        on_outage=lambda error, pause: reported.append((str(error), pause)),
    )
    assert report.complete
    assert len(reported) == 100
    assert [pause for _, pause in reported[:4]] == [1e-9, 2e-9, 4e-9, 8e-9]
    assert max(pause for _, pause in reported) == 1e-3
    assert "squeue did not answer" in reported[0][0]
    assert "Stale file handle" in reported[-1][0]


@pytest.mark.parametrize("error", [SlurmUnavailableError("squeue did not answer"), OSError(errno.EIO, "Input/output error")])
def test_waiting_for_an_answer_is_bounded(tmp_path: Path, executor: QueueOfThreads, error: Exception) -> None:
    """An outage that lasts longer than the bound ends the wait with its error."""
    executor.unseen, executor.unseen_error = 10**9, error
    with pytest.raises(type(error)):
        wait_for(local_launch.desired(tmp_path, {}), executor, poll_seconds=0.001, outage_seconds=0.1)


def test_a_reader_that_closed_the_pipe_is_no_outage(tmp_path: Path, executor: QueueOfThreads) -> None:
    """`grid --wait | head` ends when its output has no reader."""

    def after_pass(report: Report) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        wait_for(local_launch.desired(tmp_path, {}), executor, poll_seconds=0.001, on_pass=after_pass)


def test_an_interrupt_ends_the_wait_and_leaves_the_jobs(tmp_path: Path, executor: QueueOfThreads) -> None:
    """Ctrl-C in `--wait`: the report is marked as interrupted, nothing is withdrawn."""
    desired = local_launch.desired(tmp_path, {})
    main = threading.main_thread()
    timer = threading.Timer(0.3, lambda: _interrupt(main))
    timer.start()
    begun = time.monotonic()
    report = wait_for(desired, executor, poll_seconds=3600)
    timer.join()
    assert report.interrupted
    assert not report.complete
    assert len(executor.in_flight()) == 20
    assert time.monotonic() - begun < 30


def _interrupt(thread: threading.Thread) -> None:
    signal.pthread_kill(thread.ident or 0, signal.SIGINT)


def test_interrupts_restores_the_handlers() -> None:
    """Outside of the block Ctrl-C is what it was."""
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.count == 1
    assert signal.getsignal(signal.SIGINT) is before
