"""One node of a sweep's Slurm allocation, started by srun on each: starts Ray on all nodes, and the driver on the first one.

    python -m jobs.sweeps.ray.node SWEEP_FOLDER -- COMMAND...

    all nodes: announce themselves ----> first node: chooses ports and the way to start ----> all nodes: start Ray
                                                                     first node: waits for the others, runs COMMAND
    all nodes: end their Ray <---- exit code N <------------------------------------ COMMAND has ended

Ray is started by `ray symmetric-run` if every node can run it in a PID namespace: it treats every Ray process it sees as its own, refuses
to start beside one and kills all at the end, so without namespaces two sweeps on a node would kill each other. Otherwise nodes run
`ray start`, and kill its processes at the end. Ray handles a lost node, except the first: with it the driver and the batch script are
lost, but not the job, which keeps its other nodes (`--no-kill`) until its time limit. The other nodes therefore requeue the job.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jobs.errors import SlurmUnavailableError, UsageError
from jobs.signals import install_handler
from jobs.slurm.client import SlurmClient
from jobs.store.attempts import own_node
from jobs.sweeps.ray import start as ray_start
from jobs.sweeps.ray.cluster import private_folder, ray_joined
from jobs.sweeps.ray.containment import adopt_orphans, end_descendants, private_table, private_table_works, start
from jobs.sweeps.ray.start import POLL_SECONDS, NodeInfo, Rendezvous, Start, rendezvous_of, wait_until

JOIN_SECONDS = 60.0  # until all nodes have joined the rendezvous, and then Ray
START_SECONDS = 300.0  # until the first node announces how to start; it waits for the others before
TRIES = 3  # to start Ray
PAUSE_SECONDS = 1.0  # between tries
LOST_SECONDS = 900.0  # until Slurm reports that the first node is lost; more than SlurmdTimeout, 300 s by default
ASK_SECONDS = 5.0  # between queries of Slurm
ENDING_SECONDS = 45.0  # after SIGTERM, until Slurm kills the job; more than KillWait, 30 s by default
FAILED, INTERRUPTED = 1, 3
TAIL_LINES = 20  # of Ray's output, logged if it does not start
_terminated = threading.Event()  # SIGTERM was received; Slurm sends it to every process of a step, also to those of Ray


def main(arguments: Sequence[str]) -> int:
    """Run one node of an allocation, or (with `--drive`) the driver inside Ray."""
    parser = argparse.ArgumentParser(prog="python -m jobs.sweeps.ray.node")
    parser.add_argument("sweep", type=Path, help="folder of the sweep")
    parser.add_argument("--own-start", action="store_true", help="do not use `ray symmetric-run`")
    parser.add_argument("--drive", type=int, default=0, metavar="NODES", help=argparse.SUPPRESS)
    split = list(arguments).index("--") if "--" in arguments else len(arguments)
    chosen, command = parser.parse_args(arguments[:split]), list(arguments[split + 1 :])
    if not command:
        parser.error("name the driver's command after `--`")
    if "SLURM_JOB_ID" not in os.environ:
        parser.error("this is no Slurm job: `launch.py sweep` runs a sweep on this machine")
    # The batch script stops the driver by a file. Not SIG_IGN, which children would inherit.
    install_handler((signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT), _on_signal)
    rendezvous = rendezvous_of(chosen.sweep, os.environ)
    if chosen.drive:
        return drive(rendezvous, chosen.drive, command)
    adopt_orphans()
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    own = NodeInfo(own_node(), ray_start.reachable_addresses(os.environ), not chosen.own_start and _symmetric_here())
    with private_folder() as temp:
        try:
            if os.environ.get("SLURM_PROCID", "0") != "0":
                return follow(rendezvous, own, temp, SlurmClient())
            inner = [sys.executable, "-m", "jobs.sweeps.ray.node", str(chosen.sweep), "--drive", str(nodes), "--", *command]
            return lead(rendezvous, own, temp, nodes, inner)
        finally:
            end_descendants()


def lead(rendezvous: Rendezvous, own: NodeInfo, temp: Path, nodes: int, driver: Sequence[str]) -> int:
    """The first node: decide how to start Ray, start it, and wait for the driver. Returns the exit code of the driver."""
    rendezvous.open()
    rendezvous.join(own)
    wait_until(lambda: len(rendezvous.nodes()) >= nodes, JOIN_SECONDS)
    present = rendezvous.nodes()
    if len(present) < nodes:
        _log(f"{len(present)} of {nodes} nodes have joined: {', '.join(each.node for each in present)}")
    for number in range(1, TRIES + 1):
        _terminated.clear()
        port, client_port = ray_start.free_ports(own.addresses[0], 2)
        announced = Start(number, own.addresses[0], port, ray_start.all_symmetric(present, nodes), own.node)
        rendezvous.announce(announced)
        _log(f"Ray of {len(present)} nodes at {announced.address}, by {'`ray symmetric-run`' if announced.symmetric else '`ray start`'}")
        given = [*ray_start.options(ray_start.granted(os.environ), temp), *ray_start.head_options(client_port)]
        environment = ray_start.environment_of(announced, temp, rendezvous.token, os.environ)
        if announced.symmetric:
            # Each node passes its own options.
            _wait_for_end(start(private_table(ray_start.symmetric_command(announced, given, driver)), environment), rendezvous, announced)
        else:
            _lead_own(rendezvous, announced, (ray_start.head_command(announced, given), driver), environment, temp)
        end_descendants()
        code = rendezvous.code()
        if code is not None:
            return code
        if _terminated.is_set():  # cancelled or requeued, unless the job is to be preempted after a grace time
            _log(f"Slurm has ended Ray; if this node still runs in {ENDING_SECONDS:.0f} s, Ray is started again")
            time.sleep(ENDING_SECONDS)
        else:
            _log("Ray did not start, or has ended" + ("" if number == TRIES else "; trying again on other ports"))
            time.sleep(PAUSE_SECONDS)
    rendezvous.end(FAILED)
    return FAILED


def follow(rendezvous: Rendezvous, own: NodeInfo, temp: Path, client: SlurmClient) -> int:
    """Any other node: start Ray as announced by the first one, and end it when the driver has ended."""
    rendezvous.join(own)
    for number in range(1, TRIES + 1):
        if not wait_until(lambda: rendezvous.start() or rendezvous.code() is not None, START_SECONDS):
            _log("the first node does not announce how to start Ray")
            return FAILED
        announced = rendezvous.start()
        if announced is None or (_answered(rendezvous, announced) and _superseded(rendezvous, announced)):
            continue  # the driver has ended, or another start was announced
        _terminated.clear()
        if ray_start.answers(announced):
            log = temp / f"ray-{number}.log"
            given = ray_start.options(ray_start.granted(os.environ), temp)
            symmetric = private_table(ray_start.symmetric_command(announced, given, ["true"]))
            command = symmetric if announced.symmetric else ray_start.member_command(announced, given)
            environment = ray_start.environment_of(announced, temp, rendezvous.token, os.environ)
            _wait_for_end(start(command, environment, output=log), rendezvous, announced)
            end_descendants()
            if not _superseded(rendezvous, announced) and not _terminated.is_set():
                _log(f"Ray has ended before the sweep:\n{_tail(log)}")
        if _first_node_lost(rendezvous, announced, client):
            _log(f"{announced.node} is lost, and the sweep's driver with it: the job is requeued")
            client.requeue_job(os.environ["SLURM_JOB_ID"])
            return FAILED
        time.sleep(PAUSE_SECONDS)
    return FAILED if rendezvous.code() is None else 0


def drive(rendezvous: Rendezvous, nodes: int, command: Sequence[str]) -> int:
    """Inside Ray, on the first node: wait for the other nodes, run the driver, and announce its exit code."""
    code = FAILED
    try:
        _await_members(nodes)
        code = subprocess.run(list(command), stdin=subprocess.DEVNULL, check=False).returncode
        code = code if code >= 0 else 128 - code
        if code and _terminated.is_set():  # SIGTERM went to Ray too, so the driver may not have ended cleanly
            code = INTERRUPTED
    finally:
        rendezvous.end(code)
    return code


def _lead_own(
    rendezvous: Rendezvous, announced: Start, commands: tuple[list[str], Sequence[str]], environment: Mapping[str, str], temp: Path
) -> None:
    """Start `ray start` and then the driver as children."""
    head, driver = commands
    log = temp / f"ray-{announced.number}.log"
    ray = start(head, environment, output=log)
    if wait_until(lambda: ray_start.answers(announced) or ray.poll() is not None, ray_start.READY_SECONDS) and ray.poll() is None:
        _wait_for_end(start(driver, environment), rendezvous, announced, ray)
    if ray.poll() is not None:
        _log(_tail(log))


def _wait_for_end(child: subprocess.Popen[bytes], rendezvous: Rendezvous, announced: Start, *others: subprocess.Popen[bytes]) -> None:
    """Wait until a process or the driver has ended, or another start was announced."""
    while all(each.poll() is None for each in (child, *others)) and not _superseded(rendezvous, announced):
        time.sleep(POLL_SECONDS)


def _answered(rendezvous: Rendezvous, announced: Start) -> bool:
    """Whether Ray on the first node accepts connections in time, or the start is superseded."""
    return wait_until(lambda: ray_start.answers(announced) or _superseded(rendezvous, announced), ray_start.READY_SECONDS)


def _first_node_lost(rendezvous: Rendezvous, announced: Start, client: SlurmClient) -> bool:
    """Whether the job has lost the first node: it does not answer, and Slurm reports in time that the job does not have it."""
    end = time.monotonic() + LOST_SECONDS
    while time.monotonic() < end and not _superseded(rendezvous, announced) and not ray_start.answers(announced):
        try:
            nodes = client.nodes_of(os.environ["SLURM_JOB_ID"])
        except (SlurmUnavailableError, UsageError) as error:  # Slurm does not answer, or is not available in a container
            _log(str(error))
            nodes = ()
        if nodes and announced.node not in nodes:
            return True
        time.sleep(ASK_SECONDS)
    return False


def _superseded(rendezvous: Rendezvous, announced: Start) -> bool:
    """Whether the driver has ended or another start was announced."""
    return rendezvous.code() is not None or rendezvous.start() != announced


def _await_members(nodes: int) -> None:
    if nodes < 2:
        return
    with ray_joined():
        from ray import nodes as members

        def alive() -> int:
            return sum(bool(member["Alive"]) for member in members())

        if not wait_until(lambda: alive() >= nodes, JOIN_SECONDS):
            _log(f"{alive()} of {nodes} nodes have joined Ray: the sweep starts without the others")


def _symmetric_here() -> bool:
    return ray_start.symmetric_run_known() and private_table_works(os.environ)


def _tail(log: Path) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
    except FileNotFoundError:
        return ""


def _log(text: str) -> None:
    sys.stderr.write(f"{own_node()}: {text}\n")
    sys.stderr.flush()


def _on_signal(number: int, _: object) -> None:
    if number == signal.SIGTERM:
        _terminated.set()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
