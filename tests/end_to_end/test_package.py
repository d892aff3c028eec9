"""The installed package: `ser-grid` from another folder, with a registry, data and results where the user stands."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jobs import PACKAGE, VERSION
from jobs.store.layout import Layout
from jobs.store.snapshot import plan_snapshot
from tests.command_line import ROOT
from tests.slurm_cluster.cluster import Cluster

SOURCES = ("launch.py", "jobs", "ser_core", "ser_grid", "configs", "slurm_templates", "examples", "setup.py", "pyproject.toml", "LICENSE")
ENTRY = "import sys, ser_grid; sys.argv[0] = 'ser-grid'; sys.exit(ser_grid.main())"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `pip install .` would fill in site-packages."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder / "library")]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    command = [sys.executable, "setup.py", "-q", "dist_info", "--output-dir", str(folder / "library")]
    subprocess.run(command, cwd=source, capture_output=True, check=True)
    shutil.rmtree(source)
    return folder / "library"


def run_installed(library: Path, here: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`ser-grid` of the package, typed in the folder `here`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SER_GRID")} | {"PYTHONPATH": str(library)}
    command = [sys.executable, "-c", ENTRY, *arguments]
    return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.end_to_end
def test_the_package_runs_from_another_folder(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortest registry of docs/your-own-grid.md: read and written is where the user stands; messages name `ser-grid`."""
    assert {path.name for path in library.iterdir()} == {"ser_grid", f"ser_grid-{VERSION}.dist-info"}
    here = tmp_path / "here"
    (here / "configs" / "experiment").mkdir(parents=True)
    module, file = re.findall(r"```(?:python|yaml)\n(.*?)```", (ROOT / "docs" / "your-own-grid.md").read_text(), re.DOTALL)
    (here / "mine.py").write_text(module)
    (here / "configs" / "experiment" / "small.yaml").write_text(f"{file}\nmethods: [ridge]\nfolds: ['1']\n")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_installed(library, here, *arguments)

    done = run("grid", "small", "seeds=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Root mean square error (RMSE) on diabetes" in " ".join(done.stdout.split())
    assert "confusion" not in done.stdout
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == ["configs", "data", "mine.py", "results"]
    assert f"code of {PACKAGE} {VERSION};" in (here / "results" / "small" / "tables" / "table.md").read_text()
    assert "`ser-grid collect small`" in run("status", "small").stdout
    missing = run("grid", "demo", "corpus=mine")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "run `ser-grid prepare csv --source FOLDER --name mine`" in missing.stderr

    monkeypatch.syspath_prepend(str(here))
    copied = plan_snapshot(library / "ser_grid", Layout(here / "results", "small"), "mine:REGISTRY").files
    assert {"launch.py", "jobs/worker/main.py", "slurm_templates/stage.sh.j2", "configs/published.yaml", "mine.py"} <= set(copied)


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.end_to_end
def test_the_package_submits_its_example_to_slurm(library: Path, slurm_cluster: Cluster, tmp_path: Path) -> None:
    """The file of the example is found in the package, and jobs run a copy of the package's code, the registry's included."""
    once = ("methods=[components]", "seeds=1", "folds=[a]", "recipe.epochs=3", "policy.poll_seconds=1", "policy.poll_minutes=0.05")
    done = run_installed(library, tmp_path, "grid", "--config", "examples/digits/digits.yaml", "--cluster", "slurm", "--wait", *once)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "results"]
    with (tmp_path / "results" / "digits" / "tables" / "runs.csv").open(newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["components"]
    (result,) = (tmp_path / "results" / "store" / "classify").glob("*/result.json")
    assert json.loads(result.read_text())["provenance"]["slurm"]["job_id"]
    copied = tmp_path / "results" / "digits" / "snapshots" / "current"
    assert {"examples", "jobs", "launch.py", "slurm_templates"} <= {path.name for path in copied.iterdir()}
    assert (copied / "examples" / "digits" / "digits.py").is_file()


def test_the_package_needs_what_the_project_needs() -> None:
    """requirements.txt is the dependencies of the package and of its extra."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["sweep"]
    assert sorted([*project["dependencies"], *extra]) == sorted(filter(None, (line.partition("#")[0].strip() for line in lines)))
