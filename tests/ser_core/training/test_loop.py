from __future__ import annotations

import functools
import itertools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from jobs.commands.activity import last_progress
from ser_core.errors import Diverged, Interrupted
from ser_core.settings.execution import Precision
from ser_core.training.checkpoints import SCHEMA, Checkpoints
from ser_core.training.curves import thinned
from ser_core.training.device import choose_arithmetic
from ser_core.training.loop import Objective, PartLoss, TrainingResult
from ser_core.training.progress import Progress
from ser_core.training.schedule import constant, warmup_flat_linear
from tests.ser_core.training.line import CPU, Regression, line_plan, train_line, weights


@dataclass
class Bench:
    root: Path
    lines: list[str] = field(default_factory=list)

    def train(
        self, objective: Objective, name: str, *, stop_at: int = 10**9, identity: str = "mine", output: str = "out", **changes: Any
    ) -> TrainingResult:
        """Train for 20 steps; the signal to stop comes when it was asked for the `stop_at`-th time."""
        asked = iter(range(10**9))
        return train_line(
            objective,
            line_plan(**changes),
            self.root / name,
            self.root / output,
            identity=identity,
            should_stop=lambda: next(asked) >= stop_at,
            report=self.lines.append,
        )

    def curve(self, output: str, tag: str) -> list[tuple[int, float]]:
        found = EventAccumulator(str(self.root / output / "tensorboard"))
        found.Reload()
        return [(event.step, event.value) for event in found.Scalars(tag)]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stops", [[1], [4, 2, 5], [0], [19], [7, 7]])
def test_interruptions_change_no_number(stops: list[int], bench: Bench) -> None:
    """Weights, means and curves of an interrupted training are bit-identical to an uninterrupted one; no batch is computed twice."""
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
    assert bench.curve("last", "again/accuracy") == bench.curve("whole", "train/accuracy")
    for tag in ("train/loss", "train/accuracy", "train/learning_rate", "validation/best"):
        assert bench.curve("last", tag) == bench.curve("whole", tag)
    assert (bench.root / "last/curves.json").read_bytes() == (bench.root / "whole/curves.json").read_bytes()
    assert not list(bench.root.glob("part*/curves.json")), "an interrupted training publishes none"


class WithoutSums(Regression):
    """The same without sums for the curves, as in earlier versions."""

    curve_sums = 0

    def loss(self, part: Tensor) -> PartLoss:
        return replace(super().loss(part), curve_sums=None)


def test_sums_for_curves_change_no_number(bench: Bench) -> None:
    """Weights, result and the other curves are bit-identical without them; a checkpoint without them, of an earlier version, is resumed."""
    plain, summed, resumed = WithoutSums(), Regression(), Regression()
    expected, found = bench.train(plain, "plain", output="plain"), bench.train(summed, "summed", output="summed")
    with pytest.raises(Interrupted):
        bench.train(WithoutSums(), "parts", stop_at=10, output="part")
    bench.train(resumed, "parts", output="last")
    for other in (summed, resumed):
        assert all(torch.equal(one, each) for one, each in zip(weights(plain), weights(other), strict=True))
    assert (found.loss, found.accuracy) == (expected.loss, expected.accuracy)
    of_plain, of_summed = (json.loads((bench.root / name / "curves.json").read_text())["curves"] for name in ("plain", "summed"))
    again = of_summed.pop("again/accuracy")
    assert of_summed == of_plain
    late = bench.curve("last", "again/accuracy")
    assert [step for step, _ in late] == [12, 15, 18, 20]
    assert [value for _, value in late[1:]] == pytest.approx([value for _, value in again[4:]])


def test_published_curves(bench: Bench) -> None:
    """`curves.json` has what the event files have; of long curves 200 points with the last one, each curve by itself."""
    bench.train(Regression(), "whole", output="whole")
    published = json.loads((bench.root / "whole/curves.json").read_text())
    assert (published["schema"], published["references"]) == (1, {})
    steps, values = zip(*bench.curve("whole", "train/loss"), strict=True)
    assert [step for step, _ in published["curves"]["train/loss"]] == list(steps)
    assert [value for _, value in published["curves"]["train/loss"]] == pytest.approx(list(values))
    for count in (1, 199, 200, 201, 399, 400, 10_000):
        curves = thinned([[step, {"loss": float(step), **({"best": 1.0} if step % 100 == 0 else {})}] for step in range(1, count + 1)])
        points = [step for step, _ in curves["loss"]]
        assert len(points) == min(count, 200)
        assert points[-1] == count
        assert points == sorted(set(points))
        gaps = {after - before for before, after in itertools.pairwise(points)}
        assert not gaps or max(gaps) - min(gaps) <= 1
        assert len(curves.get("best", ())) == min(count // 100, 200)


@pytest.mark.slow
@pytest.mark.parametrize("torn", [1, 2])
@pytest.mark.parametrize("damage", ["truncated tensors", "flipped byte", "truncated state", "other schema"])
def test_a_damaged_checkpoint_costs_steps_and_changes_no_number(damage: str, torn: int, bench: Bench) -> None:
    """If the newest is damaged, training resumes from the previous one; if both are, it starts from step 0."""
    whole = Regression()
    bench.train(whole, "whole", output="whole")
    with pytest.raises(Interrupted):
        bench.train(Regression(), "parts", stop_at=9, checkpoint_seconds=0.0, output="part")
    folders = sorted((bench.root / "parts").iterdir(), reverse=True)
    assert [folder.name for folder in folders] == ["step-000000009", "step-000000008"]
    for folder in folders[:torn]:
        tensors, state = folder / "adam.safetensors", folder / "state.json"
        content = tensors.read_bytes()
        match damage:
            case "truncated tensors":
                tensors.write_bytes(content[: len(content) // 2])
            case "flipped byte":
                middle = len(content) // 2
                tensors.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
            case "truncated state":
                state.write_bytes(state.read_bytes()[:-1])
            case "other schema":
                state.write_text(json.dumps({**json.loads(state.read_text()), "schema": SCHEMA + 1}))
    last = Regression()
    found = bench.train(last, "parts", output="last")
    assert found.resumed_at == (8 if torn == 1 else 0)
    assert all(torch.equal(one, other) for one, other in zip(weights(last), weights(whole), strict=True))
    assert bench.curve("last", "train/loss") == bench.curve("whole", "train/loss")


def test_a_finished_training_is_not_done_again(bench: Bench) -> None:
    """With the last step saved, the same call trains nothing and returns the same result."""
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
    """With interval 0 every step but the last is saved; the newest two are kept."""
    bench.train(Regression(), "often", checkpoint_seconds=0.0)
    assert sorted(path.name for path in (bench.root / "often").iterdir()) == ["step-000000018", "step-000000019"]


def test_parts_add_up_to_the_whole(bench: Bench) -> None:
    """A batch in four parts trains like the whole batch (without dropout, which each part would draw separately)."""
    whole, parts = Regression(1, dropout=0.0), Regression(4, dropout=0.0)
    one, other = bench.train(whole, "one", output="one"), bench.train(parts, "four", output="four")
    assert other.loss == pytest.approx(one.loss, rel=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(weights(whole), weights(parts), strict=True))


@pytest.mark.slow
def test_training_learns_under_the_schedule(bench: Bench) -> None:
    """The loss falls, and the curve shows the rate that was used."""
    bench.train(Regression(dropout=0.0), "learns", steps=300, schedule=constant(), log_every=10)
    losses = [value for _, value in bench.curve("out", "train/loss")]
    assert losses[-1] < losses[0] / 20
    bench.train(Regression(), "rates", output="rates", log_every=1)
    expected = [0.05 * warmup_flat_linear(20, 3, 4)(step) for step in range(20)]
    assert [value for _, value in bench.curve("rates", "train/learning_rate")] == pytest.approx(expected)


def test_a_loss_that_is_not_finite_ends_the_training_at_once(bench: Bench) -> None:
    """And no checkpoint contains the NaN."""

    class Exploding(Regression):
        def loss(self, part: Tensor) -> PartLoss:
            found = super().loss(part)
            return (
                PartLoss(found.loss * float("nan"), found.curve_loss * float("nan"), found.correct, found.counted)
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
    """Loading the next batch in a thread changes neither the order nor the number of batches."""
    from ser_core.training.loop import LocalParts, _Prefetcher

    objective = Regression()

    def local_parts(step: int) -> LocalParts:
        planned = objective.plan(step)
        return LocalParts(dict(enumerate(planned.parts)), len(planned.parts), planned.rows)

    with _Prefetcher(local_parts, ahead=True) as batches:
        found = [batches.get(step, more=step < 5) for step in range(6)]
    assert objective.asked == list(range(6))
    assert all(torch.equal(parts.loaded[0], Regression().plan(step).parts[0]) for step, parts in enumerate(found))


def test_a_gpu_without_bfloat16_resumes_what_one_with_it_began(bench: Bench) -> None:
    """`auto` may choose another precision on the next node: the float16 scaler then starts from its default, and training resumes."""
    with pytest.raises(Interrupted):
        bench.train(Regression(), "nodes", stop_at=9, arithmetic=choose_arithmetic(CPU, Precision.bfloat16), output="first")
    last = Regression()
    found = bench.train(last, "nodes", arithmetic=choose_arithmetic(CPU, Precision.float16), output="last")
    assert (found.resumed_at, last.asked) == (9, list(range(9, 20)))


def test_the_result_does_not_depend_on_how_often_curves_are_written(bench: Bench) -> None:
    """`log_every` is not part of a stage's identity; the means are those of the last tenth of the steps."""
    told = [bench.train(Regression(), f"every{every}", output=f"every{every}", log_every=every) for every in (1, 3, 7, 50)]
    assert len({(each.loss, each.accuracy) for each in told}) == 1
    last = [value for step, value in bench.curve("every1", "train/loss") if step > 18]
    assert len(last) == 2
    assert told[0].loss == pytest.approx(sum(last) / 2)


def test_status_reads_the_progress_of_training(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step, epoch and the seconds to go are found in the lines of the loop, behind the name that a worker puts before them."""
    monkeypatch.setattr("ser_core.training.loop.Progress", functools.partial(Progress, interval=0.0))
    bench.train(Regression(), "told", steps_per_epoch=10, log_every=7)
    (line,) = (line for line in bench.lines if "step 14/20" in line)
    progress, to_go = last_progress(f"2026-11-29 12:00:00 finetune vft fold 1 seed 0 [01234567]: {line}", "0123456789ab")
    assert progress == "step 14/20, epoch 2/2"
    assert to_go is not None
