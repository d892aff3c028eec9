"""A small experiment on a real Slurm whose stages fail on request: launched by the tests of failure classes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jobs.control.controller import Desired, Report, reconcile
from jobs.control.failure_policy import ended_attempts
from jobs.control.observe import PassContext, read_attempts
from jobs.experiment.config import Cluster as Where
from jobs.experiment.config import Experiment, Policy, SlurmSite, StageResources
from jobs.experiment.graph import Graph, Run, Slot
from jobs.slurm.client import SlurmClient
from jobs.slurm.executor import SlurmArrays
from jobs.store.layout import Layout, StageFolder
from jobs.store.records import Claim, Outcome, Result, attempt_numbers, read_claim, read_outcome, read_result
from jobs.worker.task import Workplace
from tests.jobs import fake_registry
from tests.jobs.slurm_cases import make_source

ROOT = Path(__file__).resolve().parents[2]
FIRST = "1"


class Trial:
    """An experiment of the fake registry on the test cluster, looked after by the real controller."""

    def __init__(
        self,
        folder: Path,
        behaviours: Mapping[int, str],
        *,
        seeds: int,
        methods: tuple[str, ...] = ("vft",),
        site: SlurmSite | None = None,
        policy: Policy | None = None,
        settle_seconds: float = 20.0,
        **resources: Any,
    ) -> None:
        self.folder, self.corpus = folder, fake_registry.make_corpus(folder / "corpus")
        self.layout = Layout(folder / "results", "trial")
        self.layout.root.mkdir()
        self.recipe = {"failing": {f"finetune {methods[-1]} {FIRST} {seed}": behaviour for seed, behaviour in behaviours.items()}}
        self.methods, self.seeds, self.policy = methods, seeds, policy or Policy()
        site = site or SlurmSite()
        site.environment["PYTHONPATH"] = str(ROOT)
        given = StageResources(**{"cpus": 1, "gpus": 0, "memory_gb": 0.5, "minutes": 5, **resources})
        self.experiment = Experiment(name="trial", corpus="fake", cluster=Where.slurm, resources={"default": given}, slurm=site)
        self.source = make_source(folder / "source")
        self.settle_seconds = settle_seconds
        self.arrays = self.executor()
        self.desired = self.launched()

    def executor(self, client: SlurmClient | None = None) -> SlurmArrays:
        place = Workplace(fake_registry.NAME, str(self.layout.root), "trial", "fake", str(self.corpus), "d1", fake_registry.DIGEST_OF)
        worker = (sys.executable, "-m", "jobs.worker.main")
        return SlurmArrays(
            self.experiment, self.layout, place, source=self.source, worker=worker, client=client, settle_seconds=self.settle_seconds
        )

    def graph(self, generations: Mapping[Slot, int] | None = None) -> Graph:
        return fake_registry.make_graph(self.recipe, methods=self.methods, folds=(FIRST,), seeds=self.seeds, generations=generations)

    def launched(self) -> Desired:
        return Desired(self.graph(), self.layout, self.policy, since=time.time(), refill=self.graph)

    def launch_again(self) -> None:
        self.desired = self.launched()

    def look(self) -> Report:
        return reconcile(self.desired, self.arrays)

    def settle(self, seconds: float = 180.0, each: Callable[[Report], None] = lambda report: None) -> Report:
        """Passes until nothing is left to do."""
        end = time.monotonic() + seconds
        while True:
            report = self.look()
            each(report)
            if report.settled:
                return report
            assert time.monotonic() < end, [(key, report.facts[key]) for key in report.plan.waiting]
            time.sleep(0.3)

    def run(self, slot: int, generation: int = 0) -> Run:
        graph = self.graph({("vft", FIRST, slot): generation}) if generation else self.graph()
        return next(run for run in graph.runs if (run.method, run.slot, run.generation) == (self.methods[-1], slot, generation))

    def stage(self, slot: int, generation: int = 0) -> StageFolder:
        return self.layout.stage("finetune", self.run(slot, generation).key)

    def claims(self, slot: int) -> list[Claim]:
        folder = self.stage(slot)
        return [claim for number in attempt_numbers(folder) if (claim := read_claim(folder.attempt(number)))]

    def outcome(self, slot: int, attempt: int = 1) -> Outcome | None:
        return read_outcome(self.stage(slot).attempt(attempt))

    def result(self, slot: int, generation: int = 0) -> Result | None:
        return read_result(self.stage(slot, generation), self.run(slot, generation).key)

    def classes(self, slot: int) -> list[str]:
        """The class of every attempt that ended without a result."""
        key = self.run(slot).key
        files = read_attempts(self.stage(slot), PassContext(live_jobs=self.arrays.live_jobs()))
        return [each.failure.name for each in ended_attempts(files, self.arrays.departures([key]).get(key, ()), 0.0)]

    def states(self, slot: int) -> list[str]:
        """What Slurm said of every job that held it."""
        key = self.run(slot).key
        return [each.state for each in self.arrays.departures([key]).get(key, ())]

    def script(self, job: str) -> str:
        """What was handed to sbatch for an element."""
        (script,) = (self.layout.submissions / "scripts").glob(f"{job.partition('_')[0]}_submission.sh")
        return script.read_text()

    def starts(self, slot: int, generation: int = 0) -> int:
        return fake_registry.count(self.corpus, "starts").get(self.run(slot, generation).key, 0)

    def bury(self) -> None:
        """Let time pass for every worker that was killed: its heartbeat is old as soon as its job is gone."""
        live = self.arrays.live_jobs() or frozenset()
        for slot in range(self.seeds):
            folder = self.stage(slot)
            for number in attempt_numbers(folder)[-1:]:
                attempt = folder.attempt(number)
                claim = read_claim(attempt)
                if claim is not None and claim.slurm_job not in live and read_outcome(attempt) is None:
                    os.utime(attempt.claim, (1, 1))


# What each slot of the first grid meets; all of them start at once, four on each of three nodes.
