"""Starting Ray on the nodes of an allocation: command lines, ports, addresses, the resources of the job, and the rendezvous of the nodes.

Every port is chosen by the kernel, so that several sweeps can share a node: ports that other nodes must know are chosen here just before
Ray binds them, and announced; the others are 0, so that Ray chooses. The nodes of a job exchange addresses, the way to start and the exit
code through files in a shared folder (`Rendezvous`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jobs.store.attempts import own_node
from jobs.store.records import read_json, write_json, write_text
from jobs.sweeps.ray.cluster import ADDRESS_VARIABLE, OBJECT_STORE_BYTES, ray_environment, without_ray_variables, write_token
from jobs.worker.team_channel import LOOPBACK, is_loopback, own_addresses

POLL_SECONDS = 0.25
RAY = "from ray.scripts.scripts import main; main()"  # the program `ray`
READY_SECONDS = 120  # until Ray on the first node accepts connections
# Fixed by default: the Ray client server (10001), the dashboard (8265) and its agents (52365), the workers (10002 to 19999).
_PORTS = ("dashboard-agent-listen-port", "min-worker-port", "max-worker-port", "node-manager-port", "object-manager-port")


def granted(environment: Mapping[str, str]) -> dict[str, int]:
    """Cores, GPUs and bytes of memory that Slurm allocated to the job on this node; memory only if Slurm reports it."""
    cpus = environment.get("SLURM_CPUS_PER_TASK") or environment.get("SLURM_CPUS_ON_NODE") or "1"
    if "CUDA_VISIBLE_DEVICES" in environment:
        gpus = len([name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name and name != "NoDevFiles"])
    else:
        gpus = _number(environment.get("SLURM_GPUS_ON_NODE", ""))
    found = {"num-cpus": _number(cpus) or 1, "num-gpus": gpus}
    memory = _number(environment.get("SLURM_MEM_PER_NODE", "")) * 2**20
    return {**found, "memory": max(2**28, memory - OBJECT_STORE_BYTES)} if memory else found


def options(resources: Mapping[str, int], temp: Path) -> list[str]:
    """Options of `ray start` on every node."""
    given = [f"--{name}={value}" for name, value in resources.items()]
    others = [f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={temp / 'ray'}", "--include-log-monitor=false"]
    return [f"--node-name={own_node()}", *given, *others, *(f"--{name}=0" for name in _PORTS)]


def head_options(client_port: int) -> list[str]:
    """Options of `ray start` on the first node only."""
    return ["--disable-usage-stats", "--include-dashboard=false", "--dashboard-port=0", f"--ray-client-server-port={client_port}"]


def symmetric_command(start: Start, given: Sequence[str], driver: Sequence[str]) -> list[str]:
    """`ray symmetric-run`, without a number of nodes to wait for: a lost node would block the others, and then end them."""
    return ["ray", "symmetric-run", "--address", start.address, *given, "--", *driver]


def head_command(start: Start, given: Sequence[str]) -> list[str]:
    """`ray start` on the first node."""
    return [sys.executable, "-c", RAY, "start", "--head", f"--node-ip-address={start.host}", f"--port={start.port}", "--block", *given]


def member_command(start: Start, given: Sequence[str]) -> list[str]:
    """`ray start` on any other node."""
    return [sys.executable, "-c", RAY, "start", f"--address={start.address}", "--block", *given]


def environment_of(start: Start, temp: Path, token: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Environment of Ray and of the driver, with `ray` in PATH."""
    code = os.pathsep.join(dict.fromkeys([str(Path.cwd()), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]))
    return {
        **without_ray_variables(environment),
        **ray_environment(temp, token),
        ADDRESS_VARIABLE: start.address,
        "RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT": str(READY_SECONDS),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}",
        "PYTHONPATH": code,
    }


def symmetric_run_known() -> bool:
    """Whether the installed Ray has `ray symmetric-run` (since 2.49) and the program `ray` is in PATH. Does not import Ray."""
    found = importlib.util.find_spec("ray")
    folders = (found.submodule_search_locations if found is not None else None) or []
    has = any((Path(folder) / "scripts" / "symmetric_run.py").is_file() for folder in folders)
    return has and shutil.which("ray", path=str(Path(sys.executable).parent)) is not None


def all_symmetric(present: Sequence[NodeInfo], nodes: int) -> bool:
    """Whether every node can use `ray symmetric-run`. It recognises the first node by its address, so addresses must be distinct."""
    outward = [[address for address in each.addresses if not is_loopback(address)] for each in present]
    addresses = [address for own in outward for address in own]
    distinct = len(set(addresses)) == len(addresses) and all(outward)
    return len(present) == nodes and distinct and all(each.symmetric for each in present)


def reachable_addresses(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Addresses of this machine, the one by which Slurm reaches it first, loopback addresses last."""
    likely = (environment.get("SLURM_LAUNCH_NODE_IPADDR", ""), *own_addresses())
    own = [address for address in dict.fromkeys(filter(None, likely)) if _is_own(address)]
    return tuple(sorted(own, key=is_loopback)) or (LOOPBACK,)


def free_ports(host: str, count: int) -> list[int]:
    """Free ports."""
    with contextlib.ExitStack() as opened:
        probes = [opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) for _ in range(count)]
        for probe in probes:
            probe.bind((host, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def answers(start: Start) -> bool:
    """Whether the port of Ray on the first node accepts connections."""
    with contextlib.suppress(OSError), socket.create_connection((start.host, start.port), timeout=2):
        return True
    return False


def _is_own(address: str) -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return True
    return False


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


@dataclass(frozen=True)
class NodeInfo:
    """What a node announces about itself."""

    node: str
    addresses: tuple[str, ...]
    symmetric: bool  # `ray symmetric-run` can be used there


@dataclass(frozen=True)
class Start:
    """How Ray is started, as decided by the first node."""

    number: int  # attempt, from 1: another process may have bound the port first
    host: str
    port: int
    symmetric: bool  # with `ray symmetric-run` on every node; else `ray start`
    node: str = ""  # the first node

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Rendezvous:
    """The folder through which the nodes of one run of a job exchange information."""

    folder: Path

    @property
    def token(self) -> Path:
        return self.folder / "token"

    def open(self) -> None:
        """Create the folder and the token, on the first node."""
        self.folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        if not self.token.exists():
            write_token(self.token)

    def join(self, presence: NodeInfo) -> None:
        """Announce a node."""
        self.folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        write_json(self.folder / f"{presence.node}.json", asdict(presence))

    def nodes(self) -> tuple[NodeInfo, ...]:
        """The nodes that have joined, by name."""
        found = [read_json(self.folder / name) for name in sorted(self._names()) if name.endswith(".json") and name != "start.json"]
        return tuple(NodeInfo(each["node"], tuple(each["addresses"]), bool(each["symmetric"])) for each in found if each)

    def announce(self, start: Start) -> None:
        """Announce to all nodes how Ray is started."""
        write_json(self.folder / "start.json", asdict(start))

    def start(self) -> Start | None:
        """The last announced start."""
        found = read_json(self.folder / "start.json") if "start.json" in self._names() else None
        return Start(**found) if found else None

    def end(self, code: int) -> None:
        """Announce to all nodes the exit code of the sweep's driver."""
        if self.code() is None:
            write_text(self.folder / "over", f"{code}\n")

    def code(self) -> int | None:
        """The exit code; None while the driver is running."""
        if "over" not in self._names():
            return None
        text = (self.folder / "over").read_text(encoding="ascii").strip()
        return int(text) if text.isdigit() else 1

    def _names(self) -> list[str]:
        """Lists the folder every time, which makes a network file system show new files."""
        try:
            return os.listdir(self.folder)
        except FileNotFoundError:
            return []


def rendezvous_of(sweep: Path, environment: Mapping[str, str]) -> Rendezvous:
    """The rendezvous of this run of this job. KeyError outside of Slurm."""
    return Rendezvous(sweep / "nodes" / f"{environment['SLURM_JOB_ID']}.{environment.get('SLURM_RESTART_COUNT', '0')}")


def wait_until(true: Callable[[], object], seconds: float) -> bool:
    """Poll until `true()`, for at most so many seconds; whether it became true."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS)
    return True
