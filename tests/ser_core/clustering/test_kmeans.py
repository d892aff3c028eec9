"""K-means: the result of scikit-learn's Lloyd, bit-identical with any number of threads and after resuming, without copying the frames."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ser_core.clustering.kmeans import BLOCK, Checkpointing, Float32Array, KMeans, KMeansResult, lloyd
from ser_core.errors import Interrupted
from ser_core.parallel.threads import DeterministicPool

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


def mixture(count: int, channels: int, components: int, seed: int = 0) -> Float32Array:
    """A ReLU of overlapping Gaussian clusters."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((components, channels), dtype=np.float32)
    noise = rng.standard_normal((count, channels), dtype=np.float32)
    clouds: Float32Array = np.maximum(centres[rng.integers(0, components, count)] + noise + np.float32(0.5), 0)
    return clouds


def nothing_kept(done: int, centroids: Float32Array) -> None:
    del done, centroids


def quiet(iteration: int, inertia: float) -> None:
    del iteration, inertia


def cluster(
    frames: Float32Array, k: int, *, iterations: int = 20, threads: int = 1, seed: int = 0, start: Float32Array | None = None
) -> KMeansResult:
    """From our seeds, or from centroids `start`."""
    with DeterministicPool(threads) as pool:
        means = KMeans(frames, pool, CPU)

        def first() -> Float32Array:
            return means.initial_centroids(k, np.random.default_rng(seed)) if start is None else start - means.mean

        return lloyd(means, first, iterations, Checkpointing(nothing_kept, float("inf")), quiet)


def inertia_of(frames: Float32Array, found: KMeansResult) -> float:
    return float(((frames.astype(np.float64) - found.centroids[found.labels]) ** 2).sum())


def same(one: KMeansResult, other: KMeansResult) -> bool:
    """To the bit."""
    arrays = zip((one.labels, one.centroids), (other.labels, other.centroids), strict=True)
    return all(np.array_equal(mine, theirs) for mine, theirs in arrays) and (one.inertia, one.iterations) == (
        other.inertia,
        other.iterations,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("k", "iterations"), [(2, 20), (17, 20), (64, 3), (300, 20)])
def test_result_equals_scikit_learn(k: int, iterations: int) -> None:
    """From the same start after as many iterations: labels, centroids, inertia; frames are more than a block, not whole chunks."""
    from sklearn.cluster import KMeans as Theirs

    frames = mixture(BLOCK + 4321, 24, 40)
    start = frames[np.random.default_rng(1).choice(len(frames), k, replace=False)]
    found = cluster(frames, k, iterations=iterations, threads=2, start=start)
    theirs = Theirs(k, init=start, n_init=1, max_iter=iterations, tol=0.0, algorithm="lloyd").fit(frames)
    assert found.inertia == pytest.approx(theirs.inertia_, rel=1e-5)
    assert found.inertia == pytest.approx(inertia_of(frames, found), rel=1e-6)
    assert (found.labels == theirs.labels_).mean() > 0.999  # a frame half-way between two centroids may fall to either
    np.testing.assert_allclose(found.centroids, theirs.cluster_centers_, atol=2e-3)
    assert found.labels.dtype == np.int32
    assert found.centroids.dtype == np.float32


@pytest.mark.slow
def test_the_result_is_bit_identical_with_any_number_of_threads() -> None:
    """Seeds too, whose subset is cut into several shards; and again on the same number. The threads of torch are left as they were."""
    frames = mixture(2 * BLOCK + 77, 48, 60)
    before = torch.get_num_threads()
    found = [cluster(frames, 130, threads=threads, iterations=6) for threads in (1, 1, 2, 3)]
    assert all(same(found[0], other) for other in found[1:])
    assert torch.get_num_threads() == before
    assert not same(found[0], cluster(frames, 130, iterations=6, seed=1))


def test_seeds_are_frames_that_cover_the_clouds() -> None:
    """Of clouds far apart each gets a seed, where frames drawn evenly miss many; and they are frames."""
    rng = np.random.default_rng(2)
    centres = 100 * rng.standard_normal((50, 16))
    cloud = rng.integers(0, 50, 20_000)
    frames = (centres[cloud] + rng.standard_normal((20_000, 16))).astype(np.float32)
    with DeterministicPool(2) as pool:
        means = KMeans(frames, pool, CPU)
        seeds = means.initial_centroids(50, np.random.default_rng(3)) + means.mean
    nearest = ((frames[None, :, :] - seeds[:, None, :]) ** 2).sum(2)
    assert nearest.min(1).max() < 1e-6
    assert len(set(cloud[nearest.argmin(1)])) == 50


def test_interrupted_anywhere_the_result_is_bit_identical() -> None:
    """Stopped at any of its looks, before the first iteration and in the last pass too, and gone on from what it kept."""
    frames = mixture(BLOCK + 500, 12, 20)
    start = frames[:40]
    whole = cluster(frames, 40, iterations=5, start=start)
    assert whole.iterations == 5
    steps = set()
    for allowed in range(4, 16):
        kept: list[tuple[int, Float32Array]] = []
        looks = iter(range(allowed))

        def stop(looks: object = looks) -> bool:
            return next(looks, None) is None  # type: ignore[call-overload]

        def save(done: int, centroids: Float32Array, kept: list[tuple[int, Float32Array]] = kept) -> None:
            kept.append((done, centroids.copy()))

        with DeterministicPool(2) as pool:
            means = KMeans(frames, pool, CPU, stop)
            with pytest.raises(Interrupted, match="in the checkpoint"):
                lloyd(means, lambda means=means: start - means.mean, 5, Checkpointing(save, float("inf")), quiet)  # type: ignore[misc]
            assert len(kept) == 1
            steps.add(kept[0][0])
            resumed = lloyd(KMeans(frames, pool, CPU), _unused, 5, Checkpointing(nothing_kept, float("inf"), kept[0]), quiet)
        assert same(resumed, whole)
    assert steps == set(range(6))


def _unused() -> Float32Array:
    raise AssertionError("a resumed clustering draws no seeds")


def test_centroids_are_kept_as_often_as_asked() -> None:
    frames = mixture(3000, 8, 20)
    often: list[int] = []
    never: list[int] = []
    with DeterministicPool(1) as pool:
        means = KMeans(frames, pool, CPU)
        for kept, seconds in ((often, 0.0), (never, 1e9)):
            checkpointing = Checkpointing(lambda done, _, kept=kept: kept.append(done), seconds)  # type: ignore[misc]
            lloyd(means, lambda: frames[:30] - means.mean, 4, checkpointing, quiet)
    assert (often, never) == ([1, 2, 3, 4], [])


def test_iterations_end_at_convergence() -> None:
    """And the reported inertia never grows."""
    frames = mixture(2000, 4, 3)
    told: list[float] = []
    with DeterministicPool(1) as pool:
        means = KMeans(frames, pool, CPU)
        found = lloyd(
            means,
            lambda: frames[:3] - means.mean,
            500,
            Checkpointing(nothing_kept, 1e9),
            lambda number, inertia: told.append(inertia),
        )
    assert found.iterations == len(told) < 500
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(told))
    assert told[-1] == found.inertia


def test_empty_cluster_takes_the_farthest_frame() -> None:
    """As in scikit-learn: two of the first centroids are far from everything, and move to the frames with the worst distances."""
    from sklearn.cluster import KMeans as Theirs

    frames = mixture(4000, 6, 4)
    frames[123], frames[3456] = 40, -30
    start = np.concatenate([frames[:4], np.full((2, 6), 1e3, dtype=np.float32)])
    for iterations in (1, 20):
        found = cluster(frames, 6, iterations=iterations, start=start)
        theirs = Theirs(6, init=start, n_init=1, max_iter=iterations, tol=0.0, algorithm="lloyd").fit(frames)
        assert len(np.unique(found.labels)) == 6
        assert found.inertia == pytest.approx(theirs.inertia_, rel=1e-5)
        assert (found.labels == theirs.labels_).mean() > 0.999


def test_as_many_clusters_as_frames() -> None:
    """Every frame is its own centroid."""
    frames = mixture(200, 8, 200)
    found = cluster(frames, 200)
    assert sorted(found.labels) == list(range(200))
    assert found.inertia == pytest.approx(0, abs=1e-3)
    np.testing.assert_allclose(found.centroids[found.labels], frames, atol=1e-5)


def test_fewer_distinct_frames_than_clusters() -> None:
    """Equal frames share a cluster, the rest stay empty and finite; nothing is divided by zero."""
    frames = np.repeat(mixture(5, 8, 5), 100, axis=0)
    with np.errstate(all="raise"):
        found = cluster(frames, 12)
    assert len(np.unique(found.labels)) == 5
    assert all(len(np.unique(found.labels[first : first + 100])) == 1 for first in range(0, 500, 100))
    assert np.isfinite(found.centroids).all()
    assert found.inertia == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_frames_that_are_not_finite_are_refused(value: float) -> None:
    frames = mixture(100, 4, 3)
    frames[50, 2] = value
    with DeterministicPool(1) as pool, pytest.raises(ValueError, match="not finite"):
        KMeans(frames, pool, CPU)


def test_a_mean_far_from_zero_costs_no_precision() -> None:
    """Frames are centred before float32 products are taken: the same clusters with 1000 added to every channel."""
    frames = mixture(3000, 16, 10)
    near, far = (cluster(moved, 10, start=moved[:10]) for moved in (frames, frames + np.float32(1000)))
    assert (near.labels == far.labels).mean() > 0.995
    assert far.inertia == pytest.approx(near.inertia, rel=1e-3)


MEASURED = """
import resource, sys
import numpy as np, torch
from ser_core.parallel.threads import DeterministicPool
from ser_core.clustering.kmeans import KMeans, Checkpointing, lloyd

def run(frames, k):
    with DeterministicPool(2) as pool:
        means = KMeans(frames, pool, torch.device("cpu"))
        start = lambda: means.initial_centroids(k, np.random.default_rng(0))
        lloyd(means, start, 2, Checkpointing(lambda done, centroids: None, 1e9), lambda *told: None)

run(np.ones((64, 8), dtype=np.float32), 2)
own = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (own + int(sys.argv[2]) * 2**20,) * 2)  # all private memory, and no page of a mapped file
frames = np.load(sys.argv[1], mmap_mode="r")
if sys.argv[3] == "copied":
    frames = np.array(frames)
run(frames, 64)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_frames(tmp_path: Path) -> None:
    """300 MB of frames are clustered by a process that may not have 250 MB more of its own; a copy would not fit."""
    written: NDArray[np.float32] = np.lib.format.open_memmap(tmp_path / "frames.npy", mode="w+", dtype=np.float32, shape=(150_000, 512))
    part = np.random.default_rng(0).standard_normal((10_000, 512), dtype=np.float32)
    for first in range(0, len(written), len(part)):
        written[first : first + len(part)] = part + np.float32(first / len(written))
    del written
    for way, fits in (("mapped", True), ("copied", False)):
        command = [sys.executable, "-c", MEASURED, str(tmp_path / "frames.npy"), "250", way]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == fits, done.stderr
        assert fits or "allocate" in done.stderr


def test_an_exception_in_a_thread_is_raised() -> None:
    """What a thread raises comes out of the map, in its place, and the pool ends."""

    def inverse(value: int) -> float:
        return 1 / value

    found: list[float] = []
    with DeterministicPool(2) as pool:
        mapped = pool.map(inverse, [1, 2, 0, 5])
        found.extend(itertools.islice(mapped, 2))
        with pytest.raises(ZeroDivisionError):
            next(mapped)
    assert found == [1, 0.5]
