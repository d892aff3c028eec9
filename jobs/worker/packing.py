"""Several stages of one task at the same time: on one GPU, in the memory and on the cores of one array element.

The process that was started for the task becomes the packer. It forks a child for every stage, so that CUDA contexts are apart and memory
that runs out ends one stage alone; hands every stop signal on; and computes nothing itself. Each child claims its attempt, keeps its
heartbeat and publishes its result as a worker with one stage does, into the same log. None outlives the packer.

How many at once: `Description.at_once`, or, where that is 0, as many as fit by the memory that a finished stage of the same kind has used
at most (`fits`); until one has, one. A stage that runs out of memory in company says so by a class of its own (`crowded`): fewer are then
computed at once, and it is tried again with nothing beside it, here and ever after.
"""

from __future__ import annotations

import gc
import mmap
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from signal import SIGKILL
from typing import NoReturn

from jobs.experiment.graph import Node
from jobs.store.failures import FailureClass
from jobs.store.layout import StageFolder
from jobs.store.records import read_outcome
from jobs.worker.deaths import ENDS_OF_ITS_OWN, attempt_of, class_of_death, oom_kills, state_end
from jobs.worker.machine import Room, fits, larger, measured_peak, room_here, was_crowded
from jobs.worker.processes import FORKABLE, die_with, end_child, kill_group, limit_threads
from jobs.worker.stage import EXIT_CODES, Verdict, WorkerProcess, execute
from jobs.worker.task import load_registry

POLL_SECONDS = 0.05


def run_packed(process: WorkerProcess, nodes: Sequence[Node], room: Room | None = None) -> int:
    """Compute stages at the same time, each in a child; returns the exit code of the task, as jobs.worker.main gives it."""
    _preload(process)
    return Packer(process, nodes, room or room_here(process.threads)).run()


@dataclass(frozen=True)
class _Child:
    node: Node
    slot: int  # in the table of how many were beside it
    alone: bool  # nothing may begin beside it
    oom_kills: int | None  # of the kernel, when it began


class Packer:
    """Forks children and reaps them; everything happens in `run`."""

    def __init__(self, process: WorkerProcess, nodes: Sequence[Node], room: Room) -> None:
        self._process = process
        self._room = room
        self._alone = deque(node for node in nodes if was_crowded(process.folder(node)))
        self._together = deque(node for node in nodes if node not in self._alone)
        self._most = process.description.at_once or len(nodes)
        self._measures = process.description.at_once == 0
        self._peak = measured_peak(self._siblings(nodes[0].stage)) if self._measures else None
        self._running: dict[int, _Child] = {}
        # A child reads here how many were beside it at the most: shared memory, one number each; a stage begins twice at the most.
        self._beside = memoryview(mmap.mmap(-1, 4 * 2 * len(nodes))).cast("I")
        self._begun = 0
        self._code = 0
        self._told = False  # the children have been asked to stop

    def run(self) -> int:
        """Until every stage has had its turn, or a stop signal came and the children have left."""
        try:
            while self._running or self._together or self._alone:
                if self._process.stop():
                    self._stop()
                else:
                    self._start()
                if self._running and not self._reap():
                    time.sleep(POLL_SECONDS)
        finally:
            self._kill()
        return self._code

    def _siblings(self, stage: str) -> Iterable[tuple[StageFolder, str]]:
        nodes = (node for node in self._process.description.nodes.values() if node.stage == stage)
        return ((self._process.folder(node), node.key) for node in nodes)

    def _limit(self) -> int:
        """How many may run now."""
        if not self._measures:
            return self._most
        return min(self._most, fits(self._peak, self._room) if self._peak else 1)

    def _start(self) -> None:
        while self._together and len(self._running) < self._limit() and not any(child.alone for child in self._running.values()):
            if not self._fork(self._together.popleft(), alone=False):
                return
        if self._alone and not self._together and not self._running:
            self._fork(self._alone.popleft(), alone=True)

    def _fork(self, node: Node, *, alone: bool) -> bool:
        """Begin a stage; False if there is no room for another process now."""
        together = 1 if alone else min(self._limit(), len(self._running) + len(self._together) + 1)
        threads, parent = max(1, self._room.threads // together), os.getpid()
        child = _Child(node, self._begun, alone, oom_kills())
        self._beside[child.slot] = len(self._running)
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            pid = os.fork()
        except OSError as error:
            self._process.tell(f"{node.name}: cannot start: {error}")
            if self._running:
                self._most = len(self._running)
                self._together.appendleft(node)
            else:
                self._end_with(1)
            return False
        if pid == 0:
            self._compute(child, threads, parent)
        self._begun += 1
        self._running[pid] = child
        for each in self._running.values():
            self._beside[each.slot] = max(self._beside[each.slot], len(self._running) - 1)
        return True

    def _compute(self, child: _Child, threads: int, parent: int) -> NoReturn:
        """Be the child. The handlers of stop signals came along with the fork."""
        code = 1
        name = child.node.name
        try:
            os.setsid()  # what it starts can be killed with it
            die_with(parent, SIGKILL)
            limit_threads(threads)
            said = self._process.tell

            def tell(text: str) -> None:
                for line in text.splitlines():  # the log is shared: every line says whose it is
                    said(line if line.startswith(name) else f"{name}: {line}")

            own = replace(self._process, threads=threads, tell=tell, beside=lambda: self._beside[child.slot])
            verdict = execute(own, child.node)
            tell(verdict.value)
            code = EXIT_CODES[verdict]
        except BaseException:
            traceback.print_exc()
        finally:
            end_child(code)

    def _stop(self) -> None:
        """Ask the children to leave with a checkpoint, once; what has not begun does not begin."""
        if not self._told:
            for pid in self._running:  # a pid stays ours until it is reaped
                os.kill(pid, self._process.stop.signal)
            self._told = True
        for waiting in (self._together, self._alone):
            while waiting:
                self._process.tell(f"{waiting.popleft().name}: {Verdict.interrupted.value}")
                self._end_with(EXIT_CODES[Verdict.interrupted])

    def _reap(self) -> bool:
        """Take in the children that have ended; False if none has."""
        ended = [pid for pid in self._running if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)]
        for pid in ended:
            kill_group(pid)  # while its pid is still taken
            _, status = os.waitpid(pid, 0)
            child = self._running.pop(pid)
            try:
                self._take_in(pid, child, status)
            except OSError as error:  # a full disk, a shared folder that is away: the others go on
                self._process.tell(f"{child.node.name}: how it ended cannot be read or written: {error}")
                self._end_with(1)
        return bool(ended)

    def _take_in(self, pid: int, child: _Child, status: int) -> None:
        signal = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        code = None if signal else os.WEXITSTATUS(status)
        folder = self._process.folder(child.node)
        if code not in ENDS_OF_ITS_OWN:
            self._state_end(folder, pid, child, code, signal)
        outcome = read_outcome(attempt) if (attempt := attempt_of(folder, pid)) else None
        if outcome is not None and outcome.kind == FailureClass.crowded.name and not child.alone:
            self._most = max(1, min(self._limit(), len(self._running) + 1) // 2)
            self._alone.append(child.node)
            self._process.tell(f"{child.node.name}: memory ran out in company; again with nothing beside it, others {self._most} at once")
            return
        if self._measures and code == 0:
            self._peak = larger(self._peak, measured_peak([(folder, child.node.key)]))
        self._end_with(EXIT_CODES[Verdict.interrupted] if code is None and self._told else 1 if code not in ENDS_OF_ITS_OWN else code)

    def _state_end(self, folder: StageFolder, pid: int, child: _Child, code: int | None, signal: int | None) -> None:
        kills = oom_kills()
        killed = child.oom_kills is None or kills is None or kills > child.oom_kills
        failure = class_of_death(signal, stopping=self._told, beside=self._beside[child.slot], oom_killed=killed)
        state_end(folder, child.node, pid, failure, code=code, signal=signal, log=self._process.log)
        how = f"killed by signal {signal}" if signal else f"left with exit code {code}"
        self._process.tell(f"{child.node.name}: its process was {how}" if signal else f"{child.node.name}: its process {how}")

    def _end_with(self, code: int) -> None:
        self._code = self._code if self._code == 1 else code or self._code

    def _kill(self) -> None:
        """Only after an error of the packer itself are there any left."""
        for pid in self._running:
            os.kill(pid, SIGKILL)
            kill_group(pid)
            os.waitpid(pid, 0)


def _preload(process: WorkerProcess) -> None:
    """Import once what all children need, where the registry can without starting a thread or touching a GPU."""
    os.environ.update(FORKABLE)
    try:
        preload = getattr(load_registry(process.place), "preload", None)
        if callable(preload):
            preload()
    except Exception:  # the stages that need it will say so, each in its own record
        traceback.print_exc()
    gc.collect()
    gc.freeze()  # the collector of a child does not write into the pages that are shared
