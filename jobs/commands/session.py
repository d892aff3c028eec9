"""One experiment in hand: executors, passes, tables and notices of the commands. It returns facts; jobs.commands.console prints them."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.commands.status_report import Status, status_of, table_states
from jobs.control.controller import Event, Look, Report, desired_of, experience_of, look, reconcile, sight_of
from jobs.control.executor_protocol import Limits
from jobs.control.facts import InFlight, NodeFacts, Phase
from jobs.control.plan import make_plan, needed_keys
from jobs.errors import SlurmUnavailableError, UsageError
from jobs.experiment.config import Cluster, resources_of
from jobs.experiment.graph import Graph, Run
from jobs.experiment.launched import Launched
from jobs.store.cancellations import read_cancellations, record_cancellation
from jobs.store.records import Result, damaged_records, read_json, read_result

if TYPE_CHECKING:
    from jobs.commands.notify import Notice
    from jobs.commands.requests import RequestsRow
    from jobs.control.executor_protocol import Batch
    from jobs.control.observe import Sight
    from jobs.slurm.chain import Chain, ChainState
    from jobs.slurm.chain_link import LinkEnd
    from jobs.slurm.client import SlurmClient
    from jobs.slurm.executor import SlurmArrays
    from jobs.store.layout import Layout
    from jobs.tables.collect import CollectReport
    from jobs.tables.published import Published
    from jobs.worker.task import Workplace


@dataclass(frozen=True)
class Cancellation:
    """What a `cancel` has done."""

    stages: int  # that are cancelled on record; of everything: those without a result
    withdrawn: int  # that Slurm held, waiting or running
    running: tuple[str, ...] = ()  # who still computes a stage of them
    links: tuple[str, ...] = ()  # jobs of the controller that were ended


@dataclass
class Launcher:
    """What a command does with an experiment.

    `root` is the folder of the code that runs now. A launch hands it to its jobs; whatever goes on with a launch hands on the code of
    that launch, so that an edit afterwards reaches no job.
    """

    launched: Launched
    place: Workplace
    root: Path
    published_file: Path
    preload: Sequence[str] = ()  # for workers on this machine
    new: bool = False  # this is a launch
    patient: bool = True  # False: somebody waits for the answer, and Slurm is asked once and shortly
    blind: bool = field(default=False, init=False)  # Slurm could not be asked when last looked at

    @property
    def name(self) -> str:
        return self.launched.layout.experiment

    @property
    def on_slurm(self) -> bool:
        return self.launched.experiment.cluster is Cluster.slurm

    @property
    def command(self) -> str:
        """What launches it again."""
        file = self.launched.config or self.name
        named = file if file == self.name else f"{file} name={self.name}"
        return f"python launch.py grid {named}{' --cluster slurm' if self.on_slurm else ''}"

    @property
    def acts(self) -> str:
        """Who submits what is missing."""
        return "the next pass" if self.on_slurm else f"`{self.command}`"

    @cached_property
    def published(self) -> Published:
        """What the tables print beside ours."""
        from jobs.tables.published import load_published

        return load_published(self.published_file, self.launched.experiment.table)

    @cached_property
    def client(self) -> SlurmClient:
        from jobs.slurm.client import SHORT_SECONDS, SlurmClient

        return SlurmClient() if self.patient else SlurmClient(looks=1, look_seconds=SHORT_SECONDS)

    @cached_property
    def arrays(self) -> SlurmArrays:
        from jobs.slurm.executor import SlurmArrays

        return SlurmArrays(self.launched.experiment, self.launched.layout, self.place, source=self.source, client=self.client)

    @cached_property
    def chain(self) -> Chain:
        from jobs.slurm.chain import Chain

        binds = (self.launched.corpus.folder,)
        return Chain(self.launched.experiment, self.launched.layout, source=self.source, binds=binds, client=self.client)

    @property
    def source(self) -> Path:
        """Folder of the code that jobs run."""
        current = self.launched.layout.snapshots / "current"
        return current.resolve() if not self.new and current.is_dir() else self.root

    # ---- looking

    def look(self, *, ask_slurm: bool = True, room: bool = False) -> Report:
        """Where it stands; changes nothing. Where Slurm cannot be asked, a line on stderr says so, and the files have to do.

        `room`: with the limits of the site, which costs further calls.
        """
        asked = self.on_slurm and ask_slurm and not self._other_user
        in_flight: dict[str, InFlight] = dict(self.arrays.look_only()) if asked else {}
        self.blind = asked and self.arrays.live_jobs() is None
        now = look(desired_of(self.launched), self.arrays if asked else None)
        return self._report(now, in_flight, self.arrays.limits() if asked and room else Limits())

    def why_only_look(self) -> str:
        """Why no pass is to be made here; "" if one may be."""
        if self.launched.changed:
            return (
                f"the code computes other stages now than when {self.name} was launched: shown are these; `{self.command}` launches it anew"
            )
        if self._other_user:
            return f"{self.name} was launched by another user ({self.launched.user}), whose jobs are theirs to submit: only shown"
        if not os.access(self.launched.layout.folder, os.W_OK):
            return f"{self.launched.layout.folder} cannot be written: only shown"
        return ""

    @property
    def cancelled(self) -> bool:
        """The user has cancelled all of it."""
        return read_cancellations(self.launched.layout, self.launched.since).everything

    def status(self, report: Report) -> Status:
        """A report as it is shown."""
        chain = self.chain_state()
        watched = chain is not None and bool(chain.running or chain.waiting)
        told = "" if chain is None or (report.settled and not watched) else chain.sentence
        stuck = self.arrays.stuck() if self.on_slurm else {}
        return status_of(
            self.name,
            report,
            command=self.command,
            controller=told,
            watched=watched,
            stuck=stuck,
            cancelled=self.cancelled,
            notices=self._notices(),
            tables=self.tables_there() if report.complete else "",
            damaged=damaged_records(*self.launched.layout.records),
        )

    def chain_state(self) -> ChainState | None:
        """How the chain of controllers stands; None where there is none to be."""
        if not self.on_slurm or not self.launched.experiment.policy.controller:
            return None
        from jobs.slurm.chain import chain_state, link_name

        try:
            queue = None if self.blind or self._other_user else self.client.queue(name=link_name(self.launched.layout), patient=False)
        except (SlurmUnavailableError, UsageError):
            queue = None
        return chain_state(self.launched.layout, queue)

    def sight(self) -> Sight:
        """What reading single attempts needs to know beside the files."""
        return sight_of(desired_of(self.launched), self.arrays if self.on_slurm and not (self.blind or self._other_user) else None)

    def request_words(self, report: Report) -> Callable[[Batch], str]:
        """What Slurm is asked for a batch of a report's plan, and why."""
        from jobs.control.estimates import CONFIGURED, asks_in_words, shape_in_words

        predict = experience_of(desired_of(self.launched), report)

        def words(batch: Batch) -> str:
            asked = asks_in_words(self.arrays.asked(batch), predict(batch.stage, batch.method) if predict else CONFIGURED)
            return asked + shape_in_words(resources_of(self.launched.experiment, batch.stage), max(len(task.keys) for task in batch.tasks))

        return words

    def requests(self) -> tuple[RequestsRow, ...]:
        """What the tasks that are over asked for and used."""
        from jobs.commands.requests import read_tasks, rows_of

        if not self.on_slurm:
            raise UsageError(f"{self.name} was launched on this machine, of which nothing is asked")
        report, given = self.look(), self.launched.experiment
        records = self.arrays.submissions()
        return rows_of(
            read_tasks(records, report.graph, report.facts, self.launched.layout, self.sight(), lambda stage: resources_of(given, stage))
        )

    # ---- acting

    def hand_on_code(self) -> None:
        """Let whoever goes on with this launch submit its code, where no controller is to be too: `status`, cron, `grid --wait`."""
        self.chain.point_to_code()

    def one_pass(self) -> Report:
        """One pass of the controller on Slurm."""
        self._refuse_other_code()
        self._refuse_other_user()
        self._refuse_other_launch()
        report = reconcile(desired_of(self.launched), self.arrays)
        self.blind, self.launched = False, replace(self.launched, graph=report.graph)  # the next pass begins with what fills the slots now
        return report

    def ensure_chain(self) -> ChainState | None:
        """See to it that a controller looks after the experiment inside Slurm; None where none is to be."""
        return self.chain.ensure() if self.launched.experiment.policy.controller else None

    def run_here(self, *, tell: Callable[[Event], None], stopping: Callable[[int], None]) -> Report:
        """All of it on this machine."""
        from jobs.control.controller import run_local
        from jobs.local.executor import LocalExecutor
        from jobs.store.snapshot import code_facts
        from jobs.worker.machine import capacity_here

        executor = LocalExecutor(
            place=replace(self.place, code=code_facts(self.root)),
            layout=self.launched.layout,
            resources=lambda stage: resources_of(self.launched.experiment, stage),
            capacity=capacity_here(),
            preload=self.preload,
            code=self.root,
        )
        with executor:
            return run_local(desired_of(self.launched), executor, tell=tell, stopping=stopping)

    def wait_on_slurm(self, *, tell: Callable[[Event], None]) -> Report:
        """Passes until nothing is left to do."""
        from jobs.control.controller import wait_for

        return wait_for(
            desired_of(self.launched),
            self.arrays,
            poll_seconds=self.launched.experiment.policy.poll_seconds,
            tell=tell,
            each_pass=lambda report: self._refuse_other_launch(),
        )

    def control(self, *, tell: Callable[[Report], None] = lambda report: None) -> LinkEnd:
        """Be one link of the chain: passes until nothing is left to do or the job's time is up, then tables and a notice.

        `tell` is handed every pass.
        """
        from jobs.slurm.chain_link import LinkEnd, run_link

        self._refuse_other_user()
        policy = self.launched.experiment.policy
        if not (self.on_slurm and policy.controller):  # the chain of an earlier launch: the last one wants none
            self.chain.withdraw_successors()
            return LinkEnd.stopped

        def told() -> Report:
            report = self.one_pass()
            tell(report)
            return report

        return run_link(
            told,
            self.chain,
            poll_seconds=policy.poll_seconds,
            minutes=policy.controller_minutes,
            deadline=self.launched.since + 24 * 3600 * policy.controller_days,
            launched=self.launched.since,
            on_end=self._end,
            on_stop=lambda message: self._end(self.look(ask_slurm=False), message),
        )

    def cancel(self, runs: Sequence[str], *, now: float | None = None) -> Cancellation:
        """Cancel some runs, or everything: on record first, then what Slurm holds.

        Of single runs what is upstream of them is cancelled only where no other run needs it.
        """
        from jobs.commands.explain import find_target

        if runs:
            self._refuse_other_code()
        if self.on_slurm:
            self._refuse_other_user()
        # Clocks of two machines differ: what is cancelled now is cancelled after the launch.
        layout, moment = self.launched.layout, max(self.launched.since, time.time() if now is None else now)
        seen = self.look(ask_slurm=False)
        targets = [find_target(seen.graph, run) for run in runs]
        keys = keys_to_cancel(seen, [target.node.key for target in targets]) if runs else None
        if keys is not None and not keys:
            return Cancellation(0, 0)  # all of it has its result
        reserves = self._reserves([target.run for target in targets if target.run and keys and target.node.key in keys])
        record_cancellation(layout, None if keys is None else keys | reserves, moment)
        over = [key for key in seen.graph.nodes if (keys is None or key in keys) and not seen.facts[key].done]
        held = tuple(dict.fromkeys(seen.facts[key].held for key in over if seen.facts[key].held))
        if not self.on_slurm:
            return Cancellation(len(over), 0, held)
        try:
            if keys is None:
                links = self.chain.stop() if self.launched.experiment.policy.controller else ()
                return Cancellation(len(over), len(self.arrays.cancel_all()), (), links)
            withdrawn = self.arrays.cancel(keys)
            running = whole_jobs(self.arrays.in_flight(), keys)
            self.client.cancel(tuple(running))
        except (SlurmUnavailableError, UsageError) as error:
            raise UsageError(
                f"cancelled on record, so nothing is submitted again; but {error}: `cancel` once more ends the jobs"
            ) from error
        return Cancellation(len(over), len(withdrawn) + sum(map(len, running.values())))

    # ---- results

    def tables(self, report: Report, formats: Sequence[str] | None = None, out: Path | None = None) -> CollectReport:
        """Write the tables; `formats` None: all."""
        from jobs.control.outliers import rule_in_words
        from jobs.tables.collect import FORMATS, collect

        policy = self.launched.experiment.policy
        return collect(
            self.launched.layout,
            report.graph,
            read_results(report.graph, self.launched.layout, report.facts),
            table_states(status_of(self.name, report)),
            self.published,
            formats=tuple(FORMATS) if formats is None else formats,
            out=out,
            outlier_rule=rule_in_words(policy.outliers, policy.sigmas, policy.rounds),
            unresolved=Counter((report.graph.corpus, method) for method, _, _ in report.judgements.unresolved),
        )

    def notify(self, report: Report, written: CollectReport, message: str = "") -> tuple[Notice, ...]:
        """Tell whom the policy names how the experiment ended, once for each launch and outcome."""
        policy = self.launched.experiment.policy
        if policy.mail is None and policy.webhook is None:
            return ()
        from jobs.commands.notify import Ending, notify
        from jobs.commands.status_report import problem_lines

        ending = Ending(
            experiment=self.name,
            launched=self.launched.since,
            outcome="stopped" if message else "complete" if written.complete else "incomplete",
            runs=sum(method.n for method in written.summary.methods),
            all_runs=len(report.graph.runs),
            ua={f"{method.corpus} {method.method}": method.mean_ua for method in written.summary.methods},
            problems=(*filter(None, [message]), *problem_lines(status_of(self.name, report))),
            tables=str(self.launched.layout.tables.resolve()),
        )
        return notify(policy, self.launched.layout, ending)

    # ---- inside

    def _refuse_other_code(self) -> None:
        if self.launched.changed:
            raise UsageError(
                f"{self.name}: the code computes other stages now than when it was launched; `{self.command}` launches it anew, "
                f"`cancel {self.name}` ends it"
            )

    def _reserves(self, runs: Sequence[Run]) -> frozenset[str]:
        """What could fill the slots of these runs later: one that goes on to its end may diverge, and is not to be followed by another."""
        last = self.launched.experiment.policy.max_seeds - 1
        slots = {(run.method, run.fold, run.slot): last for run in runs}
        graph = self.launched.refill(slots) if slots else None
        every = (*graph.superseded, *graph.runs) if graph else ()
        return frozenset(run.key for run in every if (run.method, run.fold, run.slot) in slots)

    @property
    def _other_user(self) -> bool:
        return self.on_slurm and self.launched.user not in (None, os.getuid())

    def _refuse_other_user(self) -> None:
        """Of another user's jobs the queue that is looked at says nothing: all of them would be taken for gone, and submitted once more."""
        if self._other_user:
            raise UsageError(
                f"{self.name} was launched by another user ({self.launched.user}): only they can go on with it or cancel it; "
                f"`{self.command}` launches it as yours"
            )

    def _refuse_other_launch(self) -> None:
        """A process that began before the last launch would go on with settings that are no more, against whoever goes on with the new."""
        from jobs.slurm.chain import launched_at

        if launched_at(self.launched.layout) != self.launched.since:
            raise UsageError(f"{self.name} was launched anew, or moved, since this command began: run it again")

    def _report(self, now: Look, in_flight: Mapping[str, InFlight], limits: Limits) -> Report:
        desired = desired_of(self.launched)
        plan = make_plan(
            now.graph,
            now.facts,
            in_flight,
            runs_per_task=desired.runs_per_task if self.on_slurm else {},
            limits=limits,
            max_failures=desired.policy.max_failures,
            since=desired.since,
            predict=experience_of(desired, now),
        )
        return Report(plan, now.graph, now.facts, in_flight, now.judgements)

    def tables_there(self) -> str:
        """The folder of the tables if they were written since the last launch, and of every run."""
        file = self.launched.layout.tables / "summary.json"
        try:
            current = file.stat().st_mtime >= self.launched.since
        except OSError:
            return ""
        return str(file.parent) if current and (read_json(file) or {}).get("complete") is True else ""

    def _notices(self) -> list[str]:
        policy = self.launched.experiment.policy
        if policy.mail is None and policy.webhook is None:
            return []
        from jobs.commands.notify import notice_line, read_notices

        return [notice_line(notice) for notice in read_notices(self.launched.layout, self.launched.since)]

    def _end(self, report: Report, message: str = "") -> None:
        from jobs.commands.notify import notice_line

        for notice in self.notify(report, self.tables(report), message):
            print(notice_line(notice), flush=True)  # noqa: T201 - the log of the link


def read_results(graph: Graph, layout: Layout, facts: Mapping[str, NodeFacts]) -> dict[str, Result]:
    """Results of every finished stage of a graph, by key; those of dropped runs too."""
    found: dict[str, Result] = {}
    for key, node in graph.nodes.items():
        if key in facts and facts[key].done and (result := read_result(layout.stage(node.stage, key), key)):
            found[key] = result
    return found


def keys_to_cancel(seen: Report, chosen: Collection[str]) -> frozenset[str]:
    """The chosen stages and what lies upstream of them that nobody else needs."""
    others = replace(seen.graph, runs=tuple(run for run in seen.graph.runs if run.key not in chosen))
    needed = set(needed_keys(others, seen.facts))
    found: set[str] = set()
    stack = list(chosen)
    while stack:
        key = stack.pop()
        if key in found or (key in needed and key not in chosen) or seen.facts[key].done:
            continue
        found.add(key)
        stack.extend(seen.graph.nodes[key].upstream.values())
    return frozenset(found)


def whole_jobs(in_flight: Mapping[str, InFlight], keys: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Running jobs that hold none but these keys -> their keys."""
    held: dict[str, list[str]] = {}
    for key, flight in in_flight.items():
        if flight.phase is Phase.running:
            held.setdefault(flight.job, []).append(key)
    return {job: tuple(found) for job, found in held.items() if all(key in keys for key in found)}
