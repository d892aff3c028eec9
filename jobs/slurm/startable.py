"""Whether a request can ever start at a site, judged before it is submitted.

`sbatch --test-only` alone does not answer that. It accepts a time limit above the partition's (with EnforcePartLimits=NO), and it rejects a
sound request with the same message as an impossible one while the nodes are down or drained (Slurm 22.05). Both are therefore compared with
the partitions and nodes as they are configured, whatever state they are in.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.slurm.parse import Refusal, classify_refusal
from jobs.slurm.script import Header, Job, render_script

if TYPE_CHECKING:
    from jobs.experiment.config import SlurmSite
    from jobs.slurm.client import SlurmClient

NODES_FORMAT = "%P|%l|%c|%m|%G"  # of `sinfo --Node`: partition, its time limit, cores, MiB, GRES; one line for each node and partition
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?:(?P<hours>\d+):)?(?P<minutes>\d+):(?P<seconds>\d+)")
_GPU = re.compile(r"gpu:(?:(?P<type>[^:,()]+):)?(?P<count>\d+)")


@dataclass(frozen=True)
class ConfiguredNode:
    """A node as a partition offers it, whatever its state."""

    partition: str
    is_default: bool  # of the partition: where jobs go that name none
    minutes: int  # longest time limit in the partition; 0: no limit
    cpus: int
    memory_mb: int
    gpus: tuple[tuple[str, int], ...] = ()  # type, "" if it has none, and number


def parse_nodes(text: str) -> tuple[ConfiguredNode, ...]:
    """Nodes in the output of `sinfo --Node --noheader --format=NODES_FORMAT`; lines that cannot be parsed are left out. Pure."""
    found: list[ConfiguredNode] = []
    for line in text.splitlines():
        fields = [*line.strip().split("|"), "", "", "", ""][:5]
        partition, limit, cpus, memory, gres = fields
        if cpus.isdecimal() and memory.isdecimal():
            gpus = tuple((each["type"] or "", int(each["count"])) for each in _GPU.finditer(gres))
            name = partition.removesuffix("*")
            found.append(ConfiguredNode(name, partition != name, parse_limit(limit), int(cpus), int(memory), gpus))
    return tuple(found)


def parse_limit(text: str) -> int:
    """Minutes of sinfo's `D-HH:MM:SS`, `HH:MM:SS` or `MM:SS`, rounded down; 0, no limit, for `infinite` and any other text. Pure."""
    found = _TIME.fullmatch(text)
    if found is None:
        return 0
    days, hours, minutes = (int(found[name] or 0) for name in ("days", "hours", "minutes"))
    return (days * 24 + hours) * 60 + minutes


def why_impossible(header: Header, nodes: Sequence[ConfiguredNode], said: str, partition: str = "") -> str:
    """Why a request can never start, as the site is configured; "" if it can, or if that is not known. Pure.

    `said`: the message of a `sbatch --test-only` that rejected it, "" if it was accepted; `partition`: where it goes if it names none.
    """
    if said and classify_refusal(said) is Refusal.refused:
        return said
    named = (header.partition or partition or "").split(",")
    offered = [node for node in nodes if (node.partition in named if any(named) else node.is_default)]
    if not offered:
        return ""
    partitions = ",".join(dict.fromkeys(node.partition for node in offered))
    longest = 0 if any(not node.minutes for node in offered) else max(node.minutes for node in offered)
    if longest and header.minutes > longest:
        return f"its time limit, {header.minutes} min, is above the {longest} min of partition {partitions} (PartitionTimeLimit)"
    fitting = Counter(node.partition for node in offered if _fits(header, node))
    if said and max(fitting.values(), default=0) < header.nodes:
        return f"partition {partitions} has no {_shape(header)} (BadConstraints): {said}"
    return ""


class Requests:
    """What sbatch says of the requests of a site, each asked once with `--test-only`; nothing is submitted."""

    def __init__(self, client: SlurmClient, site: SlurmSite, templates: Path) -> None:
        self._client, self._site, self._templates = client, site, templates
        self._answers: list[tuple[Header, tuple[bool, str]]] = []

    def accepted(self, job: Job) -> tuple[bool, str]:
        """Whether sbatch accepts the request of a job, and its message."""
        header = job.header(self._site)
        known = next((answer for asked, answer in self._answers if asked == header), None)
        if known is None:
            known = accepted(self._client, job, self._site, self._templates)
            self._answers.append((header, known))
        return known

    def impossible(self, jobs: Sequence[Job]) -> tuple[str, ...]:
        """Why each job can never start, "" if it can."""
        if not jobs:
            return ()
        nodes = parse_nodes(self._client.output("sinfo", "--all", "--noheader", "--Node", f"--format={NODES_FORMAT}") or "")
        found = [self._why_impossible(job, nodes) for job in jobs]
        overridden = any("PartitionTimeLimit" in why for why in found) and _limit_may_be_overridden(self._client)
        return tuple("" if overridden and "PartitionTimeLimit" in why else why for why in found)

    def _why_impossible(self, job: Job, nodes: Sequence[ConfiguredNode]) -> str:
        fits, said = self.accepted(job)
        return why_impossible(job.header(self._site), nodes, "" if fits else said, os.environ.get("SBATCH_PARTITION", ""))


def accepted(client: SlurmClient, job: Job, site: SlurmSite, templates: Path) -> tuple[bool, str]:
    """Whether `sbatch --test-only` accepts a job, and its message."""
    with tempfile.TemporaryDirectory(prefix="ser-grid-test-") as name:
        script = Path(name) / "script.sh"
        script.write_text(render_script(job, site, templates), encoding="utf-8")
        return client.would_accept(script, site)


def _limit_may_be_overridden(client: SlurmClient) -> bool:
    """Whether some QOS of the site lets its jobs exceed the time limit of a partition: which QOS a job gets is not known here."""
    flags = client.output("sacctmgr", "--noheader", "--parsable2", "show", "qos", "format=Flags") or ""
    return "PartitionTimeLimit" in flags


def _fits(header: Header, node: ConfiguredNode) -> bool:
    wanted = _GPU.fullmatch(f"gpu:{header.gpus}")
    gpus = sum(count for kind, count in node.gpus if not wanted or wanted["type"] in (None, kind))
    return (
        header.cpus * max(1, header.processes_per_node) <= node.cpus
        and header.memory_mb <= node.memory_mb
        and (int(wanted["count"]) if wanted else 0) <= gpus
    )


def _shape(header: Header) -> str:
    nodes = "node" if header.nodes == 1 else f"{header.nodes} nodes"
    memory = f", {header.memory_mb} MB" if header.memory_mb else ""
    gpus = f", {header.gpus} GPUs" if header.gpus else ""
    return f"{nodes} with {header.cpus * max(1, header.processes_per_node)} cores{memory}{gpus}"
