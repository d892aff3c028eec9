"""The interface of a registry: what the job system must know of training stages, and nothing of what a stage computes.

An experiment names its registry (jobs.experiment.plugin), which the planner and the workers then use. The package that defines the stages
implements these protocols, without importing this module if it is to be independent of the job system.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict, Unpack

StopSignal = Callable[[], bool]


class StageCall(Protocol):
    """One stage and everything that determines its output except the corpus."""

    @property
    def stage(self) -> str:
        """Name of the stage."""

    @property
    def version(self) -> int:
        """Increased by the authors when the stage computes something else."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Resolved settings, JSON values only; part of the stage's key."""

    @property
    def runtime(self) -> Mapping[str, Any]:
        """Paths and options that do not change the output, JSON values only; not part of the key.

        An entry `weights` (text) describes the weights that the stage starts from; tables state it. An entry `keep` (`all` or `best_slot`)
        states that the stage writes what it has trained to `output`/model, and which runs keep it (`jobs.control.cleaning.models_of`). An
        entry `reads`, role -> names, names artifacts that not every version of the upstream stage has written: a launch is refused if a
        finished one lacks them.
        """

    @property
    def upstream(self) -> Mapping[str, StageCall]:
        """Role -> the stage whose artifacts are read in that role."""

    @property
    def fold(self) -> str:
        """The held-out fold."""

    @property
    def seed(self) -> int:
        """Seed of all random numbers of the stage."""


class Team(Protocol):
    """The processes that compute one stage together, seen from one of them."""

    @property
    def rank(self) -> int:
        """Global rank. Only rank 0 writes artifacts and checkpoints, and only its return value is used."""

    @property
    def size(self) -> int:
        """Number of processes (world size)."""

    @property
    def local_rank(self) -> int:
        """Rank among the processes of this node, which selects the GPU."""

    def share(self, value: str = "") -> str:
        """Broadcast of rank 0's value; every process must call it equally often. Raises ConnectionError if a process has exited."""

    @property
    def address(self) -> str:
        """IPv4 address of this machine on the network that connects the team; a loopback address if the leader is reached by one."""

    def post(self, key: str, value: str) -> None:
        """Make a value known to all processes under a key that no process has used in this stage."""

    def find(self, key: str, seconds: float) -> str:
        """Return the value that some process has posted. Raises ConnectionError if none arrives in time, or a process has exited."""

    def advance(self, within: float) -> None:
        """Report progress, and announce the next report within so many seconds (0: no limit). A process that misses it counts as hung."""


class StageArguments(TypedDict):
    """Keyword arguments of `Registry.run`: the stage's settings, its folders, and how it reports and stops."""

    settings: Mapping[str, Any]
    runtime: Mapping[str, Any]
    corpus: Path
    fold: str
    seed: int
    upstream: Mapping[str, Path]  # role -> folder with the artifacts of that stage
    output: Path
    checkpoint: Path
    should_stop: StopSignal  # True as soon as the stage should write a checkpoint and exit
    report: Callable[[str], None]  # writes a line to the log; `status` shows `WHAT DONE/TOTAL` and reads `SECONDS s to go` in the last one
    relief: int  # how often the stage ran out of memory: the micro-batch is halved that many times, the result stays the same
    attempt: NotRequired[int]  # number of this execution: files in `checkpoint` of an earlier one may be removed, of a later one not
    superseded: NotRequired[StopSignal]  # True once a later execution has begun, which owns `checkpoint`: nothing may be written there
    team: NotRequired[Team | None]  # the processes that compute it together, all with the same folders; the result does not depend on it
    shared: NotRequired[Path | None]  # folder for what stages of all experiments share; many processes on many machines use it at once


class Registry(Protocol):
    """The methods and stages of one field of research."""

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods that `calls` accepts, in the order of the tables."""

    @property
    def measurements(self) -> tuple[str, ...]:
        """Names of further methods that `calls` accepts, whose last stage measures the whole corpus and has no score.

        Such a method has one run, whatever folds and seeds an experiment has.
        """

    @property
    def teams(self) -> tuple[str, ...]:
        """Names of the stages that several processes can compute together; every other stage gets one process."""

    def calls(self, method: str, recipe: Any) -> Callable[[str, int], StageCall]:
        """A function from fold and seed to the last stage of a run, which contains its upstream stages.

        Runs should share objects, such as settings and the upstream stages of a fold: every look plans grids of many thousand runs.
        """

    def run(self, stage: str, **arguments: Unpack[StageArguments]) -> Mapping[str, Any]:
        """Compute one stage: artifacts go to `output`, resumable state to `checkpoint`.

        Returns JSON values: `metrics` (numbers), and for a run `confusion` (rows: true class), `classes`, and `diverged`: why the
        training does not count, or "". `arithmetic` (text values): what the hardware decides and tables name, such as `device` and
        `precision`. `warnings` (texts): about a result that counts all the same; `explain` and the report show them.

        If `should_stop` returned True, raises an exception with the attribute `interrupted = True` after writing a checkpoint.
        """


class ProxyColumn(Protocol):
    """A proxy of a point's score that is known before fine-tuning, as a column of the tables of a sweep."""

    @property
    def name(self) -> str:
        """Its key in JSON and CSV."""

    @property
    def heading(self) -> str:
        """Its heading in a table."""

    @property
    def per_count(self) -> bool:
        """Whether there is one value per cluster count, rather than one per set of counts."""

    @property
    def decimals(self) -> int:
        """Decimals in a table."""


class SweptMethod(Protocol):
    """The method whose settings a sweep searches: the class attribute `swept` of a recipe schema."""

    @property
    def name(self) -> str:
        """A name in `Registry.methods`."""

    @property
    def label(self) -> str:
        """Its name in captions."""

    @property
    def counts(self) -> str:
        """Key of the recipe with the set of cluster counts."""

    @property
    def counts_stage(self) -> str:
        """The stage that is computed once per cluster count and divides the frames of its upstream stage."""

    @property
    def path_keys(self) -> Sequence[str]:
        """Last part of the keys of the recipe whose value may be a path."""

    @property
    def proxies(self) -> Sequence[ProxyColumn]:
        """In the order of the tables."""

    @property
    def proxies_caption(self) -> Sequence[str]:
        """Sentences that explain them."""


class SweepRegistry(Registry, Protocol):
    """A registry whose runs can be scored on speakers of the training folds, so that settings are chosen without the held-out fold.

    The stages of such a run never read a recording of these speakers for training, nor any recording of the held-out fold.
    """

    def calls(self, method: str, recipe: Any, validation: Mapping[str, Sequence[str]] | None = None) -> Callable[[str, int], StageCall]:
        """As for every registry; `validation`: fold -> the speakers that its runs are scored on (None: on the held-out fold)."""

    def check(self, recipe: Any) -> None:
        """Raise an error with lines for the user where a value is out of its range."""

    def check_corpus(self, corpus: Path, methods: Sequence[tuple[str, Any]], folds: Mapping[str, Sequence[str]]) -> None:
        """Raise an error with lines for the user where a corpus is too small for the recipe of a method (`methods`: each with its recipe).

        `folds`: held-out fold -> the speakers that its runs are scored on; (): on the held-out fold.
        """

    def validation_speakers(self, corpus: Path, fold: str) -> tuple[str, ...]:
        """The speakers that runs of a fold are scored on. Raises an error with one line for the user where none are left."""

    def training_frames(self, corpus: Path, recipe: Any, fold: str, validation: Sequence[str]) -> int:
        """Number of frames that are clustered for a fold: the largest possible cluster count."""

    def proxies(self, corpus: Path, fold: str, validation: Sequence[str], clusters: Mapping[int, Path]) -> Mapping[str, Any]:
        """How the clusters agree with the labels, by cluster count: `{"k": {"16": {"purity": 0.31}}}`.

        `clusters`: cluster count -> folder with the artifacts of its stage.
        """

    def stage_proxies(self, stage: str, settings: Mapping[str, Any], metrics: Mapping[str, Any]) -> Mapping[str, Any]:
        """The proxies in the metrics of a finished stage: `{"k": {"16": {...}}}` of a stage per cluster count, `{name: ...}` of others."""
