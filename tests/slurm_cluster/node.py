"""First process of one test node: sets the node's host name, runs its slurmd, and reaps orphans as an init must.

Runs inside fresh UTS, PID and mount namespaces, with the standard library only: `python node.py FOLDER NODE [ADDRESS]`. With an address it
has a network of its own too, which whoever started it joins to that of the cluster.
SIGUSR1 starts slurmd again when it has died, SIGTERM stops it and ends the node.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

NETWORK_INTERFACE = "eth0"
NETWORK_SECONDS = 60.0
WATCHED = {signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR1}


def start_slurmd(node: str) -> int:
    """Start the node's daemon; pid. Its signal mask is empty again: jobs inherit it."""
    command = ["slurmd", "-D", "-N", node]
    if os.getuid() != 0:  # the capabilities of the user namespace were for the mount only
        command = ["setpriv", "--inh-caps=-all", "--ambient-caps=-all", *command]
    return os.posix_spawnp(command[0], command, os.environ, setsigmask=[])


def reap() -> set[int]:
    """Pids of all children that have ended."""
    ended: set[int] = set()
    with contextlib.suppress(ChildProcessError):
        while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
            ended.add(pid)
    return ended


def join_network(address: str) -> None:
    """Take the address on the interface that is being given to this network."""
    end = time.monotonic() + NETWORK_SECONDS
    while NETWORK_INTERFACE not in (name for _, name in socket.if_nameindex()):
        if time.monotonic() > end:
            raise TimeoutError(f"no interface {NETWORK_INTERFACE} within {NETWORK_SECONDS:g} s")
        time.sleep(0.02)
    for command in (f"address add {address}/24 dev {NETWORK_INTERFACE}", f"link set {NETWORK_INTERFACE} up", "link set lo up"):
        subprocess.run([shutil.which("ip") or "ip", *command.split()], check=True)


def main(folder: Path, node: str, address: str = "") -> int:
    """Run the node until it is told to stop."""
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)  # taken one by one below: none is lost, none interrupts
    socket.sethostname(node)
    subprocess.run([shutil.which("mount") or "mount", "--bind", str(folder / "hosts"), "/etc/hosts"], check=True)
    if address:
        join_network(address)
    slurmd = start_slurmd(node)
    while True:
        received = signal.sigwait(WATCHED)
        if received == signal.SIGTERM:
            if slurmd:
                os.kill(slurmd, signal.SIGTERM)
            return 0
        if slurmd in reap():
            slurmd = 0
        if received == signal.SIGUSR1 and not slurmd:
            slurmd = start_slurmd(node)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
