"""Slurm's commands: the one module that calls sbatch (through submitit), squeue, sacct, scontrol, sacctmgr and scancel.

Each call has a time limit. Queries are retried; sbatch never is, because the job may exist although its reply was lost.
"""

from __future__ import annotations

import logging
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.errors import SlurmUnavailableError, UsageError
from jobs.experiment.config import SlurmSite
from jobs.slurm.parse import (
    ACCOUNTING_FORMAT,
    NODE_FORMAT,
    QUEUE_FORMAT,
    Accounted,
    JobRef,
    QueuedElement,
    array_expressions,
    count_nodes,
    least_limit,
    parse_accounting,
    parse_queue,
    parse_site,
)
from jobs.text import one_line

LOOK_SECONDS = 30.0  # time limit of one query; a busy slurmctld answers within its MessageTimeout, 10 s by default
LOOKS = 3  # tries of one query
SHORT_SECONDS = 10.0  # time limit of a query that a user waits for
CANCELLED_AT_ONCE = 100  # array expressions in one scancel, which keeps its arguments below the kernel's limit
SUBMIT_SECONDS = 120  # time limit of sbatch, which retries by itself while slurmctld is busy
# Longest time from an intent to the end of its sbatch: the query before it (LOOKS times LOOK_SECONDS, and pauses), then SUBMIT_SECONDS.
UNDERWAY_SECONDS = 240.0
# Environment variables that sbatch, and so the job, inherits from the launching shell; a site's profile may set more.
EXPORTED: tuple[str, ...] = ("HOME", "USER", "LOGNAME", "SHELL", "PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SLURM_CONF")
EXPORTED += ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE")
_SLURM_PREFIXES = ("SLURM_", "SBATCH_", "SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_", "SALLOC_", "SRUN_")
_MISSING = 127  # a shell's exit code for a command that was not found
_UNKNOWN_JOB = "Invalid job id specified"  # of squeue, when slurmctld knows none of the jobs
_OPTIONAL = ("sacct", "sacctmgr")  # sites without accounting may lack them
_DEFAULTS = {"SBATCH_ACCOUNT": "account", "SBATCH_PARTITION": "partition", "SBATCH_QOS": "qos"}
_log = logging.getLogger(__name__)


class SlurmClient:
    """Slurm's commands, each with a time limit of `look_seconds`; a query is tried `looks` times, everything else once.

    Every method raises UsageError if the command is not installed, except sacct and sacctmgr.
    """

    def __init__(self, *, look_seconds: float = LOOK_SECONDS, looks: int = LOOKS, pause: float = 1.0) -> None:
        self._look_seconds = look_seconds
        self._looks = looks
        self._pause = pause
        self.calls = 0

    def queue(self, *, name: str | None = None, patient: bool = True) -> tuple[QueuedElement, ...]:
        """This user's pending, running, suspended and completing jobs on this cluster, in hidden partitions too.

        SlurmUnavailableError if squeue fails. `patient=False`: one try with a short time limit, while a user waits for the output.
        """
        mark = _mark()
        command = _queue_command(mark, *([f"--name={name}"] if name else []))
        return _parsed(self._query(command, patient=patient), mark)

    def jobs_known(self, jobs: Iterable[str]) -> tuple[QueuedElement, ...]:
        """What slurmctld knows of some of this user's jobs, asked by number: of ended ones too, for MinJobAge (300 s by default).

        SlurmUnavailableError if squeue fails.
        """
        mark = _mark()
        command = _queue_command(mark, "--states=all", f"--jobs={','.join(jobs)}")
        return _parsed(self._query(command, none=_UNKNOWN_JOB), mark)

    def accounting(self, jobs: Mapping[str, str]) -> dict[str, Accounted] | None:
        """Element -> state, end and node of the jobs that accounting knows already; None on a site without it. `jobs`: number -> name.

        Only jobs of that name count: a slurmctld that lost its state gives their numbers to others.
        """
        found = self._sacct([f"--jobs={','.join(jobs)}", f"--format={ACCOUNTING_FORMAT}"])
        if found is None:
            return None
        return {job: each for job, each in parse_accounting(found).items() if each.name == jobs.get(JobRef.parse(job).array)}

    def launch_nodes(self, elements: Iterable[str]) -> dict[str, str]:
        """Element -> node on which it last started, for elements that were requeued and that accounting knows."""
        found = self._sacct(["--duplicates", f"--jobs={','.join(elements)}", "--format=JobID,NodeList"]) or ""
        rows = (line.split("|", 1) for line in found.splitlines() if "|" in line)
        return {job: nodes for job, nodes in rows if nodes and " " not in nodes}

    def accounting_by_name(self, names: Iterable[str], since: float) -> dict[str, str] | None:
        """Name -> job id, for the job names that accounting knows; None if the site has no accounting. `since`: seconds since the epoch."""
        start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since - 3600))
        found = self._sacct([f"--name={','.join(names)}", f"--starttime={start}", "--format=JobID,JobName%100"])
        if found is None:
            return None
        rows = [line.split("|", 1) for line in found.splitlines() if "|" in line]
        return {name: job.partition("_")[0] for job, name in reversed(rows)}

    def configuration(self) -> dict[str, str]:
        """The output of `scontrol show config`."""
        return parse_site(self._query(["scontrol", "show", "config"]))

    def submit_limit(self, site: SlurmSite) -> int:
        """The number of elements that account and QOS allow one user in the queue; 0 if there is no limit or it is not known."""
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

    def node_count(self, site: SlurmSite) -> int:
        """How many nodes the partitions of the site's profile have, in whatever state; 0: not known."""
        printed = self.output("sinfo", "--all", "--noheader", "--Node", f"--format={NODE_FORMAT}")
        return count_nodes(printed or "", site.partition or os.environ.get("SBATCH_PARTITION", ""))

    def set_dependency(self, elements: str, dependency: str) -> bool:
        """Replace the dependency of pending elements (`JOB_[0-4]`). False if Slurm refuses."""
        return self._succeeds(["scontrol", "update", f"JobId={elements}", f"Dependency={dependency}"])

    def requeue(self, element: str) -> bool:
        """Requeue one element (`ARRAY_INDEX`). False if Slurm refuses.

        By array and index, not by its raw job id: that of the last element equals the array's id and would requeue the whole array.
        """
        if JobRef.parse(element).index is None:
            raise ValueError(f"{element}: an element is ARRAY_INDEX")
        return self._succeeds(["scontrol", "requeue", element])

    def cancel(self, elements: Iterable[str]) -> None:
        """Cancel array elements (`ARRAY_INDEX`), also if one has started meanwhile; one that has ended is no error.

        SlurmUnavailableError if scancel fails. Without `--state=PENDING`: beside a range of indices it would cancel all pending elements of
        the array (Slurm 22.05).
        """
        expressions = array_expressions(elements)
        for start in range(0, len(expressions), CANCELLED_AT_ONCE):
            self.cancel_jobs(expressions[start : start + CANCELLED_AT_ONCE])

    def cancel_jobs(self, jobs: Sequence[str]) -> None:
        """Cancel jobs by id or array expression; one that has ended is no error. SlurmUnavailableError if scancel fails."""
        if jobs:
            self._query(["scancel", "--quiet", *jobs])

    def requeue_job(self, job: str) -> bool:
        """Requeue a whole job, even one submitted with `--no-requeue`. False if Slurm refuses."""
        return self._succeeds(["scontrol", "update", f"JobId={job}", "Requeue=1"]) and self._succeeds(["scontrol", "requeue", job])

    def nodes_of(self, job: str) -> tuple[str, ...]:
        """The nodes of a running job, without those that failed. SlurmUnavailableError if Slurm does not answer."""
        expression = self._query(["squeue", "--noheader", f"--jobs={job}", "--format=%N"]).strip()
        return tuple(self._query(["scontrol", "show", "hostnames", expression]).split()) if expression else ()

    def cancel_named(self, name: str) -> None:
        """Cancel all jobs of this user with that name. SlurmUnavailableError if scancel fails."""
        self._query(["scancel", "--quiet", f"--user={os.getuid()}", f"--name={name}"])

    def submit(self, folder: Path, script: str, parameters: Mapping[str, Any], site: SlurmSite) -> str:
        """Submit a script and return the new job's id; the script is kept in `folder` under that id.

        Raises UsageError if sbatch was not called, SubmissionFailedError if it returned no job id (classify_refusal: whether there may be
        a job all the same).
        """
        from jobs.slurm.sbatch import TemplateExecutor

        if shutil.which("sbatch") is None:
            raise UsageError(f"sbatch is not in PATH on {socket.gethostname()}: no Slurm here (--cluster local needs none)")
        self.calls += 1
        return TemplateExecutor(folder, self.submission_command(site)).submit_script(script, parameters)

    def submission_command(self, site: SlurmSite) -> list[str]:
        """sbatch with a time limit and only those environment variables that a job needs, as jobs inherit sbatch's environment."""
        names = [*EXPORTED, *(name for name, key in _DEFAULTS.items() if getattr(site, key) is None)]
        kept = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
        return ["timeout", "--kill-after=5", str(SUBMIT_SECONDS), "env", "-i", *kept, "sbatch"]

    def output(self, *command: str) -> str | None:
        """The output of a Slurm command, tried once with a short time limit; None if it fails."""
        done = self._run(command, min(self._look_seconds, SHORT_SECONDS))
        return done.stdout.strip() if done is not None and done.returncode == 0 else None

    def would_accept(self, script: Path, site: SlurmSite) -> tuple[bool, str]:
        """Whether `sbatch --test-only` accepts a script, and its message; nothing is submitted."""
        done = self._run([*self.submission_command(site), "--test-only", str(script)], self._look_seconds)
        if done is None:
            return False, f"sbatch did not answer within {self._look_seconds:g} s"
        return done.returncode == 0, one_line(done.stderr)

    def _sacct(self, arguments: Sequence[str]) -> str | None:
        """Output of sacct; "" if it fails; None if the site has no accounting."""
        options = ["--allocations", "--noheader", "--parsable2", "--local", f"--user={os.getuid()}"]
        done = self._run(["sacct", *options, *arguments], self._look_seconds)
        if done is None:
            return ""
        if done.returncode == 0:
            return done.stdout
        return None if done.returncode == _MISSING or "accounting storage is disabled" in done.stderr else ""

    def _succeeds(self, command: Sequence[str]) -> bool:
        done = self._run(command, self._look_seconds)
        if done is None or done.returncode != 0:
            _log.info("%s: %s", " ".join(command), "no answer" if done is None else one_line(done.stderr))
            return False
        return True

    def _query(self, command: Sequence[str], *, patient: bool = True, none: str = "") -> str:
        """Output of a command. SlurmUnavailableError if it fails; `none`: an error message that stands for no output."""
        problem = ""
        tries, seconds = (self._looks, self._look_seconds) if patient else (1, min(self._look_seconds, SHORT_SECONDS))
        for number in range(tries):
            if number:
                time.sleep(self._pause * number)
            done = self._run(command, seconds)
            if done is not None and done.returncode == 0:
                return done.stdout
            problem = f"no answer within {seconds:g} s" if done is None else one_line(done.stderr) or f"exit code {done.returncode}"
            if none and none in problem:
                return ""
        often = f"{tries} times" if tries > 1 else "once"
        raise SlurmUnavailableError(f"{command[0]} failed {often} ({problem}): Slurm's queue is not known; try again later")

    def _run(self, command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str] | None:
        self.calls += 1
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_SLURM_PREFIXES) or name == "SLURM_CONF"}
        # SLURM_BITSTR_LEN=0: array expressions in full, not cut after 64 characters; %s: seconds since the epoch
        environment |= {"LC_ALL": "C", "SLURM_BITSTR_LEN": "0", "SLURM_TIME_FORMAT": "%s"}
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


class LookClient(SlurmClient):
    """A client of one look at one or several experiments, for a user who waits: squeue is called once, with a short time limit.

    A later call returns the same jobs, or raises the same error.
    """

    def __init__(self) -> None:
        super().__init__(looks=1, look_seconds=SHORT_SECONDS)
        self._answer: tuple[QueuedElement, ...] | SlurmUnavailableError | UsageError | None = None

    def queue(self, *, name: str | None = None, patient: bool = False) -> tuple[QueuedElement, ...]:
        """As for SlurmClient, by the first answer."""
        if self._answer is None:
            try:
                self._answer = super().queue(patient=patient)
            except (SlurmUnavailableError, UsageError) as error:
                self._answer = error
        if isinstance(self._answer, Exception):
            raise self._answer
        return tuple(element for element in self._answer if name in (None, element.name))


def _mark() -> str:
    """Text that begins each job in the output of squeue, and that no name of another program's job can contain."""
    return f"{secrets.token_hex(8)} "


def _queue_command(mark: str, *chosen: str) -> list[str]:
    """squeue for this user's jobs. `--all`: those in hidden partitions too; `--local`: not those of other clusters of a federation."""
    return ["squeue", "--all", "--local", "--noheader", f"--user={os.getuid()}", f"--format={mark}{QUEUE_FORMAT}", *chosen]


def _parsed(text: str, mark: str) -> tuple[QueuedElement, ...]:
    try:
        return parse_queue(text, mark)
    except ValueError as error:
        raise SlurmUnavailableError(str(error)) from error


def sbatch_under_way(scripts: Path) -> bool:
    """Whether an sbatch with a script of that folder runs on this machine: it survives when its caller is killed."""
    marks = (os.fsencode(scripts), b"sbatch")
    for process in Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes() if process.name.isdigit() else b""
        except OSError:  # the process has ended
            continue
        if all(mark in words for mark in marks):
            return True
    return False


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
