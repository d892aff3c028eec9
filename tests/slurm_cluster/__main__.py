"""`python -m tests.slurm_cluster up DIR [--nodes 3]`, `down DIR`, `run DIR -- COMMAND`: a cluster by hand."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from tests.slurm_cluster.cluster import Cluster, ClusterError
from tests.slurm_cluster.configuration import ClusterSettings


def main(arguments: list[str]) -> int:
    """Bring a cluster up or down; 2 with one line on stderr when that cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm_cluster")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start a cluster and print what to export")
    up.add_argument("folder", type=Path)
    up.add_argument("--nodes", type=int, default=3)
    up.add_argument("--cpus", type=int, default=4, help="declared per node")
    up.add_argument("--gpus", type=int, default=2, help="stand-ins per node")
    up.add_argument("--no-accounting", action="store_true")
    up.add_argument("--networks", action="store_true", help="a network stack of its own for every node")
    commands.add_parser("down", help="stop a cluster").add_argument("folder", type=Path)
    commands.add_parser("guard", help="take a cluster down when standard input ends").add_argument("folder", type=Path)
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "up":
            shape = {"nodes": chosen.nodes, "cpus": chosen.cpus, "gpus": chosen.gpus}
            settings = ClusterSettings(**shape, accounting=not chosen.no_accounting, networks=chosen.networks)
            cluster = Cluster(chosen.folder, settings)
            cluster.up()
            sys.stdout.write(f"export SLURM_CONF={shlex.quote(str(cluster.slurm_conf))}\n")
        elif chosen.command == "down":
            Cluster(chosen.folder).down()
        else:
            guard(chosen.folder)
    except (ClusterError, OSError, subprocess.SubprocessError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def guard(folder: Path) -> None:
    """Wait until whoever holds the other end of standard input is gone, however that came; then remove the cluster."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 4096):
        pass
    Cluster(folder).down()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
