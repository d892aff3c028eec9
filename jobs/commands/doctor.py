"""`doctor`: collect facts about this machine and the Slurm site; jobs.commands.doctor_checks judges them.

On Slurm a probe job of one minute, submitted with the options of a controller job, tests on a compute node whether the results folder is
visible there and whether compute nodes may submit jobs.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from jobs.commands.doctor_checks import (
    Check,
    FolderFacts,
    Partition,
    ProbeFacts,
    PythonFacts,
    SlurmFacts,
    TorchFacts,
    judge_folder,
    judge_probe,
    judge_python,
    judge_slurm,
    judge_torch,
)
from jobs.commands.needs import Needs, judge_files, judge_needs
from jobs.errors import SlurmUnavailableError, UsageError
from jobs.experiment.config import Experiment, SlurmSite, resources_of
from jobs.slurm.client import SlurmClient
from jobs.slurm.parse import Refusal, is_final
from jobs.slurm.script import ArrayJob, Job, LinkJob, launcher_python
from jobs.slurm.startable import accepted
from jobs.store.layout import Layout, shared_path
from jobs.store.records import create_json, read_json, write_json
from jobs.text import one_line

PROBE_SECONDS = 60.0  # waited for the probe job to start
LAG_SECONDS = 10.0  # for which a shared file system may not show the answer of an ended job
POLL_SECONDS = 0.5
TORCH_SECONDS = 180.0
_NOTHING: Mapping[str, Any] = {"command": ("true",), "description": "/", "folder": "/", "output": "/dev"}  # of a job that is not submitted
COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo", "srun")
TORCH = """
import json, torch, torch.distributed as d
models = ""
try:
    from transformers import Wav2Vec2ForPreTraining
except Exception as error:
    models = f"{type(error).__name__}: {error}".splitlines()[0]
there = d.is_available()
cuda = torch.cuda.is_available()
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
nccl = there and d.is_nccl_available()
print(json.dumps([torch.__version__, torch.version.cuda or "", names, nccl, there and d.is_gloo_available(), models]))
"""
# Executed on a compute node, standard library only; answer.json is renamed into place, so that it is complete or absent.
PROBE = """
import json, os, socket, subprocess, sys, tempfile
folder = os.path.dirname(os.path.abspath(__file__))
try:
    with open(os.path.join(folder, "question.json")) as file:
        read = json.load(file)
    question, unseen = read["token"], [path for path in read["files"] if not os.path.exists(path)]
except (OSError, ValueError, KeyError):
    question, unseen = "", []
kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_")) or name == "SLURM_CONF"}
try:
    done = subprocess.run(["sbatch", "--test-only", *sys.argv[1:], "--wrap=true"], env=kept, timeout=25, capture_output=True, text=True)
    submits, said = done.returncode == 0, " ".join(done.stderr.split())
except (OSError, subprocess.TimeoutExpired) as error:
    submits, said = False, str(error)
answer = {"token": question, "host": socket.gethostname(), "submits": submits, "said": said, "unseen": unseen}
with open(os.path.join(folder, ".answer"), "w") as file:
    json.dump(answer, file)
    file.flush()
    os.fsync(file.fileno())
os.rename(os.path.join(folder, ".answer"), os.path.join(folder, "answer.json"))
"""


def examine(
    results: Path,
    *,
    source: Path,
    experiment: Experiment | None = None,
    client: SlurmClient | None = None,
    probe_seconds: float = PROBE_SECONDS,
    tell: Callable[[str], None] = lambda text: None,
    needs: Needs | None = None,
) -> tuple[Check, ...]:
    """All checks of this machine and, given an experiment with its site profile, of Slurm. `tell` gets a line before what takes long.

    `needs`: what the experiment's stages need, to be checked here and, by the probe job, on a compute node.
    """
    slurm = experiment is not None
    checks = judge_python(collect_python(source / "constraints.txt", source / "requirements.txt"))
    checks += judge_torch(collect_torch(), slurm=slurm)
    folder = collect_folder(results)
    checks += judge_folder(folder, slurm=slurm)
    checks += judge_needs(needs) if needs is not None else []
    if experiment is None:
        return tuple(checks)
    client = client or SlurmClient()
    facts = collect_slurm(client, experiment.slurm, experiment, needs.stages if needs is not None else ())
    checks += judge_slurm(facts, experiment.slurm, experiment.policy)
    if not facts.missing and not facts.error and not folder.error:
        tell(f"a probe job of one minute; waiting at most {probe_seconds:.0f} s for it")
        cron = cron_line(Layout(results, "EXPERIMENT"), folder=source, environment=cron_environment())
        answer = probe(client, experiment.slurm, results, seconds=probe_seconds, files=needs.files if needs is not None else ())
        checks += [*judge_probe(answer, cron), *judge_files(answer.host, answer.unseen)]
    return tuple(checks)


def cron_environment() -> dict[str, str]:
    """Environment that Slurm's commands need here and cron does not set."""
    found: dict[str, str] = {}
    place = shutil.which("sbatch")
    if place is not None and str(Path(place).parent) not in ("/usr/bin", "/bin"):
        found["PATH"] = f"{Path(place).parent}:/usr/bin:/bin"
    if "SLURM_CONF" in os.environ:
        found["SLURM_CONF"] = os.environ["SLURM_CONF"]
    return found


def collect_python(constraints: Path, requirements: Path) -> PythonFacts:
    """Installed packages, and those that the files pin or require; a missing file names none."""
    wanted = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", _text(constraints), re.MULTILINE))
    needed = frozenset(re.findall(r"^([A-Za-z0-9_.-]+)", _text(requirements), re.MULTILINE))
    found: dict[str, str] = {}
    for name in {*wanted, *needed}:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    version = sys.version_info
    return PythonFacts((version.major, version.minor, version.micro), wanted, needed, found)


def collect_torch() -> TorchFacts:
    """torch, imported in a separate process because it takes seconds and much memory."""
    try:
        done = subprocess.run([sys.executable, "-c", TORCH], capture_output=True, text=True, timeout=TORCH_SECONDS, check=False)
        version, cuda, gpus, nccl, gloo, models = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return TorchFacts(waited=TORCH_SECONDS)
    except (ValueError, IndexError):
        return TorchFacts(error=f"torch cannot be imported: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return TorchFacts(version, cuda, tuple(gpus), nccl, gloo, models=models)


def collect_folder(results: Path, mounts: Path = Path("/proc/mounts")) -> FolderFacts:
    """The file operations that records need, tried in a temporary folder."""
    path = shared_path(results)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=path) as name:
            folder = Path(name)
            start, clock = time.monotonic(), time.time()
            write_json(folder / "renamed.json", {})
            linked = create_json(folder / "linked.json", {})
            again = create_json(folder / "linked.json", {})
            seconds = time.monotonic() - start
            skew = (folder / "renamed.json").stat().st_mtime - (clock + seconds / 2)
        error = "" if linked and not again else "a second hard link to the same name does not fail"
        free = float(shutil.disk_usage(path).free)
    except OSError as problem:
        return FolderFacts(str(path), error=f"{problem.strerror or problem}")
    return FolderFacts(str(path), file_system(path, _text(mounts)), free, error, seconds, skew)


def file_system(path: Path, mounts: str) -> str:
    """Type of the file system of a path, by the text of /proc/mounts; "" if unknown. Pure."""
    best, kind = -1, ""
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[1]))
        if (path == point or point in path.parents) and len(point.parts) >= best:
            best, kind = len(point.parts), fields[2]
    return kind


def collect_slurm(client: SlurmClient, site: SlurmSite, experiment: Experiment | None = None, stages: Sequence[str] = ()) -> SlurmFacts:
    """Properties of the site by Slurm's commands, and whether sbatch would accept a small job with the profile's options.

    `experiment`: also whether it would accept what each entry of `resources` and each of the `stages` asks for.
    """
    missing = tuple(name for name in COMMANDS if shutil.which(name) is None)
    if missing:
        return SlurmFacts(missing=missing)
    try:
        config = client.configuration()
    except SlurmUnavailableError as error:
        return SlurmFacts(error=str(error))
    small = _accepted(client, site)
    return SlurmFacts(
        version=client.output("sinfo", "--version") or "Slurm of an unknown version",
        config=config,
        partitions=read_partitions(
            client.output("scontrol", "show", "partition", "--oneliner") or "", client.output("sinfo", "--noheader", "--format=%R|%G") or ""
        ),
        submit_limit=client.submit_limit(site),
        accounting=client.output("sacct", "--allocations", "--noheader", "--jobs=1") is not None,
        accepted=small,
        accepted_without_memory=small[0] or _accepted(client, SlurmSite(**{**vars(site), "memory_requests": False}))[0],
        refused=_refused(client, experiment, stages) if experiment is not None and small[0] else {},
    )


def read_partitions(shown: str, resources: str) -> tuple[Partition, ...]:
    """Partitions in `scontrol show partition --oneliner`, with the GRES of `sinfo --format=%R|%G`. Pure."""
    gpus: dict[str, set[str]] = {}
    for line in resources.splitlines():
        name, _, found = line.partition("|")
        gpus.setdefault(name.strip(), set()).update(part.split("(")[0] for part in found.split(",") if part.startswith("gpu"))
    partitions: list[Partition] = []
    for line in shown.splitlines():
        facts = dict(pair.split("=", 1) for pair in line.split() if "=" in pair)
        name = facts.get("PartitionName", "")
        if name:
            default, up = facts.get("Default") == "YES", facts.get("State") == "UP"
            limits = read_minutes(facts.get("MaxTime", "")), read_minutes(facts.get("DefaultTime", ""))
            partitions.append(Partition(name, default, up, *limits, ", ".join(sorted(gpus.get(name, ())))))
    return tuple(partitions)


def read_minutes(text: str) -> int:
    """Minutes of Slurm's `D-HH:MM:SS`, rounded down; 0 for UNLIMITED, NONE and unknown text."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if found is None:
        return 0
    days, hours, minutes = (int(part or 0) for part in found.groups()[:3])
    return (days * 24 + hours) * 60 + minutes


def probe(
    client: SlurmClient,
    site: SlurmSite,
    results: Path,
    *,
    seconds: float = PROBE_SECONDS,
    lag_seconds: float = LAG_SECONDS,
    files: Sequence[str] = (),
) -> ProbeFacts:
    """Submit the probe job and wait for its answer in the results folder. Job and files are always removed.

    `files`: absolute paths that the job looks for on its node.
    """
    token = secrets.token_hex(6)
    folder = shared_path(results) / f".doctor-{token}"
    job = _probe_job(site, folder, token)
    try:
        folder.mkdir()
        (folder / "probe.py").write_text(PROBE, encoding="utf-8")
        write_json(folder / "question.json", {"token": token, "files": list(files)})
        number, problem = _submit_probe(client, job, site, folder)
        if problem:
            return ProbeFacts(submitted=problem)
        try:
            if number and _unlisted(client, job.name, number):
                return ProbeFacts(unlisted=True)
            return _await_answer(client, job.name, folder, token, seconds, lag_seconds)
        finally:
            _cancel(client, job.name)
    except OSError as error:
        return ProbeFacts(submitted=f"{folder}: {error.strerror or error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _submit_probe(client: SlurmClient, job: LinkJob, site: SlurmSite, folder: Path) -> tuple[str, str]:
    """Job id, "" if the reply was lost, and error of the submission, "" if the job was, or may have been, submitted."""
    from jobs.slurm.submissions import call_sbatch

    try:
        reply = call_sbatch(client, folder / "scripts", job, site, _templates())
    except UsageError as error:
        return "", str(error)
    return reply.job, "" if reply.job or reply.refusal is Refusal.unknown else reply.text


def _unlisted(client: SlurmClient, name: str, job: str) -> bool:
    """Whether slurmctld has a job in its queue that squeue does not list by its name; False if Slurm does not answer."""
    try:
        listed = any(element.job == job for element in client.queue(name=name))
        return not listed and any(not is_final(element.state) for element in client.jobs_known([job]))
    except SlurmUnavailableError:
        return False


def _await_answer(client: SlurmClient, name: str, folder: Path, token: str, seconds: float, lag_seconds: float) -> ProbeFacts:
    submitted, gone, started = time.monotonic(), 0.0, False
    while True:
        waited = time.monotonic() - submitted
        answer = read_json(folder / "answer.json")
        if answer is not None:
            sees, submits = answer.get("token") == token, answer.get("submits") is True
            host, said, unseen = (answer.get(key) for key in ("host", "said", "unseen"))
            missing = tuple(map(str, unseen)) if isinstance(unseen, list) else ()
            return ProbeFacts("", True, True, waited, str(host), sees, submits, str(said), unseen=missing)
        try:
            states = [element.state for element in client.queue(name=name, patient=False)]
            started = started or any(state != "PENDING" for state in states)
            gone = 0.0 if states else gone or waited
        except SlurmUnavailableError:  # the job may still answer
            states = ["?"]
        if gone and waited - gone > lag_seconds:
            return ProbeFacts("", True, True, waited, log=one_line(_text(folder / "probe.out"))[-300:])
        if not gone and waited > seconds:
            return ProbeFacts("", started, False, waited)
        time.sleep(POLL_SECONDS)


def _cancel(client: SlurmClient, name: str) -> None:
    try:
        client.cancel_named(name)
    except (SlurmUnavailableError, UsageError):  # it ends within a minute by itself
        return


def _probe_job(site: SlurmSite, folder: Path, token: str) -> LinkJob:
    partition = site.controller_partition or site.partition
    options = [("partition", partition), ("account", site.account), ("qos", site.qos)]
    return LinkJob(
        name=f"ser-grid.doctor.{token}",
        minutes=1,
        command=(launcher_python(site, sys.executable), "probe.py", "--time=1", *(f"--{key}={value}" for key, value in options if value)),
        description=str(folder / "probe.py"),
        folder=str(folder),
        output=str(folder / "probe.out"),
        binds=(str(folder),),
        dependency="",
    )


def _refused(client: SlurmClient, experiment: Experiment, stages: Sequence[str]) -> dict[str, str]:
    """Entry of `resources` or stage -> sbatch's message, of those whose request it would reject."""
    found: dict[str, str] = {}
    for name in dict.fromkeys((*experiment.resources, *stages)):
        resources = resources_of(experiment, name)
        job = ArrayJob(size=1, resources=resources, stages_per_element=resources.runs_per_task, name="ser-grid.doctor", **_NOTHING)
        fits, said = _accepted(client, experiment.slurm, job)
        found.update({} if fits else {name: said})
    return found


def _accepted(client: SlurmClient, site: SlurmSite, job: Job | None = None) -> tuple[bool, str]:
    """Whether sbatch would accept a job, by default a small one, and its message."""
    return accepted(client, job or LinkJob(name="ser-grid.doctor", minutes=1, dependency="", **_NOTHING), site, _templates())


def _templates() -> Path:
    return Path(__file__).resolve().parents[2] / "slurm_templates"


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cron_line(layout: Layout, *, folder: Path, python: str = sys.executable, environment: Mapping[str, str] | None = None) -> str:
    """Crontab line that makes passes where no controller can run inside Slurm. UsageError for a path that a crontab cannot contain.

    `environment`: variables that cron does not set, such as PATH of Slurm's commands and SLURM_CONF.
    """
    assignments = [f"{name}={shlex.quote(value)}" for name, value in (environment or {}).items()]
    command = [python, "launch.py", "reconcile", layout.experiment, "--results", str(shared_path(layout.root))]
    log = shared_path(layout.logs) / "cron.out"
    line = f"cd {shlex.quote(str(shared_path(folder)))} && {' '.join([*assignments, shlex.join(command)])} >>{shlex.quote(str(log))} 2>&1"
    if "\n" in line or "\r" in line:
        raise UsageError(f"{folder}, {layout.root}: a crontab cannot contain a line break")
    return f"*/10 * * * * {line}".replace("%", "\\%")  # an unescaped % ends the line in cron
