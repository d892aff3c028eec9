"""All batch scripts and their sbatch parameters: of an array of stages, and of a link of the controller chain. Pure.

`Header` holds what a job requests of Slurm: the `#SBATCH` lines (`slurm_templates/header.sh.j2`) and the parameters that submitit checks
are both made from it. The rest of a script is in its template.

No value reaches a script unquoted: a template may only print numbers and values that passed one of the filters `option` (value of an
`#SBATCH` line), `shell` (one or several shell words) and `verbatim` (shell lines of the site profile). Anything else is an error, and so is
an undefined name.
"""

from __future__ import annotations

import math
import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs.control.facts import Asked, Request
from jobs.errors import UsageError
from jobs.experiment.config import Resources, SlurmSite, at_once_of

# sbatch options that `slurm.extra` may not set: the program or the template sets them, or they make no sense in a script.
_ARRAY_OPTIONS = ("array", "job-name", "dependency", "kill-on-invalid-dep", "begin", "hold", "requeue", "no-requeue")
_SIZE_OPTIONS = ("time", "nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "mem")
_OUTPUT_OPTIONS = ("output", "error", "open-mode", "export", "export-file", "get-user-env", "parsable", "quiet", "verbose", "test-only")
_OTHER_OPTIONS = ("help", "usage", "version", "uid", "gid", "signal", "wait", "wrap", "chdir")
OWN_OPTIONS = frozenset(_ARRAY_OPTIONS + _SIZE_OPTIONS + _OUTPUT_OPTIONS + _OTHER_OPTIONS)
LINK_CPUS = 1
LINK_MEMORY_MB = 2048  # making the tables at the end needs the most
MOST_AGAIN = 60  # links in a row that may fail before their pass; with pauses that grow to 12 polls, two days at 5 minutes a poll
MOST_REQUEUES = 500  # of one link, where the queue has no room for another: about 17 hours, as Slurm waits two minutes each time
# Options in `slurm.extra` that also apply to links. Options that request resources apply to stages only, and so does `nice`: links start
# before the stages that wait.
SHARED_OPTIONS = ("comment", "reservation", "wckey")
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x80-\x9f\u2028\u2029]")
_SITE_OPTIONS = ("partition", "account", "qos", "constraint", "gpu_type", "exclude")


@dataclass(frozen=True)
class Header:
    """What a job requests of Slurm; "", 0 and None: the option is left out."""

    output: str  # log file, may contain Slurm's `%` patterns
    minutes: int
    cpus: int  # per process
    memory_mb: int  # per node
    partition: str | None
    constraint: str | None
    exclude: str
    extra: Mapping[str, str]
    signal_seconds: int  # before the time limit
    nodes: int = 1
    processes_per_node: int = 1  # 0: one process in total
    gpus: str = ""  # per node
    array: str = ""
    kill_on_invalid_dependency: bool = False
    signal_to: str = "B:"  # signal the batch script only; "": the processes of its steps
    requeue: bool = True
    begin_seconds: int = 0  # after the submission; 0: at once


@dataclass(frozen=True, kw_only=True)
class Job(ABC):
    """A batch job; `output` is its log file, of an array the folder of the logs."""

    name: str
    command: tuple[str, ...]
    description: str  # file that the command needs; the script waits for it, as a shared folder may lag
    folder: str  # working directory
    output: str
    binds: tuple[str, ...] = ()  # folders to mount in a container
    dependency: str = "singleton"  # value of `--dependency`

    @abstractmethod
    def template(self, site: SlurmSite) -> str:
        """Name of its template."""

    @abstractmethod
    def header(self, site: SlurmSite) -> Header:
        """What it requests of Slurm."""

    def facts(self, site: SlurmSite) -> Mapping[str, Any]:
        """Further values for its template."""
        return {}


@dataclass(frozen=True, kw_only=True)
class ArrayJob(Job):
    """An array of stages; each of its elements runs the command."""

    size: int  # elements
    resources: Resources
    stages_per_element: int  # of the largest element, which the time limit is made for
    dependency: str = ""
    request: Request = field(default_factory=Request)  # replaces values of `resources`
    avoided: tuple[str, ...] = ()  # nodes on which Slurm recently could not start an element

    @property
    def minutes(self) -> int:
        """Time limit of an element: its stages run `at_once` at a time, one at a time where the worker decides by memory."""
        rounds = math.ceil(max(1, self.stages_per_element) / max(1, at_once_of(self.resources)))
        return (self.request.minutes or self.resources.minutes) * rounds

    @property
    def asked(self) -> Asked:
        """Time and memory of one element, for the records."""
        plain = replace(self, request=replace(self.request, minutes=None, memory_gb=None))
        return Asked(self.minutes, memory_mb(self), plain.minutes, memory_mb(plain))

    def requested(self, site: SlurmSite, now: float) -> dict[str, float]:
        """The request of one element and when it was made, for the records of its stages. Cores, GPUs and memory (MiB) are per node.

        Memory is left out where the site takes no request for it.
        """
        asked, given = self.asked, self.resources
        memory = {"memory_mb": asked.memory_mb, "configured_mb": asked.configured_mb} if site.memory_requests else {}
        return {
            "submitted": now,  # seconds since the epoch
            "minutes": asked.minutes,
            "configured_minutes": asked.configured_minutes,
            **memory,
            "cpus": given.cpus_per_process * given.processes_per_node,
            "gpus": given.gpus,
            "nodes": given.nodes,
            "stages": self.stages_per_element,
            "at_once": at_once_of(given),
        }

    def template(self, site: SlurmSite) -> str:
        return site.template

    def header(self, site: SlurmSite) -> Header:
        return Header(
            output=f"{_literal(self.output)}/%x_%A_%a.out",
            minutes=self.minutes,
            cpus=self.resources.cpus_per_process,
            memory_mb=memory_mb(self) if site.memory_requests else 0,
            partition=site.partition,
            constraint=site.constraint,
            exclude=excluded_nodes(self, site),
            extra=site.extra,
            signal_seconds=signal_seconds(self.minutes, site),
            nodes=self.resources.nodes,
            processes_per_node=self.resources.processes_per_node,
            gpus=gpu_expression(self.resources.gpus, site),
            array=array_expression(self.size, self.resources.throttle),
            kill_on_invalid_dependency=bool(self.dependency),
            signal_to="",
        )

    def facts(self, site: SlurmSite) -> Mapping[str, Any]:
        return {"team": self.resources.team}


@dataclass(frozen=True, kw_only=True)
class LinkJob(Job):
    """A link of the controller chain, or another small job of the program itself."""

    minutes: int
    begin_seconds: int = 0  # after the submission
    again_seconds: int = 0  # a link that fails submits itself again, to begin after this time, longer after each failure; 0: it does not

    def template(self, site: SlurmSite) -> str:
        return "controller.sh.j2"

    def header(self, site: SlurmSite) -> Header:
        return Header(
            output="/dev/null" if self.again_seconds else _literal(self.output),  # a job whose log cannot be opened does not start
            minutes=self.minutes,
            cpus=LINK_CPUS,
            memory_mb=LINK_MEMORY_MB if site.memory_requests else 0,
            partition=site.controller_partition or site.partition,
            constraint=None,
            exclude=site.exclude or "",
            extra={key: site.extra[key] for key in SHARED_OPTIONS if site.extra.get(key)},
            signal_seconds=0,
            processes_per_node=0,
            requeue=False,  # if Slurm cannot start a job that may be requeued, it holds it, and all other links would wait for it
            begin_seconds=self.begin_seconds,
        )

    def facts(self, site: SlurmSite) -> Mapping[str, Any]:
        return {"again_seconds": self.again_seconds, "most_again": MOST_AGAIN, "most_requeues": MOST_REQUEUES, "log": self.output}


class Quoted(str):
    """Text that is quoted already."""

    __slots__ = ()


def render_script(job: Job, site: SlurmSite, templates: Path) -> str:
    """The batch script of a job. UsageError for a value that cannot be quoted, and for a missing or wrong template."""
    check_site(site)
    if "/" in site.template or site.template.startswith("."):
        raise UsageError(f"slurm.template {site.template!r}: name a file of {templates}")
    own = {name: getattr(job, name) for name in ("name", "binds", "folder", "description", "command", "dependency")}
    facts = {**vars(job.header(site)), **own, **job.facts(site), "login_shell": bool(site.modules), "site": site}
    return _render_template(job.template(site), facts, templates)


def parameters(job: Job, site: SlurmSite) -> dict[str, Any]:
    """The request under submitit's parameter names, which submitit checks."""
    header = job.header(site)
    found = {
        "job_name": job.name,
        "time": header.minutes,
        "nodes": header.nodes,
        "ntasks_per_node": header.processes_per_node or 1,
        "cpus_per_task": header.cpus,
        "gpus_per_node": header.gpus,
        "mem": f"{header.memory_mb}MB" if header.memory_mb else "",
        "partition": header.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": header.constraint,
        "exclude": header.exclude,
        "dependency": job.dependency,
        "signal_delay_s": header.signal_seconds,
        "additional_parameters": {**({"array": header.array} if header.array else {}), **header.extra},
    }
    return {key: value for key, value in found.items() if value}


def _render_template(name: str, facts: Mapping[str, Any], templates: Path) -> str:
    """The rendered template. UsageError for a missing or wrong template, and for a value that it prints unquoted."""
    import jinja2

    environment = jinja2.Environment(  # noqa: S701 - a shell script, no HTML: quoting is enforced by `finalize`
        loader=jinja2.FileSystemLoader(str(templates)),
        undefined=jinja2.StrictUndefined,
        finalize=_only_quoted,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.clear()
    environment.filters.update(option=_option, shell=_shell, verbatim=_verbatim)
    environment.globals.clear()
    try:
        return environment.get_template(name).render(facts)
    except jinja2.TemplateNotFound as error:
        raise UsageError(f"no template {error} in {templates} (slurm.template)") from error
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        raise UsageError(f"{templates / name}{f', line {line}' if line else ''}: {error}") from error


def check_site(site: SlurmSite) -> None:
    """UsageError for the first key of a site profile whose value cannot be written into a script."""
    for key in _SITE_OPTIONS:
        if getattr(site, key) is not None:
            _checked(f"slurm.{key}", getattr(site, key), option=True)
    lists = (("modules", site.modules), ("container_arguments", site.container_arguments), ("prologue", site.prologue))
    for key, values in (*lists, ("container", [site.container or ""]), ("python", [site.python or ""])):
        for value in values:
            _checked(f"slurm.{key}", value)
    for name, value in site.environment.items():
        if not _VARIABLE.fullmatch(name):
            raise UsageError(f"slurm.environment.{name!r}: not the name of a variable")
        _checked(f"slurm.environment.{name}", value)
    for name, value in site.extra.items():
        if not _OPTION.fullmatch(name):
            raise UsageError(f"slurm.extra.{name!r}: not the long name of an sbatch option (without the dashes)")
        if name in OWN_OPTIONS:
            raise UsageError(f"slurm.extra.{name}: set by the program itself; see resources and the other keys of slurm")
        _checked(f"slurm.extra.{name}", value, option=True)


def array_expression(size: int, throttle: int) -> str:
    """`0-24%5`: all elements, at most `throttle` at once (0: no limit)."""
    return f"0-{size - 1}" + (f"%{throttle}" if 0 < throttle < size else "")


def memory_mb(job: ArrayJob) -> int:
    """Memory of each node, in MiB, rounded up."""
    return _mebibytes((job.request.memory_gb or job.resources.memory_gb) * job.request.memory_factor)


def excluded_nodes(job: ArrayJob, site: SlurmSite) -> str:
    """Nodes excluded by the site, the request, or after a failed launch; "" for none."""
    found = (site.exclude or "", *job.request.exclude, *job.avoided)
    return ",".join(dict.fromkeys(filter(None, found)))


def gpu_expression(gpus: int, site: SlurmSite) -> str:
    """`2` or `a100:2`, per node; "" for none."""
    if not gpus:
        return ""
    return f"{site.gpu_type}:{gpus}" if site.gpu_type else str(gpus)


def signal_seconds(minutes: int, site: SlurmSite) -> int:
    """How long before the time limit Slurm sends the warning signal: as the site says, at most a quarter of the time. 0: never."""
    return min(site.signal_seconds, minutes * 60 // 4)


def launcher_python(site: SlurmSite, here: str) -> str:
    """The interpreter on compute nodes: the site's, else `python3` of the container, else the one of this process."""
    return site.python or ("python3" if site.container else here)


def _literal(path: str) -> str:
    """A path for an option in which `%` starts a pattern."""
    return path.replace("%", "%%")


def _mebibytes(gigabytes: float) -> int:
    return math.ceil(round(gigabytes * 1024, 6))


def _checked(what: str, value: str, *, option: bool = False) -> str:
    found = _CONTROL.search(value)
    if found:
        raise UsageError(f"{what}: control character {found[0]!r} in {value!r}")
    if option and "\\" in value:
        raise UsageError(f"{what}: sbatch interprets a backslash itself, so {value!r} cannot be passed to it")
    return value


def _only_quoted(value: object) -> str:
    if isinstance(value, Quoted) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value)
    import jinja2

    if isinstance(value, jinja2.Undefined):
        return str(value)  # StrictUndefined: raises with the name
    raise jinja2.TemplateRuntimeError(f"{value!r} is printed without `| option`, `| shell` or `| verbatim`")


def _option(value: object) -> Quoted:
    return Quoted(shlex.quote(_checked("value of an sbatch option", str(value), option=True)))


def _shell(value: object) -> Quoted:
    words: Iterable[object] = value if isinstance(value, (list, tuple)) else (value,)
    return Quoted(" ".join(shlex.quote(_checked("word of the shell", str(word))) for word in words))


def _verbatim(value: object) -> Quoted:
    return Quoted(_checked("line of the shell", str(value)))
