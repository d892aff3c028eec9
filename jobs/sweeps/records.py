"""Records of a sweep: what was launched, and the points that Optuna has chosen. Only this module writes these files.

The state of a sweep is in no record: it follows from the results in the store (jobs.sweeps.decisions).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from jobs.errors import UsageError
from jobs.experiment.config import Experiment, secrets_of
from jobs.experiment.launched import Corpus
from jobs.experiment.registry import SweepRegistry
from jobs.experiment.stored_config import resolved_values, restore_experiment
from jobs.store.identity import record_identity
from jobs.store.layout import Layout, valid_experiment_name
from jobs.store.records import DamagedRecordError, Decoder, write_json, write_text
from jobs.sweeps.space import Point, Space, space_of
from jobs.text import did_you_mean

SCHEMA = 2  # 1: until sweeps were computed by the executors of a grid
AGAIN = "launch `sweep` again to renew it; stages in the store are reused"


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """The record of a sweep: fields of `Sweep` that determine it, and the values of its experiment."""

    file: str  # name of the experiment's file in configs/experiment/
    corpus: Corpus
    validation: Mapping[str, tuple[str, ...]]  # fold -> speakers that its trials are scored on
    launched: float  # seconds since the epoch
    began: float = 0.0  # its first launch
    user: int | None = None  # uid of the launch
    typed: tuple[str, ...] = ()  # words of the last launch, after `launch.py`
    config: Mapping[str, Any] = field(default_factory=dict)  # the resolved values of the experiment


@dataclass(frozen=True)
class Proposal:
    """A point chosen by Optuna, and the values of its parameters (jobs.sweeps.space.parameters)."""

    parameters: Mapping[str, Any]
    point: Point


@dataclass(frozen=True)
class _Proposals:
    """All batches of points that Optuna has chosen."""

    batches: tuple[tuple[Proposal, ...], ...]


_SWEEPS, _PROPOSALS = Decoder(_Stored, SCHEMA), Decoder(_Proposals, SCHEMA)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One sweep, with everything that is needed to run it."""

    experiment: Experiment
    file: str
    corpus: Corpus
    layout: Layout  # of the experiment
    validation: Mapping[str, tuple[str, ...]]
    launched: float
    began: float
    digest: str  # its name: hash of everything that determines it
    registry: SweepRegistry
    code: Path  # folder of the running code
    user: int | None = None
    typed: tuple[str, ...] = ()  # words of the last launch, after `launch.py`

    @property
    def folds(self) -> tuple[str, ...]:
        return folds_of(self.experiment, self.corpus)

    @property
    def own_layout(self) -> Layout:
        """Layout of its launch, logs, submissions and cancellation. Cancelling the experiment's grid does not cancel its sweep."""
        return sweep_layout(self.layout, self.digest)

    @property
    def folder(self) -> Path:
        return self.own_layout.folder

    @property
    def proxies(self) -> Path:
        """Cache of proxies by stage key. May be removed."""
        return self.folder / "proxies"

    @cached_property
    def space(self) -> Space:
        return space_of(self.experiment)


def sweep_layout(layout: Layout, digest: str) -> Layout:
    """Layout of one sweep of an experiment."""
    return Layout(layout.root, (layout.sweep / digest).relative_to(layout.root).as_posix())


def sweeps_of(layout: Layout) -> tuple[Layout, ...]:
    """Layouts of all sweeps of an experiment that were launched."""
    return tuple(sweep_layout(layout, file.parent.name) for file in sorted(layout.sweep.glob("*/experiment.json")))


def folds_of(experiment: Experiment, corpus: Corpus) -> tuple[str, ...]:
    """The held-out folds that every trial is evaluated on, in this order."""
    return tuple(experiment.sweep.folds or experiment.folds or corpus.folds)


def store_sweep(sweep: Sweep) -> None:
    """Record a sweep as the last one launched; only its user can read the record if it has settings that may hold secrets."""
    record_identity(sweep.layout.root)
    recorded = {each.name: getattr(sweep, each.name) for each in fields(_Stored) if each.name != "config"}
    stored = _Stored(**{**recorded, "user": os.getuid()}, config=resolved_values(sweep.experiment))
    private = bool(secrets_of(sweep.experiment))
    write_json(sweep.own_layout.experiment_file, {"schema": SCHEMA, **asdict(stored)}, private=private)
    store_latest(sweep)


def store_latest(sweep: Sweep) -> None:
    """Record a sweep as the last one launched, without changing its files."""
    write_text(latest_file(sweep.layout), f"{sweep.digest}\n")


def began(layout: Layout, digest: str) -> float:
    """Time of the first launch of a sweep, seconds since the epoch; 0 if it was not launched, or its record cannot be read."""
    stored = _SWEEPS.read(sweep_layout(layout, digest).experiment_file)
    return stored.began if stored else 0.0


def load_sweep(layout: Layout, digest: str, registry: SweepRegistry, recipe_schema: type[Any], code: Path) -> Sweep:
    """A sweep as it was launched last. UsageError if its record is missing, damaged, or of another version of the program."""
    own = sweep_layout(layout, digest)
    try:
        stored = _SWEEPS.load(own.experiment_file)
    except DamagedRecordError as error:
        raise UsageError(f"{own.experiment_file}: damaged ({error}); {AGAIN}") from error
    if stored is None:
        former = own.folder / "sweep.json"
        what = f"{former}: launched by an earlier version" if former.is_file() else f"{own.experiment_file}: no such sweep"
        raise UsageError(f"{what}; {AGAIN}")
    recorded = {each.name: getattr(stored, each.name) for each in fields(_Stored) if each.name != "config"}
    experiment = restore_experiment(stored.config, recipe_schema=recipe_schema, again=AGAIN)
    return Sweep(**recorded, experiment=experiment, layout=layout, digest=digest, registry=registry, code=code)


def latest_file(layout: Layout) -> Path:
    """The file with the digest of the last sweep launched."""
    return layout.sweep / "latest"


def require_latest(layout: Layout) -> str:
    """Digest of the sweep of an experiment that was launched last. UsageError if there is none, or the file is damaged."""
    if not valid_experiment_name(layout.experiment):
        raise UsageError(f"experiment {layout.experiment!r}: not a name that an experiment can have")
    try:
        digest = latest_file(layout).read_text(encoding="ascii").strip()
    except (FileNotFoundError, NotADirectoryError) as error:
        known = sorted(path.parents[1].name for path in layout.root.glob("*/sweep/latest"))
        hint = did_you_mean(layout.experiment, known, otherwise=f"there are sweeps of: {', '.join(known) or 'none'}")
        raise UsageError(f"experiment {layout.experiment!r}: no sweep was launched (nothing in {layout.sweep}); {hint}") from error
    except UnicodeDecodeError:
        digest = ""
    if not digest.isalnum():
        raise UsageError(f"{latest_file(layout)}: damaged; {AGAIN}")
    return digest


def latest_sweep(layout: Layout) -> Layout | None:
    """Layout of the sweep of an experiment that was launched last; None if there is none, or the file that names it is damaged."""
    try:
        return sweep_layout(layout, require_latest(layout))
    except UsageError:
        return None


def read_proposals(sweep: Sweep) -> tuple[tuple[Proposal, ...], ...]:
    """The batches of points that Optuna has chosen, oldest first; () if there are none, or the record is damaged."""
    found = _PROPOSALS.read(_proposals_file(sweep))
    return found.batches if found else ()


def write_proposals(sweep: Sweep, batches: Sequence[Sequence[Proposal]]) -> None:
    """Record them: another version of Optuna might choose other points. Without the record this version chooses the same ones again."""
    value = [[{"parameters": dict(each.parameters), "point": each.point.to_json()} for each in batch] for batch in batches]
    write_json(_proposals_file(sweep), {"schema": SCHEMA, "batches": value})


def _proposals_file(sweep: Sweep) -> Path:
    return sweep.folder / "proposals.json"
