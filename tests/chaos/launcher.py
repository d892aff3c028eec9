"""The command line of the chaos run: like launch.py, with the stages of the chaos registry and shorter waits.

    launch.py start | local | reconcile | control | worker | collect  ...      copied as `launch.py` into the source tree of the run

Waits are shortened (a submission of unknown outcome is settled after seconds, not a minute), the logic is the product's.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent))

from jobs.experiment.config import Cluster, Experiment, OutlierRule, Policy, StageResources
from jobs.experiment.launched import Corpus, Launched, launch, reopen, store
from jobs.slurm import client as slurm_client
from jobs.store import attempts as liveness
from jobs.store.layout import Layout
from jobs.worker.task import Workplace, load_object

ROOT = Path(__file__).resolve().parent
REGISTRY_NAME = "ser_core.registry:REGISTRY"  # the chaos registry lies there in the run's source tree
SETTLE_SECONDS = 8.0
NAME = "chaos"


def shorten_waits() -> None:
    """Set waits to seconds instead of minutes; called before the modules that copy the values are imported."""
    liveness.GONE_SECONDS, liveness.QUIET_SECONDS = 25.0, 60.0
    slurm_client.UNDERWAY_SECONDS = 12.0


def experiment_of(methods: Sequence[str], folds: int, seeds: int, recipe: Any, cluster: Cluster) -> Experiment:
    """Short stages, one CPU each."""
    small = StageResources(cpus=1, gpus=0, memory_gb=0.2, minutes=10, runs_per_task=1)
    policy = Policy(poll_minutes=0.05, controller_minutes=3, max_attempts=40, max_failures=10_000, outliers=OutlierRule.pooled)
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
    )


def launched_of(results: Path, corpus: Path, folds: int, seeds: int, steps: int, step_seconds: float, cluster: Cluster) -> Launched:
    """The experiment, launched now."""
    module = load_object(REGISTRY_NAME.partition(":")[0])
    experiment = experiment_of(module.REGISTRY.methods, folds, seeds, module.Recipe(steps=steps, step_seconds=step_seconds), cluster)
    prepared = Corpus("chaos", "d1", tuple(experiment.folds), str(corpus))
    return launch(experiment, prepared, module.REGISTRY, Layout(results.resolve(), NAME))


def reopened(results: Path) -> Launched:
    """The experiment as it was launched."""
    module = load_object(REGISTRY_NAME.partition(":")[0])
    return reopen(Layout(results.resolve(), NAME), module.REGISTRY, module.Recipe)


def workplace(launched: Launched) -> Workplace:
    corpus = launched.corpus
    return Workplace(
        REGISTRY_NAME, str(launched.layout.root), NAME, corpus.name, corpus.folder, corpus.digest, "ser_core.registry:read_digest"
    )


def arrays(launched: Launched) -> Any:
    from jobs.slurm.executor import SlurmArrays

    return SlurmArrays(launched.experiment, launched.layout, workplace(launched), source=ROOT, settle_seconds=SETTLE_SECONDS)


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
    )
    return 1 if end is LinkEnd.alone else 0


def run_here(results: Path, corpus: Path, folds: int, seeds: int, steps: int) -> int:
    """The undisturbed run, on this machine and without sleeping."""
    from jobs.control.controller import desired_of, run_local
    from jobs.experiment.config import resources_of
    from jobs.local.executor import LocalExecutor
    from jobs.worker.machine import Capacity

    launched = launched_of(results, corpus, folds, seeds, steps, 0.0, Cluster.local)
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


def start(results: Path, corpus: Path, folds: int, seeds: int, steps: int, step_seconds: float) -> int:
    """Launch on Slurm and leave."""
    from jobs.control.controller import desired_of, reconcile
    from jobs.slurm.chain import Chain

    launched = launched_of(results, corpus, folds, seeds, steps, step_seconds, Cluster.slurm)
    store(launched)
    reconcile(desired_of(launched), arrays(launched))
    sys.stdout.write(Chain(launched.experiment, launched.layout, source=ROOT).ensure().sentence + "\n")
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
        return run_here(chosen.results, chosen.corpus, chosen.folds, chosen.seeds, chosen.steps)
    return start(chosen.results, chosen.corpus, chosen.folds, chosen.seeds, chosen.steps, cast(float, chosen.step_seconds))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
