from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from ser_core.training.batches import StepPlan, bucket_count, bucketed_epoch, length_parts, longest_first, shares, shuffled_epoch

LENGTHS = st.lists(st.integers(1, 400), min_size=1, max_size=80)


@given(count=st.integers(1, 200), size=st.integers(1, 70), seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_a_fine_tuning_epoch_has_whole_batches_of_different_utterances(count: int, size: int, seed: int, epoch: int) -> None:
    """No utterance twice; only the last incomplete batch is missing; fewer utterances than a batch are one batch."""
    batches = shuffled_epoch(count, size, seed, epoch)
    seen = [index for batch in batches for index in batch]
    assert len(set(seen)) == len(seen)
    if count < size:
        assert sorted(seen) == list(range(count))
    else:
        assert [len(batch) for batch in batches] == [size] * (count // size)


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = {tuple(shuffled_epoch(50, 50, seed, epoch)[0]) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(lengths=LENGTHS, budget=st.integers(1, 2000), buckets=st.integers(1, 50), epoch=st.integers(0, 3))
def test_a_bucketed_epoch_has_every_utterance_once_within_the_budget(lengths: list[int], budget: int, buckets: int, epoch: int) -> None:
    """Padded batches stay within the budget, apart from an utterance that alone exceeds it."""
    batches = bucketed_epoch(lengths, budget, buckets, 0, epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or max(lengths[index] for index in batch) * len(batch) <= budget for batch in batches)


def test_buckets_keep_padding_small() -> None:
    """With 50 buckets of IEMOCAP-like lengths there is little padding; with one bucket there is much."""
    import numpy as np

    lengths = np.clip(np.random.default_rng(0).lognormal(1.3, 0.6, 4000) * 16_000, 9_000, 160_000).astype(int).tolist()

    def padded(buckets: int) -> float:
        batches = bucketed_epoch(lengths, 250 * 16_000, buckets, 0, 0)
        return float(sum(max(lengths[index] for index in batch) * len(batch) for batch in batches) / sum(lengths))

    assert padded(50) < 1.1
    assert padded(1) > 1.5
    sizes = [sum(lengths[index] for index in batch) / 16_000 for batch in bucketed_epoch(lengths, 250 * 16_000, 50, 0, 0)]
    assert 200 < np.median(sizes) <= 250


def test_a_small_corpus_has_few_buckets() -> None:
    """A bucket holds more than a batch, so that batches differ between epochs; the paper's corpus gets the paper's number of buckets."""
    assert bucket_count([100] * 30, 1000, 50) == 2
    assert bucket_count([4_500] * 4_300, 250_000, 50) == 50
    assert bucket_count([100], 1000, 50) == 1
    assert bucket_count([100] * 10_000, 1000, 50) == 50
    first, second = (sorted(map(sorted, bucketed_epoch([100] * 30, 1000, 50, 0, epoch))) for epoch in (0, 1))
    assert first != second


@given(lengths=LENGTHS, size=st.integers(1, 100), relief=st.integers(0, 9))
def test_parts_are_the_batch_in_pieces_of_similar_length(lengths: list[int], size: int, relief: int) -> None:
    """Every row once, longest first; each out-of-memory error halves the size, down to one."""
    batch = list(range(len(lengths)))
    ordered = longest_first(batch, lengths)
    parts = [ordered[rows] for rows in length_parts([lengths[each] for each in ordered], size=size, relief=relief)]
    assert sorted(index for part in parts for index in part) == batch
    assert [lengths[index] for part in parts for index in part] == sorted(lengths, reverse=True)
    assert max(len(part) for part in parts) == max(1, math.ceil(min(size, len(batch)) / 2**relief))


@given(lengths=LENGTHS, budget=st.integers(1, 2000), relief=st.integers(0, 9))
def test_parts_by_length_stay_within_the_budget(lengths: list[int], budget: int, relief: int) -> None:
    """In any order: each padded part is within the budget or a single row, no two consecutive parts could be merged, relief halves each."""
    parts = [lengths[rows] for rows in length_parts(lengths, budget=budget)]
    assert [length for part in parts for length in part] == lengths
    assert all(len(part) == 1 or max(part) * len(part) <= budget for part in parts)
    assert all(max(*one, other[0]) * (len(one) + 1) > budget for one, other in itertools.pairwise(parts))
    halved = [lengths[rows] for rows in length_parts(lengths, budget=budget, relief=relief)]
    assert [length for part in halved for length in part] == lengths
    assert max(map(len, halved)) == max(1, math.ceil(max(map(len, parts)) / 2**relief))


@given(costs=st.lists(st.integers(1, 1000), max_size=60), processes=st.integers(1, 9))
def test_shares_are_balanced(costs: list[int], processes: int) -> None:
    """Every part has one process; the most loaded has at most the mean plus one part; no process is idle if there are enough parts."""
    taken = shares(costs, processes)
    assert sorted(number for share in taken for number in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in taken)
    loads = [sum(costs[number] for number in share) for share in taken]
    assert max(loads) <= sum(costs) / processes + max(costs, default=0)
    assert all(taken) == (len(costs) >= processes)
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_a_plan_gives_the_same_batch_whichever_step_is_asked_first() -> None:
    """Epochs of different lengths: random access, as after a restart, gives the same batches as sequential access."""

    def epoch_batches(epoch: int) -> list[list[int]]:
        return [[epoch, number] for number in range(2 + epoch % 3)]

    plan = StepPlan(epoch_batches)
    walked = [plan.batch(step) for step in range(30)]
    assert [StepPlan(epoch_batches).batch(step) for step in range(30)] == walked
    assert [plan.batch(step) for step in (29, 3, 17, 0)] == [walked[step] for step in (29, 3, 17, 0)]
    assert walked[:6] == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2], [2, 0]]
