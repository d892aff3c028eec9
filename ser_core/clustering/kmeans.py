"""K-means of more frames than one would copy: exact Lloyd iterations on memory-mapped float32 frames, repeatable on any number of threads.

The frames are read in chunks, each centred into a buffer of its own: the scores of a chunk against all centroids are one float32 matrix
product, its argmin is taken while they are in the cache, and the frames are added to float64 sums in their order. A chunk is computed by
one thread alone and the sums of blocks are added up in the order of the blocks, so that the result is the same to the bit whatever the
number of threads (a BLAS that has more of them may cut a product in other places, and so break a tie otherwise). Blocks are shared out over
all threads. A GPU computes the same with one thread; its sums are atomic, in float64.

Beside the pages of the frames memory holds the labels, three buffers a thread and at most twice as many sums (k, channels) as threads.

Why not a library: `benchmarks/kmeans.py` runs them side by side. From the same start scikit-learn's Lloyd and faiss reach the same inertia
in about as many CPU seconds, because all are bound by the same matrix product; Elkan takes twice as many and keeps (frames, k) bounds;
mini-batch ends at a slightly worse inertia and gains no time in 20 passes. But scikit-learn adds its threads' sums in the order in which
they finish, both want the frames in memory, and neither can be stopped and resumed. scikit-learn's k-means++ takes ten times as long: it
computes in float64, about an hour of one core for 4096 clusters.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ser_core.errors import Interrupted
from ser_core.parallel.threads import DeterministicPool

CHUNK = 1024  # frames a matrix product on a CPU: 16 MB of scores at k = 4096
BLOCK = 16 * CHUNK  # frames summed up by one thread before its sums join the others; a product on a GPU
SHARD = 4096  # frames of the seeding's subset that one thread compares at a time
SEEDING_FRAMES, FEWEST_SEEDING_FRAMES = 32, 16_384  # of the subset: for each cluster, and in all
Float32Array = NDArray[np.float32]


@dataclass(frozen=True)
class KMeansResult:
    """`inertia`: sum of squared distances of all frames to their centroids. `iterations`: fewer than asked for where nothing moved."""

    labels: NDArray[np.int32]  # (frames,)
    centroids: Float32Array  # (k, channels)
    inertia: float
    iterations: int


@dataclass(frozen=True)
class Assignment:
    """What one pass over the frames finds."""

    labels: NDArray[np.int32]  # (frames,)
    sums: NDArray[np.float64]  # (k, channels), of the centred frames
    counts: NDArray[np.int64]  # (k,)
    inertia: float


class KMeans:
    """Frames (N, channels), an array or a memory map, and what is needed to pass over them. Centroids are centred in here: less their mean.

    Raises ValueError for frames that are not finite, and in every pass Interrupted once `should_stop` turned true.
    """

    def __init__(
        self, frames: Float32Array, pool: DeterministicPool, device: torch.device, should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        self.frames = frames
        self._pool = pool
        self._device = device
        self._should_stop = should_stop
        self._local = threading.local()
        self._rows = CHUNK if device.type == "cpu" else BLOCK
        count, channels = frames.shape
        self.mean = np.zeros(channels, dtype=np.float32)
        self.mean = (self._total(lambda chunk: chunk.sum(0)) / count).astype(np.float32)
        if not np.isfinite(self.mean).all():
            raise ValueError("frames that are not finite")
        self._squares = float(self._total(lambda chunk: torch.dot(chunk.view(-1), chunk.view(-1))))

    def initial_centroids(self, k: int, rng: np.random.Generator) -> Float32Array:
        """First centroids (k, channels): greedy k-means++ (2 + ln k candidates for each) on a random subset of the frames."""
        count = len(self.frames)
        size = min(count, max(SEEDING_FRAMES * k, FEWEST_SEEDING_FRAMES))
        subset = self.frames[np.sort(rng.choice(count, size=size, replace=False, shuffle=False))] - self.mean
        points = torch.from_numpy(subset).to(self._device)
        squares = torch.from_numpy(_squares(subset)).to(self._device)
        candidates = rng.integers(size, size=1)  # the first centroid has no rival
        closest = torch.full((size,), math.inf, device=self._device)
        chosen: list[int] = []

        def compare(start: int) -> tuple[Tensor, Tensor]:
            """Squared distances (frames, candidates) of a shard to what would be its nearest centroid, and their sums."""
            shard = slice(start, start + SHARD)
            found = torch.addmm(squares[candidates], points[shard], points[candidates].T, alpha=-2)
            found = torch.minimum(found.add_(squares[shard, None]).clamp_(min=0), closest[shard, None])
            return found, found.sum(0, dtype=torch.float64)

        while True:
            self._check("while seeding, which begins again")
            parts = list(self._pool.map(compare, range(0, size, SHARD)))
            best = int(sum(potential for _, potential in parts).argmin())  # type: ignore[union-attr]
            closest = torch.cat([distances[:, best] for distances, _ in parts])
            chosen.append(int(candidates[best]))
            if len(chosen) == k:
                return np.ascontiguousarray(subset[chosen])
            reach = np.cumsum(closest.cpu().numpy(), dtype=np.float64)
            draws = rng.random(2 + int(math.log(k))) * reach[-1]
            candidates = np.minimum(np.searchsorted(reach, draws, side="right"), size - 1)

    def assign(self, centroids: Float32Array) -> Assignment:
        """The nearest centroid of every frame; of several the first."""
        (k, channels), count = centroids.shape, len(self.frames)
        labels = np.empty(count, dtype=np.int32)
        transposed = torch.from_numpy(centroids).to(self._device).T.contiguous()
        half = torch.from_numpy(_squares(centroids) / 2).to(self._device)

        def block(start: int) -> NDArray[np.float64]:
            sums = torch.zeros(k, channels, dtype=torch.float64, device=self._device)
            for first, chunk in self._chunks(start):
                # |x - c|² / 2 without |x|² / 2, which is the same for all centroids
                scores = torch.addmm(half, chunk, transposed, alpha=-1, out=self._buffer("scores", len(chunk), k, torch.float32))
                nearest = _argmin(scores)
                labels[first : first + len(chunk)] = nearest.cpu().numpy()
                sums.index_add_(0, nearest, self._wide(chunk))
            return sums.cpu().numpy()

        sums = np.zeros((k, channels))
        for part in self._pool.map(block, range(0, count, BLOCK)):
            sums += part
            self._check("between two blocks of frames")
        counts = np.bincount(labels, minlength=k)
        exact = centroids.astype(np.float64)
        inertia = self._squares - 2 * float((sums * exact).sum()) + float(counts @ (exact**2).sum(1))
        return Assignment(labels, sums, counts, max(0.0, inertia))

    def update(self, found: Assignment, centroids: Float32Array) -> Float32Array:
        """Means of the clusters. One without frames moves to the frame that is farthest from its centroid, the next to the next, as in
        scikit-learn; where all frames lie on centroids it stays empty, on the centroid of the largest cluster."""
        sums, counts = found.sums.copy(), found.counts.copy()
        empty = np.flatnonzero(counts == 0)
        if len(empty):
            distances = self._distances(found.labels, centroids)
            order = iter(np.argsort(-distances, kind="stable"))
            for cluster in empty:
                place = next((each for each in order if distances[each] > 0 and counts[found.labels[each]] > 1), None)
                if place is None:
                    break
                frame = self.frames[place] - self.mean
                sums[found.labels[place]] -= frame
                counts[found.labels[place]] -= 1
                sums[cluster], counts[cluster] = frame, 1
        means: Float32Array = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
        means[counts == 0] = means[np.argmax(counts)]
        return means

    def _distances(self, labels: NDArray[np.int32], centroids: Float32Array) -> NDArray[np.float64]:
        """Squared distance (frames,) of every frame to its centroid."""
        table = torch.from_numpy(centroids).to(self._device)
        distances = np.empty(len(self.frames))

        def block(start: int) -> None:
            for first, chunk in self._chunks(start):
                place = slice(first, first + len(chunk))
                own = table[torch.from_numpy(labels[place].astype(np.int64)).to(self._device)]
                distances[place] = (chunk - own).double().square_().sum(1).cpu().numpy()

        for _ in self._pool.map(block, range(0, len(self.frames), BLOCK)):
            self._check("between two blocks of frames")
        return distances

    def _total(self, term: Callable[[Tensor], Tensor]) -> NDArray[np.float64]:
        """Sum over all frames of what `term` gives for chunks (frames, channels) in float64."""

        def block(start: int) -> NDArray[np.float64]:
            terms = [term(self._wide(chunk)).cpu().numpy() for _, chunk in self._chunks(start)]
            return np.asarray(np.sum(terms, axis=0), dtype=np.float64)

        total: Any = 0.0
        for part in self._pool.map(block, range(0, len(self.frames), BLOCK)):
            total = total + part
            self._check("between two blocks of frames")
        return np.asarray(total, dtype=np.float64)

    def _chunks(self, start: int) -> Iterator[tuple[int, Tensor]]:
        """First frame of each chunk of a block, and its centred frames (frames, channels), in a buffer that the next one overwrites."""
        stop = min(start + BLOCK, len(self.frames))
        for first in range(start, stop, self._rows):
            rows = min(self._rows, stop - first)
            chunk = self._buffer("chunk", rows, self.frames.shape[1], torch.float32, torch.device("cpu"))
            np.subtract(self.frames[first : first + rows], self.mean, out=chunk.numpy())
            yield first, chunk.to(self._device)

    def _wide(self, chunk: Tensor) -> Tensor:
        return self._buffer("wide", len(chunk), chunk.shape[1], torch.float64).copy_(chunk)

    def _buffer(self, name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """Room (rows, columns) of this thread alone, used again and again: new pages for every chunk would cost more than the sums."""
        kept: Tensor | None = getattr(self._local, name, None)
        if kept is None or kept.shape[1] != columns:
            kept = torch.empty(self._rows, columns, dtype=dtype, device=device or self._device)
            setattr(self._local, name, kept)
        return kept[:rows]

    def _check(self, where: str) -> None:
        if self._should_stop():
            raise Interrupted(f"cluster: stopped {where}")


@dataclass(frozen=True)
class Checkpointing:
    """How centroids outlive the process: `save` is called with the iterations done and centred centroids, at most every `seconds`."""

    save: Callable[[int, Float32Array], None]
    seconds: float
    saved: tuple[int, Float32Array] | None = None  # to go on from


def lloyd(
    frames: KMeans,
    first: Callable[[], Float32Array],
    iterations: int,
    checkpointing: Checkpointing,
    on_iteration: Callable[[int, float], None],
) -> KMeansResult:
    """At most so many iterations from the centred centroids that `first` gives, and the labels of the last centroids.

    `on_iteration` hears of every iteration: its number, and the inertia that it began with. Interrupted leaves a checkpoint; nothing else than the
    centroids has to be known to go on.
    """
    done, centroids = checkpointing.saved or (0, first())
    written = time.monotonic()
    try:
        for iteration in range(done, iterations):
            found = frames.assign(centroids)
            moved = frames.update(found, centroids)
            done = iteration + 1
            on_iteration(done, found.inertia)
            if np.array_equal(moved, centroids):
                return KMeansResult(found.labels, centroids + frames.mean, found.inertia, done)
            centroids = moved
            if time.monotonic() - written >= checkpointing.seconds:
                checkpointing.save(done, centroids)
                written = time.monotonic()
        found = frames.assign(centroids)
    except Interrupted as ending:
        checkpointing.save(done, centroids)
        raise Interrupted(f"{ending}, after {done} iterations; they are in the checkpoint") from None
    return KMeansResult(found.labels, centroids + frames.mean, found.inertia, done)


def _argmin(scores: Tensor) -> Tensor:
    """Column (rows,) of the smallest value; on a CPU numpy's is quicker."""
    return torch.from_numpy(scores.numpy().argmin(1)) if scores.device.type == "cpu" else scores.argmin(1)


def _squares(rows: Float32Array) -> Float32Array:
    """Squared norms (rows,)."""
    return np.asarray(np.einsum("ij,ij->i", rows, rows, dtype=np.float64), dtype=np.float32)
