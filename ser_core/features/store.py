"""Outputs of a frozen front end on disk: computed once, by whichever processes need them first, and mapped into memory by all.

    FOLDER/KEY/                  one front end on one corpus: `front_end_key`
        NAME.block               features of some utterances of one fold in float32; NAME is a digest of which these are
        NAME.claim               somebody computes that block, and touched this file after his last utterance
        .NAME.HOST-PID-ANY.tmp   a block being written

A block is published by a rename, whole and flushed. Claims only share out the work: a block that two processes computed is the same to the
bit, whatever threads they have; the kind of device is part of KEY. So a claim that nobody touches any more is taken over, and whatever goes
wrong with the folder costs time, never a number. A published block is not replaced, since others have it mapped; on NFS, whoever removes
the folder while stages run ends them (they are tried again).
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
from ser_core.models.backbone import NORMALISE_KEY
from ser_core.training.progress import Progress
from ser_core.training.splits import Split

# Of the file format and of how features are computed: raised with every change of ser_core/models/{front_end,convolutions,conv1d_matmul}.py that
# may change a bit of the features of the same weights.
VERSION = 1
BLOCK_SAMPLES = 120 * SAMPLE_RATE  # 18 MB of wav2vec2-base: small enough to share out, large enough to be few
STALE_SECONDS = 60.0  # since a claim was touched: its process is gone, or slower than computing the block anew
POLL_SECONDS = (0.1, 3.0)  # between looks at the blocks of others, from the first wait to the longest
ATTEMPTS = 2  # a block that is bad again right after it was written is the disk's doing
MAGIC = b"SERFEAT\x01"
PREAMBLE = struct.Struct("<8s32s")  # magic, sha256 of all that follows
HEADER_LENGTH = struct.Struct("<Q")  # of the JSON facts, padded so that frames begin at a multiple of ALIGNMENT
ALIGNMENT = 64
MAX_HEADER_BYTES = 1 << 24
FRAME_TYPE = np.dtype("<f4")
# What of a configuration determines the front end, beside its weights.
CONFIG_KEYS = ("conv_dim", "conv_kernel", "conv_stride", "conv_bias", "feat_extract_norm", "feat_extract_activation", "layer_norm_eps")
FRONT_END = ("feature_extractor", "feature_projection")
Frames = NDArray[np.float32]  # (frames, hidden) of one utterance


@dataclass(frozen=True)
class Block:
    """Utterances of one fold by their positions in a split, and what names the block: (utterance, samples used from its start)."""

    positions: tuple[int, ...]
    items: tuple[tuple[str, int], ...]

    @functools.cached_property
    def name(self) -> str:
        return hashlib.sha256(json.dumps(self.items).encode()).hexdigest()[:32]


MapInOrder = Callable[[Callable[[int], Frames], Sequence[int]], Generator[Frames, None, None]]


def map_sequentially(compute: Callable[[int], Frames], positions: Sequence[int]) -> Generator[Frames, None, None]:
    """One after another."""
    yield from map(compute, positions)


class StoreUnavailable(Exception):  # noqa: N818 - not an error: features are computed without the store
    """The folder cannot be written or read."""


def device_kind(device: torch.device) -> str:
    """What rounds alike: a model of GPU, or the instructions that torch uses of a processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def front_end_key(encoder: Any, corpus_digest: str, device: str) -> str:
    """sha256 of all that features depend on: weights of convolutions and projection, their configuration, corpus, kind of device."""
    facts = {
        "version": VERSION,
        "torch": torch.__version__,  # another one may round otherwise
        "corpus": corpus_digest,
        "device": device,
        "config": {name: getattr(encoder.config, name) for name in CONFIG_KEYS},
        NORMALISE_KEY: bool(getattr(encoder.config, NORMALISE_KEY, False)),
    }
    found = hashlib.sha256(json.dumps(facts, sort_keys=True, default=list).encode())
    for part in FRONT_END:
        for name, tensor in sorted(getattr(encoder, part).state_dict().items()):
            found.update(f"{part}.{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def blocks_of(split: Split, max_samples: int | None = None) -> list[Block]:
    """The blocks of a split's utterances, each cut to its first `max_samples` (None: whole); no block has utterances of two folds.

    So every split that holds a fold has the same blocks of it. Within a fold utterances go from short to long: cut or whole, all blocks
    are the same ones up to the first that holds an utterance that is cut.
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
    """The blocks of one front end and corpus in a folder, filled on demand: of utterances that the caller may see, and no others."""

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
        self._map = map_in_order  # how those of several are computed, in their order
        self._stale = stale
        self._problem = ""
        self._clock_offset = 0.0  # seconds by which the clock of the file system is ahead of ours
        self._writer = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"  # containers of one machine may share pids

    def fill(self, blocks: Sequence[Block], should_stop: Callable[[], bool], progress: Progress) -> dict[int, Frames]:
        """Features by position, read-only and mapped, each block checked against its digest: those that were there or could be put there.

        Blocks that are missing or bad are computed, shared out among all processes that want them. What is not in the answer cannot be had
        from the store; a line says why. Raises Interrupted where asked to stop; blocks that were finished stay.
        """
        kept: dict[int, Frames] = {}
        left = list(blocks)
        random.SystemRandom().shuffle(left)  # processes that start together begin with different ones
        self._problem = "blocks are damaged again as soon as they are written"
        for _ in range(ATTEMPTS):
            refused = False
            try:
                self._build(left, should_stop, progress)
            except StoreUnavailable as refusal:
                refused, self._problem = True, str(refusal)
            with ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads())) as pool:  # hashing lets go of the interpreter
                found = list(pool.map(self._open, left))
            for block, arrays in zip(left, found, strict=True):
                kept.update(zip(block.positions, arrays or (), strict=False))
            left = [block for block, arrays in zip(left, found, strict=True) if arrays is None]
            if refused or not left:
                break
        if left:
            utterances = sum(len(block.positions) for block in left)
            progress.report(f"front end: {utterances} utterances are computed by this stage for itself: {self.folder}: {self._problem}")
        return kept

    def path(self, block: Block) -> Path:
        return self.folder / f"{block.name}.block"

    def _build(self, blocks: Sequence[Block], should_stop: Callable[[], bool], progress: Progress) -> None:
        """Return when all blocks are there. Waits for those of others only while they get on, and when there is none left to compute.

        Raises StoreUnavailable where the folder cannot be used.
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
                    if self.path(block).exists():  # published since the last look
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
                progress.update(there, total, "front end: utterance", ", the rest by others")
                time.sleep(pause)
                pause = min(2 * pause, longest)
            with _store_errors():
                left = [block for block in waiting if not self.path(block).exists()]

    def _measure_clock_offset(self) -> float:
        """Make the folder, and compare the file system's clock with ours by a file that is then removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        probe = self.folder / f".clock.{self._writer}.tmp"
        try:
            with probe.open("wb") as file:
                return os.fstat(file.fileno()).st_mtime - time.time()
        finally:
            probe.unlink(missing_ok=True)

    def _claim(self, block: Block) -> Claim | None:
        """The right to compute a block: nobody else's, or that of a process that has not got on for long."""
        path = self.folder / f"{block.name}.claim"
        claim = Claim.take(path)
        if claim is not None or not self._is_stale(path):
            return claim
        # Many see it stale at the same moment: moved away first, so that who comes late finds the fresh one of another and puts it back.
        aside = self.folder / f".{block.name}.{self._writer}.tmp"
        try:
            path.rename(aside)
            if self._is_stale(aside):
                for torn in self.folder.glob(f".{block.name}.*.tmp"):
                    torn.unlink(missing_ok=True)
            else:
                aside.rename(path)
        except FileNotFoundError:  # another was faster
            return None
        return Claim.take(path)

    def _is_stale(self, path: Path) -> bool:
        try:
            with path.open("rb") as file:  # opened, because NFS answers a bare stat from its cache
                touched = os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return False  # just released
        return time.time() + self._clock_offset - touched > self._stale

    def _write(self, block: Block, arrays: Sequence[Frames]) -> None:
        """Publish a block, by streams: a full disk is an OSError here, where a memory map would end the process."""
        facts = json.dumps({"items": block.items, "frames": [len(array) for array in arrays], "hidden": self._hidden}).encode()
        facts += b" " * (-(PREAMBLE.size + HEADER_LENGTH.size + len(facts)) % ALIGNMENT)
        pieces: list[Any] = [HEADER_LENGTH.pack(len(facts)), facts, *(np.ascontiguousarray(array, FRAME_TYPE) for array in arrays)]
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
            with contextlib.suppress(FileNotFoundError):  # we were so slow that another took over and tidied up: the block is his
                if not self.path(block).exists():  # or he has published it, and others have mapped it
                    temporary.rename(self.path(block))
        finally:
            temporary.unlink(missing_ok=True)

    def _open(self, block: Block) -> list[Frames] | None:
        """Features of each utterance, or None where the block is not there or not whole; what is not whole is removed."""
        path = self.path(block)
        try:
            with path.open("rb") as file:
                try:
                    return _map_block(file, block, self._hidden)
                except (ValueError, KeyError, TypeError):
                    # Unless somebody has already put a good one in its place.
                    if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                        path.unlink()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._problem = error.strerror or str(error)
        return None


@dataclass
class Claim:
    """A claim file of ours. All that happens to it later is advisory."""

    path: Path
    descriptor: int

    @classmethod
    def take(cls, path: Path) -> Claim | None:
        """None where there is one already."""
        try:
            return cls(path, os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            return None

    def touch(self) -> None:
        """Tell others that we get on."""
        with contextlib.suppress(OSError):
            os.utime(self.descriptor)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *ending: object) -> None:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self.descriptor), self.path.stat()):  # not that of a process that took over
                self.path.unlink()
        with contextlib.suppress(OSError):
            os.close(self.descriptor)


def _map_block(file: BinaryIO, block: Block, hidden: int) -> list[Frames]:
    """The features in a block's file. Raises ValueError, KeyError or TypeError where it is not what was written, OSError as the disk does.

    Size and digest are read before anything is mapped: beyond the end of a file a map ends the process.
    """
    magic, digest = PREAMBLE.unpack(_read_exactly(file, PREAMBLE.size))
    if magic != MAGIC:
        raise ValueError("not a block of this version")
    seen = hashlib.sha256(lead := _read_exactly(file, HEADER_LENGTH.size))
    (length,) = HEADER_LENGTH.unpack(lead)
    if length > MAX_HEADER_BYTES:
        raise ValueError("facts of no possible length")
    seen.update(text := _read_exactly(file, length))
    facts = json.loads(text)
    counts = [int(count) for count in facts["frames"]]
    offset = PREAMBLE.size + HEADER_LENGTH.size + length
    if [tuple(item) for item in facts["items"]] != list(block.items) or facts["hidden"] != hidden or len(counts) != len(block.items):
        raise ValueError("another block")
    if os.fstat(file.fileno()).st_size != offset + sum(counts) * hidden * FRAME_TYPE.itemsize:
        raise ValueError("torn")
    while piece := file.read(1 << 20):
        seen.update(piece)
    if seen.digest() != digest:
        raise ValueError("its content does not fit its digest")
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
    """Context for what is done to the folder, apart from what is done to the corpus."""
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(error.strerror or str(error)) from error
