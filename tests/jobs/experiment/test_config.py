"""Configuration: layers, overrides, and one-line errors."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

import pytest

from jobs.errors import UsageError
from jobs.experiment.config import Cluster, OutlierRule, Policy, Resources, load_experiment, resources_of
from jobs.experiment.stored_config import resolved_values, restore_experiment


@dataclass
class Training:
    epochs: int = 15
    learning_rate: float = 1e-4


@dataclass
class FakeRecipe:
    finetune: Training = field(default_factory=Training)
    counts: list[int] = field(default_factory=lambda: [64, 512])


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    for folder in ("experiment", "site"):
        (tmp_path / folder).mkdir()
    (tmp_path / "site" / "default.yaml").write_text("{}\n")
    (tmp_path / "site" / "campus.yaml").write_text("partition: gpu\naccount: speech\n")
    (tmp_path / "experiment" / "small.yaml").write_text(
        "corpus: demo\nmethods: [vft, tapt]\nseeds: 3\n"
        "resources:\n  default: {cpus: 2, minutes: 5}\n  tapt: {cpus: 8}\nrecipe:\n  finetune: {epochs: 2}\n"
    )
    return tmp_path


def _error(configs: Path, *overrides: str, name: str = "small") -> str:
    with pytest.raises(UsageError) as caught:
        load_experiment(name, overrides, configs=configs, recipe_schema=FakeRecipe)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


def test_layers_in_order(configs: Path) -> None:
    """Schema, site profile, experiment, overrides: the later wins; the rest has the schema's defaults."""
    experiment = load_experiment("small", ["seeds=7", "site=campus", "slurm.account=x"], configs=configs, recipe_schema=FakeRecipe)
    assert (experiment.name, experiment.corpus, experiment.seeds) == ("small", "demo", 7)
    assert (experiment.slurm.partition, experiment.slurm.account, experiment.slurm.qos) == ("gpu", "x", None)
    assert (experiment.recipe.finetune.epochs, experiment.recipe.finetune.learning_rate) == (2, 1e-4)
    assert experiment.cluster is Cluster.local
    assert isinstance(experiment.recipe, FakeRecipe)


def test_methods_of_the_registry_by_default(configs: Path) -> None:
    """An experiment that names no method gets those of the call; an empty list is an error, see below."""
    (configs / "experiment" / "bare.yaml").write_text("corpus: demo\n")
    load = functools.partial(load_experiment, "bare", configs=configs, recipe_schema=FakeRecipe, methods=("a", "b"))
    assert load([]).methods == ["a", "b"]
    assert load(["methods=[b]"]).methods == ["b"]


def test_overrides_of_every_type(configs: Path) -> None:
    """Lists, numbers, enums and nested keys by dot-list."""
    overrides = ["methods=[vft,tapt]", "recipe.finetune.learning_rate=3e-5", "recipe.counts=[8]", "cluster=slurm", "resources.tapt.gpus=4"]
    experiment = load_experiment("small", overrides, configs=configs, recipe_schema=FakeRecipe)
    assert experiment.methods == ["vft", "tapt"]
    assert experiment.recipe.finetune.learning_rate == 3e-5
    assert experiment.recipe.counts == [8]
    assert experiment.cluster is Cluster.slurm
    assert experiment.resources["tapt"].gpus == 4


@pytest.mark.parametrize(
    ("override", "found"),
    [("methods=vft", ["vft"]), ("methods=[vft,tapt]", ["vft", "tapt"]), ("folds=2", ["2"]), ("recipe.counts=8", [8]), ("folds=[]", [])],
)
def test_one_value_is_a_list_of_one(configs: Path, override: str, found: list[object]) -> None:
    """On the command line and in files, where the schema has a list."""
    key, _, text = override.rpartition("=")
    experiment = load_experiment("small", [override], configs=configs, recipe_schema=FakeRecipe)
    assert attrgetter(key)(experiment) == found
    *sections, last = key.split(".")
    (configs / "experiment" / "own.yaml").write_text("corpus: demo\nmethods: tapt\n" if key != "methods" else "corpus: demo\n")
    with (configs / "experiment" / "own.yaml").open("a") as file:
        file.write("".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(sections)) + f"{'  ' * len(sections)}{last}: {text}\n")
    own = load_experiment("own", [], configs=configs, recipe_schema=FakeRecipe)
    assert attrgetter(key)(own) == found
    assert own.methods == (found if key == "methods" else ["tapt"])


def test_resources_by_stage(configs: Path) -> None:
    """Key by key: the stage's entry, else `default`, else the schema; the same after storing."""
    experiment = load_experiment("small", ["resources.tapt.gpus=0"], configs=configs, recipe_schema=FakeRecipe)
    assert resources_of(experiment, "tapt") == Resources(cpus=8, gpus=0, minutes=5)
    assert resources_of(experiment, "finetune") == Resources(cpus=2, minutes=5)
    stored = restore_experiment(json.loads(json.dumps(resolved_values(experiment))), recipe_schema=FakeRecipe)
    assert resources_of(stored, "tapt") == Resources(cpus=8, gpus=0, minutes=5)
    experiment.resources.clear()
    assert resources_of(experiment, "finetune") == Resources()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seds=5", "did you mean 'seeds'"),
        ("recipe.finetune.epoch=5", "did you mean 'recipe.finetune.epochs'"),
        ("slurm.partitoin=x", "did you mean 'slurm.partition'"),
        ("resources.states.proceses=2", "did you mean 'resources.states.processes'"),
        ("seeds=many", "seeds"),
        ("seeds=0", "seeds out of range: 0; allowed: 1 or more, at most 1000 (in "),
        ("policy.max_attempts=0", "policy.max_attempts out of range"),
        ("policy.max_failures=0", "policy.max_failures out of range"),
        ("policy.rounds=0", "policy.rounds out of range"),
        ("policy.max_seeds=0", "policy.max_seeds out of range"),
        ("policy.sigmas=0", "policy.sigmas out of range"),
        ("policy.sigmas=nan", "policy.sigmas out of range"),
        ("policy.poll_seconds=0", "policy.poll_seconds out of range: 0; allowed: more than 0, at most 3600"),
        ("policy.controller_minutes=1", "policy.controller_minutes out of range"),
        ("policy.controller_days=400", "policy.controller_days out of range"),
        ("policy.outliers=median", "policy.outliers"),
        ("seeds=1001", "seeds out of range"),
        ("resources.tapt.cpus=0", "resources.tapt.cpus out of range"),
        ("resources.tapt.memory_gb=inf", "resources.tapt.memory_gb out of range"),
        ("slurm.max_submit=-1", "slurm.max_submit out of range"),
        ("recipe=null", "recipe in"),
        ("cluster=cloud", "cluster"),
        ("methods=[vft,vft]", "each method once"),
        ("methods=[]", "each method once"),
        ("name=../x", "name"),
        ("name=store", "name"),
        ("seeds", "write KEY=VALUE"),
        ("=5", "write KEY=VALUE"),
        ("site=nowhere", "no site profile 'nowhere': known are campus, default"),
        ("recipe.counts=[1", "overrides"),
    ],
)
def test_a_wrong_override_is_one_line(configs: Path, override: str, expected: str) -> None:
    """The key, the problem, and the nearest known key."""
    assert expected in _error(configs, override)


def test_resources_of_an_unknown_stage_are_a_usage_error(configs: Path) -> None:
    """The known stages are listed, `default` among them."""
    known = ("tapt", "finetune")
    load_experiment("small", ["resources.default.cpus=1"], configs=configs, recipe_schema=FakeRecipe, stages=known)
    with pytest.raises(UsageError, match=r"resources\.tatp: no such stage; known are default, tapt, finetune"):
        load_experiment("small", ["resources.tatp.cpus=1"], configs=configs, recipe_schema=FakeRecipe, stages=known)


def test_an_unknown_experiment_names_the_known_ones(configs: Path) -> None:
    """And the nearest of them."""
    text = _error(configs, name="smal")
    assert "small" in text
    assert "did you mean 'small'" in text


@pytest.mark.parametrize("text", ["seeds: [1", "- a\n- b\n", "seeds: 3\n\tx: 4\n", "unheard: 1\n"])
def test_a_broken_file_is_named(configs: Path, text: str) -> None:
    """YAML that does not parse, a list, an unknown key: one line with the file."""
    (configs / "experiment" / "small.yaml").write_text(text)
    assert "small.yaml" in _error(configs)


def test_a_corpus_must_be_named(configs: Path) -> None:
    """It has no default."""
    (configs / "experiment" / "small.yaml").write_text("seeds: 3\n")
    assert "corpus" in _error(configs)


def test_the_policy_is_set_key_by_key(configs: Path) -> None:
    """Other keys keep their defaults; rules have the names used in the tables."""
    experiment = load_experiment("small", ["policy.outliers=none", "policy.rounds=1"], configs=configs, recipe_schema=FakeRecipe)
    assert experiment.policy == Policy(outliers=OutlierRule.none, rounds=1)
    assert load_experiment("small", [], configs=configs, recipe_schema=FakeRecipe).policy == Policy()


def test_stored_values_give_the_same_experiment(configs: Path) -> None:
    """Stored values are plain JSON and restore the same experiment."""
    experiment = load_experiment("small", ["cluster=slurm", "site=campus"], configs=configs, recipe_schema=FakeRecipe)
    values = json.loads(json.dumps(resolved_values(experiment), allow_nan=False))
    assert restore_experiment(values, recipe_schema=FakeRecipe) == experiment
    with pytest.raises(UsageError, match="launch `grid` again"):
        restore_experiment({**values, "outdated": 1}, recipe_schema=FakeRecipe)
    damaged: object
    for damaged in ([], "text", None):
        with pytest.raises(UsageError, match="launch `grid` again"):
            restore_experiment(damaged, recipe_schema=FakeRecipe)  # type: ignore[arg-type]


def test_keys_that_were_added_since_have_their_defaults(configs: Path) -> None:
    """An experiment that an earlier version stored, without a key of any section; a key of a later version is named."""
    experiment = load_experiment(
        "small", ["cluster=slurm", "site=campus", "resources.tapt.cpus=3"], configs=configs, recipe_schema=FakeRecipe
    )
    values = json.loads(json.dumps(resolved_values(experiment)))
    for section, key in (
        (values, "table"),
        (values["policy"], "poll_minutes"),
        (values["slurm"], "exclude"),
        (values["resources"]["tapt"], "nodes"),
    ):
        del section[key]
    assert restore_experiment(values, recipe_schema=FakeRecipe) == experiment
    values["policy"]["later"] = 1
    with pytest.raises(UsageError, match=r"policy\.later: written by another version"):
        restore_experiment(values, recipe_schema=FakeRecipe)


@pytest.mark.parametrize(("overrides", "given"), [((), (1, 1, 1)), (("resources.default.gpus=4", "resources.default.nodes=2"), (2, 4, 4))])
def test_a_stage_without_team_support_gets_one_process(configs: Path, overrides: tuple[str, ...], given: tuple[int, int, int]) -> None:
    """Whatever `default` is; it keeps its cores and memory, also in the stored configuration."""
    arguments = {"configs": configs, "recipe_schema": FakeRecipe, "stages": ("tapt", "cluster"), "teams": ("tapt",)}
    experiment = load_experiment("small", ["resources.default.cpus=8", *overrides], **arguments)  # type: ignore[arg-type]
    tapt, cluster = resources_of(experiment, "tapt"), resources_of(experiment, "cluster")
    assert (tapt.nodes, tapt.gpus, tapt.processes_per_node) == given
    assert (cluster.nodes, cluster.gpus, cluster.processes_per_node, cluster.cpus, cluster.minutes) == (1, 1, 1, 8, 5)
    assert restore_experiment(resolved_values(experiment), recipe_schema=FakeRecipe) == experiment


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("resources.cluster.nodes=2", "resources.cluster: nodes=2: this stage is computed by one process"),
        ("resources.cluster.gpus=4", "resources.cluster: gpus=4"),
        ("resources.cluster.processes=2", "resources.cluster: processes=2"),
        ("resources.tapt={gpus: 1, processes: 2}", "resources.tapt: 2 processes for 1 GPUs of a node"),
        ("resources.tapt={gpus: 16}", "resources.tapt: 8 cpus for 16 processes of a node"),
    ],
)
def test_impossible_teams_are_usage_errors(configs: Path, override: str, words: str) -> None:
    """One line that names the stage."""
    with pytest.raises(UsageError, match=words) as caught:
        load_experiment("small", [override], configs=configs, recipe_schema=FakeRecipe, stages=("tapt", "cluster"), teams=("tapt",))
    assert "\n" not in str(caught.value)
