"""The command line: arguments, output and exit codes."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from jobs.commands.arguments import opener_of
from jobs.experiment.config import load_experiment
from jobs.experiment.launched import Corpus, launch, reopen, store
from jobs.store.cancellations import read_cancellations
from jobs.store.layout import Layout
from launch import PROGRAM
from ser_core.corpora.manifest import Utterance, load_manifest, write_manifest
from ser_core.registry import REGISTRY
from ser_core.settings.recipe import Recipe
from tests.command_line import ROOT, CommandLine, Forks


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """An interpreter that ends at an import of Ray or Optuna."""
    found = Forks(without_ray(tmp_path_factory.mktemp("forks") / "site"))
    yield found
    found.close()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("grid",), ("iemocap", "prepare iemocap --source", "grid demo")),
        (("grid", "iemocapp"), ("no experiment 'iemocapp'", "did you mean 'iemocap'?")),
        (("grid", "demo", "seed=3"), ("unknown key 'seed'", "did you mean 'seeds'?")),
        (("grid", "demo", "recipe.finetune.epoch=3"), ("did you mean 'recipe.finetune.epochs'?",)),
        (("grid", "demo", "seeds=many"), ("seeds", "many")),
        (("grid", "demo", "recipe.finetune.epochs=0"), ("recipe.finetune.epochs",)),
        (("grid", "demo", "registry=nowhere.else:REGISTRY"), ("registry=nowhere.else:REGISTRY: no module nowhere",)),
        (("grid", "demo", "--config", "own.yaml"), ("--config own.yaml", "leave out demo")),
        (("grid", "--config", "own"), ("own", "no such file")),
        (("grid", "demo", "site=nowhere"), ("no site profile 'nowhere'",)),
        (
            ("grid", "demo", "resources.finetun.cpus=1"),
            ("resources.finetun: no such stage", "default, states, cluster, tapt, ptapt, source, finetune"),
        ),
        (("grid", "demo", "recipe=null"), ("recipe",)),
        (("grid", "mine.yaml"), ("no experiment '/", "mine.yaml'", "no such file")),
        (("grid", "demo", "methods=vft,tapt"), ("methods in KEY=VALUE", "a list in brackets")),
        (("grid", "demo", "recipe.preset=publshed"), ("recipe.preset", "did you mean 'published'?")),
        (
            ("grid", "iemocap-ablation", "variants.spans.recipe.finetune.epoch=1"),
            ("'variants.spans.recipe.finetune.epoch'", "did you mean 'variants.spans.recipe.finetune.epochs'?"),
        ),
        (("grid", "iemocap-ablation", "variants.spans.recipe.finetune.epochs=0"), ("recipe.finetune.epochs=0",)),
        (("grid", "demo", "table=table9"), ("table 'table9'", "iemocap_table1")),
        (("status", "../demo"), ("'../demo'", "not a name")),
        (("grid", "demo", "savee"), ("one experiment at a time",)),
        (("grid", "demo", "--cluster", "cloud"), ("--cluster cloud",)),
        (("status", "demo"), ("was not launched",)),
        (("clean", "--whole"), ("--whole goes with the name of an experiment",)),
        (("clean", "demo"), ("nothing of that name in", "there are none")),
        (("resume", "demo"), ("was not launched",)),
        (("status", "demo", "--json", "--watch"), ("--json", "--watch")),
        (("explain", "demo", "vft/1/0"), ("was not launched",)),
        (("explain", "demo", "vft/1/0", "vft/1/1"), ("one run at a time",)),
        (("explain", "demo"), ("'demo' names no run", "METHOD/FOLD/SLOT")),
        (("logs", "demo", "vft/1/0"), ("was not launched",)),
        (("cancel", "demo"), ("was not launched",)),
        (("grid", "demo", "policy.outliers=cell"), ("outlier rule 'cell'", "at least 6 seeds")),
        (("grid", "demo", "policy.mail=somebody"), ("policy.mail", "name@example.org")),
        (("collect", "demo", "--format", "docx"), ("docx", "latex")),
        (("collect", "--from", "/nowhere/runs.csv"), ("/nowhere/runs.csv",)),
        (("collect", "demo", "--outliers", "cell"), ("--from", "policy.outliers")),
        (("collect", "--from", "runs.csv", "--unreplaced", "forget"), ("'forget'", "keep or drop")),
        (("collect", "--from", "runs.csv", "--width", "wide"), ("'wide'", "column, page")),
        (("collect", "--from", "runs.csv", "--out", "-"), ("--out -", "--format")),
        (("bundle", "demo"), ("was not launched",)),
        (("bundle", "demo", "--width", "wide"), ("'wide'", "column, page")),
        (("verify", "/nowhere/b.zip"), ("/nowhere/b.zip: no such file", "bundle EXPERIMENT` writes")),
        (("doctor", "demo", "--cluster", "cloud"), ("--cluster cloud",)),
        (("sweep", "iemocap"), ("prepare iemocap --source",)),
        (("sweep", "demo", "sweep.sets=[[8],[]]"), ("sweep.sets", "an empty set")),
        (("sweep", "demo", "sweep.counts=[]"), ("sweep.counts=[]", "the counts of the recipe")),
        (("grid", "demo", "recipe.backbone.config.hidden_size=66"), ("hidden_size=66", "num_conv_pos_embedding_groups=4")),
        (("grid", "demo", "recipe.backbone.config.num_attention_heads=3"), ("hidden_size=64", "num_attention_heads=3")),
        (("grid", "demo", "recipe.backbone.config.hiden_size=64"), ("recipe.backbone.config.hiden_size", "did you mean hidden_size?")),
        (("sweep", "demo", "sweep.counts=[16,64,16]"), ("sweep.counts", "twice")),
        (("sweep", "demo", "sweep.sizes=[9]"), ("sweep.sizes", "allowed: 1 to 3")),
        (("sweep", "demo", "sweep.search=bayes"), ("sweep.search", "bayes", "optuna")),
        (("sweep", "demo", "sweep.trial=3"), ("did you mean 'sweep.trials'?",)),
        (("sweep", "demo", "sweep.settings.ptapt.learning_rat=[0.1]"), ("learning_rat",)),
        (("sweep", "demo", "--show"), ("no sweep was launched", "there are sweeps of: none")),
        (("sweep", "demo", "--cancel"), ("no sweep was launched",)),
        (("sweep", "demo", "--json"), ("--json goes with --show",)),
        (("sweep", "demo", "--show", "--dry-run"), ("--dry-run and --show", "one at a time")),
        (("sweep", "demo", "--show", "seeds=2"), ("--show", "without settings")),
        (("sweep", "../demo", "--show"), ("'../demo'", "not a name")),
        (("control", "demo/sweep/0123456789ab"), ("demo/sweep/0123456789ab", "no such sweep")),
        (("sweep", "demo", "sweep.resources.nodes=2"), ("unknown key", "sweep.resources")),
        (("prepare", "iemocap"), ("--source",)),
        (("prepare", "savee", "--source", "/nowhere/at/all"), ("/nowhere/at/all",)),
        (("prepare",), ("prepare: name a corpus", "prepare --list")),
        (("prepare", "emobox", "--source", "."), ("prepare emobox --meta FILE --audio DIR",)),
        (("prepare", "savee", "--meta", "."), ("prepare savee: --meta names the list of a corpus of EmoBox",)),
        (("prepare", "emobox", "--meta", "/nowhere/emodb.jsonl", "--audio", "."), ("--meta /nowhere/emodb.jsonl: no such file",)),
        (("prepare", "demo", "--folds", "5"), ("prepare demo", "--folds is for csv only")),
        (("grid", "demo", "--scripts"), ("--scripts goes with --dry-run",)),
        (("grid", "demo", "--yes", "--keep-old"), ("--yes and --keep-old",)),
        (("init", "mine", "--corpus", "mine"), ("--corpus mine: no prepared corpus", "prepare csv --source FILE.csv --name mine")),
        (("config", "demo", "recipe.finetune.epoch=3"), ("did you mean 'recipe.finetune.epochs'?",)),
        (("prepare", "timit", "--source", "."), ("timit", "iemocap")),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], expected: tuple[str, ...], tmp_path: Path, forks: Forks
) -> None:
    """One line with the error, its place and what to do; nothing is written, and Ray is not imported."""
    done = forks(CommandLine(tmp_path / "data", tmp_path / "results"), *arguments)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for text in expected:
        assert text in done.stderr
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "results").exists()


RAY_ENDS_IT = """
import os, sys
def hook(event, arguments):
    if event == "import" and arguments[0].partition(".")[0] in ("ray", "optuna"):
        os.write(2, f"imported {arguments[0]}\\n".encode())
        os._exit(99)
sys.addaudithook(hook)
"""
NO_RAY = """
import importlib.machinery
finder = importlib.machinery.PathFinder
found = finder.find_spec
finder.find_spec = classmethod(lambda cls, name, path=None, target=None: None if name == MISSING else found(name, path, target))
"""


def without_ray(site: Path, program: str = RAY_ENDS_IT) -> dict[str, str]:
    """Environment in which every Python runs `program` first: by default one that exits at an import of Ray or Optuna."""
    site.mkdir()
    (site / "sitecustomize.py").write_text(program)
    return {"PYTHONPATH": str(site)}


@pytest.mark.parametrize(
    ("speakers", "settings", "expected"),
    [
        ({"1": "ab", "2": "cd", "3": "ef"}, ("sweep.counts=[8,100000]",), ("k=100000", "number of training frames", "sweep.counts")),
        ({"1": "a", "2": "b"}, (), ("validation", "fold '1'")),
        ({"1": "ab", "2": "cd", "3": "ef"}, ("sweep.folds=[4]",), ("sweep.folds", "'4'")),
    ],
)
def test_an_impossible_sweep_is_a_usage_error_before_ray_starts(
    speakers: dict[str, str], settings: tuple[str, ...], expected: tuple[str, ...], tmp_path: Path, forks: Forks
) -> None:
    """Errors that need the corpus are one line too, without Ray, and nothing is written."""
    small_corpus(tmp_path / "data" / "demo", speakers)
    run = CommandLine(tmp_path / "data", tmp_path / "results")
    done = forks(run, "sweep", "demo", "sweep.folds=[]", "sweep.counts=[8]", *settings)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stdout + done.stderr
    for text in expected:
        assert text in done.stderr
    assert not run.results.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("missing", "search", "code"), [("ray", "grid", 2), ("optuna", "optuna", 2), ("optuna", "grid", 0)])
def test_without_ray_or_optuna_the_extra_is_named(missing: str, search: str, code: int, tmp_path: Path) -> None:
    """Only packages that the search needs are required, one line names what to install; a dry run imports neither."""
    small_corpus(tmp_path / "data" / "demo", {"1": "ab", "2": "cd", "3": "ef"})
    program = RAY_ENDS_IT + NO_RAY.replace("MISSING", repr(missing))
    run = CommandLine(tmp_path / "data", tmp_path / "results", without_ray(tmp_path / "site", program))
    sizes = ("recipe.finetune.batch_size=20", "recipe.states.batch_size=18")
    done = run("sweep", "demo", "sweep.folds=[]", "sweep.counts=[8,16]", f"sweep.search={search}", *sizes, "--dry-run")
    assert done.returncode == code, done.stdout + done.stderr
    if code:
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert missing in done.stderr
        assert "pip install -c constraints.txt -e '.[sweep]'" in done.stderr
    else:
        assert "Recipe: preset paper with backbone.checkpoint=null," in done.stdout
    assert not run.results.exists()


def test_a_dry_run_names_the_recipe_and_what_it_costs(tmp_path: Path, forks: Forks) -> None:
    """The preset and each departure; with `published`, that the front end runs at every step, and for how many hours of audio."""
    small_corpus(tmp_path / "data" / "emodb", {"03-08": "ab", "2": "cd", "3": "ef"})
    run = CommandLine(tmp_path / "data", tmp_path / "results")
    done = forks(run, "grid", "emodb-ablation", "--dry-run", "methods=[published,independent,pooling]", "recipe.finetune.epochs=15")
    assert done.returncode == 0, done.stderr
    assert "published: preset published; + independent features: preset published with features.padding=independent;" in done.stdout
    assert "+ pooling of the paper: preset paper." in done.stdout
    assert (
        "In all recipes: backbone.checkpoint=null, backbone.config={...}, finetune.batch_size=32," in done.stdout
    )  # 15 epochs: the preset's
    # 5 fine-tunings of 15 epochs on 4 speakers' 10 recordings of 2 s.
    assert "5 stages compute the front end at every training step" in done.stdout
    assert f"{5 * 15 * 40 * 2 / 3600:.1f} hours of audio" in done.stdout
    assert "submit finetune independent: 5 tasks" in done.stdout
    assert not run.results.exists()


def test_a_text_encoder_that_is_not_here_is_named_before_its_stages_fail(tmp_path: Path, forks: Forks) -> None:
    """With the command that fetches it. Its key is that of the commit, so that finished runs are found without it."""
    small_corpus(tmp_path / "data" / "demo", {"1": "ab", "2": "cd", "3": "ef"}, text="it is")
    encoder = ("recipe.text.encoder.checkpoint=own/small", f"recipe.text.encoder.revision={'1' * 40}")
    arguments = ("grid", "demo", "--cluster", "local", "--dry-run", "methods=[text]", "recipe.text.batch_size=8", *encoder)
    done = forks(CommandLine(tmp_path / "data", tmp_path / "results"), *arguments)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("recipe.text.encoder.checkpoint: own/small is not in the cache of the Hugging Face hub")
    assert line.endswith(f"run `hf download own/small --revision {'1' * 40}`")


def small_corpus(folder: Path, speakers: dict[str, str], text: str | None = None) -> None:
    """A manifest without recordings: each speaker of a fold has five of two seconds of both classes."""
    folder.mkdir(parents=True, exist_ok=True)
    spoken = [
        Utterance(f"{speaker}-{label}-{take}", "a.flac", 32_000, label, speaker, fold, audio_digest=f"{speaker}{label}{take}", text=text)
        for fold, names in speakers.items()
        for speaker in names
        for label in ("happy", "sad")
        for take in range(5)
    ]
    write_manifest(folder, "demo", list(speakers), spoken)


def test_a_launched_corpus_has_what_captions_state(tmp_path: Path) -> None:
    """From its manifest through the registry, and through the record of a launch; a record of an earlier version has none."""
    folder, layout = tmp_path / "data" / "demo", Layout(tmp_path / "results", "demo")
    small_corpus(folder, {"1": "ab", "2": "bc", "3": "de"})
    manifest = load_manifest(folder)
    write_manifest(folder, manifest.corpus, manifest.folds, manifest.utterances, {"shared_speakers": {"1": 1, "2": 1, "3": 0}})
    corpus = opener_of(PROGRAM).prepared(folder, "demo")
    assert corpus.caption == (
        "The folds of demo share speakers (in the training and the test part of a fold: 0 to 1 of 5), "
        "so the figures are not those for unknown speakers.",
    )
    experiment = load_experiment("demo", ["methods=vft"], configs=ROOT / "configs", recipe_schema=Recipe, methods=REGISTRY.methods)
    store(launch(experiment, corpus, REGISTRY, layout, "demo"))
    assert reopen(layout, REGISTRY, Recipe).corpus == corpus
    record = json.loads(layout.experiment_file.read_text())
    del record["corpus"]["caption"]
    layout.experiment_file.write_text(json.dumps(record))
    assert reopen(layout, REGISTRY, Recipe).corpus == replace(corpus, caption=())


def test_resume_needs_only_the_name(tmp_path: Path, forks: Forks) -> None:
    """The settings of the launch, not those of the experiment's file; a corpus prepared again is refused with the whole command."""
    data, results = tmp_path / "data", tmp_path / "results"
    small_corpus(data / "demo", {"1": "ab", "2": "cd", "3": "ef"})
    manifest = load_manifest(data / "demo")
    corpus = Corpus(manifest.corpus, manifest.digest, manifest.folds, str(manifest.folder))
    settings = ("methods=[vft]", "folds=[1,2]", "seeds=3", "recipe.finetune.epochs=7")
    experiment = load_experiment("demo", settings, configs=ROOT / "configs", recipe_schema=Recipe, methods=REGISTRY.methods)
    typed = ("grid", "demo", *settings, "--results", str(results))
    store(launch(experiment, corpus, REGISTRY, Layout(results, "demo"), "demo", typed))
    run = partial(forks, CommandLine(data, results))
    done = run("resume", "demo", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "demo: 6 runs, 6 stages; reused 0" in done.stdout
    assert "finetune.epochs=7" in done.stdout
    small_corpus(data / "demo", {"1": "ab", "2": "cd", "3": "eg"})
    refused = run("resume", "demo")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1), refused.stderr
    assert shlex.join(("python", "launch.py", *typed)) in refused.stderr


@pytest.mark.slow
def test_the_experiment_is_named_where_the_user_did_not(tmp_path: Path) -> None:
    """Only one was launched: it is meant. Otherwise the default; the line is on stderr, and an error stays one line."""
    run, results = CommandLine(tmp_path / "data", tmp_path / "results"), tmp_path / "results"
    experiment = load_experiment(
        "demo", ["methods=vft", "name=own"], configs=ROOT / "configs", recipe_schema=Recipe, methods=REGISTRY.methods
    )
    store(launch(experiment, Corpus("demo", "d1", ("1", "2"), str(tmp_path)), REGISTRY, Layout(results, "own"), "demo"))
    done = run("explain", "vft/1/0")
    assert (done.returncode, "own" in done.stdout) == (0, True), done.stderr
    assert "experiment own: the only one that was launched\n" in done.stderr


def test_a_launch_with_other_settings_prints_what_has_changed(tmp_path: Path, forks: Forks) -> None:
    """Each key with both values, also the corpus; the dry run says which key makes stages new, and stores nothing."""
    data, results = tmp_path / "data", tmp_path / "results"
    small_corpus(data / "demo", {"1": "ab", "2": "cd", "3": "ef"})
    manifest = load_manifest(data / "demo")
    corpus = Corpus(manifest.corpus, manifest.digest, manifest.folds, str(manifest.folder))
    experiment = load_experiment("demo", ["methods=vft"], configs=ROOT / "configs", recipe_schema=Recipe, methods=REGISTRY.methods)
    store(launch(experiment, corpus, REGISTRY, Layout(results, "demo"), "demo"))
    record, run = (results / "demo" / "experiment.json").read_bytes(), partial(forks, CommandLine(data, results))
    done = run("grid", "demo", "--dry-run", "methods=vft", "seeds=3", "recipe.finetune.epochs=6")
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^demo differs from its last launch \(.*\):\n  seeds: 5 -> 3\n  recipe.finetune.epochs: 5 -> 6\ndemo: 9 runs", done.stdout, re.M
    )
    assert "new: finetune vft, 9 stages: recipe.finetune.epochs 5 -> 6\n" in done.stdout
    small_corpus(data / "demo", {"1": "ab", "2": "cd", "3": "eg"})
    done = run("grid", "demo", "--dry-run", "methods=vft", "table=emobox_savee")  # published means, without folds, fit any corpus
    assert done.returncode == 0, done.stderr
    assert f"  digest of corpus demo: {manifest.digest[:12]} -> " in done.stdout
    assert f"new: finetune vft, 15 stages: corpus digest {manifest.digest[:12]} -> " in done.stdout
    assert (results / "demo" / "experiment.json").read_bytes() == record


DAMAGED = ("", "{", "[]", "{}", '{"schema": 1}', '{"schema": 1, "launched": 0, "config": [], "corpus": []}')


@pytest.mark.parametrize(
    ("command", "text"),
    [*(("status", text) for text in DAMAGED), *((name, "{") for name in ("collect", "reconcile", "resume", "control"))],
)
def test_a_damaged_experiment_is_one_line(command: str, text: str, tmp_path: Path, forks: Forks) -> None:
    """The file, and the command that renews it."""
    file = tmp_path / "results" / "demo" / "experiment.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    done = forks(CommandLine(tmp_path / "data", tmp_path / "results"), command, "demo")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "experiment.json" in done.stderr
    assert "grid" in done.stderr


@pytest.mark.parametrize("text", [*DAMAGED, '{"schema": 1, "launched": 5, "config": {"cluster": "local", "newer": 1}, "corpus": {}}'])
def test_an_experiment_is_cancelled_without_its_configuration(text: str, tmp_path: Path, forks: Forks) -> None:
    """Its record is damaged, or of another version of the program: everything is cancelled; single runs need the stages."""
    layout = Layout(tmp_path / "results", "demo")
    layout.folder.mkdir(parents=True)
    layout.experiment_file.write_text(text)
    run = partial(forks, CommandLine(tmp_path / "data", layout.root))
    done = run("cancel", "demo", "vft/1/0")
    assert done.returncode == 2, done.stderr
    assert not layout.cancellations.exists()
    done = run("cancel", "demo")
    assert done.returncode == 0, done.stderr
    assert "demo: everything cancelled" in done.stdout
    assert read_cancellations(layout, 5.0).everything


@pytest.mark.slow
def test_results_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    """A file in place of the folder, a full disk: the error, the path, and exit code 2."""
    (tmp_path / "results").write_text("")
    small_corpus(tmp_path / "data" / "demo", {"1": "ab", "2": "cd", "3": "ef"})
    done = CommandLine(tmp_path / "data", tmp_path / "results")("grid", "demo", "--cluster", "local")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert str(tmp_path / "results") in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("recipe.finetune.batch_size=41",), ("recipe.finetune.batch_size=41", "40 training utterances", "at most 40")),
        (("methods=[ptapt]", "recipe.cluster.counts=[8,99999]"), ("recipe.cluster.counts=[8, 99999]", "frames")),
        (("table=savee_table2",), ("table=savee_table2", "DC, JE, JK, KL", "corpus demo has 1, 2, 3", "table=null")),
        (("methods=[text]",), ("demo: has no transcripts", "leave text out")),
    ],
)
@pytest.mark.parametrize("command", [("grid",), ("grid", "--dry-run")])
def test_what_does_not_fit_the_corpus_is_refused_before_a_launch(
    command: tuple[str, ...], arguments: tuple[str, ...], expected: tuple[str, ...], tmp_path: Path, forks: Forks
) -> None:
    """One line, and no record of a launch."""
    small_corpus(tmp_path / "data" / "demo", {"1": "ab", "2": "cd", "3": "ef"})
    done = forks(CommandLine(tmp_path / "data", tmp_path / "results"), *command, "demo", "--cluster", "local", *arguments)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr
    for text in expected:
        assert text in done.stderr
    assert not (tmp_path / "results").exists()


def test_a_wrong_source_is_reported_with_twenty_problems_at_most(tmp_path: Path) -> None:
    """And the number of the others: a wrong folder has a problem per file."""
    names = "".join(f"no-such-file-{number}.wav,happy,speaker,1\n" for number in range(25))
    (tmp_path / "list.csv").write_text("path,label,speaker,fold\n" + names)
    done = CommandLine(tmp_path / "data", tmp_path / "results")("prepare", "csv", "--source", str(tmp_path / "list.csv"))
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 21, done.stderr
    assert all("no-such-file" in line for line in lines[:20])
    assert lines[20] == "and 5 more problems of 25"


def test_collect_from_a_csv_file(tmp_path: Path, forks: Forks) -> None:
    """`collect --from` applies the outlier rule to rows of a file: an outlier without a rerun is named on stderr and stays in the mean."""
    source = tmp_path / "runs.csv"
    rows = [f"ours,vft,{fold},{slot},{slot},{60 + slot + fold}" for fold in (1, 2) for slot in range(5)]
    rows[3] = "ours,vft,1,3,3,20"
    source.write_text("\n".join(["corpus,method,fold,slot,seed,ua", *rows]) + "\n")
    run = partial(forks, CommandLine(tmp_path / "data", tmp_path / "results"))
    done = run("collect", "--from", str(source))
    assert done.returncode == 0, done.stderr
    assert "rerun with another seed, and add the row below: ours vft/1/3 seed 3" in done.stderr
    summary = json.loads((tmp_path / "runs-tables" / "summary.json").read_text())
    assert summary["methods"][0]["unresolved"] == 1
    assert summary["methods"][0]["cells"][0]["runs"][3]["out"] is True
    done = run("collect", "--from", str(source), "--unreplaced", "drop")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs-tables" / "summary.json").read_text())["methods"][0]["n"] == 9
    done = run("collect", "--from", str(source), "--format", "csv", "--out", "-")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "runs-tables" / "runs.csv").read_text().replace("3,20.0,,,outlier", "3,20.0,,,accepted")
    assert not Path("-").exists()
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("status", "demo"), ("grid", "demo", "seed=3"), ("grid", "--help"), ("sweep", "--help"), ("sweep", "demo", "--dry-run")],
)
def test_commands_start_without_heavy_imports(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Help, `status`, a refused `grid` or `sweep`: no torch, Ray, Optuna, transformers, scikit-learn, pandas, submitit, matplotlib."""
    heavy = ("torch", "transformers", "sklearn", "pandas", "submitit", "matplotlib", "scipy", "numpy", "fairseq", "ray", "optuna")
    program = (
        "import sys, launch\n"
        f"sys.argv = ['launch.py', *{list(arguments)!r}]\n"
        "try:\n    launch.main()\nexcept SystemExit:\n    pass\n"
        f"print('imported:', [name for name in {heavy!r} if name in sys.modules])\n"
    )
    environment = {"SER_GRID_DATA": str(tmp_path / "d"), "SER_GRID_RESULTS": str(tmp_path / "r"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert done.stdout.strip().splitlines()[-1] == "imported: []"
