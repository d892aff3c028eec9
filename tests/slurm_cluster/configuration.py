"""Text of a test cluster's configuration files. Pure.

The values are those of Slurm's manual pages for a machine without systemd and control groups: resources are declared,
not real; everything listens on the loopback address, or on those of a bridge of the cluster's own where nodes have network stacks of
their own; scheduling and failure detection are as quick as Slurm allows.
"""

from __future__ import annotations

import getpass
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ClusterSettings:
    """Shape of a test cluster."""

    nodes: int = 3
    cpus: int = 4  # per node, declared
    gpus: int = 2  # per node, stand-ins
    memory_mb: int = 64000
    max_array_size: int = 1001  # Slurm's own default
    max_job_count: int = 10000
    accounting: bool = True
    enforce: bool = False  # limits of associations and QOS; needs accounting
    namespaces: bool = True  # every node with its own host name and process table
    networks: bool = False  # and with its own network stack and address
    subnet: str = ""  # first three numbers of those addresses
    port: int = 0  # first of `nodes + 2` consecutive ports

    @property
    def node_names(self) -> tuple[str, ...]:
        return tuple(f"n{number}" for number in range(1, self.nodes + 1))

    @property
    def bridge(self) -> str:
        """Interface of this machine that the nodes' networks are plugged into."""
        return f"sg{self.port}"

    @property
    def controller_address(self) -> str:
        return f"{self.subnet}.1" if self.networks else "127.0.0.1"

    def node_address(self, node: str) -> str:
        return f"{self.subnet}.{10 + int(node[1:])}" if self.networks else "127.0.0.1"

    @property
    def accounting_port(self) -> int:
        return self.port + self.nodes + 1


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def slurm_conf(folder: Path, settings: ClusterSettings) -> str:
    """slurm.conf; an unknown key in it is fatal to every client command, so it holds only keys known since 20.11."""
    user = getpass.getuser()
    nodes = f"n[1-{settings.nodes}]" if settings.nodes > 1 else "n1"
    host = nodes if settings.namespaces else "localhost"
    gres = f" Gres=gpu:fake:{settings.gpus}" if settings.gpus else ""
    addresses = f"{settings.subnet}.[11-{10 + settings.nodes}]" if settings.networks and settings.nodes > 1 else settings.node_address("n1")
    # with NoCtldInAddrAny slurmctld listens where its *name* leads, which no other network reaches
    listen = "NoInAddrAny" if settings.networks else "NoCtldInAddrAny,NoInAddrAny"
    accounting = "AccountingStorageType=accounting_storage/none"
    if settings.accounting:
        accounting = f"""\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={settings.accounting_port}
AccountingStoragePass={folder}/munge/socket"""
    if settings.enforce:
        accounting += "\nAccountingStorageEnforce=limits,qos"
    # cred_expire is also the wait before a requeued job starts again (default 120 s, least 5 s)
    return f"""\
ClusterName=test
SlurmctldHost=localhost({settings.controller_address})
SlurmctldPort={settings.port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CommunicationParameters={listen}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=10000,default_queue_depth=1000,bf_interval=1,bf_max_job_test=1000,bf_resolution=1
PriorityType=priority/basic
KillWait=2
CompleteWait=0
EpilogMsgTime=1
MinJobAge=300
MaxJobCount={settings.max_job_count}
MaxArraySize={settings.max_array_size}
SlurmctldTimeout=5
SlurmdTimeout=5
InactiveLimit=0
MessageTimeout=10
TCPTimeout=2
WaitTime=0
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobCompType=jobcomp/none
{accounting}
NodeName={nodes} NodeHostname={host} NodeAddr={addresses} Port={_span(settings.port + 1, settings.port + settings.nodes)} \
CPUs={settings.cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={settings.cpus} ThreadsPerCore=1 \
RealMemory={settings.memory_mb}{gres} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=10 DefaultTime=60 MaxTime=INFINITE State=UP
PartitionName=hidden Nodes=ALL Hidden=YES PriorityTier=1 GraceTime=10 DefaultTime=60 MaxTime=60 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF DefaultTime=60 MaxTime=INFINITE State=UP
"""


def gres_conf(folder: Path, settings: ClusterSettings) -> str:
    """gres.conf: stand-ins for GPUs must be device files; links to /dev/null are."""
    lines = ["AutoDetect=off"]
    if settings.gpus:
        nodes = f"n[1-{settings.nodes}]" if settings.nodes > 1 else "n1"
        files = f"gpu[0-{settings.gpus - 1}]" if settings.gpus > 1 else "gpu0"
        lines.append(f"NodeName={nodes} Name=gpu Type=fake File={folder}/device/{files}")
    return "\n".join(lines) + "\n"


def slurmdbd_conf(folder: Path, settings: ClusterSettings) -> str:
    """slurmdbd.conf: the accounting daemon in front of a database that only listens on a socket in the folder."""
    user = getpass.getuser()
    return f"""\
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={settings.accounting_port}
CommunicationParameters=NoInAddrAny
SlurmUser={user}
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={user}
StorageLoc=slurm_acct_db
CommitDelay=1
"""


def hosts(settings: ClusterSettings, hostname: str) -> str:
    """/etc/hosts inside the nodes."""
    lines = ["127.0.0.1 localhost", f"{settings.controller_address} {hostname}"]
    return "".join(f"{line}\n" for line in (*lines, *(f"{settings.node_address(name)} {name}" for name in settings.node_names)))
