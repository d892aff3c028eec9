"""`export`: what the registry is given, and what is refused: stages without a result, changed artifacts, folders with files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jobs.commands import export as export_module
from jobs.commands.export import export_run
from jobs.errors import InternalError, UsageError
from tests.jobs.bundle_cases import compute
from tests.jobs.local_launch import new_session


def write(stage: str, **request: Any) -> list[str]:
    """A registry's function that writes what it is given."""
    (request["folder"] / "written").write_text(stage)
    facts = request["facts"]
    assert (facts["run"], facts["licence"], facts["planned"], list(facts["cells"])) == ("tapt/1/0", "mit", 1, ["1"])
    return [f"{stage} from {request['upstream']['backbone'].name}, merged {request['merged']}, onnx {request['onnx']}"]


def refuse(stage: str, *, folder: Path, **request: Any) -> list[str]:
    """One that finds after its first file that it cannot."""
    del request
    (folder / "half").write_text(stage)
    raise UsageError("nothing to export")


class NotReproducedError(Exception):
    not_reproduced = True


def files(folder: Path) -> Mapping[str, str]:
    return {each.name: each.read_text() for each in folder.iterdir()}


def test_a_finished_run_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the artifacts of the run and of its upstream stages. After an error the folder is as before; one with files is left alone."""
    session = new_session(tmp_path, methods=("tapt",))
    upstream, last = session.launched.graph.nodes.values()
    out = tmp_path / "out"
    for stage, missing in ((last, "finetune tapt fold 1"), (upstream, "tapt tapt fold 1")):
        with pytest.raises(UsageError, match=rf"tapt/1/0: export needs its finished stages, and {missing}.* has no result"):
            export_run(session, "tapt/1/0", out, write, merged=False)
        compute(session.launched.layout, stage)
    assert not out.exists()
    with pytest.raises(UsageError, match="nothing to export"):
        export_run(session, "tapt/1/0", out, refuse, merged=False)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(UsageError, match="nothing to export"):
        export_run(session, "tapt/1/0", out, refuse, merged=False)
    assert files(out) == {}
    export_run(session, "tapt/1/0", out, write, merged=True, onnx=True, licence="mit")
    assert files(out) == {"written": "finetune"}
    assert capsys.readouterr().out.splitlines() == [str(out), "finetune from output, merged True, onnx True"]
    with pytest.raises(UsageError, match=f"--out {out}: not an empty folder"):
        export_run(session, "tapt/1/0", out, refuse, merged=True)
    assert files(out) == {"written": "finetune"}

    (session.launched.layout.stage(upstream.stage, upstream.key).attempt(1).output / "weights.safetensors").write_bytes(b"other")
    with pytest.raises(UsageError, match=r"files of tapt tapt fold 1 .* are missing or changed; .*explain exp tapt/1/0.* lists them"):
        export_run(session, "tapt/1/0", tmp_path / "new", write, merged=True)


def test_a_run_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its settings and changed runtime, outside the store; what it wrote lasts until the export ends. A poor one is an error."""
    monkeypatch.setattr(export_module, "limit_threads", lambda count: None)
    session = new_session(tmp_path)
    (node,) = session.launched.graph.nodes.values()
    compute(session.launched.layout, node)
    before = {path: path.read_bytes() for path in session.launched.layout.root.rglob("*") if path.is_file()}
    made: list[Path] = []

    def repeat(stage: str, **request: Any) -> list[str]:
        made.append(request["train_again"]({"seconds": 0.0}))
        (request["folder"] / "sum").write_bytes((made[0] / "sum.json").read_bytes())
        return []

    def differ(stage: str, **request: Any) -> list[str]:
        raise NotReproducedError(f"{stage} predicts otherwise")

    export_run(session, "vft/1/0", tmp_path / "out", repeat)
    assert files(tmp_path / "out") == {"sum": '{"sum": 45}'}
    assert not made[0].exists()
    assert {path: path.read_bytes() for path in session.launched.layout.root.rglob("*") if path.is_file()} == before
    with pytest.raises(InternalError, match="vft/1/0: finetune predicts otherwise"):
        export_run(session, "vft/1/0", tmp_path / "other", differ)
    assert not (tmp_path / "other").exists()
