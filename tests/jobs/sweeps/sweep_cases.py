"""A sweep for tests of its allocation, and a small driver in place of the program: joins Ray, sees who is there, stays until told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from jobs.experiment.config import Cluster, Experiment, SlurmSite
from jobs.experiment.launched import Corpus
from jobs.experiment.sweep_section import SweepResources, SweepSettings
from jobs.store.layout import Layout
from jobs.sweeps.records import Sweep
from jobs.worker.task import Workplace
from tests.jobs.slurm_cases import until

ROOT = Path(__file__).resolve().parents[3]

DRIVER = '''\
"""Stand-in for the program, `launch.py tune FOLDER`: writes down which nodes are there; leaves with 3 at `stop`, with 0 at `finish`."""

import json, os, sys, time
from pathlib import Path
from jobs.sweeps.ray.cluster import ray_joined

folder = Path(sys.argv[2])
restart = os.environ.get("SLURM_RESTART_COUNT", "0")


def note(what, value):
    file = folder / f"{what}.{restart}.json"
    file.with_suffix(".new").write_text(json.dumps(value))
    file.with_suffix(".new").rename(file)


with ray_joined():
    import ray

    @ray.remote(num_cpus=2, max_retries=0)
    def where():
        return os.environ["SLURMD_NODENAME"], os.getcwd()

    def alive():
        return {node["NodeName"]: node for node in ray.nodes() if node["Alive"]}

    def everywhere(nodes):
        wanted = [where.options(resources={f"node:{node['NodeManagerAddress']}": 0.01}).remote() for node in nodes.values()]
        return sorted(name for name, _ in ray.get(wanted, timeout=60))

    there = alive()
    given = {name: node["Resources"] for name, node in there.items()}
    note("seen", {"given": given, "ran": everywhere(there), "address": os.environ["RAY_ADDRESS"], "cwd": os.getcwd()})
    code = 0
    while not (folder / "finish").exists():
        if (folder / "stop").exists():
            code = 3
            break
        if len(now := alive()) < len(there):
            there = now
            note("lost", {"ran": everywhere(now)})
        time.sleep(0.2)
sys.exit(code)
'''


def source_of(folder: Path) -> Path:
    """A source tree: the package that nodes run, the templates, and the stand-in as its launch.py."""
    source = folder / "source"
    if not source.exists():
        source.mkdir(parents=True)
        (source / "launch.py").write_text(DRIVER)
        shutil.copytree(ROOT / "slurm_templates", source / "slurm_templates")
        shutil.copytree(ROOT / "jobs", source / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    return source


def sweep_of(folder: Path, name: str = "trial", site: SlurmSite | None = None, **resources: Any) -> Sweep:
    """A sweep in a results folder below `folder`."""
    small: dict[str, Any] = {"nodes": 1, "cpus": 2, "gpus": 0, "memory_gb": 1.0, "minutes": 10}
    settings = SweepSettings(resources=SweepResources(**{**small, **resources}))
    experiment = Experiment(name=name, corpus="test", cluster=Cluster.slurm, slurm=site or SlurmSite(), sweep=settings)
    results = folder / "results"
    place = Workplace("none:none", str(results), name, "test", str(folder), "0" * 64)
    sweep = Sweep(
        experiment=experiment,
        file=name,
        corpus=Corpus("test", "0" * 64, ("1", "2", "3"), str(folder)),
        layout=Layout(results, name),
        place=place,
        recipe_schema="none:none",
        validation={},
        launched=0.0,
        digest="0123456789ab",
        code=str(folder / "source"),
    )
    sweep.folder.path.mkdir(parents=True, exist_ok=True)
    sweep.folder.sweep.write_text("{}")
    return sweep


def noted(sweep: Sweep, what: str, restart: int = 0, seconds: float = 180) -> dict[str, Any]:
    """What the stand-in wrote down, as soon as it has."""
    file = sweep.folder.path / f"{what}.{restart}.json"
    until(file.exists, seconds)
    value: dict[str, Any] = json.loads(file.read_text())
    return value
