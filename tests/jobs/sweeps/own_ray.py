"""A process with a Ray of its own: says on stdout where it is, and waits for what comes next.

python -m tests.jobs.sweeps.own_ray [FOLDER]      FOLDER: of a stage to compute, which never ends by itself
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from jobs.sweeps.ray.cluster import ray_here
from jobs.worker.machine import Capacity
from tests.jobs.sweeps.stage_cases import REPOSITORY


def environment() -> dict[str, str]:
    """In a worker."""
    return dict(os.environ)


def main(arguments: list[str]) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with ray_here(Capacity(1, ("3",), 1.0), REPOSITORY):
        import ray

        worker = ray.get(ray.remote(environment).remote())
        (node,) = ray.nodes()
        told = {
            "address": ray.get_runtime_context().gcs_address,
            "temp": os.environ["RAY_TMPDIR"],
            "node": node["NodeID"],
            "resources": node["Resources"],
            "worker": {name: worker.get(name) for name in ("PYTHONPATH", "RAY_USAGE_STATS_ENABLED", "RAY_NAMESPACE")},
            "driver": {name: os.environ.get(name) for name in ("PYTHONPATH", "RAY_ADDRESS", "CUDA_VISIBLE_DEVICES")},
            "handler": signal.getsignal(signal.SIGTERM) is handler,
        }
        for folder in arguments:
            compute(Path(folder))
        try:
            sys.stdout.write(json.dumps(told) + "\n")
            sys.stdout.flush()
            time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(0.5)
            ray.get(ray.remote(environment).remote())
            sys.stdout.write("still there\n")
            sys.stdout.flush()
            raise


def compute(folder: Path) -> None:
    """Until it has begun."""
    from tests.jobs.sweeps.stage_cases import executor, graph_of_one, seen, submit, wait_until

    stages, graph = executor(folder), graph_of_one("sleep:60")
    submit(stages, graph)
    wait_until(lambda: set(seen(folder)) == set(graph.nodes), stages)


if __name__ == "__main__":
    main(sys.argv[1:])
