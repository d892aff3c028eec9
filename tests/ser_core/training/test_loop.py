from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from ser_core.settings import Precision
from ser_core.training.checkpoints import Checkpoints
from ser_core.training.device import choose_arithmetic
from ser_core.training.endings import Diverged, Interrupted
from ser_core.training.loop import Objective, PartLoss, Plan, Trained, train
from ser_core.training.randomness import generator
from ser_core.training.schedule import constant, warmup_flat_linear

CPU = torch.device("cpu")


class Regression(Objective):
    """A line with dropout, fitted on data drawn by step."""

    def __init__(self, parts: int = 1, dropout: float = 0.3) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 1))
        self.number = parts
        self.asked: list[int] = []
        self.best = torch.zeros(1)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def parts(self, step: int) -> Sequence[Tensor]:
        self.asked.append(step)
        data = torch.from_numpy(generator(0, "data", step).normal(size=(12, 5))).float()
        return list(data.chunk(self.number))

    def loss(self, part: Tensor) -> PartLoss:
        error = (self.model(part[:, :4])[:, 0] - part[:, :4].sum(1)) ** 2
        loss = error.sum() / 12
        return PartLoss(loss, loss, (error < 1).sum(), len(part))

    def after(self, step: int) -> Mapping[str, float]:
        self.best = torch.maximum(self.best, torch.tensor([float(step % 7)]))
        return {"best": float(self.best)} if step % 5 == 0 else {}

    def kept(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"best": self.best}, {"name": "best"}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        assert facts == {"name": "best"}
        self.best = tensors["best"]


@dataclass
class Bench:
    root: Path
    lines: list[str] = field(default_factory=list)

    def train(
        self, objective: Objective, name: str, *, stop_at: int = 10**9, identity: str = "mine", output: str = "out", **changes: Any
    ) -> Trained:
        """Train for 20 steps; the signal to stop comes when it was asked for the `stop_at`-th time."""
        plan = Plan(
            **{
                "name": "line",
                "steps": 20,
                "learning_rate": 0.05,
                "schedule": warmup_flat_linear(20, 3, 4),
                "seed": 1,
                "arithmetic": choose_arithmetic(CPU, Precision.auto),
                "checkpoint_seconds": 1e9,
                "log_every": 3,
                **changes,
            }
        )
        asked = iter(range(10**9))
        checkpoints = Checkpoints(self.root / name, identity)
        return train(objective, plan, checkpoints, self.root / output, lambda: next(asked) >= stop_at, self.lines.append)

    def curve(self, output: str, tag: str) -> list[tuple[int, float]]:
        found = EventAccumulator(str(self.root / output / "tensorboard"))
        found.Reload()
        return [(event.step, event.value) for event in found.Scalars(tag)]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def weights(objective: Objective) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in objective.parameters().values()]


@pytest.mark.parametrize("stops", [[1], [4, 2, 5], [0], [19], [7, 7]])
def test_interruptions_leave_no_trace(stops: list[int], bench: Bench) -> None:
    """Weights, means and curves of an interrupted training are those of an uninterrupted one, to the bit; no batch is asked for twice."""
    whole = Regression()
    expected = bench.train(whole, "whole", output="whole")
    asked: list[int] = []
    for number, stop in enumerate(stops):
        part = Regression()
        with pytest.raises(Interrupted):
            bench.train(part, "parts", stop_at=stop, output=f"part{number}")
        asked += part.asked
    last = Regression()
    found = bench.train(last, "parts", output="last")
    assert asked + last.asked == list(range(20))
    assert all(torch.equal(one, other) for one, other in zip(weights(last), weights(whole), strict=True))
    assert torch.equal(last.best, whole.best)
    assert (found.loss, found.accuracy) == (expected.loss, expected.accuracy)
    for tag in ("train/loss", "train/accuracy", "train/learning_rate", "validation/best"):
        assert bench.curve("last", tag) == bench.curve("whole", tag)


def test_a_finished_training_is_not_done_again(bench: Bench) -> None:
    """With the last step saved, the same call trains nothing and tells the same."""
    first = bench.train(Regression(), "finished", save_last=True, output="a")
    again = Regression()
    second = bench.train(again, "finished", save_last=True, output="b")
    assert again.asked == []
    assert (second.loss, second.resumed_at) == (first.loss, 20)


def test_a_checkpoint_of_other_settings_is_not_resumed(bench: Bench) -> None:
    with pytest.raises(Interrupted):
        bench.train(Regression(), "shared", stop_at=5)
    other = Regression()
    bench.train(other, "shared", identity="other")
    assert other.asked == list(range(20))


def test_checkpoints_are_written_on_the_way(bench: Bench) -> None:
    """With an interval of no time every step but the last is saved; the newest two stay."""
    bench.train(Regression(), "often", checkpoint_seconds=0.0)
    assert sorted(path.name for path in (bench.root / "often").iterdir()) == ["step-000000018", "step-000000019"]


def test_parts_add_up_to_the_whole(bench: Bench) -> None:
    """A batch in four parts trains as the batch in one (no dropout: each part would draw its own)."""
    whole, parts = Regression(1, dropout=0.0), Regression(4, dropout=0.0)
    one, other = bench.train(whole, "one", output="one"), bench.train(parts, "four", output="four")
    assert other.loss == pytest.approx(one.loss, rel=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(weights(whole), weights(parts), strict=True))


def test_training_learns_under_the_schedule(bench: Bench) -> None:
    """The loss falls, and the curve shows the rate that was used."""
    bench.train(Regression(dropout=0.0), "learns", steps=300, schedule=constant(), log_every=10)
    losses = [value for _, value in bench.curve("out", "train/loss")]
    assert losses[-1] < losses[0] / 20
    bench.train(Regression(), "rates", output="rates", log_every=1)
    expected = [0.05 * warmup_flat_linear(20, 3, 4)(step) for step in range(20)]
    assert [value for _, value in bench.curve("rates", "train/learning_rate")] == pytest.approx(expected)


def test_a_loss_that_is_not_finite_ends_the_training_at_once(bench: Bench) -> None:
    """And no checkpoint holds the ruins."""

    class Exploding(Regression):
        def loss(self, part: Tensor) -> PartLoss:
            found = super().loss(part)
            return (
                PartLoss(found.loss * float("nan"), found.shown * float("nan"), found.correct, found.counted)
                if len(self.asked) > 4
                else found
            )

    objective = Exploding()
    with pytest.raises(Diverged, match="nan at step 5"):
        bench.train(objective, "explodes", checkpoint_seconds=0.0)
    saved = Checkpoints(bench.root / "explodes", "mine").load()
    assert saved is not None
    assert saved.step == 4


@pytest.mark.parametrize("precision", [Precision.bfloat16, Precision.float16])
def test_sixteen_bit_arithmetic_trains_and_resumes(precision: Precision, bench: Bench) -> None:
    """Autocast with 16 bits, the gradient scaler of float16 included, resumes to the bit."""
    arithmetic = choose_arithmetic(CPU, precision)
    whole = Regression()
    bench.train(whole, "whole", arithmetic=arithmetic, output="whole")
    with pytest.raises(Interrupted):
        bench.train(Regression(), "parts", stop_at=9, arithmetic=arithmetic, output="part")
    last = Regression()
    bench.train(last, "parts", arithmetic=arithmetic, output="last")
    assert all(torch.equal(one, other) for one, other in zip(weights(last), weights(whole), strict=True))


def test_batches_made_ahead_are_the_same(bench: Bench) -> None:
    """Making the next batch in a thread changes neither their order nor their number."""
    from ser_core.training.loop import _Ahead

    objective = Regression()
    with _Ahead(objective.parts, ahead=True) as batches:
        found = [batches.get(step, more=step < 5) for step in range(6)]
    assert objective.asked == list(range(6))
    assert all(torch.equal(parts[0], Regression().parts(step)[0]) for step, parts in enumerate(found))


def test_a_gpu_without_bfloat16_resumes_what_one_with_it_began(bench: Bench) -> None:
    """`auto` may choose another arithmetic on the next node: the scaler of float16 then begins anew, and the steps go on."""
    with pytest.raises(Interrupted):
        bench.train(Regression(), "nodes", stop_at=9, arithmetic=choose_arithmetic(CPU, Precision.bfloat16), output="first")
    last = Regression()
    found = bench.train(last, "nodes", arithmetic=choose_arithmetic(CPU, Precision.float16), output="last")
    assert (found.resumed_at, last.asked) == (9, list(range(9, 20)))


def test_what_is_told_at_the_end_does_not_depend_on_how_often_curves_are_written(bench: Bench) -> None:
    """`log_every` is no part of a stage's identity; the means are those of the last tenth of the steps."""
    told = [bench.train(Regression(), f"every{every}", output=f"every{every}", log_every=every) for every in (1, 3, 7, 50)]
    assert len({(each.loss, each.accuracy) for each in told}) == 1
    last = [value for step, value in bench.curve("every1", "train/loss") if step > 18]
    assert len(last) == 2
    assert told[0].loss == pytest.approx(sum(last) / 2)
