"""First process of one test node: sets the node's host name, runs its slurmd, and reaps orphans as an init must.

Runs inside fresh UTS, PID and mount namespaces, with the standard library only: `python node.py FOLDER NODE`.
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
from pathlib import Path

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


def main(folder: Path, node: str) -> int:
    """Run the node until it is told to stop."""
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)  # taken one by one below: none is lost, none interrupts
    socket.sethostname(node)
    subprocess.run([shutil.which("mount") or "mount", "--bind", str(folder / "hosts"), "/etc/hosts"], check=True)
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
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
