"""For tests of stages as tasks of Ray: a registry whose stages note what they may see, and executors in a place of their own."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.control.controller import Desired
from jobs.control.executor_protocol import Batch, Task
from jobs.experiment.config import Resources
from jobs.experiment.graph import Graph
from jobs.store.layout import Layout
from jobs.sweeps.ray.executor import RayStages
from jobs.worker.task import Workplace
from tests.jobs import fake_registry, local_launch

REPOSITORY = Path(__file__).resolve().parents[3]
PRELOAD = ("tests.jobs.fake_registry:preload",)
ONE_CORE = Resources(cpus=1, gpus=0, memory_gb=0.1, minutes=1)
SEEN = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "SER_GRID_JOB")


class SeeingRegistry(fake_registry.FakeRegistry):
    """Writes what a stage finds in its environment to the corpus's `seen/KEY.json`."""

    def run(self, stage: str, *, corpus: Path, output: Path, **rest: Any) -> Mapping[str, Any]:
        (corpus / "seen").mkdir(exist_ok=True)
        server = os.getppid()
        seen = {**{name: os.environ.get(name) for name in SEEN}, "server": server, "raylet": parent(parent(server))}
        (corpus / "seen" / f"{output.parents[2].name}.json").write_text(json.dumps(seen))
        return super().run(stage, corpus=corpus, output=output, **rest)


REGISTRY = SeeingRegistry()


def parent(pid: int) -> int:
    """Of a process: a stage's is a fork server, whose is a worker of Ray, whose is a node's raylet."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def workplace(folder: Path) -> Workplace:
    """A corpus and a store below `folder`, and the registry that notes what it sees."""
    return replace(local_launch.workplace(folder), registry="tests.jobs.sweeps.stage_cases:REGISTRY")


def layout_of(folder: Path) -> Layout:
    return Layout(folder / "results", "exp")


def executor(folder: Path, resources: Resources = ONE_CORE) -> RayStages:
    """As a trial has one."""
    return RayStages(workplace(folder), layout_of(folder), lambda stage: resources, REPOSITORY, PRELOAD)


def graph_of_one(behaviour: str) -> Graph:
    """One stage."""
    return fake_registry.make_graph({"failing": {"finetune vft 1 0": behaviour}}, methods=("vft",), folds=("1",), seeds=1)


def desired(folder: Path, graph: Graph) -> Desired:
    return Desired(graph, layout_of(folder), since=time.time())


def submit(stages: RayStages, graph: Graph, *keys: str) -> None:
    """Some stages of a graph, or all."""
    for key in keys or tuple(graph.nodes):
        node = graph.nodes[key]
        stages.submit(Batch(node.stage, node.method, (Task((key,)),)), graph, stages.in_flight())


def seen(folder: Path) -> dict[str, dict[str, Any]]:
    """Key -> what its stage found."""
    return {path.stem: json.loads(path.read_text()) for path in (folder / "corpus" / "seen").glob("*.json")}


def wait_until(true: Callable[[], bool], stages: RayStages | None = None, seconds: float = 120.0) -> None:
    """Bounded; an executor is kept going meanwhile."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError
        if stages is not None:
            stages.wait(0.05)
        else:
            time.sleep(0.05)
