"""What `doctor` makes of what it found: one line a fact, and what to do about it. Pure.

A problem keeps experiments from running; a note is worth knowing: something runs slower, is not looked after, or is not known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from jobs.experiment.config import Policy, SlurmSite

PYTHON = (3, 11)
LITTLE_BYTES = 20e9  # checkpoints and features of one experiment
NO_BYTES = 1e9
SLOW_SECONDS = 0.5  # one small file written, flushed, linked and renamed
SKEW_NOTE = 2.0  # seconds between this clock and the file system's
SKEW_PROBLEM = 30.0  # the heartbeat of a claim is compared with the clock
SHARED_SYSTEMS = re.compile(
    r"nfs|lustre|gpfs|beegfs|cephfs|\bceph\b|pvfs|orangefs|panfs|smb|cifs|weka|vast|daos|juicefs|glusterfs|9p|afs|wekafs"
)
SHORT_KILL_WAIT = 10


class Verdict(Enum):
    """How a fact is meant."""

    ok = "ok"
    note = "note"
    problem = "problem"


@dataclass(frozen=True)
class Check:
    """One line of a report."""

    name: str
    verdict: Verdict
    text: str
    advice: str = ""


@dataclass(frozen=True)
class PythonFacts:
    """The interpreter and the packages, as they are and as they are pinned."""

    version: tuple[int, int, int]
    wanted: Mapping[str, str]  # package -> pinned version
    needed: frozenset[str]  # packages that the project imports
    found: Mapping[str, str]  # package -> installed version


@dataclass(frozen=True)
class TorchFacts:
    """torch, asked in a process of its own."""

    version: str = ""
    cuda: str = ""  # version that it was built for
    gpus: tuple[str, ...] = ()
    nccl: bool = False
    gloo: bool = False
    error: str = ""


@dataclass(frozen=True)
class FolderFacts:
    """The results folder."""

    path: str
    kind: str = ""  # type of the file system
    free: float = 0.0  # bytes
    error: str = ""  # of writing, linking, renaming
    seconds: float = 0.0  # that it took
    skew: float = 0.0  # of the file system's clock against this machine's


@dataclass(frozen=True)
class Partition:
    """One partition."""

    name: str
    default: bool
    up: bool
    max_minutes: int  # 0: no limit
    default_minutes: int  # 0: as `max_minutes`
    gpus: str  # as sinfo prints it; "" for none


@dataclass(frozen=True)
class SlurmFacts:
    """What Slurm says of the site."""

    missing: tuple[str, ...] = ()  # commands
    error: str = ""  # why nothing more is known
    version: str = ""
    config: Mapping[str, str] = field(default_factory=dict)
    partitions: tuple[Partition, ...] = ()
    submit_limit: int = 0
    accounting: bool = False  # sacct answers
    accepted: tuple[bool, str] = (True, "")  # a job as the profile asks for it
    accepted_without_memory: bool = True


@dataclass(frozen=True)
class ProbeFacts:
    """What a small job found on a compute node."""

    submitted: str = ""  # why there was no job
    started: bool = False
    ended: bool = False  # it has left the queue
    waited: float = 0.0
    host: str = ""  # of its answer
    sees_files: bool = False  # it read what was written here
    submits: bool = False
    said: str = ""  # by sbatch there
    log: str = ""  # last lines of the job's output


def judge_python(facts: PythonFacts) -> list[Check]:
    """Interpreter and packages."""
    shown = ".".join(map(str, facts.version))
    fine = facts.version[:2] >= PYTHON
    checks = [Check("python", Verdict.ok, shown) if fine else Check("python", Verdict.problem, shown, "Python 3.11 or newer is needed")]
    missing = sorted(name for name in facts.needed if name not in facts.found)
    other = [
        f"{name} {facts.found[name]} (pinned {wanted})"
        for name, wanted in sorted(facts.wanted.items())
        if facts.found.get(name, wanted) != wanted
    ]
    if missing:
        checks.append(Check("packages", Verdict.problem, f"missing: {', '.join(missing)}", "run `make setup`"))
    if other:
        checks.append(
            Check("packages", Verdict.note, "other versions than pinned: " + ", ".join(other), "`make setup` installs the pinned ones")
        )
    if not missing and not other:
        checks.append(Check("packages", Verdict.ok, f"{len(facts.found)} as pinned"))
    return checks


def judge_torch(facts: TorchFacts, *, slurm: bool) -> list[Check]:
    """torch's build, GPUs, communication. On a login node the absence of GPUs says nothing."""
    if facts.error:
        return [Check("torch", Verdict.problem, facts.error, "run `make setup`")]
    checks = [Check("torch", Verdict.ok, f"{facts.version}, {f'built for CUDA {facts.cuda}' if facts.cuda else 'built for CPUs only'}")]
    if facts.gpus:
        checks.append(Check("gpus", Verdict.ok, f"{len(facts.gpus)}: {', '.join(sorted(set(facts.gpus)))}"))
    elif slurm:
        advice = "" if facts.cuda else "make setup TORCH=torch==VERSION with a CUDA build, if compute nodes have GPUs"
        checks.append(
            Check("gpus", Verdict.note if not facts.cuda else Verdict.ok, "none on this machine; compute nodes may have some", advice)
        )
    else:
        checks.append(Check("gpus", Verdict.note, "none: stages run on the CPU", "use small experiments, or a machine with GPUs"))
    if facts.nccl:
        checks.append(Check("communication", Verdict.ok, "NCCL for GPUs" + (", gloo for CPUs" if facts.gloo else "")))
    elif facts.gloo:
        wanted = bool(facts.cuda)
        advice = "install a torch build with NCCL: stages on several GPUs need it" if wanted else ""
        checks.append(Check("communication", Verdict.problem if wanted else Verdict.ok, "gloo for CPUs, no NCCL", advice))
    else:
        checks.append(
            Check("communication", Verdict.note, "neither NCCL nor gloo: a stage is one process", "install another build of torch")
        )
    return checks


def judge_folder(facts: FolderFacts, *, slurm: bool) -> list[Check]:
    """Space, writing, clock, and whether other machines are likely to see it."""
    name = "results"
    if facts.error:
        return [Check(name, Verdict.problem, f"{facts.path}: {facts.error}", "choose another folder: --results DIR or SER_GRID_RESULTS")]
    checks: list[Check] = []
    space = f"{facts.path}: {facts.free / 1e9:.1f} GB free"
    if facts.free < LITTLE_BYTES:
        verdict = Verdict.problem if facts.free < NO_BYTES else Verdict.note
        checks.append(Check(name, verdict, space, "make room: features and checkpoints of an experiment take tens of GB"))
    else:
        checks.append(Check(name, Verdict.ok, space))
    slow = facts.seconds > SLOW_SECONDS
    checks.append(
        Check(
            "records",
            Verdict.note if slow else Verdict.ok,
            f"written, flushed, linked and renamed in {facts.seconds * 1000:.0f} ms",
            "a slow file system: expect slow passes" if slow else "",
        )
    )
    checks.append(_clock(facts.skew))
    shared = SHARED_SYSTEMS.search(facts.kind) is not None
    if slurm and not shared:
        text = f"{facts.kind or 'unknown file system'}: looks like a disk of this machine alone"
        checks.append(Check("file system", Verdict.note, text, "compute nodes must see it under the same path; the probe below tells"))
    else:
        checks.append(Check("file system", Verdict.ok, facts.kind or "unknown"))
    return checks


def _clock(skew: float) -> Check:
    text = f"the file system is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"
    if abs(skew) < SKEW_NOTE:
        return Check("clock", Verdict.ok, text)
    verdict = Verdict.problem if abs(skew) >= SKEW_PROBLEM else Verdict.note
    return Check("clock", verdict, text, "ask the administrator to synchronise clocks: living workers may be taken for dead")


def judge_slurm(facts: SlurmFacts, site: SlurmSite, policy: Policy) -> list[Check]:
    """Commands, limits, accounting, partitions, interruptions, and whether the profile is accepted."""
    if facts.missing:
        advice = "run this where Slurm's commands are; --cluster local needs none"
        return [Check("slurm", Verdict.problem, f"not in PATH: {', '.join(facts.missing)}", advice)]
    if facts.error:
        return [Check("slurm", Verdict.problem, facts.error, "slurmctld does not answer: try again later, or ask the administrator")]
    return [
        Check("slurm", Verdict.ok, f"{facts.version}, slurmctld answers"),
        _limits(facts, site),
        _accounting(facts),
        *_partitions(facts, site, policy),
        _interruptions(facts.config),
        _request(facts, site),
    ]


def _limits(facts: SlurmFacts, site: SlurmSite) -> Check:
    own = f", at most {site.max_submit} by slurm.max_submit" if site.max_submit else ""
    submit = f"{facts.submit_limit} by your account" if facts.submit_limit else "no limit by your account"
    config = facts.config
    text = f"MaxArraySize {config.get('MaxArraySize', '?')}, MaxJobCount {config.get('MaxJobCount', '?')}; jobs at once: {submit}{own}"
    return Check("limits", Verdict.ok, text)


def _accounting(facts: SlurmFacts) -> Check:
    storage = facts.config.get("AccountingStorageType", "")
    if facts.accounting:
        return Check("accounting", Verdict.ok, f"sacct answers ({storage or 'unknown storage'})")
    advice = "nothing to do: how a job ended that left no word (time limit, memory, node) cannot be told, and counts as lost"
    return Check("accounting", Verdict.note, f"none ({storage or 'sacct fails'})", advice)


def _partitions(facts: SlurmFacts, site: SlurmSite, policy: Policy) -> list[Check]:
    known = {partition.name: partition for partition in facts.partitions}
    default = next((partition.name for partition in facts.partitions if partition.default), "")
    checks: list[Check] = []
    asked = [("partition", site.partition or default, "slurm.partition")]
    if policy.controller:
        asked.append(("controller partition", site.controller_partition or site.partition or default, "slurm.controller_partition"))
    for name, chosen, key in asked:
        partition = known.get(chosen)
        if partition is None:
            text = f"there is no {chosen!r}" if chosen else "the site has no default"
            checks.append(Check(name, Verdict.problem, text, f"{key}: one of {', '.join(sorted(known)) or 'none'}"))
            continue
        limit = f"time limit {_span(partition.max_minutes)}"
        gpus = f", {partition.gpus}" if partition.gpus else ", no GPUs"
        text = f"{chosen}{' (default)' if chosen == default else ''}: {limit}{gpus}"
        too_long = name != "partition" and 0 < partition.max_minutes < policy.controller_minutes
        if not partition.up:
            checks.append(Check(name, Verdict.problem, f"{text}; it is not up", f"{key}: another one, or wait"))
        elif too_long:
            advice = f"policy.controller_minutes={partition.max_minutes}, or another slurm.controller_partition"
            checks.append(Check(name, Verdict.problem, f"{text}; policy.controller_minutes is {policy.controller_minutes}", advice))
        else:
            checks.append(Check(name, Verdict.ok, text))
    return checks


def _span(minutes: int) -> str:
    if not minutes:
        return "none"
    days, rest = divmod(minutes, 24 * 60)
    return f"{days} d" + (f" {rest / 60:g} h" if rest else "") if days else f"{minutes / 60:g} h" if minutes >= 60 else f"{minutes} min"


def _interruptions(config: Mapping[str, str]) -> Check:
    requeue = {"1": "jobs may be requeued", "0": "jobs are not requeued"}.get(config.get("JobRequeue", ""), "requeueing unknown")
    mode, kind = config.get("PreemptMode", "?"), config.get("PreemptType", "?")
    preempt = "no preemption" if kind.endswith("/none") or kind == "(null)" else f"preemption {mode} ({kind})"
    seconds = re.match(r"\d+", config.get("KillWait", ""))
    short = seconds is not None and int(seconds[0]) < SHORT_KILL_WAIT
    text = f"{requeue}, {preempt}, KillWait {seconds[0] if seconds else '?'} s"
    advice = "a preempted stage may lose what it did since its last regular checkpoint" if short else ""
    return Check("interruptions", Verdict.note if short else Verdict.ok, text, advice)


def _request(facts: SlurmFacts, site: SlurmSite) -> Check:
    accepted, said = facts.accepted
    if accepted:
        return Check(
            "request", Verdict.ok, f"Slurm would accept the profile{', --mem included' if site.memory_requests else ', without --mem'}"
        )
    if site.memory_requests and facts.accepted_without_memory:
        return Check("request", Verdict.problem, f"Slurm declines --mem: {said}", "slurm.memory_requests=false")
    return Check("request", Verdict.problem, f"Slurm declines a small job: {said}", "mend the site profile (configs/site/, keys slurm.*)")


def judge_probe(facts: ProbeFacts, cron: str) -> list[Check]:
    """What a compute node sees and may do; `cron` is what stands in for a controller inside Slurm."""
    instead = f"keep `grid --wait` running, or put this into your crontab: {cron}"
    if facts.submitted:
        return [Check("probe", Verdict.problem, f"no job could be submitted: {facts.submitted}", "mend the site profile (keys slurm.*)")]
    if not facts.host and not facts.ended:
        how = "has not ended" if facts.started else "did not start"
        text = f"not known yet: the probe job {how} within {facts.waited:.0f} s"
        return [
            Check("shared folder", Verdict.note, text),
            Check("controller", Verdict.note, text, "run doctor again when the queue is short"),
        ]
    if not facts.host:
        said = f"; its output ends: {facts.log}" if facts.log else ""
        advice = (
            "compute nodes must see the results folder under the same path, and start the same Python (slurm.python, modules, prologue)"
        )
        return [Check("shared folder", Verdict.problem, f"the probe job ended without an answer here{said}", advice)]
    where = f"{facts.host} and this machine"
    seen = Check("shared folder", Verdict.ok, f"{where} see each other's files")
    if not facts.sees_files:
        seen = Check(
            "shared folder", Verdict.problem, f"{facts.host} does not see what is written here", "choose a shared folder: --results DIR"
        )
    if facts.submits:
        return [
            seen,
            Check("controller", Verdict.ok, "compute nodes may submit: the controller runs inside Slurm, nobody need stay logged in"),
        ]
    return [seen, Check("controller", Verdict.note, f"compute nodes cannot submit ({facts.said})", instead)]


def exit_code(checks: Sequence[Check]) -> int:
    """0, or 2 if there is a problem that the user must mend."""
    return 2 if any(check.verdict is Verdict.problem for check in checks) else 0


def check_lines(checks: Sequence[Check]) -> list[str]:
    """A line for every check, what to do below it."""
    width = max((len(check.name) for check in checks), default=0)
    found: list[str] = []
    for check in checks:
        found.append(f"{check.verdict.value:<8}{check.name:<{width}}  {check.text}")
        if check.advice:
            found.append(f"{'':<8}{'':<{width}}  -> {check.advice}")
    problems = sum(check.verdict is Verdict.problem for check in checks)
    return [*found, f"{problems} problems" if problems != 1 else "1 problem"]


def checks_to_json(checks: Sequence[Check]) -> dict[str, object]:
    """For programs."""
    values = [{"name": check.name, "verdict": check.verdict.value, "text": check.text, "advice": check.advice} for check in checks]
    return {"schema": 1, "problems": sum(check.verdict is Verdict.problem for check in checks), "checks": values}
