"""A simulated Slurm: arrays, dependencies, nodes that fail, requeue, cancellation, limits, accounting, and replies that get lost.

It accepts the commands that `jobs.slurm.client` runs, and prints what Slurm prints. Its queue is exact, like that of squeue; everything
else may lag, not answer or be missing. It has no clock of its own: the test advances the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from jobs.errors import SubmissionFailedError
from jobs.slurm.parse import QUEUE_FORMAT, compress_indices, expand_indices, expand_job

OWNER = 1000
OTHER = 2000  # another account, of an operator
LAG_SECONDS = 30.0
LATE_SECONDS = 20.0
SBATCH_SECONDS = 110.0  # that sbatch may take when nobody waits for it
VERY_LATE_SECONDS = 900.0
FORGOTTEN_SECONDS = 300.0  # MinJobAge: an ended job is known to dependencies that long
FULL = "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates accounting/QOS policy"
TOO_LARGE = "sbatch: error: Batch job submission failed: Invalid job array specification"
NO_NODES = "sbatch: error: Batch job submission failed: Requested node configuration is not available"
AWAY = {  # while a daemon restarts: nothing was accepted
    "munge": "sbatch: error: Batch job submission failed: Protocol authentication error",
    "standby": "sbatch: error: Batch job submission failed: Slurm backup controller in standby mode",
    "unspecified": "sbatch: error: Batch job submission failed: Unspecified error",
}
LOST = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
UNREACHABLE = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


class Clock:
    """Simulated seconds since the epoch, in steps that a file's time holds exactly."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Reply(Enum):
    """What happens to the next sbatch."""

    given = "given"
    lost = "lost"  # the job exists, the reply does not
    never = "never"  # neither exists
    late = "late"  # no reply; the job turns up within seconds
    very_late = "very late"  # no reply; the job turns up when everybody has given it up
    munge = "munge"  # no job, for the reason in `AWAY`
    standby = "standby"
    unspecified = "unspecified"


class Accounting(Enum):
    """How sacct answers."""

    fine = "fine"
    slow = "slow"  # ended elements still count as running for `LAG_SECONDS`
    stale = "stale"  # and for ever
    silent = "silent"
    forgetful = "forgetful"  # knows nothing
    absent = "absent"  # the site has none


@dataclass
class Element:
    """One element of an array."""

    job: int
    index: int
    waits: str = ""  # its dependency, as sbatch takes it; "": none, or fulfilled
    state: str = "PENDING"
    node: str = ""
    begun: float = 0.0
    left: float = 0.0  # when it ended
    restarts: int = 0
    former: list[tuple[str, str]] = field(default_factory=list)  # (node, state) of executions that were requeued
    completing: bool = False  # over, and still in the queue
    held: str = ""  # why Slurm does not start it
    held_state: str = ""  # in which it is shown then; "": PENDING

    @property
    def name(self) -> str:
        return f"{self.job}_{self.index}"

    @property
    def live(self) -> bool:
        return self.state in ("PENDING", "RUNNING")

    @property
    def queued(self) -> bool:
        return self.live or self.completing


@dataclass
class Array:
    """One job array."""

    number: int
    name: str
    minutes: int
    exclude: frozenset[str]
    created: float
    elements: list[Element]


@dataclass
class UnderWay:
    """A request whose sbatch is no longer waited for."""

    lands: float
    name: str
    parameters: Mapping[str, Any]
    sbatch_runs: bool = False  # the process still exists: it was called by one that was killed
    very_late: bool = False


class SimulatedSlurm:
    """The cluster as slurmctld sees it. `created` is called with each new array, `ended` with each element whose processes are killed."""

    def __init__(self, clock: Clock, *, nodes: int = 3, slots: int = 2, max_submit: int = 0, max_array_size: int = 1001) -> None:
        self.clock = clock
        self.up = {f"n{number}": True for number in range(nodes)}
        self.slots = slots  # elements that a node runs at once
        self.max_submit = max_submit
        self.max_array_size = max_array_size
        self.arrays: dict[int, Array] = {}
        self.calls: list[str] = []
        self.reply = Reply.given
        self.accounting = Accounting.fine
        self.back_at = 0.0  # until then nobody reaches it
        self.updates_work = True
        self.under_way: list[UnderWay] = []
        self.landing: UnderWay | None = None  # what comes in just now
        self.created: Callable[[Array], None] = lambda array: None
        self.begun: Callable[[Element, Array], None] = lambda element, array: None
        self.killed: Callable[[Element], None] = lambda element: None
        self._next = 100

    @property
    def reachable(self) -> bool:
        return self.clock() >= self.back_at

    # ---- what users and the program see

    def elements(self) -> Iterable[tuple[Array, Element]]:
        """All elements in the queue."""
        return [(array, element) for array in self.arrays.values() for element in array.elements if element.queued]

    def find(self, name: str) -> Element:
        number, _, index = name.partition("_")
        return self.arrays[int(number)].elements[int(index)]

    def submit(self, name: str, parameters: Mapping[str, Any]) -> int:
        """A new array; SubmissionFailedError if Slurm rejects it."""
        indices = expand_indices(str(parameters["additional_parameters"]["array"]))
        exclude = frozenset(filter(None, str(parameters.get("exclude") or "").split(",")))
        if max(indices) >= self.max_array_size:
            raise SubmissionFailedError(TOO_LARGE)
        if self.max_submit and len(list(self.elements())) + len(indices) > self.max_submit:
            raise SubmissionFailedError(FULL)
        if exclude >= set(self.up):
            raise SubmissionFailedError(NO_NODES)
        number = self._next
        self._next += 1 + len(indices)
        waits = str(parameters.get("dependency") or "")
        elements = [Element(number, index, waits) for index in indices]
        self.arrays[number] = Array(number, name, int(parameters["time"]), exclude, self.clock(), elements)
        self.created(self.arrays[number])
        self.settle_dependencies()
        return number

    def cancel(self, names: Iterable[str], by: int | None) -> list[str]:
        """scancel by a user (None: by Slurm itself); returns what it ended."""
        ended = []
        for name in names:
            element = self.find(name)
            if element.live:
                self.end(element, "CANCELLED" if by is None else f"CANCELLED by {by}")
                ended.append(name)
        self.settle_dependencies()
        return ended

    # ---- what happens to elements

    def eligible(self) -> list[Element]:
        """Pending elements that wait only for a node, oldest first."""
        self.settle_dependencies()
        return [
            element
            for array in self.arrays.values()
            for element in array.elements
            if element.state == "PENDING" and not element.held and not element.waits and self._free(array.exclude)
        ]

    def start(self, element: Element) -> None:
        """Give a pending element a node."""
        array = self.arrays[element.job]
        element.node = self._free(array.exclude)[0]
        element.state, element.begun = "RUNNING", self.clock()
        self.begun(element, array)

    def end(self, element: Element, state: str, *, completing: bool = False) -> None:
        """An element leaves; its processes, if it has any, die with it."""
        ran = element.state == "RUNNING"
        element.state, element.left, element.completing = state, self.clock(), completing
        if ran:
            self.killed(element)
        self.settle_dependencies()

    def requeue(self, element: Element, state: str) -> None:
        """A running element is killed and pends again under its number."""
        element.former.append((element.node, state))
        element.state, element.node, element.restarts = "PENDING", "", element.restarts + 1
        self.killed(element)

    def fail_launch(self, element: Element) -> None:
        """A node could not start an element: Slurm puts it back and holds it."""
        self.start(element)
        self.requeue(element, "REQUEUED")
        element.held = "launch failed requeued held"

    def hold(self, element: Element, reason: str, state: str = "") -> None:
        """Keep an element from starting until `release`; a running one is killed and put back first."""
        if element.state == "RUNNING":
            self.requeue(element, "REQUEUED")
        element.held, element.held_state = reason, state

    def release(self, element: Element) -> None:
        """scontrol release, or the cause is gone."""
        element.held = element.held_state = ""

    def fail_node(self, node: str, *, requeue: bool) -> None:
        """A node fails with everything on it."""
        self.up[node] = False
        for _, element in self.elements():
            if element.state == "RUNNING" and element.node == node:
                if requeue:
                    self.requeue(element, "NODE_FAIL")
                else:
                    self.end(element, "NODE_FAIL")

    def moved_on(self) -> None:
        """To be called after the clock has advanced: late requests arrive, elements reach their time limit or finish completing."""
        for request in [each for each in self.under_way if each.lands <= self.clock()]:
            self.under_way.remove(request)
            self.landing = request
            try:
                self.submit(request.name, request.parameters)
            except SubmissionFailedError:
                continue
            finally:
                self.landing = None
        for array, element in self.elements():
            if element.completing:
                element.completing = False
            elif element.state == "RUNNING" and self.clock() - element.begun > 60 * array.minutes:
                self.end(element, "TIMEOUT")
        self.settle_dependencies()

    def settle_dependencies(self) -> None:
        """Remove fulfilled dependencies; cancel elements whose dependency can never be (the scripts request that)."""
        changed = True
        while changed:
            changed = False
            for array in self.arrays.values():
                for element in array.elements:
                    if element.state == "PENDING" and element.waits:
                        verdict = self._verdict(array, element)
                        if verdict is None:
                            continue
                        changed = True
                        if verdict:
                            element.waits = ""
                        else:
                            element.state, element.left = "CANCELLED", self.clock()

    def _verdict(self, array: Array, element: Element) -> bool | None:
        """True: fulfilled; False: can never be; None: pending."""
        verdicts = [self._of_one(array, element, part) for part in element.waits.split(",")]
        if False in verdicts:
            return False
        return None if None in verdicts else True

    def _of_one(self, array: Array, element: Element, condition: str) -> bool | None:
        kind, _, jobs = condition.partition(":")
        if kind == "singleton":
            others = [other for other in self.arrays.values() if other.name == array.name and other.number < array.number]
            return None if any(one.queued for other in others for one in other.elements) else True
        parents: list[Element] = []
        for job in jobs.split(":"):
            number, _, index = job.partition("_")
            parent = self.arrays.get(int(number))
            if parent is None:
                continue
            if kind == "aftercorr":
                parents.extend(one for one in parent.elements if one.index == element.index)
            elif kind == "afterok":
                parents.extend(one for one in parent.elements if not index or one.index == int(index))
            else:
                raise NotImplementedError(condition)
        known = [one for one in parents if one.queued or self.clock() - one.left <= FORGOTTEN_SECONDS]
        if any(one.live for one in known):
            return None
        return all(one.state == "COMPLETED" for one in known)

    def _free(self, exclude: Iterable[str]) -> list[str]:
        used: dict[str, int] = {}
        for _, element in self.elements():
            if element.node and element.queued:
                used[element.node] = used.get(element.node, 0) + 1
        return [node for node, up in self.up.items() if up and node not in exclude and used.get(node, 0) < self.slots]

    # ---- commands

    def run(self, command: Sequence[str]) -> tuple[int, str, str] | None:
        """Exit code, stdout and stderr of one command; None: no answer."""
        self.calls.append(command[0])
        if command[0] == "sacct":
            return self._sacct(command[1:])
        if command[0] == "sacctmgr":
            return 1, "", "sacctmgr: error: You are not running a supported accounting_storage plugin"
        if not self.reachable:
            return 1, "", UNREACHABLE
        if command[0] == "squeue":
            return self._squeue(command[1:])
        if command[0] == "scancel":
            return self._scancel(command[1:])
        if command[0] == "sinfo":
            return 0, "".join(f"{node}|main*\n" for node in self.up), ""
        if command[:3] == ["scontrol", "show", "config"]:
            return 0, f"MaxArraySize            = {self.max_array_size}\nMaxJobCount             = 10000\n", ""
        if command[:2] == ["scontrol", "update"]:
            return self._update(dict(word.split("=", 1) for word in command[2:]))
        if command[:2] == ["scontrol", "requeue"]:
            return self._requeue(command[2])
        raise NotImplementedError(f"{command}")

    def _squeue(self, arguments: Sequence[str]) -> tuple[int, str, str]:
        options = dict(word.partition("=")[::2] for word in arguments)
        unknown = set(options) - {"--all", "--local", "--noheader", "--user", "--format", "--name", "--states", "--jobs"}
        mark = options["--format"].removesuffix(QUEUE_FORMAT)
        if unknown or "--all" not in options or mark == options["--format"] or options.get("--states", "all") != "all":
            raise NotImplementedError(f"squeue {arguments}")
        asked = [int(job) for job in options["--jobs"].split(",")] if "--jobs" in options else list(self.arrays)
        lines: list[str] = []
        for array in self.arrays.values():
            if options.get("--name", array.name) != array.name or array.number not in asked:
                continue
            pending: dict[str, list[int]] = {}
            for element in array.elements:
                if element.state == "PENDING" and element.held_state:
                    lines.append(f"{mark}{element.name}|{element.held_state}|{element.held}||{array.name}")
                elif element.state == "PENDING":
                    reason = element.held or ("Dependency" if element.waits else "Resources")
                    pending.setdefault(reason, []).append(element.index)
                elif element.queued:
                    state = "COMPLETING" if element.completing else element.state
                    lines.append(f"{mark}{element.name}|{state}|None|{element.node}|{array.name}")
                elif "--states" in options and self.clock() - element.left <= FORGOTTEN_SECONDS:
                    lines.append(f"{mark}{element.name}|{element.state.partition(' ')[0]}|None|{element.node}|{array.name}")
            for reason, indices in pending.items():
                lines.append(f"{mark}{array.number}_[{compress_indices(indices)}]|PENDING|{reason}||{array.name}")
        if len(asked) == 1 and not lines and "--jobs" in options:
            return 1, "", "slurm_load_jobs error: Invalid job id specified"
        return 0, "\n".join(lines) + "\n", ""

    def _scancel(self, arguments: Sequence[str]) -> tuple[int, str, str]:
        names: list[str] = []
        for word in arguments:
            if word.startswith("--name="):
                names.extend(element.name for array, element in self.elements() if array.name == word[7:])
            elif not word.startswith("--"):
                found = expand_job(word)
                if not found:
                    raise NotImplementedError(f"scancel {arguments}")
                names.extend(found)
            elif word.partition("=")[0] not in ("--quiet", "--user"):
                raise NotImplementedError(f"scancel {arguments}")
        self.cancel(names, OWNER)
        return 0, "", ""

    def _update(self, options: Mapping[str, str]) -> tuple[int, str, str]:
        if set(options) != {"JobId", "Dependency"}:
            raise NotImplementedError(f"scontrol update {options}")
        if not self.updates_work:
            return 1, "", "slurm_update error: Socket timed out on send/recv operation"
        elements = [self.find(name) for name in expand_job(options["JobId"])]
        for element in elements:
            if element.state == "PENDING":
                element.waits = options["Dependency"]
        fine = all(element.state == "PENDING" for element in elements)
        self.settle_dependencies()
        return (0, "", "") if fine else (1, "", f"{options['JobId']}: Job is no longer pending execution")

    def _requeue(self, name: str) -> tuple[int, str, str]:
        element = self.find(name)
        if element.state != "RUNNING":
            return 1, "", "Job/step already completing or completed"
        self.requeue(element, "REQUEUED")
        return 0, "", ""

    def _sacct(self, arguments: Sequence[str]) -> tuple[int, str, str] | None:
        if self.accounting is Accounting.silent:
            return None
        if self.accounting is Accounting.absent:
            return 1, "", "Slurm accounting storage is disabled"
        if self.accounting is Accounting.forgetful:
            return 0, "", ""
        options = dict(word.partition("=")[::2] for word in arguments)
        known = {
            "--allocations",
            "--noheader",
            "--parsable2",
            "--jobs",
            "--name",
            "--starttime",
            "--format",
            "--duplicates",
            "--user",
            "--local",
        }
        if set(options) - known:
            raise NotImplementedError(f"sacct {arguments}")
        columns = [column.partition("%")[0] for column in options["--format"].split(",")]
        names = options["--name"].split(",") if "--name" in options else None
        jobs = options["--jobs"].split(",") if "--jobs" in options else None
        lines: list[str] = []
        for array in self.arrays.values():
            for element in array.elements:
                if names is not None and array.name not in names:
                    continue
                if jobs is not None and not {str(array.number), element.name} & set(jobs):
                    continue
                if "--duplicates" in options:
                    lines.extend(self._row(array, element, columns, node, state) for node, state in element.former)
                recent = self.clock() - element.left < LAG_SECONDS
                lags = self.accounting is Accounting.stale or (self.accounting is Accounting.slow and recent)
                state = "RUNNING" if lags and not element.live else element.state
                lines.append(self._row(array, element, columns, element.node, state, 0 if lags else int(element.left)))
        return 0, "".join(f"{line}\n" for line in lines), ""

    def _row(self, array: Array, element: Element, columns: Sequence[str], node: str, state: str, end: int = 0) -> str:
        place = node or "None assigned"
        facts = {"JobID": element.name, "JobName": array.name, "State": state, "NodeList": place, "End": str(end) if end else "Unknown"}
        return "|".join(facts[column] for column in columns)
