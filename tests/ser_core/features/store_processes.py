"""Processes that fill one feature store. A program of its own: it forks before torch has a thread, kills children, and mounts disks.

    python -m tests.ser_core.features.store_processes processes FOLDER
        twelve processes that start at the same time; then two that are killed, and two that take over their blocks
    python -m tests.ser_core.features.store_processes disk FOLDER
        one process on a disk that is too small, then read-only; needs the right to mount

Prints one JSON value with the results.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from ser_core.corpora.manifest import Manifest, Utterance, write_manifest
from ser_core.features import store as feature_store
from ser_core.features.features import FrozenFeatures
from ser_core.features.store import FeatureStore, Frames, blocks_of
from ser_core.models.backbone import build_backbone
from ser_core.settings.backbone import BackboneSettings, Padding
from ser_core.settings.execution import FeatureCache, Precision
from ser_core.training.device import choose_arithmetic
from ser_core.training.progress import Progress
from ser_core.training.splits import Split
from tests.ser_core.models import rebuild

FOLDS = ("1", "2", "3", "4")
PROCESSES = 12  # not more than there are blocks
WITHIN = 300.0  # seconds for all of them to have begun
STALE = 0.5


def noise(folder: Path) -> Manifest:
    """36 utterances of noise in 4 folds, 0.3 to 1.2 s."""
    (folder / "audio").mkdir(parents=True)
    rng = np.random.default_rng(0)
    utterances = []
    for number in range(36):
        fold, samples = FOLDS[number % len(FOLDS)], int(rng.integers(4_800, 19_200))
        path = f"audio/{number:02d}.flac"
        soundfile.write(folder / path, 0.1 * rng.standard_normal(samples), 16_000, subtype="PCM_16")
        utterances.append(Utterance(f"utterance{number:02d}", path, samples, ("angry", "sad")[number % 2], f"speaker{fold}", fold))
    return write_manifest(folder, "noise", FOLDS, utterances)


def everything(corpus: Manifest) -> Split:
    return Split(corpus, corpus.utterances)


def small_encoder(**changes: Any) -> Any:
    model = build_backbone(BackboneSettings(checkpoint=None, config={**rebuild.BACKBONE, **changes}))
    rebuild.fill(dict(model.named_parameters()), seed=1)
    return model.wav2vec2


def small_blocks() -> None:
    """Blocks of about 3 s: three or four of each fold."""
    feature_store.BLOCK_SAMPLES = 50_000


def frozen(encoder: Any, split: Split, cache: FeatureCache, shared: Path | None = None, limit: int | None = None) -> FrozenFeatures:
    arithmetic = choose_arithmetic(torch.device("cpu"), Precision.float32)
    return FrozenFeatures(encoder, split, limit, Padding.independent, cache, arithmetic, shared)


def digest(features: FrozenFeatures, split: Split) -> str:
    """Of the features of all utterances."""
    found = hashlib.sha256()
    for position in range(len(split)):
        found.update(features.padded([position])[0].numpy().tobytes())
    return found.hexdigest()


def computing(split: Split, encoder: Any, log: Path, after: Callable[[int], None] = lambda count: None) -> Callable[[int], Frames]:
    """What computes an utterance, writes that it did into `log`, and is then told how many it were so far."""
    plain = frozen(encoder, split, FeatureCache.none)
    count = 0

    def compute(position: int) -> Frames:
        nonlocal count
        count += 1
        with log.open("a") as file:
            file.write(f"{os.getpid()} {position}\n")
        after(count)
        array: Frames = plain.padded([position])[0][0].numpy()
        return array

    return compute


def logged(log: Path) -> list[tuple[int, int]]:
    """(process, position) of every computation."""
    rows = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return [(int(process), int(position)) for process, position in rows]


def forked(work: Callable[[], object]) -> int:
    """Fork a process that calls the function; its result is discarded, an exception shows in its exit status."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fill(store: FeatureStore, split: Split, lines: list[str] | None = None) -> dict[int, Frames]:
    report = lines.append if lines is not None else lambda line: None
    return store.fill(blocks_of(split), lambda: False, Progress(report))


def left_over(folder: Path) -> list[str]:
    """What is in a store's folder beside its blocks."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".block")


def together(folder: Path) -> dict[str, Any]:
    """All start at once, and each holds its first block until every one of them has begun one."""
    corpus, encoder, log = noise(folder / "corpus"), small_encoder(), folder / "log"
    split = everything(corpus)

    def wait_for_all(count: int) -> None:
        deadline = time.monotonic() + WITHIN
        while count == 1 and len({process for process, _ in logged(log)}) < PROCESSES:
            if time.monotonic() > deadline:
                raise TimeoutError("a process waits although a block is unclaimed")
            time.sleep(0.01)

    def work() -> None:
        store = FeatureStore(folder / "store", encoder.config.hidden_size, computing(split, encoder, log, wait_for_all))
        kept = fill(store, split)
        found = hashlib.sha256(b"".join(kept[position].tobytes() for position in range(len(split))))
        (folder / f"digest-{os.getpid()}").write_text(found.hexdigest())

    statuses = [ended(child) for child in [forked(work) for _ in range(PROCESSES)]]
    return {
        "statuses": statuses,
        "blocks": [len(list((folder / "store").glob("*.block"))), len(blocks_of(split))],
        "computed": sorted(position for _, position in logged(log)),
        "processes": len({process for process, _ in logged(log)}),
        "digests": sorted({path.read_text() for path in folder.glob("digest-*")}),
        "expected": digest(frozen(encoder, split, FeatureCache.none), split),
        "left": left_over(folder / "store"),
    }


def killed(folder: Path) -> dict[str, Any]:
    """One is killed between two utterances, one with half a block written; the next two finish their blocks."""
    corpus, encoder = noise(folder / "corpus"), small_encoder()
    split = everything(corpus)

    def store(name: str, after: Callable[[int], None] = lambda count: None) -> FeatureStore:
        compute = computing(split, encoder, folder / name, after)
        return FeatureStore(folder / "store", encoder.config.hidden_size, compute, stale=STALE)

    def kill(count: int) -> None:
        if count == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def killed_writing() -> None:
        os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)  # all is written, nothing renamed
        fill(store("second"), split)

    statuses = [ended(forked(lambda: fill(store("first", kill), split))), ended(forked(killed_writing))]
    left = left_over(folder / "store")
    others = [forked(lambda name=name: fill(store(name), split)) for name in ("third", "fourth")]  # type: ignore[misc]
    statuses += [ended(child) for child in others]
    features = frozen(encoder, split, FeatureCache.none)
    kept = fill(store("fifth"), split)
    return {
        "statuses": statuses,
        "left": [left, left_over(folder / "store")],
        "same": all(np.array_equal(kept[position], features.padded([position])[0][0].numpy()) for position in range(len(split))),
        "recomputed": len(logged(folder / "fifth")),
    }


def processes(folder: Path) -> dict[str, Any]:
    return {"together": together(folder / "together"), "killed": killed(folder / "killed")}


def disk(folder: Path) -> dict[str, Any]:
    """A store that has room for some blocks, then is read-only, then has room for all."""
    corpus, encoder, small = noise(folder / "corpus"), small_encoder(), folder / "small"
    split = everything(corpus)
    small.mkdir()
    found: dict[str, Any] = {"expected": digest(frozen(encoder, split, FeatureCache.none), split), "wanted": len(blocks_of(split))}
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", small], check=True)
    try:
        for state, options in (("full", "rw"), ("read-only", "ro"), ("roomy", "rw,size=64m")):
            subprocess.run(["mount", "-o", f"remount,{options}", small], check=True)
            lines: list[str] = []
            features = frozen(encoder, split, FeatureCache.store, small)
            features.fill(lambda: False, Progress(lines.append))
            store = next((small / "features").iterdir())
            found[state] = {
                "digest": digest(features, split),
                "lines": lines,
                "blocks": len(list(store.glob("*.block"))),
                "left": left_over(store),
            }
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)  # its blocks are still mapped
    return found


def main() -> None:
    torch.set_num_threads(1)
    small_blocks()
    what, folder = sys.argv[1], Path(sys.argv[2])
    sys.stdout.write(json.dumps({"processes": processes, "disk": disk}[what](folder)))


if __name__ == "__main__":
    main()
