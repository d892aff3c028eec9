"""What the job system needs to know of a training stage: the shape of a registry, and nothing of what a stage computes.

`launch.py` hands a registry of this shape to the planner and to the worker; the package that owns the stages satisfies
it without importing this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict, Unpack


class StageCall(Protocol):
    """One stage with everything that determines its output, apart from the corpus."""

    @property
    def stage(self) -> str:
        """`states`, `cluster`, `tapt`, `ptapt` or `finetune`."""

    @property
    def version(self) -> int:
        """Raised by an author when the meaning of the stage changes."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Resolved settings, JSON values only; part of the identity."""

    @property
    def runtime(self) -> Mapping[str, Any]:
        """Paths and ways of computing, JSON values only; no part of the identity."""

    @property
    def upstream(self) -> Mapping[str, StageCall]:
        """Role -> the stage whose artifact is read under that role."""

    @property
    def fold(self) -> str:
        """The held-out fold."""

    @property
    def seed(self) -> int:
        """Seed of everything random in the stage."""


class StopSignal(Protocol):
    """Tells a running stage to write a checkpoint and leave."""

    def __call__(self) -> bool:
        """True from the moment the stage should stop."""


class Team(Protocol):
    """The processes that compute one stage together, as one of them sees it."""

    @property
    def rank(self) -> int:
        """From 0, the leader: it alone writes artifacts and checkpoints, and its return value counts."""

    @property
    def size(self) -> int:
        """How many processes there are; 1: this one is alone."""

    @property
    def local_rank(self) -> int:
        """From 0 among those of this machine: which of its GPUs is ours."""

    def share(self, value: str = "") -> str:
        """What the leader gave, in every process; all call it equally often. Raises ConnectionError where one of them is gone."""

    def advance(self, within: float) -> None:
        """Tell that this process has got on, and will again within so many seconds (0: no promise); one that breaks it counts as hung."""


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
    should_stop: StopSignal
    report: Callable[[str], None]  # writes a line to the log
    relief: int  # how often the stage ran out of memory: the micro-batch is halved that many times, the result stays the same
    team: NotRequired[Team | None]  # the processes that compute it together, all with the same folders; the result does not depend on it
    shared: NotRequired[Path | None]  # folder for what stages of all experiments share; many processes on many machines use it at once


class Registry(Protocol):
    """The methods and stages of one field of work."""

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods that `calls` knows, in the order of the tables."""

    @property
    def teams(self) -> tuple[str, ...]:
        """Names of the stages that several processes can compute together; the others are given one."""

    def calls(self, method: str, recipe: Any) -> Callable[[str, int], StageCall]:
        """What gives, by fold and seed, the last stage of a run, holding its upstream stages.

        What runs have in common should be the same object in all of them: settings, and the upstream stages of a fold. A grid of many
        thousand runs is planned at every look.
        """

    def run(self, stage: str, **arguments: Unpack[StageArguments]) -> Mapping[str, Any]:
        """Compute one stage: artifacts go to `output`, resumable state to `checkpoint`.

        Returns JSON values: `metrics` (numbers), and for a run `confusion` (rows: true class), `classes`, and `diverged`: why the
        training does not count, or "".
        Raises `Interrupted` of its own package after a checkpoint when `should_stop` turned true: the worker knows it
        by its attribute `interrupted = True`.
        """


class SweepRegistry(Registry, Protocol):
    """A registry whose runs can be scored on speakers of the training folds, so that settings are chosen without the held-out fold.

    Stages that are trained for such a run never read a recording of these speakers, nor of the held-out fold.
    """

    def calls(self, method: str, recipe: Any, validation: Mapping[str, Sequence[str]] | None = None) -> Callable[[str, int], StageCall]:
        """As for every registry; `validation`: fold -> the speakers that its runs are scored on (None: on the held-out fold)."""

    def check(self, recipe: Any) -> None:
        """Raise an error with lines for the user where a value is out of its range."""

    def validation_speakers(self, corpus: Path, fold: str) -> tuple[str, ...]:
        """The speakers that runs of a fold are scored on. Raises an error with one line for the user where none are left."""

    def training_frames(self, corpus: Path, recipe: Any, fold: str, validation: Sequence[str]) -> int:
        """How many frames are clustered for a fold: no more clusters can be asked for."""

    def proxies(self, corpus: Path, fold: str, validation: Sequence[str], clusters: Mapping[int, Path]) -> Mapping[str, Any]:
        """What clusters have to do with the labels, by their number: `{"k": {"16": {"purity": 0.31, "nmi": 0.05}}}`.

        `clusters`: number -> folder with the artifacts of its stage.
        """
