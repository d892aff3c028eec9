"""Slurm's commands: the one module that calls sbatch (through submitit), squeue, sacct, scontrol, sacctmgr and scancel.

Each call has a time limit. Look-ups are repeated a few times; sbatch never is: its reply may be lost while the job exists.
"""

from __future__ import annotations

import logging
import os
import pwd
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.errors import SlurmUnavailableError, UsageError
from jobs.experiment.config import SlurmSite
from jobs.slurm.parse import (
    ACCOUNTING_FORMAT,
    QUEUE_FORMAT,
    QueuedElement,
    array_expressions,
    least_limit,
    parse_accounting,
    parse_queue,
    parse_site,
)

LOOK_SECONDS = 30.0  # one look-up; a busy controller answers within its MessageTimeout, 10 s unless the site changed it
LOOKS = 3
SHORT_SECONDS = 10.0  # of a look that a person waits for
CANCELLED_AT_ONCE = 100  # array expressions in one scancel, so that its arguments stay within what the kernel takes
SUBMIT_SECONDS = 120  # sbatch itself waits and retries while the controller is full; then its outcome counts as unknown
# From an intent to the end of its sbatch at most: the look before it (LOOKS times LOOK_SECONDS, and pauses), then SUBMIT_SECONDS.
UNDERWAY_SECONDS = 240.0
# What sbatch, and so a job, takes over from the shell that launches; all else is left behind. A site's profile may set more.
EXPORTED = (
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "PATH",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "SLURM_CONF",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
)
_FOREIGN = ("SLURM_", "SBATCH_", "SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_", "SALLOC_", "SRUN_")
_MISSING = 127  # exit code of a command that is not there, as shells have it
_OPTIONAL = ("sacct", "sacctmgr")  # sites without accounting may lack them
_DEFAULTS = {"SBATCH_ACCOUNT": "account", "SBATCH_PARTITION": "partition", "SBATCH_QOS": "qos"}
_log = logging.getLogger(__name__)


class SlurmClient:
    """Slurm's commands, each with a time limit; look-ups are repeated a few times, nothing else ever is."""

    def __init__(self, *, look_seconds: float = LOOK_SECONDS, looks: int = LOOKS, pause: float = 1.0) -> None:
        self._look_seconds = look_seconds
        self._looks = looks
        self._pause = pause
        self.calls = 0

    def queue(self, *, name: str | None = None, patient: bool = True) -> tuple[QueuedElement, ...]:
        """This user's pending, running, suspended and completing elements. SlurmUnavailableError if Slurm does not say.

        Not `patient`: one short look, for somebody who waits for the answer and can do without.
        """
        chosen = [f"--name={name}"] if name else []
        text = self._look(["squeue", "--noheader", f"--user={os.getuid()}", f"--format={QUEUE_FORMAT}", *chosen], patient=patient)
        try:
            return parse_queue(text)
        except ValueError as error:
            raise SlurmUnavailableError(str(error)) from error

    def accounting(self, jobs: Iterable[str]) -> dict[str, str] | None:
        """Element -> state of some jobs, as far as accounting knows yet; None where there is no accounting."""
        found = self._sacct([f"--jobs={','.join(jobs)}", f"--format={ACCOUNTING_FORMAT}"])
        return None if found is None else parse_accounting(found)

    def launch_nodes(self, elements: Iterable[str]) -> dict[str, str]:
        """Element -> node on which it was last begun, as far as accounting knows: of elements that were put back into the queue."""
        found = self._sacct(["--duplicates", f"--jobs={','.join(elements)}", "--format=JobID,NodeList"]) or ""
        rows = (line.split("|", 1) for line in found.splitlines() if "|" in line)
        return {job: nodes for job, nodes in rows if nodes and " " not in nodes}

    def accounting_by_name(self, names: Iterable[str], since: float) -> dict[str, str] | None:
        """Name -> job of submissions that accounting knows; None where there is no accounting."""
        start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since - 3600))
        found = self._sacct([f"--name={','.join(names)}", f"--starttime={start}", "--format=JobID,JobName%100"])
        if found is None:
            return None
        rows = [line.split("|", 1) for line in found.splitlines() if "|" in line]
        return {name: job.partition("_")[0] for job, name in reversed(rows)}

    def site(self) -> dict[str, str]:
        """The site's configuration."""
        return parse_site(self._look(["scontrol", "show", "config"]))

    def submit_limit(self, site: SlurmSite) -> int:
        """Elements that account and QOS allow one user to have in the queue; 0 where they do not limit it, or nobody says."""
        limits = []
        asked: list[tuple[list[str], dict[int, str]]] = [
            (["assoc", "where", f"user={_user_name()}", "format=Account,MaxSubmitJobs"], {0: site.account} if site.account else {})
        ]
        if site.qos:
            asked.append((["qos", "where", f"name={site.qos}", "format=Name,MaxSubmitJobsPU"], {0: site.qos}))
        for arguments, columns in asked:
            done = self._run(["sacctmgr", "--noheader", "--parsable2", "show", *arguments], self._look_seconds)
            limits.append(least_limit(done.stdout, columns, 1) if done is not None and done.returncode == 0 else 0)
        return min((limit for limit in limits if limit), default=0)

    def set_dependency(self, elements: str, dependency: str) -> bool:
        """Let pending elements (`JOB_[0-4]`) wait for something else. False if Slurm would not."""
        return self._told(["scontrol", "update", f"JobId={elements}", f"Dependency={dependency}"])

    def requeue(self, element: str) -> bool:
        """Let Slurm run one element (`ARRAY_INDEX`) again under the same number, from the queue. False if Slurm would not.

        The element is named by array and index: the raw number of an array's last element is the array's own, and would requeue all of it.
        """
        if "_" not in element:
            raise ValueError(f"{element}: an element is ARRAY_INDEX")
        return self._told(["scontrol", "requeue", element])

    def cancel(self, elements: Iterable[str]) -> None:
        """Cancel array elements (`ARRAY_INDEX`); those that are gone already are no error. SlurmUnavailableError if Slurm does not answer.

        An element that has begun in the meantime is cancelled too, as scancel cannot be trusted to tell: `--state=PENDING` beside a range
        of indices takes all the array's pending elements along (seen on Slurm 22.05).
        """
        expressions = array_expressions(elements)
        for start in range(0, len(expressions), CANCELLED_AT_ONCE):
            self._look(["scancel", "--quiet", *expressions[start : start + CANCELLED_AT_ONCE]])

    def cancel_jobs(self, jobs: Sequence[str]) -> None:
        """Cancel whole jobs by their numbers; those that are gone already are no error. SlurmUnavailableError if Slurm does not answer."""
        if jobs:
            self._look(["scancel", "--quiet", *jobs])

    def requeue_job(self, job: str) -> bool:
        """Let Slurm run a whole job again under the same number, also one that asked not to be. False if Slurm would not."""
        return self._told(["scontrol", "update", f"JobId={job}", "Requeue=1"]) and self._told(["scontrol", "requeue", job])

    def nodes_of(self, job: str) -> tuple[str, ...]:
        """The nodes that a running job has now; one that failed is none of them. SlurmUnavailableError if Slurm does not answer."""
        expression = self._look(["squeue", "--noheader", f"--jobs={job}", "--format=%N"]).strip()
        return tuple(self._look(["scontrol", "show", "hostnames", expression]).split()) if expression else ()

    def cancel_named(self, name: str) -> None:
        """Cancel all this user's jobs of a name, whatever their numbers are. SlurmUnavailableError if Slurm does not answer."""
        self._look(["scancel", "--quiet", f"--user={os.getuid()}", f"--name={name}"])

    def submit(self, folder: Path, script: str, parameters: Mapping[str, Any], site: SlurmSite) -> str:
        """Number of the new job; the script is kept in `folder` under that number.

        Raises SubmissionFailedError if sbatch gave none: whether there is a job then, its text tells.
        """
        from jobs.slurm.sbatch import TemplateExecutor

        self.calls += 1
        return TemplateExecutor(folder, self.submission_command(site)).submit_script(script, parameters)

    def submission_command(self, site: SlurmSite) -> list[str]:
        """sbatch with a time limit, and with no more of this process's environment than a job needs (it takes over what sbatch has)."""
        names = [*EXPORTED, *(name for name, key in _DEFAULTS.items() if getattr(site, key) is None)]
        kept = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
        return ["timeout", "--kill-after=5", str(SUBMIT_SECONDS), "env", "-i", *kept, "sbatch"]

    def answer(self, *command: str) -> str | None:
        """What one of Slurm's commands prints, asked once and shortly; None if it fails or does not answer: for whoever only reports."""
        done = self._run(command, min(self._look_seconds, SHORT_SECONDS))
        return done.stdout.strip() if done is not None and done.returncode == 0 else None

    def would_accept(self, script: Path, site: SlurmSite) -> tuple[bool, str]:
        """Whether Slurm would take a script, and what it says; nothing is submitted."""
        done = self._run([*self.submission_command(site), "--test-only", str(script)], self._look_seconds)
        if done is None:
            return False, f"sbatch did not answer within {self._look_seconds:g} s"
        return done.returncode == 0, " ".join(done.stderr.split())

    def _sacct(self, arguments: Sequence[str]) -> str | None:
        """What accounting says: "" while it does not answer; None where there is none."""
        done = self._run(["sacct", "--allocations", "--noheader", "--parsable2", *arguments], self._look_seconds)
        if done is None:
            return ""
        if done.returncode == 0:
            return done.stdout
        return None if done.returncode == _MISSING or "accounting storage is disabled" in done.stderr else ""

    def _told(self, command: Sequence[str]) -> bool:
        done = self._run(command, self._look_seconds)
        if done is None or done.returncode != 0:
            _log.info("%s: %s", " ".join(command), "no answer" if done is None else " ".join(done.stderr.split()))
            return False
        return True

    def _look(self, command: Sequence[str], *, patient: bool = True) -> str:
        said = ""
        looks, seconds = (self._looks, self._look_seconds) if patient else (1, min(self._look_seconds, SHORT_SECONDS))
        for look in range(looks):
            if look:
                time.sleep(self._pause * look)
            done = self._run(command, seconds)
            if done is not None and done.returncode == 0:
                return done.stdout
            said = f"no answer within {seconds:g} s" if done is None else done.stderr.strip() or f"exit code {done.returncode}"
        often = f"{looks} times" if looks > 1 else "once"
        raise SlurmUnavailableError(f"{command[0]} failed {often} ({' '.join(said.split())}): Slurm's queue is not known; try again later")

    def _run(self, command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str] | None:
        self.calls += 1
        environment = {name: value for name, value in os.environ.items() if not _foreign(name)}
        environment |= {"LC_ALL": "C", "SLURM_BITSTR_LEN": "0"}  # array expressions in full: they are cut at 64 characters otherwise
        try:
            return subprocess.run(
                list(command), env=environment, timeout=seconds, check=False, capture_output=True, encoding="utf-8", errors="replace"
            )
        except subprocess.TimeoutExpired:
            return None
        except FileNotFoundError as error:
            if command[0] in _OPTIONAL:
                return subprocess.CompletedProcess(list(command), _MISSING, "", "")
            raise UsageError(f"{command[0]} is not in PATH: no Slurm here (--cluster local needs none)") from error


def sbatch_under_way(scripts: Path) -> bool:
    """Whether an sbatch for a script of that folder runs on this machine: it goes on when whoever called it is killed."""
    marks = (os.fsencode(scripts), b"sbatch")
    for process in Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes() if process.name.isdigit() else b""
        except OSError:  # it has ended
            continue
        if all(mark in words for mark in marks):
            return True
    return False


def _foreign(name: str) -> bool:
    return name.startswith(_FOREIGN) and name != "SLURM_CONF"


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
