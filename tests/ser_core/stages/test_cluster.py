"""The cluster stage: resumed from anywhere it writes the same artifacts, with any number of threads, from memory-mapped frames."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ser_core.corpora.manifest import load_manifest
from ser_core.errors import InputError, Interrupted
from ser_core.settings.recipe import Recipe
from ser_core.stages.states import FRAMES, read_frames
from tests.ser_core.stages.conftest import Bench, artifacts, stage_calls


def test_a_resumed_stage_writes_the_same_artifacts(recipe: Recipe, bench: Bench, tmp_path: Path) -> None:
    """Stopped during seeding, before the first iteration and after each further one, with one or two threads: bit-identical artifacts."""
    call = stage_calls(recipe)["ptapt"].upstream["clusters.5"]
    upstream = {"states": bench.run(call.upstream["states"])[1]}
    whole, folder = bench.run(call, upstream=upstream)
    checkpoint = tmp_path / "kept"
    resumed_at = []
    for allowed in (6, 7, 3, 3, 10**6):
        looks = iter(range(allowed))

        def stop(looks: Iterator[int] = looks) -> bool:
            return next(looks, None) is None

        try:
            outcome, output = bench.run(call, upstream=upstream, checkpoint=checkpoint, should_stop=stop, threads=1 + allowed % 2)
        except Interrupted:
            continue
        resumed_at.append(outcome["durations"]["resumed_at_step"])
        assert artifacts(output) == artifacts(folder)
        assert outcome["metrics"] == whole["metrics"]
        break
    assert resumed_at == [2]  # the first was stopped while seeding, and left nothing; the second before an iteration
    assert any("resumed after iteration" in line for line in bench.lines)


def test_frames_are_mapped(recipe: Recipe, bench: Bench) -> None:
    """Reading them takes no memory, and nothing can write to them."""
    call = stage_calls(recipe)["cluster"].upstream["states"]
    _, folder = bench.run(call)
    ids = [utterance.id for utterance in load_manifest(bench.corpus).training(call.fold)]
    frames, counts = read_frames(folder, ids)
    assert isinstance(frames, np.memmap)
    assert not frames.flags.writeable
    assert len(frames) == counts.sum()


def test_frames_that_are_not_finite_are_refused_in_one_line(recipe: Recipe, bench: Bench) -> None:
    call = stage_calls(recipe)["cluster"]
    _, folder = bench.run(call.upstream["states"])
    frames = np.load(folder / FRAMES)
    frames[3, 1] = np.nan
    np.save(folder / FRAMES, frames)
    with pytest.raises(InputError, match="not finite"):
        bench.run(call, upstream={"states": folder})
