"""A launched experiment as the commands open it: where its files, its Slurm queue and its code are, and what may be done with it here.

The commands themselves are functions in modules of their own (grid, status, explain, ...), each handed a Session.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.commands.hints import Hints
from jobs.control.controller import Report, context_of, desired_of, look, plan_of
from jobs.control.executor_protocol import Limits
from jobs.errors import UsageError
from jobs.experiment.config import Cluster
from jobs.experiment.recipes import MethodRecipe, method_recipes
from jobs.store.cancellations import read_cancellations
from jobs.store.layout import shared_path
from jobs.text import counted

if TYPE_CHECKING:
    from jobs.control.executor_protocol import Batch
    from jobs.control.facts import InFlight
    from jobs.control.observe import PassContext
    from jobs.experiment.launched import LastLaunch, Launched
    from jobs.slurm.chain import Chain
    from jobs.slurm.client import SlurmClient
    from jobs.slurm.executor import SlurmArrays
    from jobs.tables.published import Published
    from jobs.worker.task import Workplace


@dataclass
class Session:
    """One launched experiment, with lazily made access to Slurm.

    `root` is the folder of the code that runs now. A launch submits that code; later commands submit the snapshot that the launch took,
    so that an edit after the launch reaches no job.
    """

    launched: Launched
    place: Workplace
    root: Path
    published_file: Path
    preload: Sequence[str] = ()  # functions that local workers call once before they are forked
    new: bool = False  # this command is the launch
    former: LastLaunch | None = None  # of a launch: the one before
    home: Path | None = None  # folder with results/ by default; None: `root`
    patient: bool = True  # False: Slurm is asked once, with a short time limit, because a person waits for the answer
    queue_unknown: bool = field(default=False, init=False)  # Slurm did not answer the last look

    @property
    def name(self) -> str:
        return self.launched.layout.experiment

    @property
    def on_slurm(self) -> bool:
        return self.launched.experiment.cluster is Cluster.slurm

    @property
    def may_have_jobs(self) -> bool:
        """Whether Slurm may have jobs of the experiment, of its last launch or of an earlier one."""
        return self.on_slurm or (self.launched.layout.submissions.is_dir() and shutil.which("squeue") is not None)

    @property
    def hints(self) -> Hints:
        """Commands for the user to paste."""
        results = self.launched.layout.root
        usual = results.resolve() == ((self.home or self.root) / "results").resolve()
        return Hints(self.name, "" if usual else str(shared_path(results)), self.launched.typed or self._launch_words)

    @property
    def resume_command(self) -> str:
        """The command that launches again with the stored settings."""
        return self.hints.resume

    @property
    def _launch_words(self) -> tuple[str, ...]:
        """The command of a launch that did not record it (until version 0.4), without its settings."""
        named = [self.name] if self.launched.config in ("", self.name) else [self.launched.config, f"name={self.name}"]
        return ("grid", *named, *(("--cluster", "slurm") if self.on_slurm else ()))

    @property
    def submitter(self) -> str:
        """What submits missing stages next, for messages."""
        if not self.on_slurm:
            return self.resume_command
        return "the next pass of the controller" if self.launched.experiment.policy.controller else self.hints.of("reconcile")

    @property
    def cancelled(self) -> bool:
        """Whether the user has cancelled the whole experiment."""
        return read_cancellations(self.launched.layout, self.launched.since).everything

    @property
    def other_user(self) -> bool:
        """Whether another user submitted the experiment's jobs: the queue seen here does not show them."""
        return self.on_slurm and self.launched.user not in (None, os.getuid())

    @property
    def source(self) -> Path:
        """Folder of the code that jobs run."""
        current = self.launched.layout.snapshots / "current"
        return current.resolve() if not self.new and current.is_dir() else self.root

    @cached_property
    def published(self) -> Published:
        """The published results printed beside ours."""
        from jobs.tables.published import load_published

        found = load_published(self.published_file, self.launched.experiment.table)
        own = {name: variant.label or name for name, variant in self.launched.experiment.variants.items()}
        return replace(found, labels={**found.labels, **own})

    @cached_property
    def recipes(self) -> tuple[MethodRecipe, ...]:
        """The recipe of each method, compared with the presets beside the published results."""
        experiment = self.launched.experiment
        methods = {name: variant.method for name, variant in experiment.variants.items()}
        return method_recipes(experiment.recipes, self.published_file.parent, methods)

    @cached_property
    def client(self) -> SlurmClient:
        from jobs.slurm.client import LookClient, SlurmClient

        return SlurmClient() if self.patient else LookClient()

    @cached_property
    def arrays(self) -> SlurmArrays:
        from jobs.slurm.executor import SlurmArrays

        return SlurmArrays(self.launched.experiment, self.launched.layout, self.place, source=self.source, client=self.client)

    @cached_property
    def chain(self) -> Chain:
        from jobs.slurm.chain import Chain

        binds = (self.launched.corpus.folder,)
        return Chain(self.launched.experiment, self.launched.layout, source=self.source, binds=binds, client=self.client)

    def look_again(self) -> None:
        """Forget what Slurm has answered, so that the next look asks again."""
        for name in ("client", "arrays", "chain"):
            self.__dict__.pop(name, None)

    def news(self) -> list[str]:
        """Lines on what the results seen last have decided; of a grid none, as its events say everything."""
        return []

    def look(self, *, ask_slurm: bool = True, with_limits: bool = False) -> Report:
        """The state of the experiment and the plan of a next pass; changes nothing.

        Where Slurm does not answer, stderr gets a line and the state is that of the files alone. `with_limits`: plan within the site's
        limits, which costs further calls of Slurm's commands.
        """
        asked = self.on_slurm and ask_slurm and not self.other_user
        in_flight: dict[str, InFlight] = dict(self.arrays.look_only()) if asked else {}
        self.queue_unknown = asked and self.arrays.live_jobs() is None
        desired = desired_of(self.launched)
        seen = look(desired, self.arrays if asked else None)
        limits = self.arrays.limits() if asked and with_limits else Limits()
        plan = plan_of(desired if self.on_slurm else replace(desired, runs_per_task={}), seen, in_flight, limits)
        return Report(plan, seen.graph, seen.facts, in_flight, seen.judgements)

    def context(self) -> PassContext:
        """What reading single attempts needs beside their files."""
        return context_of(desired_of(self.launched), self.arrays if self.on_slurm and not (self.queue_unknown or self.other_user) else None)

    def limits_of_look(self) -> str:
        """Why what is shown is not the whole state of what was launched; "" if it is."""
        if self.launched.changed:
            return (
                f"the code defines other stages now than when {self.name} was launched: shown are these; "
                f"{self.resume_command} launches it again with its settings"
            )
        if self.other_user:
            return (
                f"{self.name} was launched by another user ({self.launched.user}), whose jobs are not seen here: shown is what files state"
            )
        return ""

    def require_same_code(self) -> None:
        """UsageError if the code defines other stages now than at the launch."""
        if self.launched.changed:
            raise UsageError(
                f"{self.name}: the code defines other stages now than when it was launched; "
                f"{self.resume_command} launches it again with its settings, {self.hints.of('cancel')} ends it"
            )

    def require_slurm(self, batches: Sequence[Batch]) -> None:
        """SlurmUnavailableError or UsageError, before anything is written, if Slurm does not answer or does not know an option.

        `batches`: what is to be submitted first.
        """
        self.arrays.limits()
        self.arrays.check_options(batches)

    def require_own(self) -> None:
        """UsageError for another user's experiment: its jobs are not in the queue seen here, and would be submitted twice."""
        if self.other_user:
            raise UsageError(
                f"{self.name} was launched by another user ({self.launched.user}): only they can resume or cancel it; "
                f"{self.resume_command} launches it as yours"
            )

    def require_nothing_in_slurm(self) -> None:
        """UsageError if this machine is to compute an experiment that has jobs in Slurm, or may have them because Slurm does not answer."""
        if self.on_slurm or not self.may_have_jobs:
            return
        from jobs.slurm.chain import chain_jobs, link_name

        layout = self.launched.layout
        running, waiting = chain_jobs(link_name(layout), self.client.queue(name=link_name(layout)))
        stages, links = len(self.arrays.look_only()), len(running) + len(waiting)
        if stages or links:
            raise UsageError(
                f"{self.name} has {counted(stages, 'stage')} and {counted(links, 'controller job')} in Slurm's queue: "
                f"{self.hints.of('cancel')} withdraws them, `--cluster slurm` continues there"
            )

    def require_last_launch(self) -> None:
        """UsageError if the experiment was launched again since this process read its settings: they are no longer valid."""
        from jobs.store.launches import launched_at

        if launched_at(self.launched.layout) != self.launched.since:
            raise UsageError(f"{self.name} was launched again, or moved, since this command began: run it again")
