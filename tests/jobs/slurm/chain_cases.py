"""A controller chain for tests: a launch.py whose passes do as they are ordered, in links of the real chain."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from jobs.experiment.config import Cluster, Experiment, Policy, SlurmSite
from jobs.slurm.chain import (
    Chain,
    ChainState,
    chain_state,
    link_name,
)
from jobs.slurm.client import SlurmClient
from jobs.store.layout import Layout
from jobs.store.records import write_json
from tests.slurm_cluster import Cluster as SlurmCluster
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[3]
TEMPLATES = ROOT / "slurm_templates"


# A launch.py whose passes do as `orders.json` says, in a link of the real chain.
LINK = """\
import json, os, sys, time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, {root!r})
from jobs.slurm.chain import Chain
from jobs.experiment.config import Cluster, Experiment, Policy, SlurmSite
from jobs.store.layout import Layout
from jobs.slurm.chain_link import LinkEnd, run_link
from jobs.slurm.client import SlurmClient

VERSION = "first"
results = Path(sys.argv[sys.argv.index("--results") + 1])
folder = results.parent
orders = json.loads((folder / "orders.json").read_text())
node = os.environ["SLURMD_NODENAME"]

def tell(name, text):
    with (folder / name).open("a") as file:
        file.write(text + "\\n")

if node in orders.get("bad_nodes", []):
    tell("bad", node)
    sys.exit(7)

@dataclass
class Seen:
    settled: bool
    complete: bool = True
    stuck: dict = field(default_factory=dict)

def one_pass():
    tell("passes", f"{{os.environ['SLURM_JOB_ID']}} {{VERSION}} {{os.getcwd()}} {{node}} {{time.time()}}")
    time.sleep(orders.get("sleep", 0))
    if "fail" in orders:
        raise RuntimeError(orders["fail"])
    if "disk" in orders:
        raise OSError(orders["disk"], "no answer from the file server")
    return Seen(orders.get("settled", False))

site = SlurmSite(**orders.get("site", {{}}))
experiment = Experiment(name="trial", corpus="test", cluster=Cluster.slurm, policy=Policy(poll_minutes={poll!r}), slurm=site)
client = SlurmClient(look_seconds=3, looks=1, pause=0.1)
chain = Chain(experiment, Layout(results, sys.argv[2]), source=Path(__file__).parent, client=client)
end = run_link(one_pass, chain, deadline=orders.get("deadline", time.time() + 3600),
               on_end=lambda report: tell("ends", "settled"), on_stop=lambda message: tell("ends", message))
tell("links", f"{{os.environ['SLURM_JOB_ID']}} {{end.name}}")
sys.exit(end is LinkEnd.alone)
"""


POLL = 1 / 60  # minutes


def layout_of(folder: Path) -> Layout:
    return Layout(folder / "results", "trial")


def order(folder: Path, **orders: Any) -> None:
    write_json(folder / "orders.json", orders)


def launch(folder: Path, launched: float | None = None, **orders: Any) -> Layout:
    """What `grid` leaves: the experiment's file, and here what passes are to do."""
    order(folder, **orders)
    layout = layout_of(folder)
    write_json(layout.experiment_file, {"launched": time.time() if launched is None else launched})
    return layout


def chain_of(folder: Path, site: SlurmSite | None = None) -> Chain:
    """The chain as a launcher has it: its code is an ordinary folder."""
    source = folder / "source"
    if not source.exists():
        source.mkdir(parents=True)
        (source / "launch.py").write_text(LINK.format(root=str(ROOT), poll=POLL))
        shutil.copytree(TEMPLATES, source / "slurm_templates")
    policy = Policy(poll_minutes=POLL)
    experiment = Experiment(name="trial", corpus="test", cluster=Cluster.slurm, slurm=site or SlurmSite(), policy=policy)
    return Chain(experiment, layout_of(folder), source=source)


def lines(folder: Path, name: str) -> list[str]:
    try:
        return (folder / name).read_text().splitlines()
    except FileNotFoundError:
        return []


def in_queue(cluster: SlurmCluster, layout: Layout) -> list[tuple[str, str]]:
    """(state, job) of the chain's links."""
    text = cluster.run("squeue", "--noheader", f"--name={link_name(layout)}", "--format=%T %i", check=False)
    return sorted((line.split()[0], line.split()[1]) for line in text.splitlines())


def goes_on(folder: Path, passes: int = 3) -> bool:
    """That many more passes are made, each by another job."""
    before = len(lines(folder, "passes"))
    until(lambda: len({line.split()[0] for line in lines(folder, "passes")[before:]}) >= passes)
    return True


def pending(cluster: SlurmCluster, layout: Layout) -> list[str]:
    """Jobs of the links that wait."""
    return [job for state, job in in_queue(cluster, layout) if state == "PENDING"]


def look(layout: Layout) -> ChainState:
    return chain_state(layout, SlurmClient().queue())
