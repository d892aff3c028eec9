"""Checks of a sweep before it starts, with the speech registry, prepared corpora, and a Python without Ray."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import UsageError
from jobs.experiment.config import Experiment, StageResources
from jobs.experiment.launched import Corpus
from jobs.experiment.sweep_section import Search, SweepSettings
from jobs.sweeps.preflight import INSTALL, RAY, check_sweep
from jobs.sweeps.space import space_of
from ser_core.corpora.manifest import Utterance, write_manifest
from ser_core.errors import InputError
from ser_core.registry import REGISTRY
from ser_core.settings.backbone import BackboneSettings, Wav2vecSettings
from ser_core.settings.recipe import Recipe

ROOT = Path(__file__).resolve().parents[3]
SAMPLES = 4000  # of an utterance: at 16 kHz a quarter of a second
LAYERS = [[8, 10, 5], [8, 8, 4]]  # a frame every 20 samples, an emotion state every 40


def _recipe() -> Recipe:
    layers = {"conv_dim": [8, 8], "conv_kernel": [10, 8], "conv_stride": [5, 8]}
    recipe = Recipe(backbone=BackboneSettings(checkpoint=None, config=layers))
    recipe.finetune.batch_size = recipe.states.batch_size = 1
    recipe.states.wav2vec = Wav2vecSettings(config={"conv_feature_layers": LAYERS})
    recipe.cluster.counts = [8, 16]
    return recipe


def _corpus(folder: Path, speakers: dict[str, Sequence[str]], folds: Sequence[str]) -> Corpus:
    """Every speaker says both classes, in the fold where it is named."""
    rows = [(fold, speaker, label) for fold, names in speakers.items() for speaker in names for label in ("angry", "sad")]
    utterances = [
        Utterance(f"u{number}", f"u{number}.flac", SAMPLES, label, speaker, fold) for number, (fold, speaker, label) in enumerate(rows)
    ]
    folder.mkdir()
    manifest = write_manifest(folder, "small", folds, utterances)
    return Corpus("small", manifest.digest, manifest.folds, str(folder))


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return _corpus(tmp_path / "small", {"1": ["a"], "2": ["b", "c"], "3": ["d"]}, ["1", "2", "3"])


def _check(corpus: Corpus, *, folds: Sequence[str] = (), resources: Any = None, recipe: Recipe | None = None, **sweep: Any) -> Any:
    experiment = Experiment("e", "small", folds=list(folds), sweep=SweepSettings(**sweep), recipe=recipe or _recipe())
    experiment.resources = resources or {}
    return check_sweep(experiment, space_of(experiment), REGISTRY, corpus)


def _error(corpus: Corpus, kind: type[Exception] = UsageError, **more: Any) -> str:
    with pytest.raises(kind) as caught:
        _check(corpus, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_fold_is_given_validation_speakers(corpus: Corpus) -> None:
    """In the order asked for: those of the sweep, else of the experiment, else of the corpus."""
    assert _check(corpus) == {"1": ("b", "c"), "2": ("d",), "3": ("a",)}
    assert list(_check(corpus)) == ["1", "2", "3"]
    assert _check(corpus, folds=["3", "1"]) == {"3": ("a",), "1": ("b", "c")}
    assert list(_check(corpus, folds=["3", "1"])) == ["3", "1"]


def test_a_checkpoint_that_lies_here_is_named_by_its_absolute_path(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages run in other folders; a value that is not a local file may be the name of a published model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.pt").touch()
    told = _error(corpus, settings={"states.wav2vec.checkpoint": ["own.pt"]})
    assert told == f"sweep.settings.states.wav2vec.checkpoint: own.pt: name it by its absolute path, {tmp_path / 'own.pt'}"
    assert "absolute" not in _error(corpus, InputError, settings={"states.wav2vec.checkpoint": ["other.pt"]})


def test_folds_of_the_sweep_come_before_those_of_the_experiment(corpus: Corpus) -> None:
    """And must be folds of the corpus, each once."""
    experiment = Experiment("e", "small", folds=["3", "1"], sweep=SweepSettings(folds=["2"]), recipe=_recipe())
    assert check_sweep(experiment, space_of(experiment), REGISTRY, corpus) == {"2": ("d",)}
    experiment.sweep.folds = ["Ses2"]
    with pytest.raises(UsageError, match=r"^sweep\.folds: corpus small has no fold 'Ses2'"):
        check_sweep(experiment, space_of(experiment), REGISTRY, corpus)
    experiment.sweep.folds = ["2", "2"]
    with pytest.raises(UsageError, match=r"^sweep\.folds: 2, 2: name each once"):
        check_sweep(experiment, space_of(experiment), REGISTRY, corpus)
    assert "folds: corpus small has no fold 'x'; known are 1, 2, 3" in _error(corpus, folds=["x"])


def test_the_validation_part_of_a_corpus_is_used(tmp_path: Path) -> None:
    """A corpus with a fixed split keeps it."""
    fixed = _corpus(tmp_path / "fixed", {"train": ["a", "b"], "validation": ["c"], "test": ["d"]}, ["test"])
    (speakers,) = _check(fixed).values()
    assert speakers
    assert not {"a", "b", "d"} & set(speakers)


def test_without_validation_speakers_a_sweep_is_refused(tmp_path: Path) -> None:
    """Two speakers: one is tested, the other trained on."""
    assert "no validation speakers are left" in _error(_corpus(tmp_path / "two", {"1": ["a"], "2": ["b"]}, ["1", "2"]), InputError)


def test_more_clusters_than_frames_are_refused(corpus: Corpus) -> None:
    """The error names the fold with the fewest frames: fold 1 trains on the two utterances of one speaker."""
    frames = REGISTRY.training_frames(Path(corpus.folder), _recipe(), "1", ("b", "c"))
    assert 150 < frames < 250
    assert _check(corpus, counts=[8, frames])
    text = _error(corpus, counts=[8, frames + 1], sizes=[1])
    assert f"k={frames + 1} is above the number of training frames, {frames} in fold '1'" in text
    assert "k=300 is above" in _error(corpus, sets=[[8], [16, 300]])
    assert _check(corpus, folds=["3"], counts=[frames + 1])  # two speakers are trained on


def test_a_batch_above_the_training_utterances_is_refused(corpus: Corpus) -> None:
    """Those left without the validation speakers: two in fold 1. Every choice is checked."""
    assert _check(corpus, counts=[8], settings={"finetune.batch_size": [1, 2]})
    text = _error(corpus, InputError, counts=[8], settings={"finetune.batch_size": [1, 3]})
    assert text == "recipe.finetune.batch_size=3: more than the 2 training utterances of fold '1' of small; at most 2"


def test_number_of_frames_may_depend_on_settings(corpus: Corpus) -> None:
    """Every choice is checked, not only the recipe's own value."""
    recipe = _recipe()
    recipe.states.wav2vec.config = {}
    recipe.states.wav2vec.checkpoint = "nowhere.pt"
    recipe.backbone.config = {"num_hidden_layers": 1}
    files = []
    for name in ("a.pt", "b.pt"):
        files.append(str(Path(corpus.folder) / name))
        Path(files[-1]).write_text(name)
    asked = {"states.wav2vec.checkpoint": files}
    assert _check(corpus, recipe=recipe, counts=[8, 9], settings=asked)  # the recipe's own checkpoint is not asked for
    assert "k=300 is above" in _error(corpus, recipe=recipe, counts=[8, 300], settings=asked)


def test_a_stage_may_need_several_nodes(corpus: Corpus) -> None:
    """As in a grid: a sweep sets no limit of its own to resources."""
    assert _check(corpus, resources={"ptapt": StageResources(nodes=2), "default": StageResources(nodes=3)})


@pytest.mark.parametrize(
    "settings",
    [
        {"execution.micro_batch": [1, 2]},
        {"execution.device": ["cpu"]},
        {"tapt.learning_rate": [1e-4, 1e-3]},
        {"tapt.steps": {"low": 1, "high": 5}},
    ],
)
def test_a_key_that_no_stage_depends_on_is_refused(corpus: Corpus, settings: dict[str, Any]) -> None:
    """All its values would be the same runs: an execution setting, or a stage of another method."""
    (key,) = settings
    found = _error(corpus, settings={**settings, "ptapt.learning_rate": [1e-4, 1e-3]}, search=Search.random)
    assert found == f"sweep.settings.{key}: no stage of ptapt depends on it, so that there is nothing to search"


def test_keys_of_every_stage_can_be_searched(corpus: Corpus) -> None:
    """Of states, clusters, pretraining, fine-tuning and backbone; one choice too, the recipe's own or another."""
    settings = {
        "states.steps": [50, 100],
        "cluster.iterations": [10, 20],
        "ptapt.steps": [10],
        "ptapt.mask_length": [_recipe().ptapt.mask_length],
        "finetune.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
        "backbone.config.hidden_size": [48, 96],
        "upstream_seed": [0, 1],
    }
    assert _check(corpus, settings=settings, search=Search.random)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"ptapt.steps": [10, 0]}, "recipe.ptapt.steps=0: must be at least 1"),
        ({"ptapt.learning_rate": {"low": -1.0, "high": 1.0}}, "recipe.ptapt.learning_rate=-1.0: must be above 0"),
        ({"ptapt.mask_probability": {"low": 0.1, "high": 2.0}}, "recipe.ptapt.mask_probability=2.0: must lie between 0 and 1"),
    ],
)
def test_every_recipe_is_within_its_range(corpus: Corpus, settings: dict[str, Any], expected: str) -> None:
    """The error of the registry for the first invalid choice or end of a range."""
    assert expected in _error(corpus, InputError, settings=settings, search=Search.random)


def test_a_grid_over_a_range_is_refused(corpus: Corpus) -> None:
    """Ranges need a random search or Optuna."""
    settings = {"ptapt.learning_rate": {"low": 1e-5, "high": 1e-3}}
    assert "a grid needs choices" in _error(corpus, settings=settings)
    assert _check(corpus, settings=settings, search=Search.random)


def test_installed_ray_is_found_without_import() -> None:
    """With the extra installed there is no error, and Ray is not imported."""
    program = "import sys\n"
    program += "from jobs.sweeps.preflight import *\n[require_ray(each) for each in Search]\nprint(set(sys.modules) & {'ray', 'optuna'})"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_without_ray_the_extra_to_install_is_named() -> None:
    """The error names the missing packages and the extra; Optuna only for a search with it."""
    program = (
        "import sys\nsys.path.insert(0, '.')\nfrom jobs.errors import UsageError\nfrom jobs.sweeps.preflight import *\n"
        "for search in Search:\n  try: require_ray(search)\n  except UsageError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-S", "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    without = ", ".join(RAY)
    expected = [
        f"sweep: not installed: {each}; sweeps need the extra `sweep`: {INSTALL}" for each in (without, without, f"{without}, optuna")
    ]
    assert found.stdout.splitlines() == expected
