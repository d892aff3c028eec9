"""K-means at the paper's scale: ours, faiss and scikit-learn on the same frames from the same initial centroids, in one run.

    python benchmarks/kmeans.py                                              # 60 000 frames of 512, k = 64, 512, 4096
    python benchmarks/kmeans.py --frames FOLDER/frames.npy --k 64 512        # emotion states of a finished stage
    python benchmarks/kmeans.py --count 1200000 --k 4096 --only ours         # the paper's size, our implementation only

Unless a file is given, frames are a synthetic mixture in `--channels` dimensions: components on a low-dimensional manifold with Zipf
weights, noise, and a ReLU as in emotion states. Every variant runs in its own process, one after another, and maps or reads the same file.
The initial centroids are ours (k-means++ on a subset), computed once for each k and timed separately; `--seeding` also times scikit-learn's
on a subset of the same size.

seconds: wall time; CPU: of all threads, less affected by other load on the machine. s/pass: a pass is an iteration or the final assignment
of labels, which all but faiss make. peak: resident memory; `mapped` is the part of it that is pages of the frames' file, which the kernel
can drop. inertia: sum of squared distances relative to the first variant after the same iterations, computed in float64 in the same way for
all (not for a single variant). With `--stop-after N` only N iterations are run, and the seconds of all are extrapolated (~).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

Float32Array = NDArray[np.float32]
PART = 16_384  # frames generated or evaluated at a time
GIB = 2**30


@dataclass(frozen=True)
class Job:
    """One variant on one number of clusters."""

    variant: str
    frames: str
    start: str
    k: int
    iterations: int
    threads: int
    judged: bool = True


@dataclass(frozen=True)
class Found:
    """Measurements of a variant's process."""

    seconds: float
    cpu_seconds: float
    iterations: int
    peak: int  # bytes
    mapped: int  # of them, pages of the frames' file when it ended
    inertia: float | None  # None, like what follows: not judged
    empty: int | None
    labels: int | None  # a digest: the same for the same labels


def make_frames(path: Path, count: int, channels: int, components: int, seed: int) -> None:
    """Write synthetic frames in parts."""
    rng = np.random.default_rng(seed)
    sheet = rng.standard_normal((24, channels)).astype(np.float32)
    centres = rng.standard_normal((components, 24)).astype(np.float32) @ sheet / np.float32(3)
    shares = 1 / np.arange(1, components + 1) ** 0.7
    frames = open_memmap(path, mode="w+", dtype=np.float32, shape=(count, channels))
    for first in range(0, count, PART):
        rows = min(PART, count - first)
        chosen = rng.choice(components, size=rows, p=shares / shares.sum())
        frames[first : first + rows] = np.maximum(0, centres[chosen] + rng.standard_normal((rows, channels), dtype=np.float32))
    frames.flush()


def ours(frames: Float32Array, start: Float32Array, job: Job) -> tuple[Float32Array, int]:
    """`ser_core.clustering.kmeans` on memory-mapped frames."""
    import torch

    from ser_core.clustering.kmeans import Checkpointing, KMeans, lloyd
    from ser_core.parallel.threads import DeterministicPool

    with DeterministicPool(job.threads) as pool:
        means = KMeans(frames, pool, torch.device("cpu"))
        found = lloyd(means, lambda: start - means.mean, job.iterations, Checkpointing(lambda done, centroids: None, float("inf")), _quiet)
    return found.centroids, found.iterations


def faiss_(frames: Float32Array, start: Float32Array, job: Job) -> tuple[Float32Array, int]:
    """faiss' `Clustering` with an exact index on all frames; no final assignment, and it splits clusters to fill empty ones."""
    import faiss

    faiss.omp_set_num_threads(job.threads)
    settings = faiss.ClusteringParameters()
    settings.niter, settings.seed = job.iterations, 0
    settings.max_points_per_centroid, settings.min_points_per_centroid = len(frames), 1  # no subsampling
    clustering = faiss.Clustering(frames.shape[1], job.k, settings)
    faiss.copy_array_to_vector(start.ravel(), clustering.centroids)
    clustering.train(np.ascontiguousarray(frames), faiss.IndexFlatL2(frames.shape[1]))
    return faiss.vector_to_array(clustering.centroids).reshape(job.k, -1), job.iterations


def scikit_learn(algorithm: str) -> Callable[[Float32Array, Float32Array, Job], tuple[Float32Array, int]]:
    """scikit-learn's exact variants, with frames centred in place as it requires."""

    def run(frames: Float32Array, start: Float32Array, job: Job) -> tuple[Float32Array, int]:
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits

        with threadpool_limits(job.threads):
            fitted = KMeans(job.k, init=start, n_init=1, max_iter=job.iterations, tol=0.0, copy_x=False, algorithm=algorithm)
            fitted.fit(np.array(frames))
        return fitted.cluster_centers_, int(fitted.n_iter_)

    return run


def mini_batch(frames: Float32Array, start: Float32Array, job: Job) -> tuple[Float32Array, int]:
    """scikit-learn's MiniBatchKMeans: the same number of passes, in batches of 16 384 frames or of four frames per cluster."""
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    size = max(PART, 4 * job.k)
    with threadpool_limits(job.threads):
        fitted = MiniBatchKMeans(job.k, init=start, n_init=1, max_iter=job.iterations, batch_size=size, tol=0.0, max_no_improvement=None)
        fitted.set_params(random_state=0).fit(frames)
    return fitted.cluster_centers_, int(fitted.n_iter_)


VARIANTS: dict[
    str, tuple[Callable[[Float32Array, Float32Array, Job], tuple[Float32Array, int]], bool]
] = {  # and whether it uses all threads
    "ours": (ours, True),
    "ours, 1 thread": (ours, False),
    "faiss": (faiss_, True),
    "scikit-learn lloyd": (scikit_learn("lloyd"), True),
    "scikit-learn lloyd, 1 thread": (scikit_learn("lloyd"), False),
    "scikit-learn elkan": (scikit_learn("elkan"), True),
    "scikit-learn mini-batch": (mini_batch, True),
}


def passes_of(variant: str, iterations: int) -> int:
    """Passes over all frames; faiss makes none for the labels."""
    return iterations + (variant != "faiss")


def elkan_bytes(count: int, k: int) -> int:
    """Memory of Elkan's lower bounds."""
    return 4 * count * k


def run_job(job: Job, pipe: Any) -> None:
    """In a separate process: cluster, measure, then evaluate the centroids outside the measurement."""
    frames: Float32Array = np.load(job.frames, mmap_mode="r")
    start: Float32Array = np.load(job.start)
    run = VARIANTS[job.variant][0]
    run(frames[:256], start[:2].copy(), replace(job, k=2, iterations=1))  # imports, threads
    started, cpu = time.perf_counter(), time.process_time()
    centroids, iterations = run(frames, start, job)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    peak, mapped = status_bytes("VmHWM"), status_bytes("RssFile")
    judged = judge(frames, np.asarray(centroids, dtype=np.float32), job.threads) if job.judged else (None, None, None)
    inertia, empty, labels = judged
    pipe.send(asdict(Found(seconds, cpu_seconds, iterations, peak, mapped, inertia, empty, labels)))


def judge(frames: Float32Array, centroids: Float32Array, threads: int) -> tuple[float, int, int]:
    """Return inertia, empty clusters and a digest of the labels for these centroids."""
    import hashlib

    import torch

    from ser_core.clustering.kmeans import KMeans
    from ser_core.parallel.threads import DeterministicPool

    with DeterministicPool(threads) as pool:
        means = KMeans(frames, pool, torch.device("cpu"))
        found = means.assign(centroids - means.mean)
    return found.inertia, int((found.counts == 0).sum()), int.from_bytes(hashlib.sha256(found.labels.tobytes()).digest()[:4], "big")


def run_seeding(frames: str, k: int, threads: int, target: str, random: bool, pipe: Any) -> None:
    """In a separate process: write our initial centroids to `target`."""
    import torch

    from ser_core.clustering.kmeans import KMeans
    from ser_core.parallel.threads import DeterministicPool
    from ser_core.training.randomness import generator

    with DeterministicPool(threads) as pool:
        means = KMeans(np.load(frames, mmap_mode="r"), pool, torch.device("cpu"))
        rng = generator(0, "k-means", k)
        started, cpu = time.perf_counter(), time.process_time()
        chosen = np.sort(rng.choice(len(means.frames), size=k, replace=False)) if random else None
        start = means.initial_centroids(k, rng) + means.mean if chosen is None else means.frames[chosen]
        seconds = time.perf_counter() - started, time.process_time() - cpu
        np.save(target, start)
        pipe.send(seconds)


def run_their_seeding(frames: str, k: int, pipe: Any) -> None:
    """In a separate process: scikit-learn's k-means++ on a subset of the same size as ours."""
    from sklearn.cluster import kmeans_plusplus

    from ser_core.clustering.kmeans import FEWEST_SEEDING_FRAMES, SEEDING_FRAMES
    from ser_core.training.randomness import generator

    mapped: Float32Array = np.load(frames, mmap_mode="r")
    size = min(len(mapped), max(SEEDING_FRAMES * k, FEWEST_SEEDING_FRAMES))
    subset = mapped[np.sort(generator(0, "k-means", k).choice(len(mapped), size=size, replace=False, shuffle=False))]
    started, cpu = time.perf_counter(), time.process_time()
    kmeans_plusplus(subset, k, random_state=0)
    pipe.send((time.perf_counter() - started, time.process_time() - cpu))


def apart(function: Callable[..., None], *arguments: Any, limit: float) -> Any:
    """Return what `function` sends from a new process; None if it took longer than `limit` seconds or died."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(*arguments, sending))
    process.start()
    sending.close()
    try:
        return receiving.recv() if receiving.poll(limit) else None
    except EOFError:
        return None
    finally:
        if process.is_alive():
            process.join(5)
            process.kill()
        process.join()


def judgement(found: Found, base: Found) -> str:
    """Cells of a row."""
    if found.inertia is None or base.inertia is None or found.labels is None:
        return "– | – | –"
    return f"{found.inertia / base.inertia:.6f} | {found.empty} | {found.labels:08x}"


def _quiet(iteration: int, inertia: float) -> None:
    del iteration, inertia


def status_bytes(name: str) -> int:
    """Read /proc/self/status. `VmHWM`: peak without the parent's, unlike getrusage's; `RssFile`: resident pages of files."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{name}:"))


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=Path, help="a .npy file of float32 (frames, channels)")
    parser.add_argument("--count", type=int, default=60_000, help="frames to make")
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--components", type=int, default=3000, help="of the mixture")
    parser.add_argument("--k", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--stop-after", type=int, default=0, help="iterations to run of them; 0: all")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--random-start", action="store_true", help="random frames in place of k-means++, which is then not timed")
    parser.add_argument("--seeding", action="store_true", help="time scikit-learn's seeding too")
    parser.add_argument("--memory-gib", type=float, default=6.0, help="Elkan is left out where its bounds and the frames need more")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for one variant")
    parser.add_argument("--folder", type=Path, help="for made frames and starts (default: a temporary one)")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON, with `kmeans`: k -> seconds of ours for grid_cost.py")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        path = options.frames or Path(temporary) / "frames.npy"
        if options.frames is None:
            make_frames(path, options.count, options.channels, options.components, seed=0)
        count, channels = np.load(path, mmap_mode="r").shape
        run = options.stop_after or options.iterations
        print(
            f"{count} frames of {channels} ({4 * count * channels / GIB:.2f} GiB), {run} of {options.iterations} iterations, "
            f"{options.threads} threads\n"
        )
        print("| k | variant | seconds | CPU seconds | s/pass | peak GiB | mapped GiB | inertia | empty | labels |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        saved: dict[str, Any] = {"frames": count, "channels": channels, "threads": options.threads, "kmeans": {}, "rows": []}
        for k in options.k:
            start = Path(temporary) / f"start-{k}.npy"
            seeding = apart(run_seeding, str(path), k, options.threads, str(start), options.random_start, limit=options.limit)
            if seeding is None:
                print(f"| {k} | seeding, ours | none within {options.limit:g} | | | | | | | |", flush=True)
                continue
            name = "random start" if options.random_start else "seeding, ours"
            print(f"| {k} | {name} | {seeding[0]:.1f} | {seeding[1]:.1f} | | | | | | |", flush=True)
            if options.seeding:
                theirs = apart(run_their_seeding, str(path), k, limit=options.limit)
                cells = f"{theirs[0]:.1f} | {theirs[1]:.1f}" if theirs else f"over {options.limit:g} | "
                print(f"| {k} | seeding, scikit-learn | {cells} | | | | | | |", flush=True)
            base: Found | None = None
            for variant in options.only:
                if variant == "scikit-learn elkan" and elkan_bytes(count, k) + 8 * count * channels > options.memory_gib * GIB:
                    print(f"| {k} | {variant} | needs {elkan_bytes(count, k) / GIB:.1f} GiB for its bounds | | | | | | | |", flush=True)
                    continue
                threads = options.threads if VARIANTS[variant][1] else 1
                answer = apart(run_job, Job(variant, str(path), str(start), k, run, threads, len(options.only) > 1), limit=options.limit)
                if answer is None:
                    print(f"| {k} | {variant} | none within {options.limit:g} | | | | | | | |", flush=True)
                    continue
                found = Found(**answer)
                base = base or found
                passes = passes_of(variant, found.iterations)
                whole = found.seconds if run == options.iterations else found.seconds * passes_of(variant, options.iterations) / passes
                mark = "" if run == options.iterations else "~"
                saved["rows"].append(
                    {"k": k, "variant": variant, "seeding": seeding[0], "extrapolated": bool(mark), "whole": whole, **answer}
                )
                if variant == "ours":
                    saved["kmeans"][str(k)] = whole + seeding[0]
                print(
                    f"| {k} | {variant} | {mark}{whole:.1f} | {found.cpu_seconds:.1f} | {found.seconds / passes:.2f} "
                    f"| {found.peak / GIB:.2f} | {found.mapped / GIB:.2f} | {judgement(found, base)} |",
                    flush=True,
                )
        if options.output:
            options.output.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
