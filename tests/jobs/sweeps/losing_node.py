"""A Ray of several nodes on this machine; the node that computes a stage is killed. Says as JSON what came of it.

python -m tests.jobs.sweeps.losing_node FOLDER
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

from jobs.control.controller import run_local
from jobs.sweeps.ray.cluster import private_folder, ray_environment, write_token
from tests.jobs import fake_registry
from tests.jobs.sweeps.stage_cases import REPOSITORY, desired, executor, graph_of_one, seen, submit, wait_until


def main(folder: Path) -> None:
    with private_folder() as temp:
        os.environ.update(ray_environment(temp, write_token(temp / "token")), PYTHONPATH=str(REPOSITORY))
        import ray
        from ray.cluster_utils import Cluster

        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "temp_dir": str(temp / "ray"), "object_store_memory": 80 << 20},
        )
        try:
            nodes = [cluster.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(2)]
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.CRITICAL)
            ray._private.worker._worker_logs_enabled = False
            graph = graph_of_one("sleep:60")
            (key,) = graph.nodes
            with executor(folder) as stages:
                submit(stages, graph)
                wait_until(lambda: key in seen(folder), stages)
                first = seen(folder)[key]["raylet"]
                dying = next(node for node in nodes if _raylet(node) == first)
                cluster.remove_node(dying, allow_graceful=False)
                wait_until(lambda: bool(stages.wait(0.1)))
                departures = len(stages.departures([key])[key])
                report = run_local(desired(folder, graph), stages)
            told = {
                "complete": report.complete,
                "failures": report.facts[key].failures,
                "starts": list(fake_registry.count(folder / "corpus", "starts").values()),
                "nodes": [first, seen(folder)[key]["raylet"]],
                "departures": departures,
            }
            print(json.dumps(told), flush=True)  # noqa: T201
        finally:
            ray.shutdown()
            cluster.shutdown()


def _raylet(node: object) -> int:
    return int(node.all_processes["raylet"][0].process.pid)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
