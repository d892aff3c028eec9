"""How Ray is started on a node of an allocation: its command line, its ports, the address of the node, and what the job was given. Small.

Every port is chosen by the kernel, so that any number of sweeps share a node: those that others must know are chosen here, just before
Ray takes them, and announced; the rest is 0, which lets Ray choose.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from jobs.liveness import own_node
from jobs.sweeps.meeting import Presence, Start
from jobs.sweeps.ray_cluster import ADDRESS_VARIABLE, OBJECT_STORE_BYTES, ray_environment, without_foreign

RAY = "from ray.scripts.scripts import main; main()"  # what the program `ray` does
READY_SECONDS = 120  # for Ray of the first node to answer
# Fixed unless they are named: Ray client's server (10001), the dashboard (8265) and its agents (52365), the workers (10002 to 19999).
_PORTS = ("dashboard-agent-listen-port", "min-worker-port", "max-worker-port", "node-manager-port", "object-manager-port")


def granted(environment: Mapping[str, str]) -> dict[str, int]:
    """Cores, GPUs and bytes of memory that Slurm gave the job on this node, whatever else the machine has; memory only where it says so."""
    cpus = environment.get("SLURM_CPUS_PER_TASK") or environment.get("SLURM_CPUS_ON_NODE") or "1"
    if "CUDA_VISIBLE_DEVICES" in environment:
        gpus = len([name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name and name != "NoDevFiles"])
    else:
        gpus = _number(environment.get("SLURM_GPUS_ON_NODE", ""))
    found = {"num-cpus": _number(cpus) or 1, "num-gpus": gpus}
    memory = _number(environment.get("SLURM_MEM_PER_NODE", "")) * 2**20
    return {**found, "memory": max(2**28, memory - OBJECT_STORE_BYTES)} if memory else found


def options(resources: Mapping[str, int], temp: Path) -> list[str]:
    """Of `ray start`, on every node."""
    given = [f"--{name}={value}" for name, value in resources.items()]
    others = [f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={temp / 'ray'}", "--include-log-monitor=false"]
    return [f"--node-name={own_node()}", *given, *others, *(f"--{name}=0" for name in _PORTS)]


def head_options(client_port: int) -> list[str]:
    """Of `ray start`, on the first node only."""
    return ["--disable-usage-stats", "--include-dashboard=false", "--dashboard-port=0", f"--ray-client-server-port={client_port}"]


def symmetric_command(start: Start, given: Sequence[str], driver: Sequence[str]) -> list[str]:
    """`ray symmetric-run`. It is not told how many nodes to wait for: one that is lost would keep the rest waiting, and then end them."""
    return ["ray", "symmetric-run", "--address", start.address, *given, "--", *driver]


def head_command(start: Start, given: Sequence[str]) -> list[str]:
    """`ray start` of the first node."""
    return [sys.executable, "-c", RAY, "start", "--head", f"--node-ip-address={start.host}", f"--port={start.port}", "--block", *given]


def member_command(start: Start, given: Sequence[str]) -> list[str]:
    """`ray start` of any other node."""
    return [sys.executable, "-c", RAY, "start", f"--address={start.address}", "--block", *given]


def environment_of(start: Start, temp: Path, token: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Of Ray and of the driver: `ray` is found, and finds itself."""
    code = os.pathsep.join(dict.fromkeys([str(Path.cwd()), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]))
    return {
        **without_foreign(environment),
        **ray_environment(temp, token),
        ADDRESS_VARIABLE: start.address,
        "RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT": str(READY_SECONDS),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}",
        "PYTHONPATH": code,
    }


def symmetric_run_known() -> bool:
    """Whether the installed Ray has `ray symmetric-run` (from 2.49 on), and its program is where it looks for it. Does not import it."""
    found = importlib.util.find_spec("ray")
    folders = (found.submodule_search_locations if found is not None else None) or []
    has = any((Path(folder) / "scripts" / "symmetric_run.py").is_file() for folder in folders)
    return has and shutil.which("ray", path=str(Path(sys.executable).parent)) is not None


def all_symmetric(present: Sequence[Presence], nodes: int) -> bool:
    """Whether every node can call it. It takes a node for the first one by its address, so no two may have one in common."""
    outward = [[address for address in each.addresses if not _loopback(address)] for each in present]
    addresses = [address for own in outward for address in own]
    distinct = len(set(addresses)) == len(addresses) and all(outward)
    return len(present) == nodes and distinct and all(each.symmetric for each in present)


def own_addresses(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Addresses of this machine, the best to be reached at first: as Slurm reaches it, as its name leads to it, as it reaches others."""
    likely = [environment.get("SLURM_LAUNCH_NODE_IPADDR", "")]
    for name in (own_node(), socket.gethostname()):
        with contextlib.suppress(OSError):
            likely += socket.gethostbyname_ex(name)[2]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: asks which address leads outwards (RFC 5737)
        likely.append(probe.getsockname()[0])
    own = [address for address in dict.fromkeys(filter(None, likely)) if _is_own(address)]
    return tuple(sorted(own, key=_loopback)) or ("127.0.0.1",)


def free_ports(host: str, count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as opened:
        probes = [opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) for _ in range(count)]
        for probe in probes:
            probe.bind((host, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def answers(start: Start) -> bool:
    """Whether somebody listens where the first node's Ray should."""
    with contextlib.suppress(OSError), socket.create_connection((start.host, start.port), timeout=2):
        return True
    return False


def _is_own(address: str) -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return True
    return False


def _loopback(address: str) -> bool:
    return address.startswith("127.")


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0
