"""Projected features of a frozen front end: from the store on disk, from memory, or recomputed; bit-identical in each case."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ser_core.errors import Interrupted
from ser_core.features.store import FeatureStore, Frames, blocks_of, device_kind, front_end_key
from ser_core.models.front_end import encoder_of, project_independent, project_padded
from ser_core.parallel.threads import DeterministicPool
from ser_core.settings.backbone import Padding
from ser_core.settings.execution import FeatureCache
from ser_core.training.device import Arithmetic
from ser_core.training.progress import Progress
from ser_core.training.splits import Split

Crop = tuple[int, int]  # first frame, frames
STORE = "features"  # folder of the store in the shared cache folder
UTTERANCES_AT_ONCE = 8  # computed in parallel on a CPU; a long one needs some hundred MB
Result = TypeVar("Result")


class FrozenFeatures:
    """Features (frames, hidden) of a split's utterances, each cut to its first `max_samples` samples (None: whole).

    `independent` features depend on the utterance alone and are always float32. On a CPU one thread computes one utterance, several
    utterances in parallel: two threads for a short one would round otherwise. They can therefore be cached: in the store below `shared`
    for all stages with the same front end, or in CPU memory (7 h of wav2vec2-base: 3.9 GB). Features that cannot be stored are kept in
    memory, or, with `once` (a single pass over the split), computed when needed. `reference` features depend on the batch and on the
    autocast type, so they are computed for every batch.
    """

    def __init__(
        self,
        encoder: Any,
        split: Split,
        max_samples: int | None,
        padding: Padding,
        cache: FeatureCache,
        arithmetic: Arithmetic,
        shared: Path | None = None,
        *,
        once: bool = False,
    ) -> None:
        self._encoder = encoder
        self._split = split
        self._max_samples = max_samples
        self._arithmetic = arithmetic
        self.padding = padding
        kept = padding is Padding.independent and cache is not FeatureCache.none
        self._shared = shared if kept and cache is FeatureCache.store else None
        self._keeps = kept and not once
        self._once = once
        self._kept: dict[int, Frames] = {}

    def fill(self, should_stop: Callable[[], bool], progress: Progress) -> None:
        """Load or compute the features to be cached, if any. Raises Interrupted on request; blocks stored until then remain."""
        if self._shared is not None:
            encoder = encoder_of(self._encoder)
            key = front_end_key(encoder, self._split.corpus_digest, device_kind(self._arithmetic.device))
            store = FeatureStore(self._shared / STORE / key, encoder.config.hidden_size, self._computed, map_in_order=self._map)
            self._kept = store.fill(blocks_of(self._split, self._max_samples), should_stop, progress)
        if not self._keeps:
            return
        total = len(self._split)
        missing = [position for position in range(total) if position not in self._kept]
        with contextlib.closing(self._map(self._computed, missing)) as computed:
            for position, array in zip(missing, computed, strict=True):
                self._kept[position] = array
                progress.update(position + 1, total, "front end: utterance")
                if should_stop():
                    raise Interrupted(f"stopped at utterance {position + 1} of {total} in the front end; nothing to resume")

    def padded(self, positions: Sequence[int], crops: Sequence[Crop] | None = None, samples: int = 0) -> tuple[Tensor, Tensor]:
        """Return the features (B, T, hidden) of a batch on the encoder's device, and its valid frames (B,) int64 on the CPU.

        `crops`: (first frame, frames) of each utterance. `samples`: for `reference` features of a micro-batch, the length of the longest
        utterance of the whole batch.
        """
        if self.padding is Padding.reference:
            if crops is not None:
                raise ValueError("reference features depend on the batch: crop the waves, not the frames")
            with self._arithmetic.autocast():
                features, frames = project_padded(self._encoder, [self._wave(position, keep=True) for position in positions], samples)
            return features, frames.cpu()
        cuts = [slice(None)] * len(positions) if crops is None else [slice(first, first + count) for first, count in crops]
        kept = [self._kept[position] for position in positions if position in self._kept]
        if len(kept) == len(positions):
            return self._batch([array[cut] for array, cut in zip(kept, cuts, strict=True)])
        found = self._map(lambda position: self._alone(position, keep=not self._once), positions)
        alone = [features[cut] for features, cut in zip(found, cuts, strict=True)]
        return pad_sequence(alone, batch_first=True), torch.tensor([len(features) for features in alone], dtype=torch.int64)

    def _batch(self, arrays: Sequence[Frames]) -> tuple[Tensor, Tensor]:
        """Pad cached features into a batch on the device. The batch is in pinned memory, so that the copy to a GPU is asynchronous."""
        device = self._arithmetic.device
        counts = [len(array) for array in arrays]
        batch = torch.empty(len(arrays), max(counts), arrays[0].shape[1], pin_memory=device.type == "cuda")
        rows = batch.numpy()
        for row, array in zip(rows, arrays, strict=True):
            row[: len(array)] = array
            row[len(array) :] = 0
        return batch.to(device, non_blocking=True), torch.tensor(counts, dtype=torch.int64)

    def _map(self, compute: Callable[[int], Result], positions: Sequence[int]) -> Generator[Result, None, None]:
        """Yield `compute(position)` for each position, in order; several at a time on a CPU."""
        threads = torch.get_num_threads()
        if self._arithmetic.device.type != "cpu" or threads == 1 or not positions:
            yield from map(compute, positions)
            return
        with DeterministicPool(min(threads, len(positions), UTTERANCES_AT_ONCE)) as pool:
            yield from pool.map(compute, positions)

    def _computed(self, position: int) -> Frames:
        array: Frames = self._alone(position, keep=False).cpu().numpy()
        return array

    def _alone(self, position: int, *, keep: bool) -> Tensor:
        with float32_only(self._arithmetic.device):
            return project_independent(self._encoder, [self._wave(position, keep=keep)])[0]

    def _wave(self, position: int, *, keep: bool) -> Tensor:
        return self._split.wave(position, keep=keep)[: self._max_samples]


@contextlib.contextmanager
def float32_only(device: torch.device) -> Iterator[None]:
    """Context without autocast and TF32: cached features are used by stages of every precision."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False))
        yield
