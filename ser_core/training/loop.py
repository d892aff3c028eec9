"""The one training loop: batch, loss, gradient, step; checkpoints on the way; the same numbers with and without interruption.

What a stage trains is an `Objective`. The loop knows steps and parts of steps: the parts' losses add up to the step's, so a batch in ten
parts has the gradient of the batch in one. Several processes share the parts of each step and add up their gradients; as torch draws for
each part from a seed of its own, it makes no difference which process computes it, nor how many there are.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ser_core.errors import Diverged, Interrupted
from ser_core.parallel.group import Group, broadcast_tensors, require_equal, sum_gradients
from ser_core.training.batches import shares
from ser_core.training.checkpoints import Checkpoints, Saved
from ser_core.training.curves import Curves, Row
from ser_core.training.device import Arithmetic
from ser_core.training.progress import Progress
from ser_core.training.randomness import torch_seed
from ser_core.training.schedule import Schedule


@dataclass(frozen=True)
class PartLoss:
    """`loss` is differentiated; `shown` is what curves show, and adds up over the parts of a step; `correct` of `counted` decisions."""

    loss: Tensor
    shown: Tensor
    correct: Tensor
    counted: int


@dataclass(frozen=True)
class StepParts:
    """A step before anything of it is loaded: the same in every process. `costs`, of the parts, are what their shares are balanced by."""

    parts: Sequence[Any]
    costs: Sequence[float]
    rows: int  # utterances in all parts


@dataclass(frozen=True)
class LocalParts:
    """What one process computes of a step: its parts, loaded, by their numbers in the step."""

    loaded: Mapping[int, Any]
    count: int  # parts of the step
    rows: int  # its utterances


class Objective(ABC):
    """What a stage trains."""

    model: nn.Module

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, for the optimiser."""

    @abstractmethod
    def plan(self, step: int) -> StepParts:
        """The batch of a step in parts, with all that is drawn for the step as a whole; cheap, because every process plans every step.

        A pure function of the step; may run in another thread, ahead of time.
        """

    def load(self, part: Any) -> Any:
        """What `loss` needs of a planned part, read only by the process that computes it; where `plan` runs."""
        return part

    def before_step(self, parts: LocalParts) -> None:
        """Called before the losses of a step, in all processes, also where one has no part of it."""
        del parts

    @abstractmethod
    def loss(self, part: Any) -> PartLoss:
        """Loss of one part, with gradient."""

    def after_step(self, step: int) -> Mapping[str, float]:
        """Called in all processes when `step` steps are done; what it returns, the same in all, is shown in the curves."""
        return {}

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values beside the model that a checkpoint must hold."""
        return {}, {}

    def load_extra_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take back what `kept` gave."""
        del tensors, facts


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast, and when to write."""

    name: str  # stage, for progress lines
    steps: int
    learning_rate: float
    schedule: Schedule
    seed: int
    arithmetic: Arithmetic
    checkpoint_seconds: float
    log_every: int  # steps
    steps_per_epoch: int = 0  # 0: not trained in epochs
    save_last: bool = False  # also after the last step: for stages with long work to follow


@dataclass(frozen=True)
class TrainingResult:
    """What a finished training tells: means over the last tenth of the steps, and where the time went."""

    loss: float
    accuracy: float
    steps: int
    resumed_at: int
    seconds: float  # in this attempt
    seconds_per_step: float  # median
    waited_seconds: float  # for data


@dataclass
class _RunningSums:
    """Sums over steps: `sums` (2,) of what is shown and of correct decisions, on the device and read once in a while."""

    sums: Tensor
    counted: int = 0
    steps: int = 0

    def add(self, sums: Tensor, counted: int) -> None:
        self.sums = self.sums + sums
        self.counted += counted
        self.steps += 1

    def means(self) -> tuple[float, float]:
        """Loss of a step, and accuracy."""
        shown, correct = self.sums.tolist()
        return shown / self.steps, correct / max(1, self.counted)

    def facts(self) -> list[float]:
        """What a checkpoint keeps, so that a mean that spans an interruption is the same."""
        return [*self.sums.tolist(), self.counted, self.steps]

    @staticmethod
    def start(device: torch.device, facts: Sequence[float] = (0.0, 0.0, 0, 0)) -> _RunningSums:
        return _RunningSums(torch.tensor(facts[:2], dtype=torch.float32, device=device), int(facts[2]), int(facts[3]))


@dataclass
class _TrainingState:
    """Where the training stands."""

    step: int = 0
    rows: list[Row] = field(default_factory=list)
    saved: int = -1  # step of the newest checkpoint


def train(
    objective: Objective,
    plan: TrainingPlan,
    checkpoints: Checkpoints,
    output: Path,
    should_stop: Callable[[], bool],
    report: Callable[[str], None],
    group: Group | None = None,
) -> TrainingResult:
    """Train from the newest checkpoint, or from the start, to the last step; every process of the group calls it, the leader alone writes.

    Raises Interrupted after a checkpoint was written once `should_stop` turned true in any process, and Diverged when the loss is not
    finite; both in all processes after the same step.
    """
    group = group or Group()
    device = plan.arithmetic.device
    objective.model.to(device)
    named = objective.parameters()
    # One kernel for all parameters: faster on CPUs and GPUs alike.
    optimiser = torch.optim.Adam(list(named.values()), lr=plan.learning_rate, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=plan.arithmetic.dtype is torch.float16)
    scaler.scale(torch.zeros((), device=device))  # makes its state also where this process has no part of the first step
    state = _TrainingState()
    window = _RunningSums.start(device)  # since the last entry of the curves
    tail, tail_from = _RunningSums.start(device), plan.steps * 9 // 10  # what is told at the end, however often curves are written
    group.expect_progress()
    # Parts are cut for a type of device, and gradients of one precision are not to be added to those of another.
    require_equal(group, "arithmetic", f"{device.type}/{plan.arithmetic.dtype}")
    saved = _newest(checkpoints, group)
    if saved is not None and _restore(saved, objective, named, optimiser, scaler):
        state = _TrainingState(saved.step, list(saved.facts["curves"]), saved.step)
        window, tail = _RunningSums.start(device, saved.facts["window"]), _RunningSums.start(device, saved.facts["tail"])
        report(f"{plan.name}: resumed after step {state.step} of {plan.steps}")
    else:
        group.broadcast_(objective.model.state_dict().values())  # drawn alike, but perhaps by another kind of machine
    del saved  # as large as the model and the optimiser
    resumed_at = state.step
    curves = Curves(output if group.is_leader else None, state.rows)
    progress = Progress(report)
    started = saved_at = time.monotonic()
    durations: list[float] = []
    waited = 0.0
    idle_reported = False

    def save() -> None:
        """In all processes, so that they see alike what cannot be saved; the leader writes, the others wait for it."""
        _check_finite(window, plan, state.step)
        if state.saved == state.step:
            return
        if group.is_leader:
            extra, own = objective.extra_state()
            tensors = {"model": objective.model.state_dict(), "adam": _adam_tensors(optimiser, named), "extra": extra}
            sums = {"window": window.facts(), "tail": tail.facts()}
            facts = {"curves": state.rows, **sums, "scaler": scaler.state_dict(), "objective": own}
            checkpoints.save(state.step, tensors, facts)
        group.barrier()
        state.saved = state.step

    def local_parts(step: int) -> LocalParts:
        planned = objective.plan(step)
        numbers = shares(planned.costs, group.size)[group.rank]
        return LocalParts({number: objective.load(planned.parts[number]) for number in numbers}, len(planned.parts), planned.rows)

    with _Prefetcher(local_parts, ahead=device.type == "cuda") as batches:
        try:
            while state.step < plan.steps:
                if group.any(should_stop()):
                    save()
                    raise Interrupted(f"{plan.name}: stopped after step {state.step} of {plan.steps}; a checkpoint was written")
                group.expect_progress()
                begun = time.monotonic()
                parts = batches.get(state.step, more=state.step + 1 < plan.steps)
                waited += time.monotonic() - begun
                if parts.count < group.size and not idle_reported:
                    report(_idle_message(plan.name, state.step, parts, group.size))
                    idle_reported = True
                rate = plan.learning_rate * plan.schedule(state.step)
                for settings in optimiser.param_groups:
                    settings["lr"] = rate
                objective.model.train()
                optimiser.zero_grad(set_to_none=True)
                shown, counted = _gradients(objective, plan, scaler, state.step, parts)
                # The leader's clock says when to save, but all look at the loss before.
                due = group.is_leader and time.monotonic() - saved_at >= plan.checkpoint_seconds
                shown, (all_counted, saving) = sum_gradients(group, list(named.values()), shown, (counted, due))
                scaler.step(optimiser)
                scaler.update()
                window.add(shown, int(all_counted))
                if state.step >= tail_from:
                    tail.add(shown, int(all_counted))
                state.step += 1
                logged = state.step % plan.log_every == 0 or state.step == plan.steps
                # Reading the loss waits for a GPU, so there it is read only where it is written down.
                if logged or device.type == "cpu":
                    _check_finite(window, plan, state.step)
                durations.append(time.monotonic() - begun)
                values = {f"validation/{name}": value for name, value in objective.after_step(state.step).items()}
                if logged:
                    loss, accuracy = window.means()
                    values |= {"train/loss": loss, "train/accuracy": accuracy, "train/learning_rate": rate}
                    window = _RunningSums.start(device)
                if values:
                    curves.add(state.step, values)
                if logged:
                    _log_progress(progress, plan, state, durations)
                if saving and state.step < plan.steps:
                    save()
                    saved_at = time.monotonic()
        finally:
            curves.close()
    if plan.save_last and durations:
        save()
    return TrainingResult(
        *tail.means(), plan.steps, resumed_at, time.monotonic() - started, median(durations) if durations else 0.0, waited
    )


def _gradients(objective: Objective, plan: TrainingPlan, scaler: torch.amp.GradScaler, step: int, parts: LocalParts) -> tuple[Tensor, int]:
    """Add up the gradients of this process's parts; what they show and their correct decisions (2,), and the decisions counted."""
    shown, counted = torch.zeros(2, device=plan.arithmetic.device), 0
    with plan.arithmetic.autocast():
        objective.before_step(parts)
    for number, part in parts.loaded.items():
        torch.manual_seed(torch_seed(plan.seed, "dropout", step, number))
        with plan.arithmetic.autocast():
            found = objective.loss(part)
        scaler.scale(found.loss).backward()  # type: ignore[no-untyped-call]
        shown = shown + torch.stack([found.shown.detach().float(), found.correct.detach().float()])
        counted += found.counted
    return shown, counted


class _Prefetcher:
    """Gives the parts of each step; with `ahead`, those of the next one are made while this one is computed."""

    def __init__(self, parts: Callable[[int], LocalParts], *, ahead: bool) -> None:
        self._parts = parts
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches") if ahead else None
        self._next: tuple[int, Future[LocalParts]] | None = None

    def __enter__(self) -> _Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def get(self, step: int, *, more: bool) -> LocalParts:
        if self._pool is None:
            return self._parts(step)
        pending = self._next[1] if self._next is not None and self._next[0] == step else self._pool.submit(self._parts, step)
        parts = pending.result()
        self._next = (step + 1, self._pool.submit(self._parts, step + 1)) if more else None
        return parts


def _newest(checkpoints: Checkpoints, group: Group) -> Saved | None:
    """The checkpoint that the leader finds: two processes that look for themselves may see different ones on a network's disk."""
    saved = checkpoints.load() if group.is_leader else None
    told = group.broadcast_object(None if saved is None else (saved.step, saved.facts))
    if told is None:
        return None
    step, facts = told
    return Saved(step, broadcast_tensors(group, {} if saved is None else saved.tensors), facts)


def _idle_message(name: str, step: int, parts: LocalParts, processes: int) -> str:
    size = max(1, parts.rows // (2 * processes))  # two parts for each, because they differ in length
    wanted = f"set recipe.execution.micro_batch={size} or ask for" if parts.rows >= processes else "ask for"
    return f"{name}: step {step} has {parts.count} part(s) for {processes} processes, some are idle: {wanted} fewer processes"


def _check_finite(window: _RunningSums, plan: TrainingPlan, step: int) -> None:
    shown = float(window.sums[0])
    if not math.isfinite(shown):
        raise Diverged(f"{plan.name}: the loss is {shown} at step {step} (seed {plan.seed}, learning rate {plan.learning_rate})")


def _log_progress(progress: Progress, plan: TrainingPlan, state: _TrainingState, durations: list[float]) -> None:
    if not progress.due():
        return
    values = state.rows[-1][1]
    recent = median(durations[-100:])
    epoch = f", epoch {(state.step - 1) // plan.steps_per_epoch + 1}/{plan.steps // plan.steps_per_epoch}" if plan.steps_per_epoch else ""
    remaining = (plan.steps - state.step) * recent
    now = f"loss {values['train/loss']:.4f}, accuracy {values['train/accuracy'] * 100:.1f} %"
    progress.report(f"{plan.name}: step {state.step}/{plan.steps}{epoch}, {now}, {recent:.3g} s a step, {remaining:.0f} s to go")


ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


def _adam_tensors(optimiser: torch.optim.Adam, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Adam's state by parameter name; a parameter without a gradient so far has none."""
    return {
        f"{key}/{name}": optimiser.state[parameter][key]
        for name, parameter in named.items()
        if optimiser.state.get(parameter)
        for key in ADAM_STATE
    }


def _restore(
    saved: Saved, objective: Objective, named: Mapping[str, nn.Parameter], optimiser: torch.optim.Adam, scaler: torch.amp.GradScaler
) -> bool:
    """Put a checkpoint into place; False where its tensors are not those of this model."""
    model, adam = saved.tensors.get("model", {}), saved.tensors.get("adam", {})
    current = objective.model.state_dict()
    if {name: tensor.shape for name, tensor in model.items()} != {name: tensor.shape for name, tensor in current.items()}:
        return False
    objective.model.load_state_dict(model)
    entries = {index: {key: adam[f"{key}/{name}"] for key in ADAM_STATE} for index, name in enumerate(named) if f"step/{name}" in adam}
    optimiser.load_state_dict({"state": entries, "param_groups": optimiser.state_dict()["param_groups"]})
    if saved.facts["scaler"]:  # none where the attempt before ran on a GPU that needs no scaling: then it begins anew
        scaler.load_state_dict(saved.facts["scaler"])
    objective.load_extra_state(saved.tensors.get("extra", {}), saved.facts["objective"])
    return True
