"""Runs a stage in this process on a chosen device, records the loss of each logged step, and calls a function before each step."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ser_core.parallel.team import Team
from ser_core.registry import REGISTRY, StageCall
from ser_core.training import loop
from ser_core.training.curves import Row

_get_parts = loop._Prefetcher.get


def _ignore(step: int) -> None:
    del step


@dataclass
class Watch:
    """Observes the training loop of one stage. `on_step(n)` is called before step n of this run (from 0), `stop_at`: interrupt there."""

    on_step: Callable[[int], None] = _ignore
    stop_at: int | None = None
    losses: list[float] = field(default_factory=list)  # of each logged step, also of those before a resumption
    validation: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)  # seconds of each step of this run that the loop waited for its data
    batches: list[list[tuple[list[int], int]]] = field(default_factory=list)  # of each step: positions and `samples` of its parts
    _step: int | None = None  # None: not in the training loop

    def should_stop(self) -> bool:
        """The loop asks this before each step, other work between its items."""
        if self._step is None:
            return False
        step, self._step = self._step, self._step + 1
        if step == self.stop_at:
            return True
        self.on_step(step)
        return False

    def curves(self, output: Path | None, rows: list[Row]) -> _Curves:
        """Stands in for `ser_core.training.curves.Curves`, which needs TensorBoard."""
        del output
        self._step = 0
        return _Curves(self, rows)

    def get_parts(self, prefetcher: Any, step: int, *, more: bool) -> loop.LocalParts:
        """Stands in for the loop's `_Prefetcher.get`, and takes its time."""
        started = time.perf_counter()
        parts = _get_parts(prefetcher, step, more=more)
        self.waits.append(time.perf_counter() - started)
        self.batches.append([(list(part.positions), int(part.samples)) for part in parts.loaded.values()])
        return parts

    def ended(self) -> None:
        """The loop has ended."""
        self._step = None


class _Curves:
    def __init__(self, watch: Watch, rows: list[Row]) -> None:
        self._watch = watch
        self.rows = rows
        for _, values in rows:
            self._note(values)

    def add(self, step: int, values: dict[str, float]) -> None:
        self.rows.append([step, values])
        self._note(values)

    def publish(self, references: Mapping[str, Any]) -> None:
        """Leave no file: the losses are compared in memory."""

    def close(self) -> None:
        self._watch.ended()

    def _note(self, values: Mapping[str, float]) -> None:
        if "train/loss" in values:
            self._watch.losses.append(values["train/loss"])
        if "validation/loss" in values:
            self._watch.validation.append(values["validation/loss"])


@dataclass(frozen=True)
class Ran:
    """Result of a stage, its output folder, and its losses."""

    outcome: Mapping[str, Any]
    output: Path
    losses: list[float]
    validation: list[float]
    upstream: Mapping[str, Path]


class Bench:
    """Runs stages of one corpus, each in a folder of its own below `root`, with `threads` CPU threads (None: torch's choice)."""

    def __init__(self, corpus: Path, root: Path, threads: int | None = None) -> None:
        self.corpus = corpus
        self.root = root
        self.threads = threads
        self._count = 0

    def run(
        self,
        call: StageCall,
        execution: Mapping[str, Any],
        *,
        upstream: Mapping[str, Path] | None = None,
        watch: Watch | None = None,
        checkpoint: Path | None = None,
        relief: int = 0,
        team: Team | None = None,
        shared: Path | None = None,
        threads: int | None = None,
    ) -> Ran:
        """Compute a stage with some execution settings replaced; upstream stages that are not given are computed first."""
        known = upstream if upstream is not None else {role: self.run(parent, execution).output for role, parent in call.upstream.items()}
        watch = watch or Watch()
        self._count += 1
        output = self.root / f"{self._count:03d}-{call.stage}"
        runtime = {**call.runtime, "execution": {**call.runtime["execution"], **execution}}
        runtime["threads"] = threads or self.threads

        def get_parts(prefetcher: Any, step: int, *, more: bool) -> loop.LocalParts:
            return watch.get_parts(prefetcher, step, more=more)

        with mock.patch.object(loop, "Curves", watch.curves), mock.patch.object(loop._Prefetcher, "get", get_parts):
            outcome = REGISTRY.run(
                call.stage,
                settings=json.loads(json.dumps(call.settings)),  # as it comes back from a file
                runtime=json.loads(json.dumps(runtime)),
                corpus=self.corpus,
                fold=call.fold,
                seed=call.seed,
                upstream=known,
                output=output,
                checkpoint=checkpoint or output / "checkpoint",
                should_stop=watch.should_stop,
                report=_silent,
                relief=relief,
                team=team,
                shared=shared,
            )
        return Ran(json.loads(json.dumps(outcome)), output, watch.losses, watch.validation, known)


def _silent(line: str) -> None:
    print(line, flush=True)  # into the part's log


def on(device: str) -> dict[str, Any]:
    """Execution settings of the device under test. Without a GPU it is transformers' encoder on the CPU, which a GPU uses too."""
    return {"device": "cuda", "attention": "sdpa"} if device == "cuda" else {"device": "cpu", "attention": "eager"}


ON_CPU: Mapping[str, Any] = {"device": "cpu", "attention": "sdpa"}  # this project's encoder for CPUs


@contextlib.contextmanager
def comparable() -> Iterator[None]:
    """Context without what differs between devices by design: Gumbel noise (the likeliest code instead), and TF32 in cuDNN."""
    with (
        mock.patch.object(torch.nn.functional, "gumbel_softmax", _likeliest),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    ):
        yield


def _likeliest(logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1) -> Tensor:
    """torch's `gumbel_softmax` without noise."""
    del eps
    soft = torch.softmax(logits / tau, dim)
    if not hard:
        return soft
    return torch.zeros_like(soft).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0) - soft.detach() + soft
