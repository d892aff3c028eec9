"""A simulated worker: writes the records that `jobs.worker.main` writes, in steps between which it may die.

It reads and writes real records with the production functions; only waiting and computing are left out.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from jobs.experiment.graph import Node
from jobs.store.attempts import GONE_SECONDS, SUPERSEDED, claim_alive, divergence_of, newest_checkpoint
from jobs.store.cancellations import read_cancellations
from jobs.store.failures import FailureClass
from jobs.store.layout import AttemptFolder, Layout, StageFolder
from jobs.store.records import (
    Claim,
    Ending,
    Outcome,
    Result,
    artifacts_present,
    attempt_numbers,
    claim_attempt,
    file_digest,
    read_claim,
    read_outcome,
    read_result,
    result_intact,
    write_outcome,
    write_result,
)
from jobs.worker.task import Description
from tests.simulation.slurm import Clock


class Place(Enum):
    """What a worker does next."""

    look = "look"  # is there a result, are the upstream ones there, does anybody else work on it
    wait = "wait"  # for whoever works on it
    claim = "claim"
    recheck = "recheck"  # somebody may have had the result first
    work = "work"
    artifacts = "artifacts"  # computed, and not published
    over = "over"


@dataclass
class Execution:
    """One claimed attempt, as recorded by the simulation."""

    key: str
    attempt: int
    job: str
    node: str
    begun: float
    found: float  # the checkpoint that it found
    relief: int
    alive: bool = True
    ended: float = 0.0
    result: bool = False
    superseded: bool = False
    looked: float = 0.0  # when its worker last asked whether it is cancelled
    said: FailureClass | None = None  # in its outcome
    progress: bool = False  # it wrote a checkpoint


@dataclass
class SimulatedWorker:
    """One process of one element; `executions` takes every attempt that it claims."""

    description: Description
    keys: tuple[str, ...]
    job: str
    node: str
    pid: int
    clock: Clock
    executions: list[Execution]
    published: Callable[[str], None] = lambda key: None
    ua_of: Callable[[str], tuple[float, str]] = lambda key: (0.6, "")  # share, and why it diverged
    at: int = 0  # which of the keys
    place: Place = Place.look
    codes: list[int] = field(default_factory=list)
    execution: Execution | None = None
    number: int = 0
    looked: float = 0.0

    @property
    def over(self) -> bool:
        return self.place is Place.over

    @property
    def exit_code(self) -> int:
        return 1 if 1 in self.codes else next((code for code in reversed(self.codes) if code), 0)

    @property
    def key(self) -> str:
        return self.keys[self.at]

    @property
    def claimed(self) -> bool:
        return self.execution is not None

    @property
    def stage(self) -> Node:
        return self.description.nodes[self.key]

    @property
    def attempt(self) -> AttemptFolder:
        return self.folder(self.stage).attempt(self.number)

    def folder(self, node: Node) -> StageFolder:
        return Layout(Path(self.description.place.results), self.description.place.experiment).stage(node.stage, node.key)

    def step(self) -> None:
        """One step towards the result."""
        match self.place:
            case Place.look:
                self._look()
            case Place.wait:
                self._wait_for_holder()
            case Place.claim:
                self._claim()
            case Place.recheck:
                if self._has_result():
                    self._outcome(FailureClass.interrupted, SUPERSEDED, "another attempt had the result first")
                    self._next(0)
                else:
                    self.attempt.output.mkdir(parents=True, exist_ok=True)
                    self.folder(self.stage).checkpoint.mkdir(parents=True, exist_ok=True)
                    self.place = Place.work
            case Place.work:
                (self.attempt.output / "weights").write_text(self.key)
                self.place = Place.artifacts
            case Place.artifacts:
                self._publish()
                self._next(0)
            case Place.over:
                pass

    def run(self) -> None:
        """Work to the end, unless it has to wait for another process."""
        for _ in range(7 * len(self.keys)):
            self.step()

    def checkpoint(self) -> None:
        """Write resumable state."""
        if self.place is Place.work and self.execution is not None:
            folder = self.folder(self.stage).checkpoint
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "state").write_text(str(self.number))
            stamp(folder / "state", self.clock())
            self.execution.progress = True

    def fail(self, failure: FailureClass, words: str = "it went wrong") -> None:
        """The stage raises; the next one follows."""
        if self.place in (Place.work, Place.artifacts):
            self._outcome(failure, failure.name, words)
            self._next(3 if failure in (FailureClass.interrupted, FailureClass.time_limit) else 1)

    def stop(self, failure: FailureClass = FailureClass.interrupted) -> None:
        """It gets a signal, writes a checkpoint and exits."""
        if self.claimed and self.place in (Place.work, Place.artifacts):
            self.place = Place.work
            self.checkpoint()
            self.fail(failure, "asked to stop")
        self.place = Place.over
        self.codes.append(3)

    def beat(self) -> None:
        """Touch its own claim: the heartbeat."""
        if self.claimed:
            stamp(self.attempt.claim, self.clock())

    def die(self) -> None:
        """Die without an outcome."""
        if self.execution is not None:
            self.execution.alive, self.execution.ended = False, self.clock()
        self.execution, self.place = None, Place.over

    def _look(self) -> None:
        node = self.stage
        if self._has_result():
            return self._next(0)
        if self._cancelled() or divergence_of(self.folder(self.stage)):
            return self._next(3)
        self.looked = self.clock()
        parents = [self.description.nodes[key] for key in node.upstream.values()]
        missing = [parent for parent in parents if not self._intact(parent)]
        for parent in missing:
            self._withdraw(parent)
        if missing:
            return self._next(3)
        folder = self.folder(node)
        self.number = max((number for number in attempt_numbers(folder) if folder.attempt(number).claim.exists()), default=0) + 1
        self.place = Place.wait
        return None

    def _wait_for_holder(self) -> None:
        """Exit if another claim has a heartbeat; wait for one without until it has one again or counts as dead."""
        quiet, taken = self._live_claim(self.stage)
        if not taken:
            self.attempt.path.mkdir(parents=True, exist_ok=True)
            self.place = Place.claim
        elif quiet < GONE_SECONDS:
            self._next(3)

    def _claim(self) -> None:
        found = newest_checkpoint(self.folder(self.stage))
        claim = Claim(
            self.number, self.node, self.pid, "", self.clock(), self.job, self.node, relief=self.description.relief, checkpoint=found
        )
        if not claim_attempt(self.folder(self.stage), self.number, claim):
            return self._next(3)
        stamp(self.attempt.claim, self.clock())
        relief = self.description.relief
        self.execution = Execution(self.key, self.number, self.job, self.node, self.clock(), found, relief, looked=self.looked)
        self.executions.append(self.execution)
        self.place = Place.recheck
        return None

    def _publish(self) -> None:
        node, folder = self.stage, self.folder(self.stage)
        ua, diverged = self.ua_of(self.key)
        digest = file_digest(self.attempt.output / "weights")
        result = Result(
            key=node.key,
            stage=node.stage,
            version=node.version,
            fold=node.fold,
            seed=node.seed,
            corpus=self.description.place.corpus,
            corpus_digest=self.description.place.corpus_digest,
            settings=node.settings,
            upstream=node.upstream,
            attempt=self.number,
            metrics={"ua": ua},
            provenance={"seconds": 1.0, "peak_rss_bytes": 1 << 28, "slurm": {"job_nodelist": self.node}},
            artifacts={"weights": digest},
            diverged=diverged or divergence_of(folder),
        )
        write_result(folder, result)
        stamp(folder.result, self.clock())
        if self.execution is not None:
            self.execution.result = True
        self.published(self.key)
        shutil.rmtree(folder.checkpoint, ignore_errors=True)

    def _outcome(self, failure: FailureClass, error: str, words: str) -> None:
        ending = {FailureClass.interrupted: Ending.interrupted, FailureClass.time_limit: Ending.interrupted}.get(failure, Ending.failed)
        ending = Ending.refused if failure is FailureClass.refused else ending
        write_outcome(self.attempt, Outcome(self.number, ending, error, words, "", self.node, 1.0, self.job, failure.name))
        if self.execution is not None:
            self.execution.said, self.execution.superseded = failure, error == SUPERSEDED

    def _next(self, code: int) -> None:
        if self.execution is not None:
            self.execution.alive, self.execution.ended = False, self.clock()
        self.execution = None
        self.codes.append(code)
        self.at += 1
        self.place = Place.look if self.at < len(self.keys) else Place.over
        self.at = min(self.at, len(self.keys) - 1)

    def _cancelled(self) -> bool:
        place = self.description.place
        return bool(place.launched) and self.key in read_cancellations(Layout(Path(place.results), place.experiment), place.launched)

    def _has_result(self) -> bool:
        result = read_result(self.folder(self.stage), self.key)
        return result is not None and artifacts_present(self.folder(self.stage), result)

    def _intact(self, node: Node) -> bool:
        result = read_result(self.folder(node), node.key)
        return result is not None and result_intact(self.folder(node), result)

    def _withdraw(self, node: Node) -> None:
        folder = self.folder(node)
        result = read_result(folder, node.key)
        if result is None:
            return
        attempt = folder.attempt(result.attempt)
        folder.result.rename(attempt.path / "withdrawn.json")
        if read_outcome(attempt) is None:
            write_outcome(
                attempt,
                Outcome(attempt.number, Ending.failed, "ArtifactDamaged", "gone", "", self.node, 0.0, self.job, FailureClass.disk.name),
            )

    def _live_claim(self, node: Node) -> tuple[float, bool]:
        folder = self.folder(node)
        result = read_result(folder, node.key)
        for number in attempt_numbers(folder):
            attempt = folder.attempt(number)
            claim = read_claim(attempt)
            if claim is None or read_outcome(attempt) is not None or (result is not None and result.attempt == number):
                continue
            if claim.slurm_job == self.job and claim.pid != self.pid:
                continue  # the same job, requeued
            heartbeat = attempt.claim.stat().st_mtime
            if claim_alive(claim, heartbeat, live_jobs=None, now=self.clock(), gone=self.description.gone):
                return self.clock() - heartbeat, True
        return 0.0, False


def stamp(path: Path, now: float) -> None:
    """Set the modification time of a file to the simulated time."""
    os.utime(path, (now, now))
