"""The Ray of a sweep: isolated, with a token, and removed at the end."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import InternalError
from jobs.sweeps.ray import cluster as ray_cluster
from jobs.sweeps.ray.cluster import (
    MAX_BASE,
    MAX_FOLDER,
    PREFIX,
    private_folder,
    ray_environment,
    ray_joined,
    without_ray_variables,
    write_token,
)
from jobs.worker.machine import Capacity
from tests.jobs.sweeps.stage_cases import REPOSITORY, wait_until

ASK = "import sys; from ray._raylet import GcsClient; print(GcsClient(address=sys.argv[1]).internal_kv_keys(b'', namespace=b'session'))"


@contextlib.contextmanager
def _own_ray(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Another process with its Ray, and what it reports."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.jobs.sweeps.own_ray", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    with process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            yield process, json.loads(line or "{}")
        finally:
            process.kill()


def _processes(temp: str) -> list[str]:
    """Processes with a folder of Ray in their environment."""
    found: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"RAY_TMPDIR={temp}\0".encode() in (process / "environ").read_bytes():
                found.append(process.name)
    return found


def test_two_rays_on_one_machine_are_isolated(ray_here: Capacity, tmp_path: Path) -> None:
    """Variables of the environment do not lead to another Ray; the folder is short and private, and is removed after Ctrl-C."""
    import ray

    own = ray.get_runtime_context().gcs_address
    long = tmp_path / ("long" * 20)
    long.mkdir()
    foreign = {"RAY_ADDRESS": own, "RAY_NAMESPACE": "theirs", "RAY_AUTH_TOKEN": "x" * 32, "TMPDIR": str(long), "PYTHONPATH": "/elsewhere"}
    with _own_ray(**foreign) as (process, told):
        assert told["address"] != own
        assert told["node"] not in {node["NodeID"] for node in ray.nodes()}
        assert (told["resources"]["CPU"], told["resources"]["GPU"]) == (1, 1)
        assert told["worker"] == {
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}/elsewhere",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_NAMESPACE": None,
        }
        assert told["driver"] == {"PYTHONPATH": "/elsewhere", "RAY_ADDRESS": None, "CUDA_VISIBLE_DEVICES": None}
        assert told["handler"]
        folder = Path(told["temp"])
        assert len(str(folder)) <= MAX_FOLDER
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / "token").stat().st_mode & 0o777 == 0o600
        assert not list(long.iterdir())
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: Ray's processes must be there for whoever wants to end in order
        out, err = process.communicate(timeout=90)
        assert out == "still there\n"
        assert err.startswith("Traceback"), "Ray itself says nothing"
        assert err.strip().endswith("KeyboardInterrupt")
    assert not folder.exists()
    wait_until(lambda: not _processes(str(folder)), seconds=5)


def test_a_connection_without_the_token_is_refused(ray_here: Capacity) -> None:
    """Connecting needs the token."""
    import ray

    address, clean = ray.get_runtime_context().gcs_address, without_ray_variables(os.environ)
    strangers = [{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}, {"RAY_AUTH_MODE": "disabled"}]
    member = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
    asking = [
        subprocess.Popen([sys.executable, "-c", ASK, address], env={**clean, **who}, stdout=-1, stderr=-1, text=True)
        for who in (*strangers, member)
    ]
    answers = [process.communicate(timeout=60) for process in asking]
    for _, refusal in answers[:2]:
        assert "AuthenticationError" in refusal
    assert "session_name" not in answers[0][0] + answers[1][0]
    assert "session_name" in answers[2][0]


@pytest.mark.ray
def test_a_killed_process_leaves_checkpoints_and_a_folder(tmp_path: Path) -> None:
    """All its processes exit, a stage writes a checkpoint; the next sweep removes the folder."""
    with _own_ray(str(tmp_path)) as (process, told):
        process.kill()
        process.wait(10)
        wait_until(lambda: not _processes(told["temp"]))
    assert list(tmp_path.glob("results/store/finetune/*/checkpoint/state.json"))
    with private_folder():
        assert not Path(told["temp"]).exists()


def test_a_ray_that_does_not_start_is_one_line_that_names_its_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the logs are kept."""

    def fails(**options: Any) -> None:
        raise RuntimeError("no room\nand more")

    monkeypatch.setattr(ray_cluster, "_init", fails)
    monkeypatch.setattr(ray_cluster, "_leave", lambda: None)
    before = dict(os.environ)
    with pytest.raises(InternalError) as raised, ray_cluster.ray_here(Capacity(1, (), 1.0), REPOSITORY):
        pytest.fail("it did not start")
    assert str(raised.value).startswith("Ray did not start: no room; its logs: ")
    assert "\n" not in str(raised.value)
    assert Path(str(raised.value).rpartition(": ")[2]).parents[2].is_dir()
    assert dict(os.environ) == before


def test_joining_without_an_address_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InternalError, match="RAY_ADDRESS is not set"), ray_joined():
        pytest.fail("there is none")


def test_the_environment_of_every_process_of_a_sweep(tmp_path: Path) -> None:
    """No telemetry, no dashboards, the token if given; variables of another Ray are removed."""
    found = ray_environment(tmp_path, tmp_path / "token")
    assert found["RAY_USAGE_STATS_ENABLED"] == "0"
    assert (found["RAY_AUTH_MODE"], found["RAY_AUTH_TOKEN_PATH"]) == ("token", str(tmp_path / "token"))
    assert ray_environment(tmp_path, None)["RAY_AUTH_MODE"] == "disabled"
    mixed = {
        "RAY_ADDRESS": "elsewhere:1",
        "RAY_AUTH_TOKEN": "x",
        "TUNE_RESULT_DIR": "/x",
        "RAY_raylet_start_wait_time_s": "60",
        "PATH": "p",
    }
    assert without_ray_variables(mixed) == {"RAY_raylet_start_wait_time_s": "60", "PATH": "p"}


def test_a_private_folder_is_private_short_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a long name of the temporary folder; however the block ends."""
    long = tmp_path / ("long" * 20)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with contextlib.suppress(ValueError), private_folder() as folder:
        assert len(str(folder)) <= MAX_FOLDER
        assert folder.stat().st_mode & 0o777 == 0o700
        raise ValueError
    assert not folder.exists()


def test_only_folders_of_dead_processes_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their locks; a folder without a lock may be just being created."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as base:
        assert len(base) <= MAX_BASE
        monkeypatch.setattr(tempfile, "tempdir", base)
        dead, living, new, old = (Path(base, f"{PREFIX}{name}") for name in ("dead", "living", "new", "old"))
        for folder in (dead, living, new, old):
            (folder / "ray").mkdir(parents=True)
        (dead / "lock").touch()
        os.utime(old, (time.time() - 7200, time.time() - 7200))
        with (living / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with private_folder() as own:
                assert set(Path(base).iterdir()) == {living, new, own}


def test_tokens_are_private_and_unique(tmp_path: Path) -> None:
    one, two = write_token(tmp_path / "one"), write_token(tmp_path / "two")
    assert one.stat().st_mode & 0o777 == 0o600
    assert one.read_text() != two.read_text()
    assert len(one.read_text()) == 64
    with pytest.raises(FileExistsError):
        write_token(one)
