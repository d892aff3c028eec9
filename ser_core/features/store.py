"""Store for the outputs of a frozen front end: computed once by the processes that need them first, memory-mapped by all.

    FOLDER/KEY/                  one front end on one corpus: `front_end_key`
        NAME.block               float32 features of some utterances of one fold; NAME is a digest of their ids and lengths
        NAME.claim               a process computes this block; its mtime is updated after each utterance
        .NAME.HOST-PID-ANY.tmp   a block being written

A block is published by fsync and rename. Claims only distribute the work: processes that compute the same block write the same bits, with
any number of threads; the kind of device is part of KEY. A claim whose mtime is old is therefore taken over, and any failure of the folder
costs time but changes no number. A published block is never replaced, because other processes have it mapped. Removing the folder on NFS
while stages run ends them; they are retried.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import mmap
import os
import random
import socket
import struct
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from ser_core.corpora.manifest import SAMPLE_RATE
from ser_core.errors import Interrupted
from ser_core.models.model_types import NORMALISE_KEY
from ser_core.training.progress import Progress
from ser_core.training.splits import Split

# Version of the file format and of the computation. Increment it with every change of ser_core/models/{front_end,convolutions}.py or
# conv1d_matmul.py that may change a bit of the features.
VERSION = 1
BLOCK_SAMPLES = 120 * SAMPLE_RATE  # samples per block: 18 MB of wav2vec2-base, small enough to distribute, large enough to be few files
STALE_SECONDS = 60.0  # age of a claim after which its process counts as dead, or as slower than computing the block again
POLL_SECONDS = (0.1, 3.0)  # interval of checks for blocks of other processes: first and longest
ATTEMPTS = 2  # a block that is damaged right after it was written twice is a fault of the disk
MAGIC = b"SERFEAT\x01"
PREAMBLE = struct.Struct("<8s32s")  # magic, sha256 of the rest of the file
HEADER_LENGTH = struct.Struct("<Q")  # bytes of the JSON header, padded so that the frames start at a multiple of ALIGNMENT
ALIGNMENT = 64
MAX_HEADER_BYTES = 1 << 24
FRAME_TYPE = np.dtype("<f4")
# Keys of the model configuration that determine the front end besides its weights.
CONFIG_KEYS = ("conv_dim", "conv_kernel", "conv_stride", "conv_bias", "feat_extract_norm", "feat_extract_activation", "layer_norm_eps")
FRONT_END = ("feature_extractor", "feature_projection")
Frames = NDArray[np.float32]  # (frames, hidden) of one utterance


@dataclass(frozen=True)
class Block:
    """Some utterances of one fold: `positions` in a split, and `items` (id, samples used from the start), which name the block."""

    positions: tuple[int, ...]
    items: tuple[tuple[str, int], ...]

    @functools.cached_property
    def name(self) -> str:
        return hashlib.sha256(json.dumps(self.items).encode()).hexdigest()[:32]


MapInOrder = Callable[[Callable[[int], Frames], Sequence[int]], Generator[Frames, None, None]]


def map_sequentially(compute: Callable[[int], Frames], positions: Sequence[int]) -> Generator[Frames, None, None]:
    """Yield `compute(position)` for each position, one after the other."""
    yield from map(compute, positions)


class StoreUnavailable(Exception):  # noqa: N818 - not an error: features are computed without the store
    """The store's folder cannot be written or read."""


def device_kind(device: torch.device) -> str:
    """Name of the devices with the same rounding: the GPU model, or the CPU instruction set that torch uses."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def front_end_key(encoder: Any, corpus_digest: str, device: str) -> str:
    """sha256 (hex) of what features depend on: weights and configuration of convolutions and projection, corpus, kind of device."""
    identity = {
        "version": VERSION,
        "torch": torch.__version__,  # another version may round otherwise
        "corpus": corpus_digest,
        "device": device,
        "config": {name: getattr(encoder.config, name, None) for name in CONFIG_KEYS},
        NORMALISE_KEY: bool(getattr(encoder.config, NORMALISE_KEY, False)),
    }
    found = hashlib.sha256(json.dumps(identity, sort_keys=True, default=list).encode())
    for part in FRONT_END:
        for name, tensor in sorted(getattr(encoder, part).state_dict().items()):
            found.update(f"{part}.{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def blocks_of(split: Split, max_samples: int | None = None) -> list[Block]:
    """Return the blocks of a split's utterances, each cut to its first `max_samples` samples (None: whole).

    A block holds utterances of one fold only, so all splits that contain a fold share its blocks. Within a fold utterances are sorted by
    length, so splits with and without a cut share all blocks of shorter utterances.
    """
    by_fold: dict[str, list[int]] = {}
    for position, utterance in enumerate(split.utterances):
        by_fold.setdefault(utterance.fold, []).append(position)
    blocks = []
    for positions in by_fold.values():
        gathered: list[int] = []
        used = 0
        for position in sorted(positions, key=lambda position: (split.samples[position], split.utterances[position].id)):
            samples = _used(split, position, max_samples)
            if gathered and used + samples > BLOCK_SAMPLES:
                blocks.append(_block(split, gathered, max_samples))
                gathered, used = [], 0
            gathered.append(position)
            used += samples
        blocks.append(_block(split, gathered, max_samples))
    return blocks


def _used(split: Split, position: int, max_samples: int | None) -> int:
    samples = split.samples[position]
    return samples if max_samples is None else min(samples, max_samples)


def _block(split: Split, positions: Sequence[int], max_samples: int | None) -> Block:
    items = tuple((split.utterances[position].id, _used(split, position, max_samples)) for position in positions)
    return Block(tuple(positions), items)


class FeatureStore:
    """The blocks of one front end and corpus in a folder, computed on demand, and only for utterances that the caller passes."""

    def __init__(
        self,
        folder: Path,
        hidden: int,
        compute: Callable[[int], Frames],
        *,
        map_in_order: MapInOrder = map_sequentially,
        stale: float = STALE_SECONDS,
    ) -> None:
        self.folder = folder
        self._hidden = hidden
        self._compute = compute  # features of the utterance at a position
        self._map = map_in_order  # computes several in order
        self._stale = stale
        self._problem = ""
        self._clock_offset = 0.0  # seconds by which the file system's clock is ahead of this node's
        self._writer = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"  # containers on a node may have equal pids

    def fill(self, blocks: Sequence[Block], should_stop: Callable[[], bool], progress: Progress) -> dict[int, Frames]:
        """Return position -> features (frames, hidden), read-only and memory-mapped; the digest of every block is checked.

        Missing and damaged blocks are computed; all processes that need them share the work. Positions that are missing in the result are
        not available from the store; the reason is reported. Raises Interrupted on request; finished blocks remain.
        """
        kept: dict[int, Frames] = {}
        left = list(blocks)
        random.SystemRandom().shuffle(left)  # so that processes that start together begin with different blocks
        self._problem = "blocks are damaged again right after they were written"
        for _ in range(ATTEMPTS):
            refused = False
            try:
                self._build(left, should_stop, progress)
            except StoreUnavailable as refusal:
                refused, self._problem = True, str(refusal)
            with ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads())) as pool:  # hashing releases the GIL
                found = list(pool.map(self._open, left))
            for block, arrays in zip(left, found, strict=True):
                kept.update(zip(block.positions, arrays or (), strict=False))
            left = [block for block, arrays in zip(left, found, strict=True) if arrays is None]
            if refused or not left:
                break
        if left:
            utterances = sum(len(block.positions) for block in left)
            progress.report(f"front end: features cannot be shared (utterances: {utterances}): {self.folder}: {self._problem}")
        return kept

    def path(self, block: Block) -> Path:
        return self.folder / f"{block.name}.block"

    def _build(self, blocks: Sequence[Block], should_stop: Callable[[], bool], progress: Progress) -> None:
        """Return when all blocks exist. Waits for another process only when no unclaimed block is left, and while its claim is not stale.

        Raises StoreUnavailable if the folder cannot be used.
        """
        done, total = 0, sum(len(block.positions) for block in blocks)
        first, longest = POLL_SECONDS
        pause = first
        with _store_errors():
            left = [block for block in blocks if not self.path(block).exists()]
            if left:
                self._clock_offset = self._measure_clock_offset()
        while left:
            waiting = []
            for block in left:
                _raise_if_stopped(should_stop, done, total)
                with _store_errors():
                    claim = self._claim(block)
                if claim is None:
                    waiting.append(block)
                    continue
                with claim:
                    if self.path(block).exists():  # published since the last check
                        continue
                    arrays = []
                    with contextlib.closing(self._map(self._compute, block.positions)) as computed:
                        for array in computed:
                            arrays.append(array)
                            claim.touch()
                            done += 1
                            progress.update(done, total, "front end: utterance")
                            _raise_if_stopped(should_stop, done, total)
                    with _store_errors():
                        self._write(block, arrays)
            if len(waiting) < len(left):
                pause = first
            else:
                there = total - sum(len(block.positions) for block in waiting)
                progress.update(there, total, "front end: utterance", ", the rest in other processes")
                time.sleep(pause)
                pause = min(2 * pause, longest)
            with _store_errors():
                left = [block for block in waiting if not self.path(block).exists()]

    def _measure_clock_offset(self) -> float:
        """Create the folder and return the offset of the file system's clock, measured with a temporary file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        probe = self.folder / f".clock.{self._writer}.tmp"
        try:
            with probe.open("wb") as file:
                return os.fstat(file.fileno()).st_mtime - time.time()
        finally:
            probe.unlink(missing_ok=True)

    def _claim(self, block: Block) -> Claim | None:
        """Claim a block that is unclaimed or whose claim is stale; None if another process computes it."""
        path = self.folder / f"{block.name}.claim"
        claim = Claim.take(path)
        if claim is not None or not self._is_stale(path):
            return claim
        # Several processes may see the stale claim at once. Each renames it first; one that catches another's new claim puts it back.
        aside = self.folder / f".{block.name}.{self._writer}.tmp"
        try:
            path.rename(aside)
            if self._is_stale(aside):
                for torn in self.folder.glob(f".{block.name}.*.tmp"):
                    torn.unlink(missing_ok=True)
            else:
                aside.rename(path)
        except FileNotFoundError:  # another process was faster
            return None
        return Claim.take(path)

    def _is_stale(self, path: Path) -> bool:
        try:
            with path.open("rb") as file:  # open revalidates NFS attributes; a bare stat may be answered from the cache
                touched = os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return False  # released meanwhile
        return time.time() + self._clock_offset - touched > self._stale

    def _write(self, block: Block, arrays: Sequence[Frames]) -> None:
        """Write and publish a block with ordinary writes: a full disk raises OSError, whereas a memory map would raise SIGBUS."""
        header = json.dumps({"items": block.items, "frames": [len(array) for array in arrays], "hidden": self._hidden}).encode()
        header += b" " * (-(PREAMBLE.size + HEADER_LENGTH.size + len(header)) % ALIGNMENT)
        pieces: list[Any] = [HEADER_LENGTH.pack(len(header)), header, *(np.ascontiguousarray(array, FRAME_TYPE) for array in arrays)]
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        temporary = self.folder / f".{block.name}.{self._writer}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(PREAMBLE.pack(MAGIC, digest.digest()))
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileNotFoundError):  # our claim was stale: another process took it over and removed our file
                if not self.path(block).exists():  # or has published the block, which others may have mapped
                    temporary.rename(self.path(block))
        finally:
            temporary.unlink(missing_ok=True)

    def _open(self, block: Block) -> list[Frames] | None:
        """Return the features of each utterance of a block, or None if it is missing or damaged; a damaged one is removed."""
        path = self.path(block)
        try:
            with path.open("rb") as file:
                try:
                    return _map_block(file, block, self._hidden)
                except (ValueError, KeyError, TypeError):
                    # Unless another process has already replaced it by a good one.
                    if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                        path.unlink()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._problem = error.strerror or str(error)
        return None


@dataclass
class Claim:
    """A claim file of this process. Claims are advisory: errors with them are ignored."""

    path: Path
    descriptor: int

    @classmethod
    def take(cls, path: Path) -> Claim | None:
        """Create the claim file; None if it exists."""
        try:
            return cls(path, os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            return None

    def touch(self) -> None:
        """Update the mtime, so that the claim does not become stale."""
        with contextlib.suppress(OSError):
            os.utime(self.descriptor)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *ending: object) -> None:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self.descriptor), self.path.stat()):  # not the claim of a process that took over
                self.path.unlink()
        with contextlib.suppress(OSError):
            os.close(self.descriptor)


def _map_block(file: BinaryIO, block: Block, hidden: int) -> list[Frames]:
    """Return the features of each utterance in a block's file, memory-mapped.

    Raises ValueError, KeyError or TypeError for a damaged or different block, OSError for a read error. Size and digest are checked before
    mapping: access beyond the end of the file would raise SIGBUS.
    """
    magic, digest = PREAMBLE.unpack(_read_exactly(file, PREAMBLE.size))
    if magic != MAGIC:
        raise ValueError("not a block of this version")
    seen = hashlib.sha256(lead := _read_exactly(file, HEADER_LENGTH.size))
    (length,) = HEADER_LENGTH.unpack(lead)
    if length > MAX_HEADER_BYTES:
        raise ValueError("impossible header length")
    seen.update(text := _read_exactly(file, length))
    header = json.loads(text)
    counts = [int(count) for count in header["frames"]]
    offset = PREAMBLE.size + HEADER_LENGTH.size + length
    if [tuple(item) for item in header["items"]] != list(block.items) or header["hidden"] != hidden or len(counts) != len(block.items):
        raise ValueError("another block")
    if os.fstat(file.fileno()).st_size != offset + sum(counts) * hidden * FRAME_TYPE.itemsize:
        raise ValueError("torn")
    while piece := file.read(1 << 20):
        seen.update(piece)
    if seen.digest() != digest:
        raise ValueError("digest mismatch")
    frames = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), FRAME_TYPE, offset=offset).reshape(-1, hidden)
    return np.split(frames, np.cumsum(counts)[:-1])


def _read_exactly(file: BinaryIO, size: int) -> bytes:
    found = file.read(size)
    if len(found) != size:
        raise ValueError("torn")
    return found


def _raise_if_stopped(should_stop: Callable[[], bool], done: int, total: int) -> None:
    if should_stop():
        raise Interrupted(f"stopped at utterance {done} of {total} in the front end; nothing to resume")


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    """Context for access to the store's folder: OSError becomes StoreUnavailable; errors of the corpus stay as they are."""
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(error.strerror or str(error)) from error
