"""Batches of each step and their micro-batches: shuffled epochs, dynamic batches by length. Pure functions of seed and epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ser_core.training.randomness import generator

Batch = list[int]  # positions in the training split


def shuffled_epoch(count: int, batch_size: int, seed: int, epoch: int) -> list[Batch]:
    """Return the batches of an epoch: shuffled, without the last incomplete batch, as in the authors' code.

    A training set smaller than one batch is one batch with all utterances.
    """
    order = generator(seed, "order", epoch).permutation(count).tolist()
    if count < batch_size:
        return [order]
    return [order[start : start + batch_size] for start in range(0, count - batch_size + 1, batch_size)]


@dataclass(frozen=True)
class Bucketing:
    """How pretraining batches are made: `budget` samples of audio a batch, padding not counted; the rest as in `TaptSettings`."""

    budget: int
    buckets: int
    batches_per_bucket: float
    drop_last: bool


def bucket_count(lengths: Sequence[int], by: Bucketing) -> int:
    """Return the number of length buckets: at most `buckets`, and few enough that each holds `batches_per_bucket` batches (0: no minimum).

    With smaller buckets the same utterances would always share a batch. IEMOCAP's training folds (5.4 h) are just large enough for 50
    buckets of one and a half batches.
    """
    if by.batches_per_bucket <= 0:
        return by.buckets
    return max(1, min(by.buckets, len(lengths), int(sum(lengths) / (by.batches_per_bucket * max(1, by.budget)))))


def bucketed_epoch(lengths: Sequence[int], by: Bucketing, seed: int, epoch: int) -> list[Batch]:
    """Return batches of utterances of similar length, in random order.

    `lengths`: samples of each utterance after cropping. Utterances are shuffled within buckets of equal count, in which they follow each
    other from short to long; the longest that are left over are a bucket of their own. Batches are cut from this order:

    - `drop_last` (the authors' code): a batch is complete with the utterance that fills the budget; the last incomplete batch, hence some
      of the longest utterances, is dropped, unless it is the only one.
    - otherwise every utterance is in one batch, and all batches have the same share of the audio up to an utterance: the number of batches
      is the nearest to a budget each.
    """
    by_length = np.argsort(np.asarray(lengths), kind="stable")
    count = bucket_count(lengths, by)
    size = len(lengths) // count
    order: list[int] = []
    for number, bucket in enumerate(np.split(by_length, [size * each for each in range(1, count + 1)])):
        order.extend(generator(seed, "bucket", epoch, number).permutation(bucket).tolist())
    ends = np.cumsum([lengths[index] for index in order])
    batches = _complete_batches(order, ends, by.budget) if by.drop_last else _equal_batches(order, ends, by.budget)
    return [batches[position] for position in generator(seed, "batch order", epoch).permutation(len(batches))]


def _complete_batches(order: Sequence[int], ends: NDArray[np.int64], budget: int) -> list[Batch]:
    """Batches of at least `budget` samples; `ends`: running sum of the lengths in `order`."""
    batches: list[Batch] = []
    start, before = 0, 0
    while (stop := int(np.searchsorted(ends, before + budget)) + 1) <= len(order):
        batches.append(list(order[start:stop]))
        start, before = stop, int(ends[stop - 1])
    return batches or [list(order)]


def _equal_batches(order: Sequence[int], ends: NDArray[np.int64], budget: int) -> list[Batch]:
    """All of `order` in as many batches as the budget goes into it, rounded; each is cut where its share of the samples ends."""
    total = int(ends[-1])
    count = max(1, min(len(order), round(total / max(1, budget))))
    middles = (ends - np.diff(ends, prepend=0) / 2) * count / total
    numbers = np.minimum(middles.astype(np.int64), count - 1).tolist()
    batches: list[Batch] = [[] for _ in range(count)]
    for index, number in zip(order, numbers, strict=True):
        batches[number].append(index)
    return [batch for batch in batches if batch]


def longest_first(batch: Batch, lengths: Sequence[int]) -> Batch:
    """Sort a batch by length, longest first: micro-batches have little padding, and memory runs out in the first one or not at all."""
    return sorted(batch, key=lambda index: (-lengths[index], index))


def halved(size: int, relief: int) -> int:
    """Return `size` halved `relief` times, rounded up, at least one."""
    return max(1, -(-size // (1 << relief)))


def length_parts(lengths: Sequence[int], *, size: int = 0, budget: int = 0, relief: int = 0) -> list[slice]:
    """Divide the rows of a step into micro-batches: of `size` rows, or (0) as many as fit into `budget` samples when padded.

    `relief` halves each micro-batch so often. A row longer than the budget is a micro-batch of its own. torch draws random numbers
    (dropout, layer drop, Gumbel noise) per micro-batch, so the division must not depend on the number of processes.
    """
    if size > 0:
        size = min(size, len(lengths))
        whole = [size] * -(-len(lengths) // size)
    else:
        whole = []
        longest = 0
        for length in lengths:
            longest = max(longest, length)
            if not whole or longest * (whole[-1] + 1) > budget:
                whole.append(0)
                longest = length
            whole[-1] += 1
    parts = []
    start = 0
    for rows in whole:
        end = min(start + rows, len(lengths))
        step = halved(rows, relief)
        parts += [slice(first, min(first + step, end)) for first in range(start, end, step)]
        start = end
    return parts


def shares(costs: Sequence[float], processes: int) -> list[list[int]]:
    """Distribute positions over processes by cost: most expensive first, each to the least loaded process (the first of several).

    No process has more than the mean cost plus one position's. Returns the sorted positions of each process.
    """
    load = [0.0] * processes
    taken: list[list[int]] = [[] for _ in range(processes)]
    for position in sorted(range(len(costs)), key=lambda position: (-costs[position], position)):
        process = min(range(processes), key=lambda number: (load[number], number))
        load[process] += costs[position]
        taken[process].append(position)
    return [sorted(each) for each in taken]


class StepPlan:
    """Maps steps to batches, given a pure function epoch -> batches; epochs may have different numbers of batches."""

    def __init__(self, epoch_batches: Callable[[int], list[Batch]]) -> None:
        self._epoch_batches = epoch_batches
        self._epoch = 0
        self._first = 0  # first step of the epoch
        self._batches = epoch_batches(0)

    def batch(self, step: int) -> Batch:
        """Return the positions in the training split of a step's batch."""
        self._seek(step)
        return self._batches[step - self._first]

    def _seek(self, step: int) -> None:
        if step < self._first:
            self._epoch, self._first, self._batches = 0, 0, self._epoch_batches(0)
        while step >= self._first + len(self._batches):
            self._first += len(self._batches)
            self._epoch += 1
            self._batches = self._epoch_batches(self._epoch)
