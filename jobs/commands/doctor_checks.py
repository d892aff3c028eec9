"""The checks of `doctor`, judged by collected facts: one line each, with advice. Pure.

A problem keeps experiments from running. A note does not: something is slower, has no controller, or is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from jobs.experiment.config import Policy, SlurmSite
from jobs.text import counted

PYTHON = (3, 11)
LOW_BYTES = 20e9  # free; checkpoints and features of one experiment need tens of GB
FULL_BYTES = 1e9
SLOW_SECONDS = 0.5  # for writing, flushing, linking and renaming one small file
SKEW_NOTE = 2.0  # seconds between the clocks of this machine and of the file system
SKEW_PROBLEM = 30.0  # heartbeats of claims are compared with the local clock
SHARED_SYSTEMS = re.compile(
    r"nfs|lustre|gpfs|beegfs|cephfs|\bceph\b|pvfs|orangefs|panfs|smb|cifs|weka|vast|daos|juicefs|glusterfs|9p|afs|wekafs"
)
SHORT_KILL_WAIT = 10  # seconds


class Verdict(Enum):
    """Severity of a check."""

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
    """The interpreter, and packages installed and pinned."""

    version: tuple[int, int, int]
    wanted: Mapping[str, str]  # package -> pinned version
    needed: frozenset[str]  # packages that the project imports
    found: Mapping[str, str]  # package -> installed version


@dataclass(frozen=True)
class TorchFacts:
    """torch, imported in a separate process."""

    version: str = ""
    cuda: str = ""  # version it was built for
    gpus: tuple[str, ...] = ()
    nccl: bool = False
    gloo: bool = False
    error: str = ""
    waited: float = 0.0  # seconds without a result; the rest is unknown then
    models: str = ""  # why the wav2vec 2.0 of transformers cannot be imported; "": it can


@dataclass(frozen=True)
class FolderFacts:
    """The results folder."""

    path: str
    kind: str = ""  # type of the file system
    free: float = 0.0  # bytes
    error: str = ""  # of writing, linking or renaming a file
    seconds: float = 0.0  # taken by that
    skew: float = 0.0  # of the file system's clock against this machine's


@dataclass(frozen=True)
class Partition:
    """One Slurm partition."""

    name: str
    default: bool
    up: bool
    max_minutes: int  # 0: no limit
    default_minutes: int  # 0: as `max_minutes`
    gpus: str  # as sinfo prints it; "" for none


@dataclass(frozen=True)
class SlurmFacts:
    """Properties of the site, as Slurm's commands report them."""

    missing: tuple[str, ...] = ()  # commands not in PATH
    error: str = ""  # of the first query; then the rest is unknown
    version: str = ""
    config: Mapping[str, str] = field(default_factory=dict)
    partitions: tuple[Partition, ...] = ()
    submit_limit: int = 0
    accounting: bool = False  # sacct answers
    accepted: tuple[bool, str] = (True, "")  # whether a small job with the profile's options would be, and sbatch's message
    accepted_without_memory: bool = True
    refused: Mapping[str, str] = field(default_factory=dict)  # entry of `resources` whose request Slurm would reject -> sbatch's message


@dataclass(frozen=True)
class ProbeFacts:
    """Result of the probe job on a compute node."""

    submitted: str = ""  # error of the submission; "": submitted
    started: bool = False
    ended: bool = False  # it has left the queue
    waited: float = 0.0
    host: str = ""  # that answered
    sees_files: bool = False  # it read the file written here
    submits: bool = False
    said: str = ""  # message of sbatch there
    log: str = ""  # last lines of the job's output
    unseen: tuple[str, ...] = ()  # files named to it that it does not see
    unlisted: bool = False  # squeue does not list the job, although slurmctld has it in the queue


def judge_python(facts: PythonFacts) -> list[Check]:
    """Interpreter and packages."""
    shown = ".".join(map(str, facts.version))
    checks = [_ok("python", shown) if facts.version[:2] >= PYTHON else _problem("python", shown, "Python 3.11 or newer is needed")]
    missing = sorted(name for name in facts.needed if name not in facts.found)
    other = [
        f"{name} {facts.found[name]} (pinned {wanted})"
        for name, wanted in sorted(facts.wanted.items())
        if facts.found.get(name, wanted) != wanted
    ]
    if missing:
        checks.append(_problem("packages", f"missing: {', '.join(missing)}", "run `make setup`"))
    if other:
        checks.append(_note("packages", f"other versions than pinned: {', '.join(other)}", "`make setup` installs the pinned ones"))
    return checks if missing or other else [*checks, _ok("packages", f"{len(facts.found)} as pinned")]


def judge_torch(facts: TorchFacts, *, slurm: bool) -> list[Check]:
    """torch's build, GPUs and communication backends. On a login node (`slurm`) the absence of GPUs is no problem."""
    if facts.error:
        return [_problem("torch", facts.error, "run `make setup`")]
    if facts.waited:
        advice = "this machine is busy, or the environment is on a slow file system: every worker on such a machine starts as slowly"
        return [_note("torch", f"unknown: importing it takes more than {facts.waited:.0f} s", advice)]
    checks = [_ok("torch", f"{facts.version}, {f'built for CUDA {facts.cuda}' if facts.cuda else 'built for CPUs only'}")]
    if facts.gpus:
        checks.append(_ok("gpus", f"{len(facts.gpus)}: {', '.join(sorted(set(facts.gpus)))}"))
    elif slurm:
        text = "none on this machine; compute nodes may have some"
        build = "make setup TORCH=torch==VERSION with a CUDA build, if compute nodes have GPUs"
        checks.append(_ok("gpus", text) if facts.cuda else _note("gpus", text, build))
    else:
        checks.append(_note("gpus", "none: stages run on the CPU", "use small experiments, or a machine with GPUs"))
    if facts.nccl:
        checks.append(_ok("communication", "NCCL for GPUs" + (", gloo for CPUs" if facts.gloo else "")))
    elif facts.gloo and facts.cuda:
        needed = "install a torch build with NCCL: stages on several GPUs need it"
        checks.append(_problem("communication", "gloo for CPUs, no NCCL", needed))
    elif facts.gloo:
        checks.append(_ok("communication", "gloo for CPUs, no NCCL"))
    else:
        checks.append(_note("communication", "neither NCCL nor gloo: a stage is one process", "install another build of torch"))
    if "torchaudio" in facts.models:  # stages do without it (ser_core.models)
        advice = "`pip uninstall torchaudio`: it was built for another torch, and no stage needs it"
        checks.append(_note("transformers", f"your own programs cannot import its wav2vec 2.0: {facts.models}", advice))
    elif facts.models:
        checks.append(_problem("transformers", f"its wav2vec 2.0 cannot be imported: {facts.models}", "run `make setup`"))
    return checks


def judge_folder(facts: FolderFacts, *, slurm: bool) -> list[Check]:
    """The results folder: free space, writing, clock, and whether its file system is shared."""
    if facts.error:
        return [_problem("results", f"{facts.path}: {facts.error}", "choose another folder: --results DIR or SER_GRID_RESULTS")]
    space = f"{facts.path}: {facts.free / 1e9:.1f} GB free"
    low = _problem if facts.free < FULL_BYTES else _note
    advice = "make room: features and checkpoints of an experiment take tens of GB"
    checks = [_ok("results", space) if facts.free >= LOW_BYTES else low("results", space, advice)]
    written = f"written, flushed, linked and renamed in {facts.seconds * 1000:.0f} ms"
    slow = facts.seconds > SLOW_SECONDS
    checks.append(_note("records", written, "a slow file system: expect slow passes") if slow else _ok("records", written))
    checks.append(_clock(facts.skew))
    if slurm and not SHARED_SYSTEMS.search(facts.kind):
        text = f"{facts.kind or 'unknown file system'}: looks like a local disk of this machine"
        checks.append(_note("file system", text, "compute nodes must see it under the same path; the probe below tests that"))
    else:
        checks.append(_ok("file system", facts.kind or "unknown"))
    return checks


def _clock(skew: float) -> Check:
    text = f"the file system is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"
    if abs(skew) < SKEW_NOTE:
        return _ok("clock", text)
    worse = _problem if abs(skew) >= SKEW_PROBLEM else _note
    return worse("clock", text, "ask the administrator to synchronise the clocks: running workers may be counted as dead")


def judge_slurm(facts: SlurmFacts, site: SlurmSite, policy: Policy) -> list[Check]:
    """Commands, limits, accounting, partitions, preemption, and whether sbatch accepts the profile."""
    if facts.missing:
        return [_problem("slurm", f"not in PATH: {', '.join(facts.missing)}", "run this where Slurm's commands are, or --cluster local")]
    if facts.error:
        return [_problem("slurm", facts.error, "slurmctld does not answer: try again later, or ask the administrator")]
    return [
        _ok("slurm", f"{facts.version}, slurmctld answers"),
        _limits(facts, site),
        _accounting(facts),
        *_partitions(facts, site, policy),
        _interruptions(facts.config),
        _request(facts, site),
        *(
            _problem("request", f"Slurm rejects the request of {name}: {said}", f"lower resources.{name}")
            for name, said in facts.refused.items()
        ),
    ]


def _limits(facts: SlurmFacts, site: SlurmSite) -> Check:
    own = f", at most {site.max_submit} by slurm.max_submit" if site.max_submit else ""
    submit = f"{facts.submit_limit} by your account" if facts.submit_limit else "no limit by your account"
    size, jobs = (facts.config.get(key, "?") for key in ("MaxArraySize", "MaxJobCount"))
    return _ok("limits", f"MaxArraySize {size}, MaxJobCount {jobs}; jobs at once: {submit}{own}")


def _accounting(facts: SlurmFacts) -> Check:
    storage = facts.config.get("AccountingStorageType", "")
    if facts.accounting:
        return _ok("accounting", f"sacct answers ({storage or 'unknown storage'})")
    advice = "nothing to do: a job whose worker recorded no outcome (time limit, memory, node failure) counts as lost"
    return _note("accounting", f"none ({storage or 'sacct fails'})", advice)


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
            checks.append(_problem(name, text, f"{key}: one of {', '.join(sorted(known)) or 'none'}"))
            continue
        gpus = f", {partition.gpus}" if partition.gpus else ", no GPUs"
        text = f"{chosen}{' (default)' if chosen == default else ''}: time limit {_span(partition.max_minutes)}{gpus}"
        if not partition.up:
            checks.append(_problem(name, f"{text}; it is not up", f"{key}: another one, or wait"))
        elif name != "partition" and 0 < partition.max_minutes < policy.controller_minutes:
            advice = f"policy.controller_minutes={partition.max_minutes}, or another slurm.controller_partition"
            checks.append(_problem(name, f"{text}; policy.controller_minutes is {policy.controller_minutes}", advice))
        else:
            checks.append(_ok(name, text))
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
    text = f"{requeue}, {preempt}, KillWait {seconds[0] if seconds else '?'} s"
    if seconds is None or int(seconds[0]) >= SHORT_KILL_WAIT:
        return _ok("interruptions", text)
    return _note("interruptions", text, "a preempted stage may lose its work since the last regular checkpoint")


def _request(facts: SlurmFacts, site: SlurmSite) -> Check:
    accepted, said = facts.accepted
    if accepted:
        return _ok("request", f"Slurm would accept the profile{', --mem included' if site.memory_requests else ', without --mem'}")
    if site.memory_requests and facts.accepted_without_memory:
        return _problem("request", f"Slurm rejects --mem: {said}", "slurm.memory_requests=false")
    return _problem("request", f"Slurm rejects a small job: {said}", "correct the site profile (configs/site/, keys slurm.*)")


def judge_probe(facts: ProbeFacts, cron: str) -> list[Check]:
    """Whether compute nodes see the results folder and may submit jobs. `cron`: crontab line that replaces a controller inside Slurm."""
    if facts.submitted:
        return [_problem("probe", f"no job could be submitted: {facts.submitted}", "correct the site profile (keys slurm.*)")]
    if facts.unlisted:
        text = "squeue does not list your own job by its name, although it is in the queue: passes would not see what they submitted"
        return [_problem("queue", text, "ask the administrator what hides jobs from their owner, or choose another slurm.partition")]
    if not facts.host and not facts.ended:
        how = "has not ended" if facts.started else "did not start"
        text = f"not known yet: the probe job {how} within {facts.waited:.0f} s"
        return [_note("shared folder", text), _note("controller", text, "run doctor again when the queue is short")]
    if not facts.host:
        output = f"; its output ends: {facts.log}" if facts.log else ""
        advice = "compute nodes need the results folder under the same path, and the same Python (slurm.python, modules, prologue)"
        return [_problem("shared folder", f"the probe job ended without an answer here{output}", advice)]
    if facts.sees_files:
        seen = _ok("shared folder", f"{facts.host} and this machine see each other's files")
    else:
        seen = _problem("shared folder", f"{facts.host} does not see files written here", "choose a shared folder: --results DIR")
    if facts.submits:
        return [seen, _ok("controller", "compute nodes may submit: the controller runs inside Slurm, no login session is needed")]
    instead = f"keep `grid --wait` running, or add this line to your crontab: {cron}"
    return [seen, _note("controller", f"compute nodes cannot submit ({facts.said})", instead)]


def exit_code(checks: Sequence[Check]) -> int:
    """0, or 2 if there is a problem."""
    return 2 if _problems(checks) else 0


def check_lines(checks: Sequence[Check]) -> list[str]:
    """A line per check, with the advice below it, and the number of problems."""
    width = max((len(check.name) for check in checks), default=0)
    found: list[str] = []
    for check in checks:
        found.append(f"{check.verdict.value:<8}{check.name:<{width}}  {check.text}")
        if check.advice:
            found.append(f"{'':<8}{'':<{width}}  -> {check.advice}")
    return [*found, counted(_problems(checks), "problem")]


def checks_to_json(checks: Sequence[Check]) -> dict[str, object]:
    """Versioned JSON value."""
    return {"schema": 1, "problems": _problems(checks), "checks": [{**vars(check), "verdict": check.verdict.value} for check in checks]}


def _problems(checks: Sequence[Check]) -> int:
    return sum(check.verdict is Verdict.problem for check in checks)


def _ok(name: str, text: str) -> Check:
    return Check(name, Verdict.ok, text)


def _note(name: str, text: str, advice: str = "") -> Check:
    return Check(name, Verdict.note, text, advice)


def _problem(name: str, text: str, advice: str) -> Check:
    return Check(name, Verdict.problem, text, advice)
