"""Judges the facts that `doctor` collected: one line per fact, with advice. Pure.

A problem keeps experiments from running. A note does not, but something is slower, needs the user's attention, or is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from jobs.experiment.config import Policy, SlurmSite
from jobs.text import counted

PYTHON = (3, 11)
NOTE_BYTES = 20e9  # free space: checkpoints and features of one experiment
PROBLEM_BYTES = 1e9
SLOW_SECONDS = 0.5  # for one small file, written, flushed, linked and renamed
SKEW_NOTE = 2.0  # seconds between the clocks of this machine and of the file system
SKEW_PROBLEM = 30.0  # heartbeats (times of files) are compared with the clock
SHARED_SYSTEMS = re.compile(
    r"nfs|lustre|gpfs|beegfs|cephfs|\bceph\b|pvfs|orangefs|panfs|smb|cifs|weka|vast|daos|juicefs|glusterfs|9p|afs|wekafs"
)
CORRECT_PROFILE = "correct the site profile"
SHORT_KILL_WAIT = 10  # seconds from SIGTERM to SIGKILL, too few for a checkpoint


class Verdict(Enum):
    """What a fact means for experiments."""

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
    """The interpreter, and the packages as installed and as pinned."""

    version: tuple[int, int, int]
    wanted: Mapping[str, str]  # package -> pinned version
    needed: frozenset[str]  # packages that the project imports
    found: Mapping[str, str]  # package -> installed version


@dataclass(frozen=True)
class TorchFacts:
    """The build of torch and what it finds on this machine."""

    version: str = ""
    cuda: str = ""  # version that it was built for; "": a CPU build
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
    seconds: float = 0.0  # that this took
    skew: float = 0.0  # seconds; the file system's clock minus this machine's


@dataclass(frozen=True)
class Partition:
    """One partition of Slurm."""

    name: str
    default: bool
    up: bool
    max_minutes: int  # 0: no limit
    gpus: str  # GRES as sinfo prints it; "" for none


@dataclass(frozen=True)
class SlurmFacts:
    """Commands, configuration and limits of the site's Slurm."""

    missing: tuple[str, ...] = ()  # commands that are not in PATH
    error: str = ""  # why slurmctld did not answer
    version: str = ""
    config: Mapping[str, str] = field(default_factory=dict)
    partitions: tuple[Partition, ...] = ()
    submit_limit: int = 0  # jobs per user by account and QOS; 0: no limit
    accounting: bool = False  # sacct answers
    accepted: tuple[bool, str] = (True, "")  # `sbatch --test-only` with the profile: accepted, message
    accepted_without_memory: bool = True


@dataclass(frozen=True)
class ProbeFacts:
    """Result of a small job on a compute node."""

    problem: str = ""  # why no job could be submitted
    started: bool = False
    ended: bool = False  # it has left the queue
    waited: float = 0.0  # seconds
    host: str = ""  # compute node that answered; "": no answer
    sees_files: bool = False  # it read what was written here
    submits: bool = False  # `sbatch --test-only` works there
    message: str = ""  # of that sbatch
    log: str = ""  # end of the job's output


def _ok(name: str, text: str) -> Check:
    return Check(name, Verdict.ok, text)


def _note(name: str, text: str, advice: str = "") -> Check:
    return Check(name, Verdict.note, text, advice)


def _problem(name: str, text: str, advice: str) -> Check:
    return Check(name, Verdict.problem, text, advice)


def judge_python(facts: PythonFacts) -> list[Check]:
    """Interpreter and packages."""
    version = ".".join(map(str, facts.version))
    recent = facts.version[:2] >= PYTHON
    checks = [_ok("python", version) if recent else _problem("python", version, "Python 3.11 or newer is needed")]
    missing = sorted(name for name in facts.needed if name not in facts.found)
    installed = ((name, facts.found.get(name, wanted), wanted) for name, wanted in sorted(facts.wanted.items()))
    other = [f"{name} {found} (pinned {wanted})" for name, found, wanted in installed if found != wanted]
    if missing:
        checks.append(_problem("packages", f"missing: {', '.join(missing)}", "run `make setup`"))
    if other:
        checks.append(_note("packages", f"other versions than pinned: {', '.join(other)}", "`make setup` installs the pinned ones"))
    return checks if missing or other else [*checks, _ok("packages", f"{len(facts.found)} as pinned")]


def judge_torch(facts: TorchFacts, *, slurm: bool) -> list[Check]:
    """torch's build, GPUs, communication. Missing GPUs are no fault with `slurm`: this is then a login node."""
    if facts.error:
        return [_problem("torch", facts.error, "run `make setup`")]
    checks = [_ok("torch", f"{facts.version}, built for {f'CUDA {facts.cuda}' if facts.cuda else 'CPUs only'}")]
    if facts.gpus:
        checks.append(_ok("gpus", f"{len(facts.gpus)}: {', '.join(sorted(set(facts.gpus)))}"))
    elif slurm:
        text, advice = "none on this machine; compute nodes may have some", "make setup TORCH=torch==VERSION with a CUDA build, if they do"
        checks.append(_ok("gpus", text) if facts.cuda else _note("gpus", text, advice))
    else:
        checks.append(_note("gpus", "none: stages run on the CPU", "use small experiments, or a machine with GPUs"))
    if facts.nccl:
        checks.append(_ok("communication", "NCCL for GPUs" + (", gloo for CPUs" if facts.gloo else "")))
    elif facts.gloo and facts.cuda:
        advice = "install a torch build with NCCL: stages on several GPUs need it"
        checks.append(_problem("communication", "gloo for CPUs, no NCCL", advice))
    elif facts.gloo:
        checks.append(_ok("communication", "gloo for CPUs, no NCCL"))
    else:
        checks.append(_note("communication", "neither NCCL nor gloo: a stage is one process", "install another build of torch"))
    return checks


def judge_folder(facts: FolderFacts, *, slurm: bool) -> list[Check]:
    """Free space, writing, clock, and whether compute nodes are likely to see the folder."""
    if facts.error:
        return [_problem("results", f"{facts.path}: {facts.error}", "choose another folder: --results DIR or SER_GRID_RESULTS")]
    space, advice = f"{facts.path}: {facts.free / 1e9:.1f} GB free", "make room: features and checkpoints of an experiment take tens of GB"
    if facts.free < NOTE_BYTES:
        checks = [(_problem if facts.free < PROBLEM_BYTES else _note)("results", space, advice)]
    else:
        checks = [_ok("results", space)]
    text = f"written, flushed, linked and renamed in {facts.seconds * 1000:.0f} ms"
    slow = facts.seconds > SLOW_SECONDS
    checks.append(_note("records", text, "a slow file system: expect slow passes") if slow else _ok("records", text))
    checks.append(_clock(facts.skew))
    if slurm and SHARED_SYSTEMS.search(facts.kind) is None:
        text = f"{facts.kind or 'unknown file system'}: looks like a local disk of this machine"
        checks.append(_note("file system", text, "compute nodes must see it under the same path; see the probe below"))
    else:
        checks.append(_ok("file system", facts.kind or "unknown"))
    return checks


def _clock(skew: float) -> Check:
    text = f"the file system is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"
    if abs(skew) < SKEW_NOTE:
        return _ok("clock", text)
    advice = "ask the administrator to synchronise clocks: living workers may be taken for dead"
    return (_problem if abs(skew) >= SKEW_PROBLEM else _note)("clock", text, advice)


def judge_slurm(facts: SlurmFacts, site: SlurmSite, policy: Policy) -> list[Check]:
    """Commands, limits, accounting, partitions, interruptions, and whether Slurm accepts the profile."""
    if facts.missing:
        advice = "run this where Slurm's commands are; --cluster local needs none"
        return [_problem("slurm", f"not in PATH: {', '.join(facts.missing)}", advice)]
    if facts.error:
        return [_problem("slurm", facts.error, "slurmctld does not answer: try again later, or ask the administrator")]
    return [
        _ok("slurm", f"{facts.version}, slurmctld answers"),
        _limits(facts, site),
        _accounting(facts),
        *_partitions(facts, site, policy),
        _interruptions(facts.config),
        _request(facts, site),
    ]


def _limits(facts: SlurmFacts, site: SlurmSite) -> Check:
    own = f", at most {site.max_submit} by slurm.max_submit" if site.max_submit else ""
    submit = f"{facts.submit_limit} by your account" if facts.submit_limit else "no limit by your account"
    array, jobs = (facts.config.get(key, "?") for key in ("MaxArraySize", "MaxJobCount"))
    return _ok("limits", f"MaxArraySize {array}, MaxJobCount {jobs}; jobs at once: {submit}{own}")


def _accounting(facts: SlurmFacts) -> Check:
    storage = facts.config.get("AccountingStorageType", "")
    if facts.accounting:
        return _ok("accounting", f"sacct answers ({storage or 'unknown storage'})")
    advice = "nothing to do: the cause of a job's death (time limit, memory, node) stays unknown, and the job counts as lost"
    return _note("accounting", f"none ({storage or 'sacct fails'})", advice)


def _partitions(facts: SlurmFacts, site: SlurmSite, policy: Policy) -> list[Check]:
    default = next((partition.name for partition in facts.partitions if partition.default), "")
    checks = [_partition("partition", "slurm.partition", site.partition or default, facts.partitions, 0)]
    if policy.controller:
        chosen = site.controller_partition or site.partition or default
        minutes = policy.controller_minutes
        checks.append(_partition("controller partition", "slurm.controller_partition", chosen, facts.partitions, minutes))
    return checks


def _partition(name: str, key: str, chosen: str, partitions: Sequence[Partition], controller_minutes: int) -> Check:
    """Whether the partition exists, is up, and allows `controller_minutes`."""
    partition = next((each for each in partitions if each.name == chosen), None)
    if partition is None:
        text = f"there is no {chosen!r}" if chosen else "the site has no default"
        return _problem(name, text, f"{key}: one of {', '.join(sorted(each.name for each in partitions)) or 'none'}")
    default = " (default)" if partition.default else ""
    text = f"{chosen}{default}: time limit {_span(partition.max_minutes)}, {partition.gpus or 'no GPUs'}"
    if not partition.up:
        return _problem(name, f"{text}; it is not up", f"{key}: another one, or wait")
    if 0 < partition.max_minutes < controller_minutes:
        advice = f"policy.controller_minutes={partition.max_minutes}, or another {key}"
        return _problem(name, f"{text}; policy.controller_minutes is {controller_minutes}", advice)
    return _ok(name, text)


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
    text = f"{requeue}, {preempt}, KillWait {seconds[0] if seconds else '?'} s"
    if seconds is not None and int(seconds[0]) < SHORT_KILL_WAIT:
        return _note("interruptions", text, "a preempted stage may lose its work since the last regular checkpoint")
    return _ok("interruptions", text)


def _request(facts: SlurmFacts, site: SlurmSite) -> Check:
    accepted, message = facts.accepted
    if accepted:
        return _ok("request", f"Slurm accepts the profile, --mem {'included' if site.memory_requests else 'left out'}")
    if site.memory_requests and facts.accepted_without_memory:
        return _problem("request", f"Slurm rejects --mem: {message}", "slurm.memory_requests=false")
    return _problem("request", f"Slurm rejects a small job: {message}", f"{CORRECT_PROFILE} (configs/site/, keys slurm.*)")


def judge_probe(facts: ProbeFacts, cron: str) -> list[Check]:
    """Whether a compute node sees the results folder and may submit; `cron`: crontab line that replaces the controller inside Slurm."""
    if facts.problem:
        return [_problem("probe", f"no job could be submitted: {facts.problem}", f"{CORRECT_PROFILE} (keys slurm.*)")]
    if not facts.host and not facts.ended:
        text = f"not known yet: the probe job {'has not ended' if facts.started else 'did not start'} within {facts.waited:.0f} s"
        return [_note("shared folder", text), _note("controller", text, "run doctor again when the queue is short")]
    if not facts.host:
        output = f"; its output ends: {facts.log}" if facts.log else ""
        advice = "compute nodes must see the results folder under the same path and start the same Python (slurm.python, modules, prologue)"
        return [_problem("shared folder", f"the probe job ended without an answer here{output}", advice)]
    if facts.sees_files:
        folder = _ok("shared folder", f"{facts.host} and this machine see each other's files")
    else:
        text = f"{facts.host} does not see what is written here"
        folder = _problem("shared folder", text, "choose a shared folder: --results DIR")
    if facts.submits:
        return [folder, _ok("controller", "compute nodes may submit: the controller runs inside Slurm, no user has to stay logged in")]
    advice = f"keep `grid --wait` running, or put this into your crontab: {cron}"
    return [folder, _note("controller", f"compute nodes cannot submit ({facts.message})", advice)]


def exit_code(checks: Sequence[Check]) -> int:
    """2 if there is a problem, else 0."""
    return 2 if _problems(checks) else 0


def check_lines(checks: Sequence[Check]) -> list[str]:
    """One line per check, its advice below it, and the number of problems."""
    width = max((len(check.name) for check in checks), default=0)
    found: list[str] = []
    for check in checks:
        found.append(f"{check.verdict.value:<8}{check.name:<{width}}  {check.text}")
        if check.advice:
            found.append(f"{'':<8}{'':<{width}}  -> {check.advice}")
    return [*found, counted(_problems(checks), "problem")]


def checks_to_json(checks: Sequence[Check]) -> dict[str, object]:
    """The checks for programs."""
    values = [{"name": check.name, "verdict": check.verdict.value, "text": check.text, "advice": check.advice} for check in checks]
    return {"schema": 1, "problems": _problems(checks), "checks": values}


def _problems(checks: Sequence[Check]) -> int:
    return sum(check.verdict is Verdict.problem for check in checks)
