"""The file that `init` writes, the sources that `config` prints, and the document of all keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.commands.init import prepared_corpus, print_config, values_like, write_experiment
from jobs.commands.launching import Words, read_experiment, words_of
from jobs.commands.program import Program
from jobs.errors import UsageError
from jobs.experiment.config import schema_of
from jobs.experiment.launched import Corpus
from jobs.experiment.layers import known_keys
from jobs.experiment.schema_keys import ENTRY_NAMES, experiment_keys
from jobs.experiment.stored_config import resolved_values
from ser_core.settings.recipe import Recipe
from tests.command_line import ROOT
from tools import experiment_keys as tool

CONFIGS = ROOT / "configs"
PROGRAM = Program(CONFIGS.parent, "ser_core.registry:REGISTRY", "iemocap")
CORPUS = Corpus("mine", "d1", ("anna", "bert", "carl"), "/nowhere")
KEYS = [leaf for key in experiment_keys(Recipe) for leaf in key.leaves()]
EMPTY_IS_AN_ERROR = ("counts: []", "sizes: []")  # of a sweep: refused if they are named


@pytest.mark.slow
def test_every_key_has_an_explanation() -> None:
    """Every key that OmegaConf accepts is there, with a comment in the schema."""
    assert [key.path for key in KEYS if not key.explanation] == []
    schema = schema_of(Recipe)
    leaves = {key for key in known_keys(schema) if not any(other.startswith(f"{key}.") for other in known_keys(schema))}
    assert {key.path for key in KEYS if key.path.partition(".")[0] not in ENTRY_NAMES} == leaves - set(ENTRY_NAMES)


def test_the_document_has_every_key() -> None:
    """docs/experiments.md is what `python tools/experiment_keys.py` writes."""
    text = tool.DOCUMENT.read_text(encoding="utf-8")
    assert text == tool.document(text), "run `python tools/experiment_keys.py`"
    assert [key.path for key in KEYS if f"| `{key.path}` |" not in text] == []


@pytest.mark.slow
@pytest.mark.parametrize("like", ["emodb-base", "emodb", "iemocap-ablation"])
def test_the_written_file_has_the_settings_of_the_other_experiment(like: str, tmp_path: Path) -> None:
    """But for its name, corpus, folds and published table; also with every key in a comment made a setting."""
    file = write_experiment("mine", CORPUS, like, tmp_path / "own.yaml", PROGRAM)
    written, other = (resolved_values(read_experiment(Words(name, ()), PROGRAM)) for name in (str(file), like))
    assert (written["name"], written["corpus"], written["folds"], written["table"]) == ("mine", "mine", [], None)
    for key in ("name", "corpus", "folds", "table"):
        other[key] = written[key]
    other["sweep"]["folds"] = []
    assert written == other


@pytest.mark.slow
def test_every_key_in_a_comment_can_be_set_by_deleting_the_comment_sign(tmp_path: Path) -> None:
    """The shown defaults are valid values, and those of the schema."""
    file = write_experiment("mine", CORPUS, "savee", tmp_path / "own.yaml", PROGRAM)
    before = resolved_values(read_experiment(Words(str(file), ()), PROGRAM))
    known = {f"{key.path.rpartition('.')[2]}:" for key in KEYS}
    lines, uncommented = [], 0
    for line in file.read_text().splitlines():
        bare = line.lstrip().removeprefix("# ")
        is_key = line.lstrip().startswith("# ") and bare.split(" ")[0] in known and not bare.startswith(EMPTY_IS_AN_ERROR)
        uncommented += is_key
        lines.append(line.replace("# ", "", 1) if is_key else line)
    assert uncommented > 80
    file.write_text("\n".join(lines))
    assert resolved_values(read_experiment(Words(str(file), ()), PROGRAM)) == before


def test_init_refuses_what_is_there_and_what_is_not(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no prepared corpus of that name; did you mean 'mine'\?; `python launch.py prepare csv"):
        prepared_corpus("mime", ["demo", "mine"])
    with pytest.raises(UsageError, match=r"^init store: use letters"):
        write_experiment("store", CORPUS, "emodb", tmp_path / "own.yaml", PROGRAM)
    with pytest.raises(UsageError, match=r"no experiment 'emodbb'.*did you mean 'emodb'"):
        write_experiment("mine", CORPUS, "emodbb", tmp_path / "own.yaml", PROGRAM)
    assert not (tmp_path / "own.yaml").exists()
    write_experiment("mine", CORPUS, "emodb", tmp_path / "own.yaml", PROGRAM)
    with pytest.raises(UsageError, match=r"own.yaml exists"):
        write_experiment("mine", CORPUS, "emodb", tmp_path / "own.yaml", PROGRAM)


def test_the_same_corpus_keeps_its_folds_and_its_published_table() -> None:
    values = {"name": "a", "corpus": "iemocap", "folds": ["5"], "table": "t", "sweep": {"folds": ["5"], "seeds": 1}}
    assert values_like(values, "b", "iemocap") == {**values, "name": "b"}
    assert values_like(values, "b", "other") == {"name": "b", "corpus": "other", "sweep": {"seeds": 1}}


@pytest.mark.slow
def test_config_prints_every_setting_and_its_source(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Command line, file, preset, site profile, default; `--changed` leaves out what has the schema's default."""
    (tmp_path / "own.yaml").write_text(
        "corpus: mine\nseeds: 3\ntable: null\nresources: {tapt: {gpus: 2}}\nrecipe: {finetune: {epochs: 7}}\n"
    )
    arguments = [str(tmp_path / "own.yaml"), "seeds=4", "site=example-university", "recipe.preset=published", "methods=vft"]
    words = words_of("config", arguments, "slurm", "iemocap")
    lines = {}
    for changed in (False, True):
        print_config(words, PROGRAM, changed=changed)
        parts = [line.rpartition("  # ") for line in capsys.readouterr().out.splitlines()]
        lines[changed] = {setting.rstrip(): source for setting, _, source in parts}
    file = str(tmp_path / "own.yaml")
    expected = {
        "corpus=mine": file,
        "seeds=4": "command line",
        "methods=[vft]": "command line",
        "cluster=slurm": "command line",
        "slurm.partition=gpu": "site example-university",
        "resources.tapt.gpus=2": file,
        "recipe.finetune.epochs=7": file,
        "recipe.features.padding=reference": "preset published",
    }
    assert expected.items() <= lines[True].items()
    assert {**expected, "table=null": file, "policy.rounds=3": "default"}.items() <= lines[False].items()
    assert not [line for line in lines[True] if line.startswith(("table", "policy.rounds", "recipe.tapt.steps"))]
    assert len(lines[False]) == len([key for key in KEYS if key.path.partition(".")[0] not in ENTRY_NAMES]) + 1
