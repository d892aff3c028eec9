"""K-means on memory-mapped float32 frames: exact Lloyd iterations, bit-identical results with any number of CPU threads.

Frames are read in chunks and centred into a buffer. The scores of a chunk against all centroids are one float32 matrix product; the argmin
is taken while they are in the cache, and the frames are added to float64 sums in order. One thread computes a chunk, with one BLAS thread,
and the sums of blocks are added in the order of the blocks: therefore the number of threads changes no bit (a multi-threaded BLAS may
split a product elsewhere, round otherwise and so break a tie otherwise). Blocks are distributed over all threads. A GPU runs the same code
with one thread; its float64 sums use atomic additions.

Besides the mapped pages, memory holds the labels, three buffers per thread and at most twice as many sums (k, channels) as threads.

Why not a library: `benchmarks/kmeans.py` compares them. From the same initial centroids scikit-learn's Lloyd and faiss reach the same
inertia in about the same CPU time, because all are bound by the same matrix product; Elkan takes twice as long and keeps (frames, k)
bounds; mini-batch reaches a slightly worse inertia and saves no time in 20 passes. But scikit-learn adds the sums of its threads in the
order in which they finish, both need the frames in memory, and neither can be stopped and resumed. scikit-learn's k-means++ takes ten times
as long because it computes in float64: about an hour of one core for 4096 clusters.
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

CHUNK = 1024  # frames per matrix product on a CPU: 16 MB of scores at k = 4096
BLOCK = 16 * CHUNK  # frames summed by one thread before its sums are added to the total; frames per matrix product on a GPU
SHARD = 4096  # frames of the k-means++ subset that one thread compares at a time
SEEDING_FRAMES, FEWEST_SEEDING_FRAMES = 32, 16_384  # size of the k-means++ subset: frames per cluster, and minimum in total
Float32Array = NDArray[np.float32]


@dataclass(frozen=True)
class KMeansResult:
    """`inertia`: sum of squared distances of all frames to their centroids. `iterations`: fewer than requested if k-means converged."""

    labels: NDArray[np.int32]  # (frames,)
    centroids: Float32Array  # (k, channels)
    inertia: float
    iterations: int


@dataclass(frozen=True)
class Assignment:
    """Result of one pass over the frames."""

    labels: NDArray[np.int32]  # (frames,)
    sums: NDArray[np.float64]  # (k, channels), of the centred frames
    counts: NDArray[np.int64]  # (k,)
    inertia: float


class KMeans:
    """Passes over frames (N, channels), an array or a memory map. All centroids here are centred: the mean of the frames is subtracted.

    The constructor raises ValueError for frames that are NaN or infinite; every pass raises Interrupted once `should_stop` returns True.
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
        """Return centred initial centroids (k, channels): greedy k-means++ on a random subset of the frames.

        2 + ln k candidates per centroid, as in scikit-learn; Arthur & Vassilvitskii 2007.
        """
        count = len(self.frames)
        size = min(count, max(SEEDING_FRAMES * k, FEWEST_SEEDING_FRAMES))
        subset = self.frames[np.sort(rng.choice(count, size=size, replace=False, shuffle=False))] - self.mean
        points = torch.from_numpy(subset).to(self._device)
        squares = torch.from_numpy(_squares(subset)).to(self._device)
        candidates = rng.integers(size, size=1)  # the first centroid is drawn uniformly
        closest = torch.full((size,), math.inf, device=self._device)
        chosen: list[int] = []

        def compare(start: int) -> tuple[Tensor, Tensor]:
            """Squared distances (frames, candidates) of a shard's frames to the nearest centroid with each candidate added; their sums."""
            shard = slice(start, start + SHARD)
            found = torch.addmm(squares[candidates], points[shard], points[candidates].T, alpha=-2)
            found = torch.minimum(found.add_(squares[shard, None]).clamp_(min=0), closest[shard, None])
            return found, found.sum(0, dtype=torch.float64)

        while True:
            self._check("during k-means++ seeding, which restarts")
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
        """Assign every frame to its nearest centroid of (k, channels); of equally near ones to the first."""
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
        """Return the means of the clusters, (k, channels).

        As in scikit-learn, an empty cluster moves to the frame farthest from its centroid, the next empty one to the next frame. If all
        frames lie on centroids it stays empty, at the centroid of the largest cluster.
        """
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
        """Sum `term` over all chunks (frames, channels) in float64."""

        def block(start: int) -> NDArray[np.float64]:
            terms = [term(self._wide(chunk)).cpu().numpy() for _, chunk in self._chunks(start)]
            return np.asarray(np.sum(terms, axis=0), dtype=np.float64)

        total: Any = 0.0
        for part in self._pool.map(block, range(0, len(self.frames), BLOCK)):
            total = total + part
            self._check("between two blocks of frames")
        return np.asarray(total, dtype=np.float64)

    def _chunks(self, start: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (first frame, centred frames (frames, channels)) of each chunk of a block; the buffer is reused for the next chunk."""
        stop = min(start + BLOCK, len(self.frames))
        for first in range(start, stop, self._rows):
            rows = min(self._rows, stop - first)
            chunk = self._buffer("chunk", rows, self.frames.shape[1], torch.float32, torch.device("cpu"))
            np.subtract(self.frames[first : first + rows], self.mean, out=chunk.numpy())
            yield first, chunk.to(self._device)

    def _wide(self, chunk: Tensor) -> Tensor:
        return self._buffer("wide", len(chunk), chunk.shape[1], torch.float64).copy_(chunk)

    def _buffer(self, name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """A thread-local buffer (rows, columns), reused: allocating new pages for every chunk would take longer than the sums."""
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
    """How to save and resume: `save(iterations done, centred centroids)` is called at most once every `seconds`."""

    save: Callable[[int, Float32Array], None]
    seconds: float
    saved: tuple[int, Float32Array] | None = None  # checkpoint to resume from: iterations done, centred centroids


def lloyd(
    frames: KMeans,
    first: Callable[[], Float32Array],
    iterations: int,
    checkpointing: Checkpointing,
    on_iteration: Callable[[int, float], None],
) -> KMeansResult:
    """Run at most `iterations` Lloyd iterations from the centred centroids that `first` returns, then assign the final labels.

    `on_iteration(number, inertia before the update)` is called after every iteration. Before raising Interrupted a checkpoint is saved; the
    centroids are the whole state.
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
    """Column of the smallest value of each row: (rows,). numpy's argmin is faster on a CPU."""
    return torch.from_numpy(scores.numpy().argmin(1)) if scores.device.type == "cpu" else scores.argmin(1)


def _squares(rows: Float32Array) -> Float32Array:
    """Squared norms (rows,)."""
    return np.asarray(np.einsum("ij,ij->i", rows, rows, dtype=np.float64), dtype=np.float32)
