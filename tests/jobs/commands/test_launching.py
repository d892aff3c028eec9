"""Where an experiment computes if that is not typed."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from jobs.commands.launching import chosen_experiment, experiment_to_launch, words_of
from jobs.commands.program import Program
from jobs.errors import UsageError
from jobs.experiment.config import Cluster
from jobs.experiment.launched import Corpus, launch, store
from jobs.store.layout import Layout
from jobs.store.records import damaged_records, write_json
from jobs.sweeps.records import latest_file, sweep_layout
from ser_core.registry import REGISTRY
from tests.command_line import ROOT

CONFIGS = ROOT / "configs"
PROGRAM = Program(CONFIGS.parent, "ser_core.registry:REGISTRY", "iemocap")
SITE = "example-university"


@pytest.fixture
def login_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH on which there is an `sbatch`, which is never called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text("#!/bin/sh\nexit 1\n")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder


def place(results: Path, *arguments: str, cluster: str | None = None) -> tuple[Cluster, str, str]:
    """Cluster, site and line of `grid demo ...`."""
    experiment, line = experiment_to_launch(words_of("grid", ["demo", *arguments], cluster, "iemocap"), PROGRAM, results)
    return experiment.cluster, experiment.site, line


def launched(results: Path, *arguments: str, cluster: str | None = None) -> None:
    experiment, _ = experiment_to_launch(words_of("grid", ["demo", *arguments], cluster, "iemocap"), PROGRAM, results)
    store(launch(experiment, Corpus("demo", "d1", ("1",), str(results)), REGISTRY, Layout(results, "demo")))


@pytest.mark.slow
def test_where_slurm_is_found_a_new_experiment_says_where_it_computes(
    login_node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line with what to type for the other place; none if the place was typed, on later launches, or without Slurm."""
    here = place(tmp_path)
    assert here[0] is Cluster.local
    assert here[2] == (
        f"demo: computes on this machine ({socket.gethostname()}), not in Slurm; `--cluster slurm site=NAME` submits jobs to Slurm instead"
    )
    assert place(tmp_path, cluster="local") == (Cluster.local, "default", "")
    assert place(tmp_path, "cluster=slurm", f"site={SITE}") == (Cluster.slurm, SITE, "")
    launched(tmp_path, cluster="local")
    assert place(tmp_path) == (Cluster.local, "default", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert place(tmp_path / "other") == (Cluster.local, "default", "")


def test_where_only_a_corpus_is_prepared_init_is_named(tmp_path: Path) -> None:
    """The name of a corpus is not that of an experiment yet: the message has the command that writes its file."""
    words = words_of("grid", ["mine"], None, "iemocap")
    with pytest.raises(UsageError, match=r"^no experiment 'mine', .*`python launch.py init mine --corpus mine` writes"):
        experiment_to_launch(words, PROGRAM, tmp_path, ["mine", "demo"])
    with pytest.raises(UsageError, match=r"^no experiment 'mine': known are demo,"):
        experiment_to_launch(words, PROGRAM, tmp_path, ["demo"])


def test_the_experiment_of_a_command_that_names_none(tmp_path: Path) -> None:
    """The only one that was launched, else the default, with a line that says so. A file means the experiment of its name."""
    assert chosen_experiment("demo", tmp_path, "iemocap") == ("demo", "")
    assert chosen_experiment("some/own.yaml", tmp_path, "iemocap") == ("own", "")
    assert chosen_experiment(None, tmp_path, "iemocap") == ("iemocap", "experiment iemocap: the default, as none is named")
    launched(tmp_path, cluster="local")
    assert chosen_experiment(None, tmp_path, "iemocap") == ("demo", "experiment demo: the only one that was launched")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "experiment.json").write_text("{}")
    line = "experiment iemocap: the default, as none is named; launched are demo, own"
    assert chosen_experiment(None, tmp_path, "iemocap") == ("iemocap", line)
    assert words_of("grid", ["seeds=2"], None, "iemocap").line == "experiment iemocap: the default, as none is named"
    assert words_of("grid", ["iemocap"], None, "iemocap").line == ""


def test_an_experiment_is_the_path_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to the folder where it was typed; named after the file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("corpus: demo\nseeds: 2\n")
    words = words_of("grid", ["own.yaml", "seeds=3"], None, "iemocap")
    monkeypatch.chdir("/")
    experiment, _ = experiment_to_launch(words, PROGRAM, tmp_path)
    assert (experiment.name, experiment.corpus, experiment.seeds, words.file) == ("own", "demo", 3, str(tmp_path / "own.yaml"))


@pytest.mark.slow
def test_an_experiment_launched_on_slurm_stays_there(tmp_path: Path) -> None:
    """With its site profile; what is typed counts."""
    launched(tmp_path, f"site={SITE}", cluster="slurm")
    assert place(tmp_path) == (
        Cluster.slurm,
        SITE,
        f"demo: submits jobs to Slurm (site {SITE}), as at its last launch; `--cluster local` computes on this machine",
    )
    assert place(tmp_path, "site=default")[:2] == (Cluster.slurm, "default")
    assert place(tmp_path, cluster="local") == (Cluster.local, "default", "")
    assert place(tmp_path, "cluster=local") == (Cluster.local, "default", "")
    assert place(tmp_path, "name=other")[0] is Cluster.local


@pytest.mark.slow
def test_a_sweep_launched_on_slurm_stays_there(tmp_path: Path) -> None:
    """By its own record, not by that of its experiment's grid."""
    launched(tmp_path, cluster="local")
    layout = Layout(tmp_path, "demo")
    write_json(sweep_layout(layout, "d1").experiment_file, {"schema": 2, "config": {"cluster": "slurm", "site": SITE}})
    latest_file(layout).write_text("d1\n")
    experiment, line = experiment_to_launch(words_of("sweep", ["demo"], None, "iemocap"), PROGRAM, tmp_path, sweep=True)
    assert (experiment.cluster, experiment.site) == (Cluster.slurm, SITE)
    assert "as at its last launch" in line
    assert not damaged_records(tmp_path)
