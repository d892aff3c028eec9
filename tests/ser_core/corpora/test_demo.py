"""The demo corpus: real enough for the reader of IEMOCAP, the same every time, learnable and not trivial."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ser_core.corpora import iemocap
from ser_core.corpora.demo import demo_name, expected_counts, is_complete, prepare_demo, speakers, synthesise, turns
from ser_core.corpora.lines import how_to_prepare
from ser_core.corpora.manifest import Manifest
from ser_core.errors import InputError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Where the corpus was synthesised, and where it was prepared."""
    pytest.importorskip("espeakng_loader", reason="the extra demo is not installed")
    root = tmp_path_factory.mktemp("demo")
    (root / ".source.synthesising" / "Session1").mkdir(parents=True)  # as one that was killed leaves it
    (root / ".source.synthesising" / "Session1" / "half.wav").write_bytes(b"RI")
    calls: list[tuple[int, int]] = []
    prepare_demo(root / "data" / "demo", root / "source", progress=lambda done, total: calls.append((done, total)))
    assert [call for call in calls if call[1] == 500] == [(100 * done, 500) for done in range(1, 6)]
    assert calls[-1] == (480, 480)
    return root / "source", root / "data" / "demo"


@pytest.fixture(scope="module")
def manifest(folders: tuple[Path, Path]) -> Manifest:
    return prepare_demo(folders[1], folders[0])


@pytest.mark.slow
def test_size(manifest: Manifest) -> None:
    """5 sessions x 2 speakers x 4 emotions x 12 sentences of about a second, so that a whole grid trains in minutes."""
    assert manifest.corpus == "demo"
    assert manifest.folds == ("1", "2", "3", "4", "5")
    assert Counter(u.label for u in manifest.utterances) == dict.fromkeys(("angry", "happy", "neutral", "sad"), 120)
    assert Counter(u.speaker for u in manifest.utterances) == {f"{n}{sex}": 48 for n in range(1, 6) for sex in "FM"}
    assert 0.9 < manifest.seconds / 480 < 1.5
    assert all(8_000 < u.samples < 48_000 for u in manifest.utterances)
    assert manifest.source["dropped_turns_of_other_labels"] == 20
    assert all(not {u.speaker for u in manifest.training(fold)} & {u.speaker for u in manifest.test(fold)} for fold in manifest.folds)


@pytest.mark.slow
def test_the_layout_is_that_of_iemocap(folders: tuple[Path, Path]) -> None:
    """The reader of the real corpus finds nothing wrong with it; both names of happiness occur."""
    reading = iemocap.read(folders[0])
    assert reading.problems == ()
    assert all(u.dimensions and all(1 <= value <= 5 for value in u.dimensions) for u in reading.found)
    spoken = Counter(turn.label for turn in turns(1))
    assert spoken == {"neu": 24, "ang": 24, "sad": 24, "hap": 12, "exc": 12, "fru": 2, "xxx": 2}
    assert expected_counts()["utterances"] == len(reading.found)


@pytest.mark.slow
def test_the_same_bytes_every_time(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Synthesis is bit-identical: the demo corpus is the same everywhere, and stages are reused after synthesising it again."""
    subprocess.run([sys.executable, "-m", "ser_core.corpora.demo", str(tmp_path), "3", "1"], cwd=ROOT, check=True)
    again = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    before = {path.relative_to(folders[0]): path.read_bytes() for path in (folders[0] / "Session3").rglob("*") if path.is_file()}
    assert len(again) == 104
    assert again == before


@pytest.mark.slow
def test_another_strength_has_weaker_emotions_of_the_same_speakers(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """The names are those of the default, no recording is; anger and sadness differ less in level (10 dB times the strength)."""
    subprocess.run([sys.executable, "-m", "ser_core.corpora.demo", str(tmp_path), "3", "1", "0.4"], cwd=ROOT, check=True)
    weak, default = tmp_path / "Session3", folders[0] / "Session3"
    paths = sorted(path.relative_to(weak) for path in weak.rglob("*.wav"))
    assert paths == sorted(path.relative_to(default) for path in default.rglob("*.wav"))
    assert not any((weak / path).read_bytes() == (default / path).read_bytes() for path in paths)
    label = {turn.name: turn.label for turn in turns(3)}

    def level(folder: Path, emotion: str) -> float:
        waves = [soundfile.read(folder / path)[0] for path in paths if label[path.stem] == emotion]
        return float(np.mean([10 * np.log10(np.mean(wave**2)) for wave in waves]))

    assert level(weak, "ang") - level(weak, "sad") < 0.7 * (level(default, "ang") - level(default, "sad"))


def test_a_strength_has_a_name_of_its_own() -> None:
    """And the message that a corpus is not prepared names its command."""
    assert (demo_name(1), demo_name(0.4), demo_name(1.3)) == ("demo", "demo-0.4", "demo-1.3")
    assert how_to_prepare("demo-0.4") == "run `python launch.py prepare demo --strength 0.4`"
    with pytest.raises(InputError, match="--strength 3: must be above 0 and at most 2"):
        prepare_demo(ROOT, ROOT, strength=3)


def test_another_seed_is_another_corpus() -> None:
    """The seed reaches the voices, and from there every utterance."""
    assert speakers(1, 1) == speakers(1, 1) != speakers(1, 2)


def test_leftovers_of_a_killed_synthesis_are_removed(folders: tuple[Path, Path]) -> None:
    """Nothing of a synthesis that was killed is in the corpus, and nothing hidden stays beside it."""
    assert not list(folders[0].rglob("half.wav"))
    assert sorted(path.name for path in folders[0].parent.iterdir()) == ["data", "source"]


def test_existing_files_are_kept(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A prepared demo no longer needs its source; a damaged one is repaired from it; an incomplete source is detected."""
    source, target = tmp_path / "source", tmp_path / "demo"
    shutil.copytree(folders[0], source)
    shutil.copytree(folders[1], target)
    calls: list[int] = []
    first = prepare_demo(target, tmp_path / "absent", progress=lambda done, _total: calls.append(done))
    assert calls == []
    assert not (tmp_path / "absent").exists()
    (target / first.utterances[0].audio).unlink()
    assert prepare_demo(target, source).digest == first.digest
    assert (target / first.utterances[0].audio).is_file()
    assert is_complete(source, seed=1)
    assert not is_complete(source, seed=2)
    next(source.rglob("*.wav")).unlink()
    assert not is_complete(source, seed=1)


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    """Synthesis never replaces files of others."""
    pytest.importorskip("espeakng_loader", reason="the extra demo is not installed")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InputError, match="holds other things"):
        synthesise(tmp_path)


def test_a_missing_espeak_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where espeak-ng is not installed one line says what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"espeakng-loader is not installed; .* run `pip install espeakng-loader`"):
        prepare_demo(tmp_path / "data", tmp_path / "source")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_learnable_and_not_trivial(manifest: Manifest) -> None:
    """A classifier on spectral statistics, trained on the other speakers, is far above chance (25) and far below 100."""
    import numpy as np
    from sklearn.metrics import recall_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    from ser_core.corpora.audio import load_audio

    def statistics(samples: np.ndarray) -> np.ndarray:
        """Mean and deviation of log energies in 24 bands: (48,)."""
        frames = np.lib.stride_tricks.sliding_window_view(samples, 400)[::160] * np.hanning(400)
        edges = np.unique(np.geomspace(2, 201, 25).round().astype(int))
        energies = np.log(np.add.reduceat(np.abs(np.fft.rfft(frames)) ** 2, edges[:-1], axis=1) + 1e-8)
        return np.concatenate([energies.mean(axis=0), energies.std(axis=0), [len(samples) / 16_000]])

    features = np.stack([statistics(load_audio(manifest, u)) for u in manifest.utterances])
    targets = np.array([manifest.class_index(u) for u in manifest.utterances])
    recalls = []
    for fold in manifest.folds:
        held = np.array([u.fold == fold for u in manifest.utterances])
        model = make_pipeline(StandardScaler(), SVC(C=3)).fit(features[~held], targets[~held])
        recalls.append(100 * recall_score(targets[held], model.predict(features[held]), average="macro"))
    assert 50 < np.mean(recalls) < 85
