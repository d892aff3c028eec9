"""A full disk is named by its path, and what files say is still shown: a real disk that is too small."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.store.disk_space import FULL, is_full, name_full_disk, naming
from tests.command_line import ROOT
from tests.jobs.control.test_stage_faults import namespace

LAUNCHED = """
import sys
from pathlib import Path
from jobs.experiment.config import load_experiment
from jobs.experiment.launched import Corpus, launch, store
from jobs.store.layout import Layout
from ser_core.registry import REGISTRY, VERSIONS
from ser_core.settings.recipe import Recipe

experiment = load_experiment("demo", [], configs=Path("configs"), recipe_schema=Recipe, stages=tuple(VERSIONS), teams=REGISTRY.teams,
                             methods=REGISTRY.methods)
store(launch(experiment, Corpus("demo", "d1", ("1", "2"), "/data/demo"), REGISTRY, Layout(Path(sys.argv[1]), "demo")))
"""


def test_an_error_of_a_full_disk_gets_the_name_of_the_file(tmp_path: Path) -> None:
    """Not one that says something else."""
    for number in FULL:
        with pytest.raises(OSError, match=os.strerror(number)) as told, naming(tmp_path / "a"):
            raise OSError(number, os.strerror(number))
        assert told.value.filename == str(tmp_path / "a")
    with pytest.raises(OSError, match="Input/output") as told, naming(tmp_path / "a"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert told.value.filename is None


def test_a_folder_is_blamed_only_if_its_disk_is_full(tmp_path: Path) -> None:
    """An error without a file name on a disk with room is of another disk; a quota cannot be seen."""
    assert not is_full(tmp_path / "missing")
    other = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    name_full_disk(other, tmp_path)
    assert other.filename is None
    quota = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    name_full_disk(quota, tmp_path / "output")
    assert quota.filename == str(tmp_path / "output")


@pytest.mark.slow
def test_on_a_full_disk_status_shows_the_files_and_others_name_it(tmp_path: Path) -> None:
    """`status` as ever; `cancel`, which must write, exits with 2 and one line: which file, and how to make room. Before: "a file"."""
    disk, python = tmp_path / "disk", sys.executable
    disk.mkdir()
    lines = [
        f"mount -t tmpfs -o size=256k tmpfs {disk}",
        f"{python} -c '{LAUNCHED}' {disk}",
        f"! dd if=/dev/zero of={disk}/full bs=1k 2>{tmp_path}/dd",
        f"{python} launch.py status demo --results {disk} >{tmp_path}/status",
        f"{python} launch.py cancel demo --results {disk} 2>{tmp_path}/cancel; test $? = 2",
    ]
    command = [*namespace(), "sh", "-c", " && ".join(lines)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vft finetune: 10 missing of 10" in (tmp_path / "status").read_text()
    (line,) = (tmp_path / "cancel").read_text().splitlines()
    assert line == (
        f"{disk}/demo/cancelled.json: No space left on device; "
        "make room there (`python launch.py clean` frees what failed) and run the same command again"
    )
