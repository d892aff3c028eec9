"""Brings a multi-node Slurm up on this machine and takes it down: every process, folder and port is of one cluster alone."""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from tests.slurm_cluster.configuration import ClusterSettings, gres_conf, hosts, slurm_conf, slurmdbd_conf
from tests.slurm_cluster.node import NETWORK_INTERFACE
from tests.slurm_cluster.processes import Process, ProcessBook
from tests.slurm_cluster.users import ACCOUNT, command_as, make_users
from tests.waiting import wait_until

ALWAYS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo")
ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db", "mariadb", "sacct")
FOLDERS = ("log", "run", "state", "spool", "device", "munge", "database", "processes")


class ClusterError(Exception):
    """The cluster cannot be brought up: one line that says what is missing or which log to read."""


class Cluster:
    """One Slurm in one folder."""

    def __init__(self, folder: Path, settings: ClusterSettings | None = None) -> None:
        self.folder = folder.resolve()
        self.settings = settings or self._saved_settings() or ClusterSettings()
        self.processes = ProcessBook(self.folder)
        self._jobs_forgotten = False  # slurmctld was killed

    @property
    def slurm_conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> Mapping[str, str]:
        """What a client command needs."""
        path = os.environ.get("PATH", "/usr/bin:/bin")
        extended = path if "/usr/sbin" in path.split(":") else f"{path}:/usr/sbin:/sbin"
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SQUEUE_", "SACCT_"))}
        return {**clean, "PATH": extended, "SLURM_CONF": str(self.slurm_conf), "MYSQL_UNIX_PORT": str(self.folder / "database" / "socket")}

    def run(self, *command: str, check: bool = True, timeout: float = 60.0, user: str = "") -> str:
        """Standard output of a client command of this cluster; `user`: who runs it, if not the user of the suite."""
        return subprocess.run(
            command_as(user, *command) if user else list(command),
            env=dict(self.environment),
            check=check,
            timeout=timeout,
            capture_output=True,
            text=True,
        ).stdout.strip()

    def up(self) -> None:
        """Start everything and wait until all nodes are idle; ClusterError when something is missing or does not start."""
        missing = missing_programs(self.environment["PATH"], accounting=self.settings.accounting)
        if missing:
            raise ClusterError(f"Slurm is not installed here ({', '.join(missing)} not found): run tests/install_packages.sh as root")
        if self.processes.get("slurmctld") is not None:
            raise ClusterError(f"a cluster is already up in {self.folder}")
        self.down()
        self._write_files()
        try:
            self._start()
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Stop everything that was ever started here; the folder stays."""
        nodes = [f"{kind}-{node}" for node in self.settings.node_names for kind in ("init", "unshare")]
        if not self.settings.namespaces and self.processes.get("slurmctld") is not None:  # slurmd would leave its jobs running
            with contextlib.suppress(subprocess.SubprocessError):
                self.run("scancel", f"--user={getpass.getuser()}", check=False, timeout=5)
                wait_until(lambda: not self.run("squeue", "-h", check=False, timeout=5), 5)
        self.processes.stop(nodes, signal.SIGKILL)  # a power cut: the kernel ends every process of the namespace
        self.processes.stop([f"slurmd-{node}" for node in self.settings.node_names])
        for name in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
            self.processes.stop([name], patience=10)
        if self.settings.networks:
            self.run("ip", "link", "delete", self.settings.bridge, check=False)

    def clear(self) -> None:
        """Cancel every job until the queue is empty (one that is being cancelled may submit another), and resume drained nodes."""

        def empty() -> bool:
            for user in (getpass.getuser(), *make_users()):
                self.run("scancel", "--quiet", f"--user={user}", check=False)
            return not self.run("squeue", "-h")

        if not wait_until(empty, step=0.2):
            raise ClusterError(f"jobs do not end: {self.run('squeue', '-h')}")
        if self._jobs_forgotten:  # they still run, and slurmctld gives their ids to new jobs, which slurmd then refuses
            for node in self.settings.node_names:
                self.kill_node(node)
                self.start_node(node)
        listing = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%n %T")
        for node in (line.split()[0] for line in listing.splitlines() if "drain" in line.split()[1]):
            self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        if self._jobs_forgotten:
            self._wait_for_nodes()
            self._jobs_forgotten = False

    def _wait_for_nodes(self) -> None:
        def idle() -> bool:
            return self.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N").count("n") == self.settings.nodes

        if not wait_until(idle, step=0.1):
            raise ClusterError(f"not all nodes came up: {self.folder}/log/slurmd-*.log, {self.folder}/log/unshare-*.out")

    def kill_node(self, node: str) -> None:
        """Power a node off: daemon, steps and job processes (without namespaces: only the daemon)."""
        self.processes.stop([f"init-{node}", f"unshare-{node}", f"slurmd-{node}"], signal.SIGKILL)

    @contextlib.contextmanager
    def hidden_from(self, node: str, folder: Path) -> Iterator[None]:
        """While the block lasts, a node sees an empty folder there, as after the loss of a mount. Needs nodes in namespaces."""
        init = self.processes.get(f"init-{node}")
        assert init is not None, node
        self.run(*with_mounts_of(init, "mount", "-t", "tmpfs", "none", str(folder)))
        try:
            yield
        finally:
            self.run(*with_mounts_of(init, "umount", "--lazy", str(folder)))

    def start_node(self, node: str) -> None:
        """Start a node (again)."""
        if not self.settings.namespaces:
            self.processes.start(f"slurmd-{node}", ["slurmd", "-D", "-N", node], self.environment)
            return
        program = Path(__file__).with_name("node.py")
        address = [self.settings.node_address(node)] if self.settings.networks else []
        command = [*_unshare(networks=bool(address)), sys.executable, "-I", str(program), str(self.folder), node, *address]
        outer = self.processes.start(f"unshare-{node}", command, self.environment)
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        if not wait_until(lambda: children.exists() and bool(children.read_text().split())):
            raise ClusterError(f"node {node} did not start: {self.folder}/log/unshare-{node}.out")
        init = children.read_text().split()[0]
        self.processes.record(f"init-{node}", int(init))
        if address:
            self._plug_in(node, init)

    def stop_controller(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End slurmctld; killed, it loses what it has not written yet, jobs among it."""
        self.processes.stop(["slurmctld"], number)
        self._jobs_forgotten = self._jobs_forgotten or number == signal.SIGKILL

    def pause_controller(self) -> None:
        """Make slurmctld deaf until `resume_controller`."""
        process = self.processes.get("slurmctld")
        if process is not None:
            process.send(signal.SIGSTOP)

    def resume_controller(self) -> None:
        process = self.processes.get("slurmctld")
        if process is not None:
            process.send(signal.SIGCONT)

    def start_controller(self) -> None:
        """Start slurmctld and wait until it answers."""
        self.processes.start("slurmctld", ["slurmctld", "-D"], self.environment)
        self._wait("slurmctld", 60, "scontrol", "ping", expect="UP")

    def _plug_in(self, node: str, process: str) -> None:
        """Join the network of a node, which is that of a process, to the bridge."""
        cable = f"{self.settings.bridge}-{node}"
        self.run("ip", "link", "delete", cable, check=False)  # of a node that was killed a moment ago
        self.run("ip", "link", "add", cable, "type", "veth", "peer", "name", NETWORK_INTERFACE, "netns", process)
        self.run("ip", "link", "set", cable, "master", self.settings.bridge, "up")

    def _start(self) -> None:
        environment, folder = self.environment, self.folder
        if self.settings.networks:
            self.run("ip", "link", "add", self.settings.bridge, "type", "bridge")
            self.run("ip", "address", "add", f"{self.settings.controller_address}/24", "dev", self.settings.bridge)
            self.run("ip", "link", "set", self.settings.bridge, "up")
        munge = folder / "munge"
        files = [f"--key-file={munge}/key", f"--socket={munge}/socket", f"--pid-file={folder}/run/munged.pid"]
        files += [f"--log-file={folder}/log/munged.log", f"--seed-file={munge}/seed"]
        self.processes.start("munged", ["munged", "--foreground", "--force", "--num-threads=10", *files], environment)
        self._wait("munged", 10, "munge", "-S", f"{munge}/socket", "-n", expect="MUNGE")
        if self.settings.accounting:
            self._start_accounting()
        self.start_controller()
        for node in self.settings.node_names:
            self.start_node(node)
        self._wait_for_nodes()

    def _start_accounting(self) -> None:
        database, user = self.folder / "database", getpass.getuser()
        environment = {**self.environment, "TMPDIR": str(database)}  # databases that are made at once in one folder break each other
        arguments = ["--no-defaults", f"--datadir={database}/files", f"--user={user}"]
        authentication = ["--auth-root-authentication-method=socket", f"--auth-root-socket-user={user}", "--skip-test-db"]
        with (self.folder / "log" / "database-install.log").open("wb") as log:
            made = subprocess.run(["mariadb-install-db", *arguments, *authentication], stdout=log, stderr=log, env=environment, timeout=120)
        if made.returncode != 0:
            raise ClusterError(f"the accounting database cannot be made: {self.folder}/log/database-install.log")
        small = ["--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=128M", "--innodb-log-file-size=16M"]
        waits = ["--innodb-lock-wait-timeout=900", "--performance-schema=off", "--skip-networking"]
        files = [f"--socket={database}/socket", f"--pid-file={self.folder}/run/mariadbd.pid"]
        self.processes.start("mariadbd", ["mariadbd", *arguments, *files, *small, *waits], environment)
        self._wait(
            "mariadbd", 60, "mariadb", "--no-defaults", f"--socket={database}/socket", f"--user={user}", "-e", "select 1", expect="1"
        )
        self.processes.start("slurmdbd", ["slurmdbd", "-D"], environment)
        self._wait("slurmdbd", 60, "sacctmgr", "-n", "-P", "show", "stats", expect="")
        if self.settings.enforce:  # before slurmctld starts, which then finds them
            self.run("sacctmgr", "--immediate", "add", "cluster", "test")
            self.run("sacctmgr", "--immediate", "add", "account", ACCOUNT)
            for name in make_users():
                self.run("sacctmgr", "--immediate", "add", "user", name, f"account={ACCOUNT}")

    def _wait(self, name: str, seconds: float, *command: str, expect: str) -> None:
        def answers() -> bool:
            with contextlib.suppress(subprocess.SubprocessError):
                return expect in self.run(*command, timeout=3)
            return False

        if not wait_until(answers, seconds):
            raise ClusterError(f"{name} does not answer: {self.folder}/log/{name}.log, {self.folder}/log/{name}.out")

    def _write_files(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir()
        for folder in (self.folder, self.folder / "munge"):
            folder.chmod(0o755)  # munge wants the way to its socket open
        namespaces = self.settings.namespaces and namespaces_work()
        networks = namespaces and self.settings.networks and networks_work()
        self.settings = dataclasses.replace(
            self.settings,
            port=self.settings.port or free_ports(self.settings.nodes + 2),
            namespaces=namespaces,
            networks=networks,
            subnet=free_subnet() if networks else "",
        )
        for node in self.settings.node_names:
            (self.folder / "spool" / node).mkdir()
        for number in range(self.settings.gpus):
            (self.folder / "device" / f"gpu{number}").symlink_to("/dev/null")
        _write_private(self.folder / "munge" / "key", os.urandom(1024))
        _write_private(self.folder / "slurmdbd.conf", slurmdbd_conf(self.folder, self.settings).encode())
        self.slurm_conf.write_text(slurm_conf(self.folder, self.settings))
        (self.folder / "gres.conf").write_text(gres_conf(self.folder, self.settings))
        (self.folder / "hosts").write_text(hosts(self.settings, socket.gethostname()))
        (self.folder / "settings.json").write_text(json.dumps(asdict(self.settings)))

    def _saved_settings(self) -> ClusterSettings | None:
        try:
            return ClusterSettings(**json.loads((self.folder / "settings.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None


def with_mounts_of(init: Process, *command: str) -> list[str]:
    """A command that runs with the mounts of a node, given by its first process.

    umount reads /proc/self, which is that of the node: hence its process numbers too.
    """
    user = [] if os.getuid() == 0 else ["--user", "--preserve-credentials"]
    return ["nsenter", f"--target={init.pid}", "--mount", "--pid", *user, *command]


def missing_programs(path: str, *, accounting: bool = True) -> list[str]:
    """Programs that a cluster needs and that are not in `path`."""
    return [name for name in (*ALWAYS, *(ACCOUNTING if accounting else ())) if shutil.which(name, path=path) is None]


def namespaces_work() -> bool:
    """Whether this user may give a process its own host name and mounts."""
    probe = ["sh", "-c", "hostname n1 && mount --bind /etc/hosts /etc/hosts"]
    try:
        return subprocess.run([*_unshare(), *probe], capture_output=True, timeout=10, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def networks_work() -> bool:
    """Whether this user may give a process its own network, and join it to one of this machine (root may, unless a sandbox forbids it)."""
    probe = f"sgp{os.getpid()}"
    commands = [
        ["ip", "link", "add", probe, "type", "bridge"],
        ["ip", "link", "delete", probe],
        [*_unshare(networks=True), "ip", "link", "set", "lo", "up"],
    ]
    try:
        return all(subprocess.run(command, capture_output=True, timeout=10, check=False).returncode == 0 for command in commands)
    except (OSError, subprocess.TimeoutExpired):
        return False


def free_subnet() -> str:
    """First three numbers of private addresses that this machine does not know yet."""
    known = subprocess.run(["ip", "-4", "route"], capture_output=True, text=True, timeout=10, check=True).stdout
    for _ in range(200):
        subnet = f"10.{random.randrange(100, 250)}.{random.randrange(250)}"
        if f"{subnet}." not in known:
            return subnet
    raise ClusterError("no free private network")


def free_ports(count: int) -> int:
    """First of `count` consecutive free ports below the range that the kernel hands out."""
    for _ in range(200):
        first = random.randrange(16000, 30000, 10)
        if all(_free(first + offset) for offset in range(count)):
            return first
    raise ClusterError("no free ports")


def _free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _unshare(*, networks: bool = False) -> Sequence[str]:
    namespaces = ["--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc", *(["--net"] if networks else [])]
    return ["unshare", *([] if os.getuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]), *namespaces]


def _write_private(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
