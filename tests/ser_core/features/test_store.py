"""Features of a frozen front end are bit-identical from store, memory and recomputation, and computed once for all processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ser_core.corpora.manifest import Manifest
from ser_core.errors import Interrupted
from ser_core.features import store as feature_store
from ser_core.features.store import FeatureStore, blocks_of, front_end_key
from ser_core.models.backbone import build_backbone
from ser_core.models.model_types import NORMALISE_KEY
from ser_core.settings.backbone import BackboneSettings
from ser_core.settings.execution import FeatureCache
from ser_core.training.progress import Progress
from ser_core.training.splits import Split
from tests.ser_core.features import store_processes
from tests.ser_core.features.store_processes import computing, everything, fill, frozen, left_over, logged, noise, small_encoder
from tests.ser_core.stages.test_full_disk import namespace

ROOT = Path(__file__).parents[3]
LIMIT = 16_000  # samples; some utterances are longer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return noise(tmp_path_factory.mktemp("noise") / "corpus")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks, and threads."""
    monkeypatch.setattr(feature_store, "BLOCK_SAMPLES", 50_000)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def encoder() -> Any:
    return small_encoder()


def run_store_processes(what: str, folder: Path, command: Sequence[str] = ()) -> dict[str, Any]:
    program = [*command, sys.executable, "-m", "tests.ser_core.features.store_processes", what, str(folder)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_store_processes("processes", tmp_path_factory.mktemp("processes"))


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("limit", [None, LIMIT])
def test_features_are_the_same_bits_wherever_they_come_from(norm: str, limit: int | None, corpus: Manifest, tmp_path: Path) -> None:
    """From the store just built, from the store of another, from memory, computed at once; inside an autocast; whole and in crops."""
    split, encoder = everything(corpus), small_encoder(feat_extract_norm=norm)
    found = [
        frozen(encoder, split, FeatureCache.none, limit=limit),
        frozen(encoder, split, FeatureCache.memory, limit=limit),
        *(frozen(encoder, split, FeatureCache.store, tmp_path, limit) for _ in range(2)),
    ]
    for each in found:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            each.fill(lambda: False, Progress(lambda line: None))
    assert left_over(next((tmp_path / "features").iterdir())) == []
    for positions, crops in (([5], None), ([3, 0, 17, 30], None), ([8, 2], [(3, 20), (0, 7)])):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            batches = [each.padded(positions, crops) for each in found]
        for features, frames in batches:
            assert features.dtype == torch.float32
            assert torch.equal(features, batches[0][0])
            assert torch.equal(frames, batches[0][1])
    assert len(found[2]._kept) == len(split)  # it is the store that answered


@pytest.mark.slow
def test_the_number_of_threads_changes_no_bit(tmp_path: Path) -> None:
    """At the real size, where products of a short utterance round otherwise on two threads: kept, from the store, computed at once."""
    config = {"num_hidden_layers": 1, "intermediate_size": 64}
    encoder = build_backbone(BackboneSettings(checkpoint=None, config=config)).wav2vec2
    corpus = noise(tmp_path / "corpus")
    split = everything(corpus).subset(sorted(range(36), key=lambda position: corpus.utterances[position].samples)[2:12:3])
    found = set()
    for threads, cache in ((1, FeatureCache.memory), (2, FeatureCache.store), (2, FeatureCache.none), (3, FeatureCache.memory)):
        torch.set_num_threads(threads)
        features = frozen(encoder, split, cache, tmp_path)
        features.fill(lambda: False, Progress(lambda line: None))
        found.add(store_processes.digest(features, split))
        assert torch.get_num_threads() == threads
    assert len(found) == 1


def test_an_existing_block_is_not_replaced(corpus: Manifest, encoder: Any, tmp_path: Path) -> None:
    """Others have it mapped: who was slow and comes late keeps his own to himself."""
    split = everything(corpus)
    log = tmp_path / "log"
    store = FeatureStore(tmp_path / "store", encoder.config.hidden_size, computing(split, encoder, log))
    kept = fill(store, split)
    block = blocks_of(split)[0]
    before = store.path(block).stat().st_ino
    store._write(block, [kept[position] for position in block.positions])
    assert store.path(block).stat().st_ino == before
    assert left_over(store.folder) == []


def test_batches_are_copies_of_the_store(corpus: Manifest, encoder: Any, tmp_path: Path) -> None:
    """A batch may be written to; what is mapped may not."""
    features = frozen(encoder, everything(corpus), FeatureCache.store, tmp_path)
    features.fill(lambda: False, Progress(lambda line: None))
    before = features.padded([0])[0].clone()
    features.padded([0])[0].zero_()
    assert torch.equal(features.padded([0])[0], before)
    with pytest.raises(ValueError, match="read-only"):
        features._kept[0][0, 0] = 0


def test_a_fold_has_the_same_blocks_in_every_split(corpus: Manifest) -> None:
    """So training on it, in the stages of other folds, and testing on it find the same features; no block has two folds."""
    folds = {utterance.id: utterance.fold for utterance in corpus.utterances}
    tested = {fold: blocks_of(Split(corpus, corpus.test(fold))) for fold in corpus.folds}
    assert all(len(blocks) > 1 for blocks in tested.values())
    for held_out in corpus.folds:
        blocks = blocks_of(Split(corpus, corpus.training(held_out)))
        assert {block.name for block in blocks} == {block.name for fold in corpus.folds if fold != held_out for block in tested[fold]}
        for block in blocks:
            assert len({folds[identifier] for identifier, _ in block.items}) == 1
            assert held_out not in {folds[identifier] for identifier, _ in block.items}


def test_cut_and_whole_utterances_share_the_blocks_of_short_ones(corpus: Manifest) -> None:
    """Only blocks with an utterance that is cut are others; every utterance is in one block, with the samples that are used of it."""
    split = everything(corpus)
    whole, cut = blocks_of(split), blocks_of(split, LIMIT)
    assert blocks_of(split, max(split.samples)) == whole
    common = {block.name for block in whole} & {block.name for block in cut}
    assert len(common) >= len(corpus.folds)
    for block in cut:
        if max(split.samples[position] for position in block.positions) <= LIMIT and block.name not in common:
            pytest.fail("a block of utterances that are all short is not shared")
    for blocks, limit in ((whole, max(split.samples)), (cut, LIMIT)):
        items = [item for block in blocks for item in block.items]
        assert sorted(items) == sorted((u.id, min(u.samples, limit)) for u in corpus.utterances)


def test_the_key_depends_on_the_front_end(corpus: Manifest) -> None:
    """Weights of the transformer have no part in it; those of the front end, normalisation, corpus and device have."""
    encoder = small_encoder()
    key = front_end_key(encoder, corpus.digest, "cpu")
    assert front_end_key(small_encoder(), corpus.digest, "cpu") == key
    with torch.no_grad():
        encoder.encoder.layers[0].attention.q_proj.weight += 1
    assert front_end_key(encoder, corpus.digest, "cpu") == key
    others = [front_end_key(encoder, "another corpus", "cpu"), front_end_key(encoder, corpus.digest, "cuda")]
    for name in (
        "feature_extractor.conv_layers.1.conv.weight",
        "feature_projection.layer_norm.bias",
        "feature_projection.projection.weight",
    ):
        changed = small_encoder()
        with torch.no_grad():
            changed.get_parameter(name).view(-1)[0] += 1e-3
        others.append(front_end_key(changed, corpus.digest, "cpu"))
    setattr(encoder.config, NORMALISE_KEY, True)
    others.append(front_end_key(encoder, corpus.digest, "cpu"))
    assert len({key, *others}) == len(others) + 1


@pytest.mark.slow
def test_twelve_processes_that_start_together_compute_every_utterance_once(processes: dict[str, Any]) -> None:
    """No process waits while a block is unclaimed; all end with the features that a single process computes."""
    found = processes["together"]
    assert found["statuses"] == [0] * store_processes.PROCESSES
    assert found["processes"] == store_processes.PROCESSES
    assert found["blocks"][0] == found["blocks"][1] >= store_processes.PROCESSES
    assert found["computed"] == list(range(36))
    assert found["digests"] == [found["expected"]]
    assert found["left"] == []


@pytest.mark.slow
def test_blocks_of_processes_that_were_killed_are_taken_over(processes: dict[str, Any]) -> None:
    """Killed between two utterances and with all written but not renamed: others finish and tidy up."""
    found = processes["killed"]
    assert found["statuses"] == [-9, -9, 0, 0]
    left, after = found["left"]
    assert sum(name.endswith(".claim") for name in left) == 2
    assert sum(name.endswith(".tmp") for name in left) == 1
    assert after == []
    assert found["same"]
    assert found["recomputed"] == 0


@pytest.mark.slow
def test_a_full_disk_costs_time_and_changes_no_number(tmp_path: Path) -> None:
    """Full, then read-only: one line, nothing half written, the same features; blocks that had room are used, the rest follows."""
    work = tmp_path / "work"
    work.mkdir()
    found = run_store_processes("disk", work, namespace(tmp_path / "probe"))
    expected, wanted = found.pop("expected"), found.pop("wanted")
    for state, words in (("full", "No space left on device"), ("read-only", "Read-only file system")):
        assert found[state]["digest"] == expected
        assert [words in line for line in found[state]["lines"]] == [True]
        assert found[state]["left"] == []
        assert 0 < found[state]["blocks"] < wanted
    assert found["roomy"] == {"digest": expected, "lines": [], "blocks": wanted, "left": []}


def test_a_shared_folder_that_cannot_be_created_is_not_used(corpus: Manifest, encoder: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    lines: list[str] = []
    features = frozen(encoder, everything(corpus), FeatureCache.store, tmp_path / "file" / "cache")
    features.fill(lambda: False, Progress(lines.append))
    assert len(lines) == 1
    assert "Not a directory" in lines[0]
    assert len(features._kept) == len(corpus.utterances)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "half of it": lambda path, other: os.truncate(path, path.stat().st_size // 2),
    "without its last byte": lambda path, other: os.truncate(path, path.stat().st_size - 1),
    "a byte too long": lambda path, other: path.write_bytes(path.read_bytes() + b"\0"),
    "only its head": lambda path, other: os.truncate(path, 44),
    "empty": lambda path, other: os.truncate(path, 0),
    "a bit of a feature": lambda path, other: flip(path, path.stat().st_size - 1000),
    "a bit of the digest": lambda path, other: flip(path, 20),
    "a bit of the facts' length": lambda path, other: flip(path, 46),
    "a bit of the facts": lambda path, other: flip(path, 60),
    "another version": lambda path, other: flip(path, 7),
    "another block": lambda path, other: path.write_bytes(other.read_bytes()),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_block_is_rebuilt(damage: str, corpus: Manifest, encoder: Any, tmp_path: Path) -> None:
    """Found out before it is used; its utterances and no others are computed again, and the file is what it was."""
    split, log = everything(corpus), tmp_path / "log"
    store = FeatureStore(tmp_path / "store", encoder.config.hidden_size, computing(split, encoder, log))
    expected = {position: array.copy() for position, array in fill(store, split).items()}
    log.unlink()
    block, other = blocks_of(split)[4:6]
    whole = store.path(block).read_bytes()
    DAMAGES[damage](store.path(block), store.path(other))
    assert store.path(block).read_bytes() != whole
    lines: list[str] = []
    kept = fill(store, split, lines)
    assert [position for _, position in logged(log)] == list(block.positions)
    assert all((kept[position] == array).all() for position, array in expected.items())
    assert store.path(block).read_bytes() == whole
    assert left_over(store.folder) == lines == []


def test_a_store_on_a_corrupting_disk_is_not_used(corpus: Manifest, encoder: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Features come from memory then, after a bounded number of attempts."""
    split = everything(corpus)
    write = FeatureStore._write

    def spoilt(self: FeatureStore, block: feature_store.Block, arrays: Any) -> None:
        write(self, block, arrays)
        flip(self.path(block), -1)

    monkeypatch.setattr(FeatureStore, "_write", spoilt)
    lines: list[str] = []
    features = frozen(encoder, split, FeatureCache.store, tmp_path)
    features.fill(lambda: False, Progress(lines.append))
    assert len(lines) == 1
    assert "damaged" in lines[0]
    assert store_processes.digest(features, split) == store_processes.digest(frozen(encoder, split, FeatureCache.none), split)


def test_a_stop_keeps_finished_blocks_and_releases_claims(corpus: Manifest, encoder: Any, tmp_path: Path) -> None:
    """The next one goes on without waiting for the claim of the one that stopped."""
    split, log = everything(corpus), tmp_path / "log"
    store = FeatureStore(tmp_path / "store", encoder.config.hidden_size, computing(split, encoder, log))
    with pytest.raises(Interrupted):
        store.fill(blocks_of(split), lambda: len(logged(log)) == 10, Progress(lambda line: None))
    assert left_over(store.folder) == []
    finished = len(list(store.folder.glob("*.block")))
    assert 1 < finished < len(blocks_of(split))
    assert len(fill(store, split)) == len(split)
    assert 36 <= len(logged(log)) < 36 + 10
