"""Graphs, folders and a small worker for tests of Slurm submissions: stages that sleep, fail, or wait for a signal."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.control.executor_protocol import Batch, Task
from jobs.experiment.config import Cluster, Experiment, SlurmSite, StageResources
from jobs.experiment.graph import Graph, Node, Run
from jobs.slurm.executor import SlurmArrays
from jobs.store.layout import Layout
from jobs.worker.task import Workplace
from tests.slurm_cluster import Cluster as TestCluster

ROOT = Path(__file__).resolve().parents[2]

WORKER = '''\
"""Stand-in for the worker: does what a stage's settings say and writes down what happened, when and where."""

import json, os, signal, sys, time
from pathlib import Path

VERSION = "first"
description = json.loads(Path(sys.argv[2]).read_text())
index = int(os.environ["SLURM_ARRAY_TASK_ID"])
seen = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: seen.append(signal.Signals(number).name))
for key in description["tasks"][index]:
    settings = description["nodes"][key]["settings"]
    file = Path(description["place"]["results"]) / f"{key}.json"
    facts = {"start": time.time(), "host": os.uname().nodename, "version": VERSION, "cwd": os.getcwd(), "pid": os.getpid()}
    facts |= {"job": os.environ["SLURM_ARRAY_JOB_ID"] + f"_{index}", "environment": dict(os.environ)}
    Path(f"{file}.begun").write_text(json.dumps(facts))
    with Path(f"{file}.runs").open("a") as runs:
        runs.write(facts["job"] + "\\n")
    end = time.monotonic() + settings.get("sleep", 0)
    while time.monotonic() < end and not seen:
        time.sleep(0.02)
    facts |= {"end": time.time(), "signals": seen}
    temporary = Path(f"{file}.new")
    temporary.write_text(json.dumps(facts))
    temporary.rename(file)
    if settings.get("fail"):
        sys.exit(1)
'''


def node(key: str, stage: str, upstream: Mapping[str, str] | None = None, *, fold: str = "1", method: str = "vft", **settings: Any) -> Node:
    return Node(key, stage, 1, settings, {}, dict(upstream or {}), fold, 0, method)


def graph_of(nodes: Sequence[Node]) -> Graph:
    children: dict[str, list[str]] = {one.key: [] for one in nodes}
    for one in nodes:
        for parent in one.upstream.values():
            children[parent].append(one.key)
    runs = tuple(Run(one.method, one.fold, number, 0, one.key) for number, one in enumerate(nodes) if not children[one.key])
    return Graph({one.key: one for one in nodes}, runs, "test", "0" * 64, {key: tuple(found) for key, found in children.items()})


def batch_of(nodes: Sequence[Node], runs_per_task: int = 1) -> Batch:
    keys = [one.key for one in nodes]
    tasks = tuple(Task(tuple(keys[start : start + runs_per_task])) for start in range(0, len(keys), runs_per_task))
    return Batch(nodes[0].stage, nodes[0].method, tasks)


def make_source(folder: Path, worker: str = WORKER) -> Path:
    """A source tree with the stand-in as its launch.py, and the project's own templates."""
    folder.mkdir(parents=True)
    (folder / "launch.py").write_text(worker)
    shutil.copytree(ROOT / "slurm_templates", folder / "slurm_templates")
    return folder


def experiment_of(site: SlurmSite | None = None, **resources: Any) -> Experiment:
    small: dict[str, Any] = {"cpus": 1, "gpus": 0, "memory_gb": 0.5, "minutes": 5}
    given = StageResources(**{**small, **resources})
    return Experiment(name="trial", corpus="test", cluster=Cluster.slurm, resources={"default": given}, slurm=site or SlurmSite())


def layout_of(folder: Path) -> Layout:
    return Layout(folder / "results", "trial")


def place_of(folder: Path) -> Workplace:
    results = folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    return Workplace(
        registry="none:none", results=str(results), experiment="trial", corpus="test", corpus_folder=str(folder), corpus_digest="0" * 64
    )


def arrays_of(folder: Path, experiment: Experiment | None = None, **arguments: Any) -> SlurmArrays:
    """An executor in a fresh folder, whose jobs run the stand-in."""
    source = folder / "source"
    if not source.exists():
        make_source(source)
    given = {"worker": (sys.executable, "launch.py", "worker"), **arguments}
    return SlurmArrays(experiment or experiment_of(), layout_of(folder), place_of(folder), source=source, **given)


def facts_of(folder: Path, key: str, *, begun: bool = False) -> dict[str, Any] | None:
    """What the stand-in wrote for a stage, or None."""
    file = folder / "results" / f"{key}.json{'.begun' if begun else ''}"
    try:
        value: dict[str, Any] = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return value


def runs_of(folder: Path, key: str) -> list[str]:
    """Elements in which the stand-in began a stage, one for every execution."""
    file = folder / "results" / f"{key}.json.runs"
    return file.read_text().split() if file.exists() else []


def started(folder: Path, key: str) -> float:
    facts = facts_of(folder, key)
    assert facts is not None, key
    return float(facts["start"])


def ended(folder: Path, key: str) -> float:
    facts = facts_of(folder, key)
    assert facts is not None, key
    return float(facts["end"])


def drained(arrays: SlurmArrays) -> Callable[[], bool]:
    return lambda: not arrays.in_flight()


def array_jobs(cluster: TestCluster) -> list[str]:
    """Numbers of all arrays that the controller remembers, ended ones too."""
    return sorted(set(cluster.run("squeue", "--noheader", "--states=all", "--format=%F").split()), key=int)


def arrays_since(cluster: TestCluster, before: Sequence[str]) -> list[str]:
    """Numbers of the arrays that were submitted since; the controller forgets those that ended minutes ago."""
    return sorted(set(array_jobs(cluster)) - set(before), key=int)
