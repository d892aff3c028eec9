"""The text of a batch script, from a template in `slurm_templates/`. Pure.

Nothing reaches a script unquoted: a template may only print numbers and values that went through one of the filters `option` (the value
of an `#SBATCH` line), `shell` (one or several words of the shell) and `verbatim` (lines of the site's administrator); anything else is
an error, an undefined name too.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs.control.facts import Asked, Request
from jobs.errors import UsageError
from jobs.experiment.config import Resources, SlurmSite, at_once_of
from jobs.experiment.sweep_section import SweepResources

CONTROLLER_TEMPLATE = "controller.sh.j2"
LINK_CPUS = 1
LINK_MEMORY_MB = 2048  # the tables at the end are the largest thing that it does
LINK_WARNING_SECONDS = 120  # before the time limit a link stops to begin passes
# Of the further options of a site those that say who pays or where; what asks for resources is meant for the stages.
SHARED_OPTIONS = ("comment", "nice", "reservation", "wckey")
SWEEP_TEMPLATE = "sweep.sh.j2"
LEAVE_SECONDS = 30  # at most, for the nodes to leave, after the driver has
RESERVE_SECONDS = 15  # of the warning before the time limit: to be put back
LEAST_PATIENCE = 10  # seconds that driver and nodes are given in any case
# Set by the template or the program, or without sense in a script.
_ARRAY_OPTIONS = ("array", "job-name", "dependency", "kill-on-invalid-dep", "begin", "hold", "requeue", "no-requeue")
_SIZE_OPTIONS = ("time", "nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "mem")
_OUTPUT_OPTIONS = ("output", "error", "open-mode", "export", "export-file", "get-user-env", "parsable", "quiet", "verbose", "test-only")
_OTHER_OPTIONS = ("help", "usage", "version", "uid", "gid", "signal", "wait", "wrap", "chdir")
OWN_OPTIONS = frozenset(_ARRAY_OPTIONS + _SIZE_OPTIONS + _OUTPUT_OPTIONS + _OTHER_OPTIONS)
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x80-\x9f\u2028\u2029]")
_SITE_OPTIONS = ("partition", "account", "qos", "constraint", "gpu_type", "exclude")


@dataclass(frozen=True)
class ArrayJob:
    """What a script is made for: one array, and the command that each of its elements runs."""

    name: str
    size: int  # elements
    resources: Resources
    stages_per_element: int  # the longest element's; the time limit is for all of them
    command: tuple[str, ...]  # of the worker
    description: str  # file that the command reads: waited for where a shared folder lags
    folder: str  # where the command runs: the snapshot of the code
    output: str  # folder of the logs
    binds: tuple[str, ...] = ()  # folders that a container must see
    dependency: str = ""  # of `--dependency`
    request: Request = field(default_factory=Request)  # beyond `resources`
    avoided: tuple[str, ...] = ()  # nodes on which Slurm lately could not start an element

    @property
    def minutes(self) -> int:
        """Of an element: its stages one after another, or so many of them at a time; where memory is to decide that, it may be one."""
        rounds = math.ceil(max(1, self.stages_per_element) / max(1, at_once_of(self.resources)))
        return (self.request.minutes or self.resources.minutes) * rounds

    @property
    def asked(self) -> Asked:
        """For one element, for the records."""
        plain = replace(self, request=replace(self.request, minutes=None, memory_gb=None))
        return Asked(self.minutes, memory_mb(self), plain.minutes, memory_mb(plain))


class Quoted(str):
    """Text that a template may print as it is."""

    __slots__ = ()


def render_script(job: ArrayJob, site: SlurmSite, templates: Path) -> str:
    """The script of an array. UsageError for a value that no script can hold, and for a template that is missing or wrong."""
    check_site(site)
    if "/" in site.template or site.template.startswith("."):
        raise UsageError(f"slurm.template {site.template!r}: name a file of {templates}")
    return render_template(site.template, _facts(job, site), templates)


def render_template(name: str, facts: Mapping[str, Any], templates: Path) -> str:
    """A template with its facts, every value quoted. UsageError for a template that is missing or wrong."""
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
    """UsageError for the first key of a site profile that cannot be put into a script."""
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
    return math.ceil(round((job.request.memory_gb or job.resources.memory_gb) * job.request.memory_factor * 1024, 6))


def excluded_nodes(job: ArrayJob, site: SlurmSite) -> str:
    """Nodes that the site, the request or a launch that failed rules out; "" for none."""
    found = (site.exclude or "", *job.request.exclude, *job.avoided)
    return ",".join(dict.fromkeys(filter(None, found)))


def gpu_expression(resources: Resources, site: SlurmSite) -> str:
    """`2` or `a100:2`, per node; "" for none."""
    if not resources.gpus:
        return ""
    return f"{site.gpu_type}:{resources.gpus}" if site.gpu_type else str(resources.gpus)


def signal_seconds(minutes: int, site: SlurmSite) -> int:
    """When to warn before the time limit: as the site says, but not within the first three quarters of the time. 0: never."""
    return min(site.signal_seconds, minutes * 60 // 4)


def launcher_python(site: SlurmSite, here: str) -> str:
    """The interpreter on the compute nodes: the site's, inside a container its `python3`, else the one that runs here."""
    return site.python or ("python3" if site.container else here)


def _facts(job: ArrayJob, site: SlurmSite) -> Mapping[str, Any]:
    resources = job.resources
    return {
        "name": job.name,
        "array": array_expression(job.size, resources.throttle),
        "dependency": job.dependency,
        "output": f"{job.output.replace('%', '%%')}/%x_%A_%a.out",
        "minutes": job.minutes,
        "nodes": resources.nodes,
        "processes_per_node": resources.processes_per_node,
        "team": resources.team,
        "cpus": resources.cpus_per_process,
        "gpus": gpu_expression(resources, site),
        "memory_mb": memory_mb(job) if site.memory_requests else 0,
        "exclude": excluded_nodes(job, site),
        "signal_seconds": signal_seconds(job.minutes, site),
        "login_shell": bool(site.modules),
        "site": replace(site),
        "binds": job.binds,
        "folder": job.folder,
        "description": job.description,
        "command": job.command,
    }


def _checked(what: str, value: str, *, option: bool = False) -> str:
    found = _CONTROL.search(value)
    if found:
        raise UsageError(f"{what}: control character {found[0]!r} in {value!r}")
    if option and "\\" in value:
        raise UsageError(f"{what}: sbatch reads a backslash as a mark of its own, so {value!r} cannot be asked for")
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


@dataclass(frozen=True)
class LinkJob:
    """What the script of a link is made for."""

    name: str
    minutes: int
    command: tuple[str, ...]
    waited_for: str  # file without which the command makes no sense: shared folders lag
    folder: str  # where it runs
    output: str  # file of its log
    binds: tuple[str, ...] = ()  # folders that a container must see
    dependency: str = "singleton"


def render_link(job: LinkJob, site: SlurmSite, templates: Path) -> str:
    """The script of a link. UsageError as of `jobs.slurm.script.render_script`."""
    check_site(site)
    return render_template(CONTROLLER_TEMPLATE, _controller_facts(job, site), templates)


def _controller_facts(job: LinkJob, site: SlurmSite) -> Mapping[str, Any]:
    return {
        "name": job.name,
        "output": job.output.replace("%", "%%"),
        "minutes": job.minutes,
        "cpus": LINK_CPUS,
        "memory_mb": LINK_MEMORY_MB if site.memory_requests else 0,
        "partition": site.controller_partition or site.partition,
        "extra": {key: site.extra[key] for key in SHARED_OPTIONS if site.extra.get(key)},
        "dependency": job.dependency,
        "signal_seconds": warning_seconds(job.minutes),
        "login_shell": bool(site.modules),
        "site": site,
        "binds": job.binds,
        "description": job.waited_for,
        "folder": job.folder,
        "command": job.command,
    }


def link_parameters(job: LinkJob, site: SlurmSite) -> dict[str, Any]:
    """The request in submitit's words, for its own checks."""
    found: dict[str, Any] = {
        "job_name": job.name,
        "time": job.minutes,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": LINK_CPUS,
        "dependency": job.dependency or None,
        "partition": site.controller_partition or site.partition,
        "account": site.account,
        "qos": site.qos,
        "exclude": site.exclude,
        "mem": f"{LINK_MEMORY_MB}MB" if site.memory_requests else None,
    }
    return {key: value for key, value in found.items() if value is not None}


def warning_seconds(minutes: float) -> int:
    """How long before its time limit a link is told, and leaves."""
    return signal_seconds(int(minutes), SlurmSite(signal_seconds=LINK_WARNING_SECONDS))


def array_parameters(job: ArrayJob, site: SlurmSite) -> dict[str, Any]:
    """The request in submitit's words, for its own checks."""
    resources = job.resources
    found: dict[str, Any] = {
        "job_name": job.name,
        "time": job.minutes,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.processes_per_node,
        "cpus_per_task": resources.cpus_per_process,
        "signal_delay_s": signal_seconds(job.minutes, site),
        "dependency": job.dependency or None,
        "array_parallelism": resources.throttle or job.size,
        "additional_parameters": {"array": array_expression(job.size, resources.throttle), **site.extra},
    }
    if site.memory_requests:
        found["mem"] = f"{memory_mb(job)}MB"
    if resources.gpus:
        found["gpus_per_node"] = gpu_expression(resources, site)
    found |= {key: getattr(site, key) for key in ("partition", "account", "qos", "constraint")}
    found["exclude"] = excluded_nodes(job, site) or None
    return {key: value for key, value in found.items() if value is not None}


@dataclass(frozen=True)
class SweepJob:
    """What the script is made for."""

    name: str
    resources: SweepResources
    command: tuple[str, ...]  # on every node
    waited_for: str  # file without which the command makes no sense: shared folders lag
    stop: str  # file that has the driver stop
    meetings: str  # folder in which the nodes meet
    folder: str  # where it runs: the snapshot of the code
    output: str  # file of its log
    restarts: int
    binds: tuple[str, ...] = ()  # folders that a container must see

    @property
    def memory_mb(self) -> int:
        """Of each node, in MiB, rounded up."""
        return math.ceil(round(self.resources.memory_gb * 1024, 6))


def render(job: SweepJob, site: SlurmSite, templates: Path) -> str:
    """The script. UsageError as of `jobs.slurm.script.render_script`."""
    check_site(site)
    return render_template(SWEEP_TEMPLATE, _sweep_facts(job, site), templates)


def _sweep_facts(job: SweepJob, site: SlurmSite) -> Mapping[str, Any]:
    resources = job.resources
    warning = signal_seconds(resources.minutes, site)
    return {
        "name": job.name,
        "output": job.output.replace("%", "%%"),
        "minutes": resources.minutes,
        "nodes": resources.nodes,
        "cpus": resources.cpus,
        "gpus": gpu_expression(Resources(gpus=resources.gpus), site),
        "memory_mb": job.memory_mb if site.memory_requests else 0,
        "signal_seconds": warning,
        "patience": max(LEAST_PATIENCE, warning - RESERVE_SECONDS),
        "leave_seconds": LEAVE_SECONDS,
        "restarts": job.restarts,
        "login_shell": bool(site.modules),
        "site": site,
        "binds": job.binds,
        "description": job.waited_for,
        "folder": job.folder,
        "stop": job.stop,
        "meetings": job.meetings,
        "command": job.command,
    }


def parameters(job: SweepJob, site: SlurmSite) -> dict[str, Any]:
    """The request in submitit's words, for its own checks."""
    resources = job.resources
    found: dict[str, Any] = {
        "job_name": job.name,
        "time": resources.minutes,
        "nodes": resources.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": resources.cpus,
        "gpus_per_node": gpu_expression(Resources(gpus=resources.gpus), site) or None,
        "dependency": "singleton",
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "exclude": site.exclude,
        "mem": f"{job.memory_mb}MB" if site.memory_requests else None,
    }
    return {key: value for key, value in found.items() if value is not None}
