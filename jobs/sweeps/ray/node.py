"""One node of a sweep's Slurm allocation, started by srun on each: Ray is started on all, and the first one runs the driver.

    python -m jobs.sweeps.ray.node SWEEP_FOLDER -- COMMAND...

    all nodes: "I am here" ----> first node: chooses ports and the way to start ----> all start Ray
                                                                   first node: waits for the others, runs COMMAND
    all nodes: end their Ray <---- "it is over, exit code N" <----------------- COMMAND has ended

Ray is started by `ray symmetric-run` where every node can give it a process table of its own. It takes every Ray process it sees for its
own, refuses to start beside one and ends all in the end: without such a table two sweeps on a node would end one another. Elsewhere nodes
start `ray start` themselves, and end what has come of it. A node that is lost is missed by Ray, and by nobody here. When the first one is
lost, so are the driver and the batch script, but not the job: Slurm lets it keep its other nodes (`--no-kill`) until its time is up. The
other nodes therefore put it back into the queue.
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
from jobs.slurm.client import SlurmClient
from jobs.store.attempts import own_node
from jobs.sweeps.ray import start as ray_start
from jobs.sweeps.ray.cluster import private_folder, ray_joined
from jobs.sweeps.ray.containment import adopt_orphans, end_descendants, private_table, private_table_works, start
from jobs.sweeps.ray.start import POLL_SECONDS, Meeting, Presence, Start, meeting_of, waited

ATTEND_SECONDS = 60.0  # for the other nodes to come, and then for their Rays
START_SECONDS = 300.0  # for the first node to say how to start: it waits for the others itself
TRIES = 3  # to start Ray
PAUSE_SECONDS = 1.0  # between them
LOST_SECONDS = 900.0  # for Slurm to say that the first node is lost, when it does not answer; SlurmdTimeout, 300 s by default, and more
ASK_SECONDS = 5.0  # between questions to Slurm
ENDING_SECONDS = 45.0  # for Slurm to kill what it has told to end: KillWait, 30 s by default, and more
FAILED, INTERRUPTED = 1, 3
TAIL_LINES = 20  # of Ray's output, when it does not start
_told_to_end = threading.Event()  # Slurm sends SIGTERM to every process of a step, and so to those of Ray


def main(arguments: Sequence[str]) -> int:
    """Be one node of an allocation, or (with `--drive`) what runs the driver inside Ray."""
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
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, _note)  # the batch script has the driver told, by a file; not SIG_IGN, which children would inherit
    meeting = meeting_of(chosen.sweep, os.environ)
    if chosen.drive:
        return drive(meeting, chosen.drive, command)
    adopt_orphans()
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    own = Presence(own_node(), ray_start.own_addresses(os.environ), not chosen.own_start and _symmetric_here())
    with private_folder() as temp:
        try:
            if os.environ.get("SLURM_PROCID", "0") != "0":
                return follow(meeting, own, temp, SlurmClient())
            inner = [sys.executable, "-m", "jobs.sweeps.ray.node", str(chosen.sweep), "--drive", str(nodes), "--", *command]
            return lead(meeting, own, temp, nodes, inner)
        finally:
            end_descendants()


def lead(meeting: Meeting, own: Presence, temp: Path, nodes: int, driver: Sequence[str]) -> int:
    """The first node: decide how to start, start, and stay until the driver has ended. Its exit code."""
    meeting.open()
    meeting.attend(own)
    waited(lambda: len(meeting.present()) >= nodes, ATTEND_SECONDS)
    present = meeting.present()
    if len(present) < nodes:
        _say(f"{len(present)} of {nodes} nodes have come: {', '.join(each.node for each in present)}")
    for number in range(1, TRIES + 1):
        _told_to_end.clear()
        port, client_port = ray_start.free_ports(own.addresses[0], 2)
        begun = Start(number, own.addresses[0], port, ray_start.all_symmetric(present, nodes), own.node)
        meeting.announce(begun)
        _say(f"Ray of {len(present)} nodes at {begun.address}, by {'`ray symmetric-run`' if begun.symmetric else '`ray start`'}")
        given = [*ray_start.options(ray_start.granted(os.environ), temp), *ray_start.head_options(client_port)]
        environment = ray_start.environment_of(begun, temp, meeting.token, os.environ)
        if begun.symmetric:
            # Options of the first node are none of the others', and each calls it with its own.
            _stay(start(private_table(ray_start.symmetric_command(begun, given, driver)), environment), meeting, begun)
        else:
            _lead_own(meeting, begun, (ray_start.head_command(begun, given), driver), environment, temp)
        end_descendants()
        code = meeting.code()
        if code is not None:
            return code
        if _told_to_end.is_set():  # cancelled, or put back; not so where a job that is to be preempted has some time left
            _say(f"Slurm has ended Ray; should this node still be there in {ENDING_SECONDS:.0f} s, Ray is started once more")
            time.sleep(ENDING_SECONDS)
        else:
            _say("Ray did not start, or has ended" + ("" if number == TRIES else "; once more, on other ports"))
            time.sleep(PAUSE_SECONDS)
    meeting.end(FAILED)
    return FAILED


def follow(meeting: Meeting, own: Presence, temp: Path, client: SlurmClient) -> int:
    """Any other node: start Ray as the first one says, as often as it says so, and end it when all is over."""
    meeting.attend(own)
    for number in range(1, TRIES + 1):
        if not waited(lambda: meeting.start() or meeting.code() is not None, START_SECONDS):
            _say("the first node does not say how to start Ray")
            return FAILED
        begun = meeting.start()
        if begun is None or (_answered(meeting, begun) and _outdated(meeting, begun)):
            continue  # over, or to be started otherwise
        _told_to_end.clear()
        if ray_start.answers(begun):
            log = temp / f"ray-{number}.log"
            given = ray_start.options(ray_start.granted(os.environ), temp)
            symmetric = private_table(ray_start.symmetric_command(begun, given, ["true"]))
            command = symmetric if begun.symmetric else ray_start.member_command(begun, given)
            _stay(start(command, ray_start.environment_of(begun, temp, meeting.token, os.environ), output=log), meeting, begun)
            end_descendants()
            if not _outdated(meeting, begun) and not _told_to_end.is_set():
                _say(f"Ray has ended before the sweep:\n{_tail(log)}")
        if _first_node_lost(meeting, begun, client):
            _say(f"{begun.node} is lost, and the sweep's driver with it: the job goes back into the queue")
            client.requeue_job(os.environ["SLURM_JOB_ID"])
            return FAILED
        time.sleep(PAUSE_SECONDS)
    return FAILED if meeting.code() is None else 0


def drive(meeting: Meeting, nodes: int, command: Sequence[str]) -> int:
    """Inside Ray, on the first node: wait for the other nodes, run the driver, and tell all nodes how it ended."""
    code = FAILED
    try:
        _await_members(nodes)
        code = subprocess.run(list(command), stdin=subprocess.DEVNULL, check=False).returncode
        code = code if code >= 0 else 128 - code
        if code and _told_to_end.is_set():  # it may not have left as it wanted: Ray was told as well
            code = INTERRUPTED
    finally:
        meeting.end(code)
    return code


def _lead_own(
    meeting: Meeting, begun: Start, commands: tuple[list[str], Sequence[str]], environment: Mapping[str, str], temp: Path
) -> None:
    """`ray start` and then the driver, as children."""
    head, driver = commands
    log = temp / f"ray-{begun.number}.log"
    ray = start(head, environment, output=log)
    if waited(lambda: ray_start.answers(begun) or ray.poll() is not None, ray_start.READY_SECONDS) and ray.poll() is None:
        _stay(start(driver, environment), meeting, begun, ray)
    if ray.poll() is not None:
        _say(_tail(log))


def _stay(child: subprocess.Popen[bytes], meeting: Meeting, begun: Start, *others: subprocess.Popen[bytes]) -> None:
    """Until a process has ended, or the sweep has, or another start was announced."""
    while all(each.poll() is None for each in (child, *others)) and not _outdated(meeting, begun):
        time.sleep(POLL_SECONDS)


def _answered(meeting: Meeting, begun: Start) -> bool:
    """Whether the first node's Ray answers in time, or need not any more."""
    return waited(lambda: ray_start.answers(begun) or _outdated(meeting, begun), ray_start.READY_SECONDS)


def _first_node_lost(meeting: Meeting, begun: Start, client: SlurmClient) -> bool:
    """Whether the job has lost the first node: it does not answer, and Slurm says so as well, in time."""
    end = time.monotonic() + LOST_SECONDS
    while time.monotonic() < end and not _outdated(meeting, begun) and not ray_start.answers(begun):
        try:
            nodes = client.nodes_of(os.environ["SLURM_JOB_ID"])
        except (SlurmUnavailableError, UsageError) as error:  # Slurm does not answer, or is out of reach in a container
            _say(str(error))
            nodes = ()
        if nodes and begun.node not in nodes:
            return True
        time.sleep(ASK_SECONDS)
    return False


def _outdated(meeting: Meeting, begun: Start) -> bool:
    return meeting.code() is not None or meeting.start() != begun


def _await_members(nodes: int) -> None:
    if nodes < 2:
        return
    with ray_joined():
        from ray import nodes as members

        def there() -> int:
            return sum(bool(member["Alive"]) for member in members())

        if not waited(lambda: there() >= nodes, ATTEND_SECONDS):
            _say(f"{there()} of {nodes} nodes have joined Ray: the sweep begins without the rest")


def _symmetric_here() -> bool:
    return ray_start.symmetric_run_known() and private_table_works(os.environ)


def _tail(log: Path) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
    except FileNotFoundError:
        return ""


def _say(text: str) -> None:
    sys.stderr.write(f"{own_node()}: {text}\n")
    sys.stderr.flush()


def _note(number: int, _: object) -> None:
    if number == signal.SIGTERM:
        _told_to_end.set()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
