"""The training loop of all stages: batch, loss, gradient, optimiser step; checkpoints; the same numbers with and without interruption.

A stage defines an `Objective`. A step consists of parts (micro-batches) whose losses add up to the step's loss: gradient accumulation over
ten parts gives the gradient of the whole batch. Several processes share the parts of a step and sum their gradients. Each part has its own
seed for torch's random numbers, so the result depends neither on which process computes it nor on the number of processes.
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
from ser_core.training.curves import Curves, References, Row
from ser_core.training.device import Arithmetic
from ser_core.training.progress import Progress
from ser_core.training.randomness import torch_seed
from ser_core.training.running_sums import CurveSums, RunningSums
from ser_core.training.schedule import Schedule


@dataclass(frozen=True)
class PartLoss:
    """Result of a part, scalars. `curve_loss`: its share of the step's loss in the curves; `correct` of `counted` predictions.

    `curve_sums`: what `Objective.curve_values` computes further curves of, float32 without gradient; None if the objective has none.
    """

    loss: Tensor  # its gradient is that of the step with respect to this part
    curve_loss: Tensor
    correct: Tensor
    counted: int
    curve_sums: Tensor | None = None


@dataclass(frozen=True)
class StepParts:
    """The parts of a step before any data is loaded, the same in every process. `costs`: relative cost of each part, for load balancing."""

    parts: Sequence[Any]
    costs: Sequence[float]
    rows: int  # utterances in all parts


@dataclass(frozen=True)
class LocalParts:
    """The parts of a step that one process computes, loaded, by their numbers in the step."""

    loaded: Mapping[int, Any]
    count: int  # parts of the whole step
    rows: int  # utterances of the whole step


class Objective(ABC):
    """Model, batches and loss of a stage."""

    model: nn.Module
    curve_sums: int = 0  # elements of `PartLoss.curve_sums`, the same in all processes

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter to be optimised: by default all that require a gradient."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    @abstractmethod
    def plan(self, step: int) -> StepParts:
        """Return the parts of a step with all random draws of the step. Must be cheap: every process plans every step.

        A pure function of the step; may run in another thread, ahead of time.
        """

    def load(self, part: Any) -> Any:
        """Load the data of a planned part; called only in the process that computes it, in the thread of `plan`."""
        return part

    def before_step(self, parts: LocalParts) -> None:
        """Called before the losses of a step in all processes, also in one without a part."""
        del parts

    @abstractmethod
    def loss(self, part: Any) -> PartLoss:
        """Return the loss of one part, with gradient."""

    def curve_values(self, sums: Tensor) -> Mapping[str, float]:
        """Return values for the curves, given `PartLoss.curve_sums` summed over all parts of all processes and steps since the last entry.

        Called in all processes; `sums` (curve_sums,) float64 on the CPU. They may lack steps after a resumption from an older checkpoint.
        """
        del sums
        return {}

    def warning(self, rows: Sequence[Row]) -> str:
        """Return what is wrong with a training that has these curves so far, in a few sentences; "" if nothing is."""
        del rows
        return ""

    def after_step(self, step: int) -> Mapping[str, float]:
        """Called in all processes after `step` steps; returns values for the curves, the same in all processes."""
        return {}

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and JSON values that a checkpoint must hold in addition to model and optimiser."""
        return {}, {}

    def load_extra_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Restore the result of `extra_state`."""
        del tensors, facts


@dataclass(frozen=True)
class TrainingPlan:
    """Number of steps, learning rate, precision, and how often to log and to save."""

    name: str  # stage, for progress lines
    steps: int
    learning_rate: float
    schedule: Schedule
    seed: int
    arithmetic: Arithmetic
    checkpoint_seconds: float
    log_every: int  # steps
    steps_per_epoch: int = 0  # 0: training is not divided into epochs
    clip_norm: float = 0.0  # a gradient of a larger norm is scaled down to it; 0: never
    save_last: bool = False  # save after the last step too: for stages with long work after training
    references: References = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingResult:
    """Result of a finished training: mean loss and accuracy over the last tenth of the steps, and durations in seconds."""

    loss: float
    accuracy: float
    steps: int
    resumed_at: int
    seconds: float  # in this attempt
    seconds_per_step: float  # median
    waited_seconds: float  # for data
    warning: str = ""  # of the objective, at the end


@dataclass
class _TrainingState:
    """Progress of the training."""

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
    """Train from the newest checkpoint, or from the start, to the last step. All processes of the group call it; only the leader writes.

    Raises Interrupted after writing a checkpoint if `should_stop` returns True in any process, and Diverged for a NaN or infinite loss;
    both are raised in all processes after the same step.
    """
    group = group or Group()
    device = plan.arithmetic.device
    objective.model.to(device)
    named = objective.parameters()
    # fused: one kernel for all parameters, faster on CPUs and GPUs.
    optimiser = torch.optim.Adam(list(named.values()), lr=plan.learning_rate, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=plan.arithmetic.dtype is torch.float16)
    scaler.scale(torch.zeros((), device=device))  # initialises its state, also if this process has no part of the first step
    state = _TrainingState()
    window = RunningSums.start(device)  # since the last entry of the curves
    tail, tail_from = RunningSums.start(device), plan.steps * 9 // 10  # for the result, independent of `log_every`
    curve_sums = CurveSums(objective.curve_sums, device)
    group.expect_progress()
    # The division into parts depends on the type of device, and gradients of different precisions must not be summed.
    require_equal(group, "arithmetic", f"{device.type}/{plan.arithmetic.dtype}")
    saved = _newest(checkpoints, group)
    if saved is not None and _restore(saved, objective, named, optimiser, scaler):
        state = _TrainingState(saved.step, list(saved.facts["curves"]), saved.step)
        window, tail = RunningSums.start(device, saved.facts["window"]), RunningSums.start(device, saved.facts["tail"])
        curve_sums.restore(saved.facts.get("curve_sums", []), group)
        report(f"{plan.name}: resumed after step {state.step} of {plan.steps}")
    else:
        group.broadcast_(objective.model.state_dict().values())  # same seed, but another kind of machine may round otherwise
    del saved  # as large as the model and the optimiser
    resumed_at = state.step
    curves = Curves(output if group.is_leader else None, state.rows)
    progress = Progress(report)
    started = saved_at = time.monotonic()
    durations: list[float] = []
    waited = 0.0
    idle_reported = warned = False

    def save() -> None:
        """Called in all processes, so that all raise Diverged for a loss that must not be saved; the leader writes, the others wait."""
        _check_finite(window, plan, state.step)
        if state.saved == state.step:
            return
        summed = curve_sums.gather(group)
        if group.is_leader:
            extra, own = objective.extra_state()
            tensors = {"model": objective.model.state_dict(), "adam": _adam_tensors(optimiser, named), "extra": extra}
            sums = {"window": window.facts(), "tail": tail.facts(), "curve_sums": summed.tolist()}
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
                step_started = time.monotonic()
                parts = batches.get(state.step, more=state.step + 1 < plan.steps)
                waited += time.monotonic() - step_started
                if parts.count < group.size and not idle_reported:
                    report(_idle_message(plan.name, state.step, parts, group.size))
                    idle_reported = True
                rate = plan.learning_rate * plan.schedule(state.step)
                for settings in optimiser.param_groups:
                    settings["lr"] = rate
                objective.model.train()
                optimiser.zero_grad(set_to_none=True)
                sums, counted = _gradients(objective, plan, scaler, state.step, parts, curve_sums)
                # The leader's clock decides when to save; all processes check the loss before.
                due = group.is_leader and time.monotonic() - saved_at >= plan.checkpoint_seconds
                sums, (all_counted, saving) = sum_gradients(group, list(named.values()), sums, (counted, due))
                if any(each.grad is not None for each in named.values()):
                    if plan.clip_norm:
                        scaler.unscale_(optimiser)
                        nn.utils.clip_grad_norm_(named.values(), plan.clip_norm)
                    scaler.step(optimiser)
                    scaler.update()
                window.add(sums, int(all_counted))
                if state.step >= tail_from:
                    tail.add(sums, int(all_counted))
                state.step += 1
                logged = state.step % plan.log_every == 0 or state.step == plan.steps
                # Reading the loss waits for a GPU, so there it is read only when it is logged.
                if logged or device.type == "cpu":
                    _check_finite(window, plan, state.step)
                durations.append(time.monotonic() - step_started)
                values = {f"validation/{name}": value for name, value in objective.after_step(state.step).items()}
                if logged:
                    loss, accuracy = window.means()
                    values |= {"train/loss": loss, "train/learning_rate": rate}
                    if window.counted:
                        values["train/accuracy"] = accuracy
                    window = RunningSums.start(device)
                    if objective.curve_sums:
                        values |= objective.curve_values(curve_sums.gather(group).double())
                        curve_sums = CurveSums(objective.curve_sums, device)
                if values:
                    curves.add(state.step, values)
                if logged:
                    _log_progress(progress, plan, state, durations)
                    if not warned and (warning := objective.warning(state.rows)):
                        report(f"{plan.name}: step {state.step}: warning: {warning}")
                        warned = True
                if saving and state.step < plan.steps:
                    save()
                    saved_at = time.monotonic()
        finally:
            curves.close()
    curves.publish(plan.references)
    if plan.save_last and durations:
        save()
    seconds, per_step = time.monotonic() - started, median(durations) if durations else 0.0
    return TrainingResult(*tail.means(), plan.steps, resumed_at, seconds, per_step, waited, objective.warning(state.rows))


def _gradients(
    objective: Objective, plan: TrainingPlan, scaler: torch.amp.GradScaler, step: int, parts: LocalParts, curve_sums: CurveSums
) -> tuple[Tensor, int]:
    """Accumulate the gradients of this process's parts, and their `curve_sums`.

    Returns the sums of loss and correct predictions (2,), and the number of predictions.
    """
    sums, counted = torch.zeros(2, device=plan.arithmetic.device), 0
    with plan.arithmetic.autocast():
        objective.before_step(parts)
    for number, part in parts.loaded.items():
        seed_part(plan.seed, step, number)
        with plan.arithmetic.autocast():
            found = objective.loss(part)
        if found.loss.requires_grad:  # not if layer drop has left out every block, and the head is frozen
            scaler.scale(found.loss).backward()  # type: ignore[no-untyped-call]
        sums = sums + torch.stack([found.curve_loss.detach().float(), found.correct.detach().float()])
        counted += found.counted
        if found.curve_sums is not None:
            curve_sums.own += found.curve_sums
    return sums, counted


def seed_part(seed: int, step: int, number: int) -> None:
    """Seed torch's random numbers (dropout, layer drop, Gumbel noise) of part `number` of a step, as the loop does before its loss."""
    torch.manual_seed(torch_seed(seed, "dropout", step, number))


class _Prefetcher:
    """Returns the parts of each step; with `ahead`, those of the next step are loaded in a thread while this one is computed."""

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
    """Return the leader's newest checkpoint in every process: on a network file system two processes may see different ones."""
    saved = checkpoints.load() if group.is_leader else None
    shared = group.broadcast_json(None if saved is None else (saved.step, saved.facts))
    if shared is None:
        return None
    step, facts = shared
    return Saved(step, broadcast_tensors(group, {} if saved is None else saved.tensors), facts)


def _idle_message(name: str, step: int, parts: LocalParts, processes: int) -> str:
    size = max(1, parts.rows // (2 * processes))  # two parts per process, because parts differ in length
    wanted = f"set recipe.execution.micro_batch={size} or ask for" if parts.rows >= processes else "ask for"
    return f"{name}: step {step} has {parts.count} part(s) for {processes} processes, some are idle: {wanted} fewer processes"


def _check_finite(window: RunningSums, plan: TrainingPlan, step: int) -> None:
    loss = float(window.sums[0])
    if not math.isfinite(loss):
        raise Diverged(f"{plan.name}: the loss is {loss} at step {step} (seed {plan.seed}, learning rate {plan.learning_rate})")


def _log_progress(progress: Progress, plan: TrainingPlan, state: _TrainingState, durations: list[float]) -> None:
    if not progress.due():
        return
    values = state.rows[-1][1]
    recent = median(durations[-100:])
    epoch = f", epoch {(state.step - 1) // plan.steps_per_epoch + 1}/{plan.steps // plan.steps_per_epoch}" if plan.steps_per_epoch else ""
    remaining = (plan.steps - state.step) * recent
    accuracy = f", accuracy {values['train/accuracy'] * 100:.1f} %" if "train/accuracy" in values else ""
    now = f"loss {values['train/loss']:.4f}{accuracy}"
    progress.report(f"{plan.name}: step {state.step}/{plan.steps}{epoch}, {now}, {recent:.3g} s a step, {remaining:.0f} s to go")


ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


def _adam_tensors(optimiser: torch.optim.Adam, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Adam's state as "key/parameter name" -> tensor; a parameter that never had a gradient has none."""
    return {
        f"{key}/{name}": optimiser.state[parameter][key]
        for name, parameter in named.items()
        if optimiser.state.get(parameter)
        for key in ADAM_STATE
    }


def _restore(
    saved: Saved, objective: Objective, named: Mapping[str, nn.Parameter], optimiser: torch.optim.Adam, scaler: torch.amp.GradScaler
) -> bool:
    """Load a checkpoint into model, optimiser, scaler and objective; False if its tensors do not fit the model."""
    model, adam = saved.tensors.get("model", {}), saved.tensors.get("adam", {})
    current = objective.model.state_dict()
    if {name: tensor.shape for name, tensor in model.items()} != {name: tensor.shape for name, tensor in current.items()}:
        return False
    objective.model.load_state_dict(model)
    entries = {index: {key: adam[f"{key}/{name}"] for key in ADAM_STATE} for index, name in enumerate(named) if f"step/{name}" in adam}
    optimiser.load_state_dict({"state": entries, "param_groups": optimiser.state_dict()["param_groups"]})
    if saved.facts["scaler"]:  # empty if the previous attempt ran in bfloat16, without scaling: then the scaler starts from its default
        scaler.load_state_dict(saved.facts["scaler"])
    objective.load_extra_state(saved.tensors.get("extra", {}), saved.facts["objective"])
    return True
