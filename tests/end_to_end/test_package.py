"""The installed package: `ser-grid` from another folder, with a registry, data and results where the user stands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jobs.store.layout import Layout
from jobs.store.snapshot import plan_snapshot
from tests.command_line import ROOT

SOURCES = ("launch.py", "jobs", "ser_core", "ser_grid", "configs", "slurm_templates", "examples", "setup.py", "pyproject.toml", "LICENSE")
ENTRY = "import sys, ser_grid; sys.argv[0] = 'ser-grid'; sys.exit(ser_grid.main())"


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """The folder that `pip install .` would fill in site-packages."""
    source = tmp_path / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "library")]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    shutil.rmtree(source)
    return tmp_path / "library"


@pytest.mark.slow
@pytest.mark.end_to_end
def test_the_package_runs_from_another_folder(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its configurations and templates; what it reads and writes is where the user stands; messages name `ser-grid`."""
    assert [path.name for path in library.iterdir()] == ["ser_grid"]
    here = tmp_path / "here"
    (here / "configs" / "experiment").mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "digits" / "digits.py", here / "own_digits.py")
    settings = "registry: own_digits:REGISTRY\ncorpus: digits\nmethods: [components]\nfolds: [a]\nseeds: 1\nrecipe: {epochs: 1}\n"
    (here / "configs" / "experiment" / "small.yaml").write_text(f"{settings}resources: {{default: {{cpus: 1, gpus: 0}}}}\n")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SER_GRID")} | {"PYTHONPATH": str(library)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", ENTRY, *arguments]
        return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)

    done = run("grid", "small")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Recognised digits (accuracy, %) on digits" in done.stdout
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == ["configs", "data", "own_digits.py", "results"]
    assert "`ser-grid collect small`" in run("status", "small").stdout
    missing = run("grid", "demo", "corpus=mine")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "run `ser-grid prepare csv --source FOLDER --name mine`" in missing.stderr

    monkeypatch.syspath_prepend(str(here))
    copied = plan_snapshot(library / "ser_grid", Layout(here / "results", "small"), "own_digits:REGISTRY").files
    assert {"launch.py", "jobs/worker/main.py", "slurm_templates/stage.sh.j2", "configs/published.yaml", "own_digits.py"} <= set(copied)


def test_the_package_needs_what_the_project_needs() -> None:
    """requirements.txt is the dependencies of the package and of its extra."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["sweep"]
    assert sorted([*project["dependencies"], *extra]) == sorted(filter(None, (line.partition("#")[0].strip() for line in lines)))
