"""The registry that an experiment names: found and checked, its corpus made, and used again when the experiment is reopened."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.commands.launching import words_of
from jobs.commands.opener import Opener, Place
from jobs.commands.program import Program
from jobs.errors import StoredConfigurationError, UsageError
from jobs.experiment.launched import store
from jobs.experiment.plugin import load_plugin
from jobs.store.layout import Layout
from jobs.store.snapshot import plan_snapshot, take_snapshot
from tests.command_line import ROOT

MODULE = """
from dataclasses import dataclass
from jobs.experiment.basic_registry import BasicRegistry, Stage, write_manifest

@dataclass
class Recipe:
    degree: int = 2

class Curves(BasicRegistry):
    methods, stages, recipe_schema, makes = ("plain",), ("fit",), Recipe, ("points",)

    def call(self, method, recipe, fold, seed):
        return Stage("fit", {"degree": recipe.degree}, fold, seed)

    def run(self, stage, **arguments):
        return {"metrics": {"accuracy": 0.5}}

    def make_corpus(self, name, folder, progress):
        folder.mkdir(parents=True)
        (folder / "points.csv").write_text("1,2\\n")
        return f"{name}: digest {write_manifest(folder, name, ('a', 'b')).digest[:6]}"

REGISTRY, OTHER, NAMES = Curves(), object(), Curves()
NAMES.methods = ("plain")
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Program:
    """The program, and a module of the user outside of it whose name no other test uses."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "own_curves.py").write_text(MODULE)
    (folder / "own_broken.py").write_text("import no_such_package\n")
    (folder / "own_failing.py").write_text("raise ValueError('first line\\nsecond line')\n")
    monkeypatch.syspath_prepend(str(folder))
    (tmp_path / "curves.yaml").write_text("corpus: points\nregistry: own_curves:REGISTRY\nseeds: 2\n")
    return Program(ROOT, "ser_core.registry:REGISTRY", "iemocap")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("own_curves", "expected package.module:NAME"),
        ("__import__('os').system('true'):X", "expected package.module:NAME"),
        ("own_nowhere.curves:REGISTRY", "no module own_nowhere; it is looked for in the folder of the program"),
        ("own_curves.deeper:REGISTRY", "no module own_curves.deeper"),
        ("own_broken:REGISTRY", "it imports no_such_package, which is not installed"),
        ("own_failing:REGISTRY", "own_failing cannot be imported: ValueError: first line"),
        ("own_curves:MISSING", "module own_curves has no MISSING"),
        ("own_curves:OTHER", "not a registry, it lacks calls, "),
        ("own_curves:Curves", "Curves is a class, and a registry is an object of it: Curves()"),
        ("own_curves:NAMES", "methods is the text 'plain', expected a tuple such as ('plain',)"),
        ("os:path", "not a registry, it lacks calls, "),
    ],
)
def test_a_name_without_a_registry_is_one_line(name: str, expected: str, program: Program) -> None:
    """It names the key, and what the module lacks."""
    with pytest.raises(UsageError) as error:
        load_plugin(name)
    assert str(error.value).startswith(f"registry={name}: ")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_an_experiment_has_the_methods_recipe_and_corpus_of_its_registry(
    program: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its corpus is made at the launch, and its settings are checked against the recipe of the registry."""
    place = Place(tmp_path / "data", tmp_path / "results")
    words = words_of("grid", [str(tmp_path / "curves.yaml"), "recipe.degree=3"], None, "iemocap")
    session = Opener(program).launch(words, place, (), dry_run=False)
    graph = session.launched.graph
    assert [run.name for run in graph.runs] == ["plain/a/0", "plain/a/1", "plain/b/0", "plain/b/1"]
    assert {(node.stage, node.settings["degree"]) for node in graph.nodes.values()} == {("fit", 3)}
    assert (session.place.registry, session.place.digest_of) == ("own_curves:REGISTRY", "own_curves:REGISTRY.load_corpus")
    assert session.preload == ("own_curves:REGISTRY.preload",)
    assert "points: digest " in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"unknown key 'recipe\.degre' .*did you mean 'recipe\.degree'"):
        Opener(program).launch(words_of("grid", [str(tmp_path / "curves.yaml"), "recipe.degre=3"], None, "x"), place, (), dry_run=False)
    with pytest.raises(
        UsageError, match=r"corpus 'lines' is not prepared .*: prepare it there, or name one that the registry makes: points"
    ):
        Opener(program).launch(words_of("grid", [str(tmp_path / "curves.yaml"), "corpus=lines"], None, "x"), place, (), dry_run=False)


def test_a_corpus_of_another_registry_needs_an_experiment_like_it(program: Program, tmp_path: Path) -> None:
    """`init` reads a corpus with the registry of the experiment whose settings it takes."""
    place = Place(tmp_path / "data", tmp_path / "results")
    Opener(program).launch(words_of("grid", [str(tmp_path / "curves.yaml")], None, "x"), place, (), dry_run=False)
    folder = place.data / "points"
    (tmp_path / "speech.yaml").write_text("corpus: points\n")
    assert Opener(program).prepared(folder, str(tmp_path / "curves.yaml")).folds == ("a", "b")
    with pytest.raises(UsageError, match="of a corpus that another registry reads, name an experiment with --like"):
        Opener(program).prepared(folder, str(tmp_path / "speech.yaml"))


def test_an_experiment_is_reopened_with_the_registry_of_its_launch(program: Program, tmp_path: Path) -> None:
    """Also if its file names another one since, and with one line if the module is gone; it can be cancelled all the same."""
    file, place = tmp_path / "curves.yaml", Place(tmp_path / "data", tmp_path / "results")
    session = Opener(program).launch(words_of("grid", [str(file)], None, "iemocap"), place, (), dry_run=False)
    store(session.launched)
    file.write_text("corpus: demo\n")
    again = Opener(program).reopen("curves", place.results)
    assert again.place.registry == "own_curves:REGISTRY"
    assert list(again.launched.graph.nodes) == list(session.launched.graph.nodes)
    assert Opener(program).relaunch("curves", place.results, dry_run=True).launched.experiment.recipe.degree == 2
    record = place.layout("curves").experiment_file
    record.write_text(record.read_text().replace("own_curves:REGISTRY", "own_nowhere:REGISTRY"))
    with pytest.raises(StoredConfigurationError, match="registry=own_nowhere:REGISTRY: no module own_nowhere"):
        Opener(program).reopen("curves", place.results)
    assert Opener(program).without_configuration("curves", place.results).name == "curves"


def test_a_sweep_needs_a_registry_that_declares_one(program: Program, tmp_path: Path) -> None:
    place = Place(tmp_path / "data", tmp_path / "results")
    with pytest.raises(UsageError, match="declares no method to sweep"):
        Opener(program).launch_sweep(words_of("sweep", [str(tmp_path / "curves.yaml")], None, "x"), place, (), dry_run=True)


def test_the_code_of_the_registry_is_copied_for_jobs(program: Program, tmp_path: Path) -> None:
    """Of a module outside of the program, and of an untracked package inside; the digest depends on it."""
    layout, source = Layout(tmp_path / "results", "curves"), tmp_path / "source"
    for name in ("launch.py", "mine/__init__.py", "mine/grid.py", "notes/other.py"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("A = 1\n")
    without = plan_snapshot(source, layout)
    taken = take_snapshot(source, layout, "own_curves:REGISTRY")
    assert (set(without.files), set(taken.files)) == ({"launch.py"}, {"launch.py", "own_curves.py"})
    assert (taken.path / "own_curves.py").read_text() == MODULE
    assert plan_snapshot(taken.path, layout, "own_curves:REGISTRY").digest == taken.digest
    inside = plan_snapshot(source, layout, "mine.grid:REGISTRY")
    assert set(inside.files) == {"launch.py", "mine/__init__.py", "mine/grid.py"}
    (source / "mine" / "grid.py").write_text("A = 2\n")
    assert plan_snapshot(source, layout, "mine.grid:REGISTRY").digest != inside.digest
