"""pytest plugin: one Slurm for the whole session, started when the first test asks for it, gone with the session however that ends.

`SER_GRID_SKIP_SLURM=1` leaves the tests marked `slurm` out. Otherwise a machine without Slurm fails them: nothing is skipped in silence.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm_cluster.cluster import Cluster, ClusterError
from tests.slurm_cluster.configuration import ClusterSettings
from tests.slurm_cluster.processes import Process, start_time

SKIP = "SER_GRID_SKIP_SLURM"
LONGEST = 60  # characters of the folder's path: a socket's path below it must stay under 108


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what needs Slurm where the user says so."""
    if os.environ.get(SKIP, "0") in ("", "0"):
        return
    left_out = [item for item in items if item.get_closest_marker("slurm")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("slurm")]


@pytest.fixture(scope="session")
def slurm_session() -> Iterator[Cluster]:
    """A Slurm of three nodes with accounting and enforced limits; `SLURM_CONF` points to it as long as the session lasts."""
    with running_cluster(ClusterSettings(enforce=True)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def slurm_networks(slurm_session: Cluster) -> Iterator[Cluster]:
    """A Slurm of its own for one module, whose three nodes have a network stack and an address each; `SLURM_CONF` points to it meanwhile.

    Where no such networks can be had, its nodes share that of this machine (`cluster.settings.networks` says so). It begins after the
    session's and ends before it, and so gives `SLURM_CONF` back to it.
    """
    with running_cluster(ClusterSettings(accounting=False, networks=True)) as cluster:
        yield cluster


@contextlib.contextmanager
def running_cluster(settings: ClusterSettings) -> Iterator[Cluster]:
    """A Slurm that `SLURM_CONF` points to while the block lasts, and that ends with this process however that ends."""
    home = _home()
    remove_stale(home)
    folder = Path(tempfile.mkdtemp(prefix="c", dir=home))
    (folder / "owner.json").write_text(json.dumps([os.getpid(), start_time(os.getpid())]))
    guard = subprocess.Popen(
        [sys.executable, "-m", "tests.slurm_cluster", "guard", str(folder)],
        stdin=subprocess.PIPE,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )
    cluster = Cluster(folder, settings)
    saved = {name: os.environ.get(name) for name in ("SLURM_CONF", "PATH")}
    try:
        try:
            cluster.up()
        except ClusterError as error:
            pytest.fail(f"{error}, or leave these tests out with {SKIP}=1", pytrace=False)
        os.environ.update({name: cluster.environment[name] for name in saved})
        yield cluster
    finally:
        for name, value in saved.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        if guard.stdin is not None:
            guard.stdin.close()  # it tears the cluster down, as it does when this process is killed
        try:
            guard.wait(60)
        except subprocess.TimeoutExpired:
            guard.kill()
            cluster.down()


@pytest.fixture
def slurm_cluster(slurm_session: Cluster) -> Iterator[Cluster]:
    """The session's Slurm with an empty queue, before and after the test."""
    slurm_session.clear()
    yield slurm_session
    slurm_session.clear()


def remove_stale(home: Path) -> None:
    """Take down clusters whose session is gone and whose guard is gone too."""
    for folder in home.iterdir() if home.is_dir() else ():
        try:
            pid, started = json.loads((folder / "owner.json").read_text())
        except (OSError, ValueError):
            continue
        if not Process(int(pid), str(started)).alive:
            with contextlib.suppress(ClusterError, subprocess.SubprocessError):
                Cluster(folder).down()
            shutil.rmtree(folder, ignore_errors=True)


def _home() -> Path:
    temporary = Path(tempfile.gettempdir())
    home = (temporary if len(str(temporary)) <= LONGEST - 30 else Path("/tmp")) / f"ser-grid-slurm-{os.getuid()}"  # noqa: S108 - made 0755, owner only writes
    home.mkdir(mode=0o755, exist_ok=True)
    if home.stat().st_uid != os.getuid():
        pytest.fail(f"{home} belongs to somebody else", pytrace=False)
    return home
