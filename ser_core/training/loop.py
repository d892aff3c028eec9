"""The one training loop: batch, loss, gradient, step; checkpoints on the way; the same numbers with and without interruption.

What a stage trains is an `Objective`. The loop knows steps and parts of steps: the parts' losses add up to the step's, so a batch in ten
parts has the gradient of the batch in one.
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

from ser_core.training.checkpoints import Checkpoints, Saved
from ser_core.training.curves import Curves, Row
from ser_core.training.device import Arithmetic
from ser_core.training.endings import Diverged, Interrupted
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


class Objective(ABC):
    """What a stage trains."""

    model: nn.Module

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, for the optimiser."""

    @abstractmethod
    def parts(self, step: int) -> Sequence[Any]:
        """The batch of a step, in parts. A pure function of the step; may run in another thread, ahead of time."""

    @abstractmethod
    def loss(self, part: Any) -> PartLoss:
        """Loss of one part, with gradient."""

    def after(self, step: int) -> Mapping[str, float]:
        """Called when `step` steps are done; what it returns is shown in the curves."""
        return {}

    def kept(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values beside the model that a checkpoint must hold."""
        return {}, {}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take back what `kept` gave."""
        del tensors, facts


@dataclass(frozen=True)
class Plan:
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
class Trained:
    """What a finished training tells: means over the last tenth of the steps, and where the time went."""

    loss: float
    accuracy: float
    steps: int
    resumed_at: int
    seconds: float  # in this attempt
    seconds_per_step: float  # median
    waited_seconds: float  # for data


@dataclass
class _Window:
    """Sums over steps; tensors on the device, read once in a while."""

    shown: Tensor
    correct: Tensor
    counted: int = 0
    steps: int = 0

    def add(self, part: PartLoss) -> None:
        self.shown = self.shown + part.shown.detach().float()
        self.correct = self.correct + part.correct.detach().float()
        self.counted += part.counted

    def facts(self) -> list[float]:
        """What a checkpoint keeps, so that a mean that spans an interruption is the same."""
        return [float(self.shown), float(self.correct), self.counted, self.steps]

    @staticmethod
    def start(device: torch.device, facts: Sequence[float] = (0.0, 0.0, 0, 0)) -> _Window:
        shown, correct = torch.tensor(facts[0], device=device), torch.tensor(facts[1], device=device)
        return _Window(shown, correct, int(facts[2]), int(facts[3]))


@dataclass
class _State:
    """Where the training stands."""

    step: int = 0
    rows: list[Row] = field(default_factory=list)
    saved: int = -1  # step of the newest checkpoint


def train(
    objective: Objective,
    plan: Plan,
    checkpoints: Checkpoints,
    output: Path,
    should_stop: Callable[[], bool],
    report: Callable[[str], None],
) -> Trained:
    """Train from the newest checkpoint, or from the start, to the last step.

    Raises Interrupted after writing a checkpoint once `should_stop` turned true, and Diverged when the loss is not finite.
    """
    device = plan.arithmetic.device
    objective.model.to(device)
    named = objective.parameters()
    # One kernel for all parameters: faster on CPUs and GPUs alike.
    optimiser = torch.optim.Adam(list(named.values()), lr=plan.learning_rate, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=plan.arithmetic.dtype is torch.float16)
    state = _State()
    window = _Window.start(device)  # since the last entry of the curves
    tail, tail_from = _Window.start(device), plan.steps * 9 // 10  # what is told at the end, however often curves are written
    saved = checkpoints.load()
    if saved is not None and _restore(saved, objective, named, optimiser, scaler):
        state = _State(saved.step, list(saved.facts["curves"]), saved.step)
        window, tail = _Window.start(device, saved.facts["window"]), _Window.start(device, saved.facts["tail"])
        report(f"{plan.name}: resumed after step {state.step} of {plan.steps}")
    resumed_at = state.step
    curves = Curves(output, state.rows)
    progress = Progress(report)
    started = saved_at = time.monotonic()
    durations: list[float] = []
    waited = 0.0

    def save() -> None:
        _check_finite(window, plan, state.step)
        if state.saved == state.step:
            return
        extra, own = objective.kept()
        tensors = {"model": objective.model.state_dict(), "adam": _adam_tensors(optimiser, named), "extra": extra}
        sums = {"window": window.facts(), "tail": tail.facts()}
        facts = {"curves": state.rows, **sums, "scaler": scaler.state_dict(), "objective": own}
        checkpoints.save(state.step, tensors, facts)
        state.saved = state.step

    with _Ahead(objective.parts, ahead=device.type == "cuda") as batches:
        try:
            while state.step < plan.steps:
                if should_stop():
                    save()
                    raise Interrupted(f"{plan.name}: stopped after step {state.step} of {plan.steps}; a checkpoint was written")
                begun = time.monotonic()
                parts = batches.get(state.step, more=state.step + 1 < plan.steps)
                waited += time.monotonic() - begun
                rate = plan.learning_rate * plan.schedule(state.step)
                for group in optimiser.param_groups:
                    group["lr"] = rate
                torch.manual_seed(torch_seed(plan.seed, "dropout", state.step))
                objective.model.train()
                optimiser.zero_grad(set_to_none=True)
                for part in parts:
                    with plan.arithmetic.autocast():
                        part_loss = objective.loss(part)
                    scaler.scale(part_loss.loss).backward()  # type: ignore[no-untyped-call]
                    window.add(part_loss)
                    if state.step >= tail_from:
                        tail.add(part_loss)
                scaler.step(optimiser)
                scaler.update()
                window.steps += 1
                tail.steps += state.step >= tail_from
                state.step += 1
                logged = state.step % plan.log_every == 0 or state.step == plan.steps
                # Reading the loss waits for a GPU, so there it is read only where it is written down.
                if logged or device.type == "cpu":
                    _check_finite(window, plan, state.step)
                durations.append(time.monotonic() - begun)
                values = {f"validation/{name}": value for name, value in objective.after(state.step).items()}
                if logged:
                    accuracy = float(window.correct) / max(1, window.counted)
                    values |= {"train/loss": float(window.shown) / window.steps, "train/accuracy": accuracy, "train/learning_rate": rate}
                    window = _Window.start(device)
                if values:
                    curves.add(state.step, values)
                if logged:
                    _tell(progress, plan, state, durations)
                if time.monotonic() - saved_at >= plan.checkpoint_seconds and state.step < plan.steps:
                    save()
                    saved_at = time.monotonic()
        finally:
            curves.close()
    if plan.save_last and durations:
        save()
    loss, accuracy = float(tail.shown) / tail.steps, float(tail.correct) / max(1, tail.counted)
    return Trained(loss, accuracy, plan.steps, resumed_at, time.monotonic() - started, median(durations) if durations else 0.0, waited)


class _Ahead:
    """Gives the parts of each step; with `ahead`, those of the next one are made while this one is computed."""

    def __init__(self, parts: Callable[[int], Sequence[Any]], *, ahead: bool) -> None:
        self._parts = parts
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches") if ahead else None
        self._next: tuple[int, Future[Sequence[Any]]] | None = None

    def __enter__(self) -> _Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def get(self, step: int, *, more: bool) -> Sequence[Any]:
        if self._pool is None:
            return self._parts(step)
        pending = self._next[1] if self._next is not None and self._next[0] == step else self._pool.submit(self._parts, step)
        parts = pending.result()
        self._next = (step + 1, self._pool.submit(self._parts, step + 1)) if more else None
        return parts


def _check_finite(window: _Window, plan: Plan, step: int) -> None:
    if not math.isfinite(float(window.shown)):
        raise Diverged(
            f"{plan.name}: the loss is {float(window.shown)} at step {step} (seed {plan.seed}, learning rate {plan.learning_rate})"
        )


def _tell(progress: Progress, plan: Plan, state: _State, durations: list[float]) -> None:
    if not progress.due():
        return
    values = state.rows[-1][1]
    recent = median(durations[-100:])
    epoch = f", epoch {(state.step - 1) // plan.steps_per_epoch + 1}/{plan.steps // plan.steps_per_epoch}" if plan.steps_per_epoch else ""
    remaining = (plan.steps - state.step) * recent
    now = f"loss {values['train/loss']:.4f}, accuracy {values['train/accuracy'] * 100:.1f} %"
    progress.say(f"{plan.name}: step {state.step}/{plan.steps}{epoch}, {now}, {recent:.3g} s a step, {remaining:.0f} s to go")


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
    objective.restore(saved.tensors.get("extra", {}), saved.facts["objective"])
    return True
