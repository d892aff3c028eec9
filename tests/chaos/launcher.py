"""The command line of the chaos run: like launch.py, with the stages of the chaos registry and shorter waits.

    launch.py start | local | reconcile | control | worker | collect  ...      copied as `launch.py` into the source tree of the run

Waits are `SCALE` times as short (a submission of unknown outcome is settled after 3 s, not a minute), the logic is the product's. Limits
that must exceed the time that a process or a command takes on a busy machine are shortened by less, pauses after storage errors by more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jobs.experiment.config import Cluster, Experiment, OutlierRule, Policy, SlurmSite, StageResources
from jobs.experiment.launched import Corpus, Launched, launch, reopen, store
from jobs.slurm import client as slurm_client
from jobs.store import attempts as liveness
from jobs.store.clock import file_time, measure
from jobs.store.layout import Layout
from jobs.worker.task import Workplace, load_object

ROOT = Path(__file__).resolve().parent
REGISTRY_NAME = "ser_core.registry:REGISTRY"  # the chaos registry lies there in the run's source tree
SCALE = 20.0
SETTLE_SECONDS = 60.0 / SCALE
LOOK_SECONDS = 5.0  # three queries and an sbatch must fit into UNDERWAY_SECONDS
POLL_MINUTES = 0.1  # 6 s: of two links that wait, a slurmctld that loses its last seconds knows one
NAME = "chaos"


def shorten_waits() -> None:
    """Set waits to seconds instead of minutes; called before the modules that copy the values are imported."""
    liveness.GONE_SECONDS, liveness.QUIET_SECONDS = 10.0, 300.0 / SCALE
    liveness.Heartbeat = partial(liveness.Heartbeat, seconds=liveness.HEARTBEAT_SECONDS / SCALE)  # type: ignore[misc, assignment]
    slurm_client.UNDERWAY_SECONDS, slurm_client.SUBMIT_SECONDS = 30.0, round(120 / SCALE)


def experiment_of(methods: Sequence[str], folds: int, seeds: int, recipe: Any, cluster: Cluster, variables: dict[str, str]) -> Experiment:
    """Short stages, one CPU each.

    Their time limit is short too: a slurmctld that is killed as a job ends may list the job as running until then.
    """
    small = StageResources(cpus=1, gpus=0, memory_gb=0.2, minutes=3, runs_per_task=1)
    policy = Policy(poll_minutes=POLL_MINUTES, controller_minutes=3, max_attempts=40, max_failures=10_000, outliers=OutlierRule.pooled)
    return Experiment(
        name=NAME,
        corpus="chaos",
        methods=list(methods),
        folds=[f"f{number}" for number in range(folds)],
        seeds=seeds,
        cluster=cluster,
        resources={"default": small, "finetune": replace(small, runs_per_task=2)},
        policy=policy,
        recipe=recipe,
        slurm=SlurmSite(environment=variables),
    )


def launched_of(chosen: argparse.Namespace, cluster: Cluster, step_seconds: float) -> Launched:
    """The experiment, launched now."""
    module = load_object(REGISTRY_NAME.partition(":")[0])
    recipe = module.Recipe(steps=chosen.steps, step_seconds=step_seconds)
    experiment = experiment_of(module.REGISTRY.methods, chosen.folds, chosen.seeds, recipe, cluster, json.loads(chosen.variables))
    prepared = Corpus("chaos", "d1", tuple(experiment.folds), str(chosen.corpus))
    measure(chosen.results.resolve())
    return launch(experiment, prepared, module.REGISTRY, Layout(chosen.results.resolve(), NAME))


def reopened(results: Path) -> Launched:
    """The experiment as it was launched."""
    module = load_object(REGISTRY_NAME.partition(":")[0])
    measure(results.resolve())
    return reopen(Layout(results.resolve(), NAME), module.REGISTRY, module.Recipe)


def workplace(launched: Launched) -> Workplace:
    corpus = launched.corpus
    return Workplace(
        REGISTRY_NAME, str(launched.layout.root), NAME, corpus.name, corpus.folder, corpus.digest, "ser_core.registry:read_digest"
    )


def arrays(launched: Launched) -> Any:
    from jobs.control import failure_policy
    from jobs.slurm.executor import SlurmArrays

    failure_policy.STORAGE_SECONDS /= 5 * SCALE
    failure_policy.LONGEST_PAUSE /= 50 * SCALE
    client = slurm_client.SlurmClient(look_seconds=LOOK_SECONDS)
    return SlurmArrays(launched.experiment, launched.layout, workplace(launched), source=ROOT, settle_seconds=SETTLE_SECONDS, client=client)


def control(results: Path) -> int:
    """One link of the chain."""
    from jobs.control.controller import desired_of, reconcile
    from jobs.slurm.chain import Chain
    from jobs.slurm.chain_link import LinkEnd, run_link

    launched = reopened(results)
    policy = launched.experiment.policy
    executor = arrays(launched)
    end = run_link(
        lambda: reconcile(desired_of(launched), executor),
        Chain(launched.experiment, launched.layout, source=ROOT),
        deadline=launched.since + policy.controller_days * 86400,
        clock=partial(file_time, launched.layout.root),
    )
    return 1 if end is LinkEnd.alone else 0


def run_here(chosen: argparse.Namespace) -> int:
    """The undisturbed run, on this machine and without sleeping."""
    from jobs.control.controller import desired_of, run_local
    from jobs.experiment.config import resources_of
    from jobs.local.executor import LocalExecutor
    from jobs.worker.machine import Capacity

    launched = launched_of(chosen, Cluster.local, 0.0)
    store(launched)
    capacity = Capacity(os.cpu_count() or 1, (), 8.0)
    with LocalExecutor(
        workplace(launched), launched.layout, lambda stage: resources_of(launched.experiment, stage), capacity, code=ROOT
    ) as executor:
        report = run_local(desired_of(launched), executor)
    return 0 if report.complete else 3


def one_pass(results: Path) -> int:
    """A pass by hand; 3: not settled yet, or settled and not complete."""
    from jobs.control.controller import desired_of, reconcile

    launched = reopened(results)
    report = reconcile(desired_of(launched), arrays(launched))
    plan = report.plan
    counts = {
        "done": len(plan.reused),
        "waiting": len(plan.waiting),
        "submitted": len(report.submitted),
        "held": len(plan.held_or_cancelled),
    }
    counts |= {"deferred": len(plan.deferred), "given_up": len(plan.given_up), "blocked": len(plan.blocked)}
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {counts} settled={plan.settled}\n")
    for key, reason in list(plan.reasons.items())[:5]:
        sys.stdout.write(f"  {report.graph.nodes[key].name}: {reason}\n")
    return 0 if report.complete else 4 if plan.settled else 3


def start(chosen: argparse.Namespace) -> int:
    """Launch on Slurm and leave, with a controller: where the reply about it was lost, a user asks again."""
    from jobs.control.controller import desired_of, reconcile
    from jobs.slurm.chain import Chain, Phase

    launched = launched_of(chosen, Cluster.slurm, chosen.step_seconds)
    store(launched)
    reconcile(desired_of(launched), arrays(launched))
    chain = Chain(launched.experiment, launched.layout, source=ROOT)
    while (state := chain.ensure()).phase is Phase.broken:
        sys.stdout.write(state.sentence + "\n")
        time.sleep(SETTLE_SECONDS)
    sys.stdout.write(state.sentence + "\n")
    return 0


def table(results: Path) -> int:
    """Write and print the tables; before them every run, superseded ones too, with the digest of its result."""
    from jobs.commands.collect import Asked, collect_tables
    from jobs.commands.session import Session
    from jobs.store.records import read_result

    launched = reopened(results)
    session = Session(launched, workplace(launched), ROOT, ROOT / "configs" / "published.yaml")
    now = session.look(ask_slurm=False)
    for run in sorted((*now.graph.runs, *now.graph.superseded), key=lambda run: (run.method, run.fold, run.slot, run.generation)):
        node = now.graph.nodes[run.key]
        result = read_result(launched.layout.stage(node.stage, run.key), run.key)
        digest = result.metrics["digest"] if result else "no result"
        sys.stdout.write(f"{run.method} {run.fold} {run.slot} {run.generation} {run.seed} {digest}\n")
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(collect_tables(session, now, Asked(["csv", "latex", "json"], Path(folder))).paths):
            if path.suffix in (".csv", ".tex", ".json"):
                sys.stdout.write(f"---- {path.name}\n{path.read_text()}")
    return 0


def main(arguments: list[str]) -> int:
    """One command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=("start", "local", "reconcile", "control", "worker", "table"))
    parser.add_argument("place", help="experiment, or description of a worker's task")
    parser.add_argument("--results", type=Path, default=Path())
    parser.add_argument("--corpus", type=Path, default=Path())
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--step-seconds", type=float, default=0.5)
    parser.add_argument("--variables", default="{}", help="environment of the jobs, as JSON")
    chosen = parser.parse_args(arguments)
    shorten_waits()
    if chosen.command == "worker":
        from jobs.worker.main import main as work

        return work([chosen.place])
    if chosen.command == "control":
        return control(chosen.results)
    if chosen.command == "reconcile":
        return one_pass(chosen.results)
    if chosen.command == "table":
        return table(chosen.results)
    if chosen.command == "local":
        return run_here(chosen)
    return start(chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
