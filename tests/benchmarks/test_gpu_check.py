"""The GPU check where there is no GPU: all its parts run on the CPU, and what a part has found survives its crash and its time limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_check.__main__ import PROVING
from benchmarks.gpu_check.environment import NEEDED, missing_packages, version_notes
from benchmarks.gpu_check.part_suite import read_report
from benchmarks.gpu_check.parts import PARTS, Part, Plan, chosen_parts, seconds_for
from benchmarks.gpu_check.record import Record, read_findings
from benchmarks.gpu_check.report import as_json, as_text
from benchmarks.gpu_check.runner import DONE, FAILED, NO_TIME, ROOT, TIMED_OUT, PartResult, passed, run_part, run_parts
from tests.waiting import until

NOT_NEEDED = ("fairseq", "ray", "submitit", "soxr", "tensorboard", "pytest", "hypothesis", "pandas", "matplotlib", "optuna", "faiss")
# Read by every Python that starts with it on its path: the packages that the check must do without cannot be found.
BLOCKER = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in {NOT_NEEDED!r} else find(name, path, target)
PathFinder.find_spec = staticmethod(find_spec)
"""


def check(output: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--output", str(output), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


# All parts in one interpreter: each would import torch and transformers again.
ALL_PARTS = """
import importlib, sys
from pathlib import Path
from benchmarks.gpu_check.parts import PARTS, Plan
from benchmarks.gpu_check.record import Record
folder = Path(sys.argv[1])
for part in PARTS:
    importlib.import_module(f"benchmarks.gpu_check.{part.module}").run(Record(folder / f"{part.name}.jsonl", 3600.0), Plan(folder, "cpu"))
    print(part.name, flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_all_parts_run_without_a_gpu_and_with_the_needed_packages_alone(tmp_path: Path) -> None:
    """Every proof holds, every part has its tables, and neither fairseq, Ray, Slurm's submitit nor TensorBoard is there."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALL_PARTS, str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = {part.name: read_findings((tmp_path / f"{part.name}.jsonl").read_text().splitlines()) for part in PARTS}
    assert [(name, proof) for name, each in found.items() for proof in each.proofs if not proof["holds"]] == []
    (note,) = found["suite"].notes
    assert note == "left out: pytest, hypothesis, tensorboard not installed; the part `stages` compares the same stages"
    proofs = {name: [proof["name"] for proof in each.proofs] for name, each in found.items()}
    for stage in ("finetune", "tapt", "states", "ptapt"):
        for setting in ("float32", "bfloat16", "preset published, float32"):
            assert f"{setting}, losses of {stage}" in proofs["stages"]
    assert {"features", "k-means, clusters.4", "fine-tuning after ptapt, test", "layer-norm model, float32, losses of tapt"} <= set(
        proofs["stages"]
    )
    assert "finetune, CPU to transformers' encoder" in proofs["resume"]
    assert proofs["memory"] == ["the whole batch does not fit", "halving makes it fit", "same losses"]
    assert "finetune in two processes, cpu:gloo,cuda:gloo" in proofs["processes"]
    tables = {name: rows for each in found.values() for name, rows in each.rows.items()}
    assert {(row["stage"], row["setting"]) for row in tables["steps"]} == {
        *((stage, "ours") for stage in ("finetune", "tapt", "states", "ptapt")),
        ("finetune", "reference"),
    }
    assert all(0 < row["share_of_matrix_peak"] < 1 for row in tables["steps"])
    assert [row["part_seconds"] for row in tables["part_seconds"]] == [2.0, 8.0]
    assert [row["at_once"] for row in tables["together"]] == [1, 2]
    assert [row["way"] for row in tables["compile"]] == ["as it is", "torch.compile"]
    assert [row["implementation"] for row in tables["adam"]] == ["fused", "foreach", "loop"]
    assert {"attention", "k_means", "batch", "busy", "kernels", "ratios", "machine"} <= set(tables)


@pytest.mark.slow
def test_the_command_without_a_gpu(tmp_path: Path) -> None:
    """The JSON, the page and the exit code of two parts."""
    ran = check(tmp_path, "--cpu", "--only", "environment", "memory", "--seconds", "500")
    found = json.loads((tmp_path / "results.json").read_text())
    text = (tmp_path / "report.txt").read_text()
    assert ran.returncode == 0, text
    assert text.startswith("PASSED: 4 of 4 proofs hold\nCPU halves only: nothing here is about a GPU\n")
    assert text in ran.stdout
    assert (found["schema"], found["device"], found["complete"], found["passed"]) == (1, "cpu", True, True)
    assert [(part["name"], part["status"]) for part in found["parts"]] == [("environment", DONE), ("memory", DONE)]
    assert set(found["parts"][0]) == {"name", "title", "status", "seconds", "limit", "proofs", "rows", "notes", "error"}
    assert found["environment"]["torch"] == torch.__version__
    assert (found["advice"], found["goals"]) == ([], [])  # small models on a CPU say nothing about a GPU


@pytest.mark.slow
def test_the_gpu_tests_of_the_suite_are_found_and_skipped_here(tmp_path: Path) -> None:
    ran = check(tmp_path, "--cpu", "--only", "suite", "--seconds", "500")
    assert ran.returncode == 0, ran.stdout
    (part,) = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert part["proofs"] == [{"name": "tests that need a GPU are skipped", "holds": True, "text": "9 of 9 skipped"}]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_check_of_one_ends_at_once_and_says_so(tmp_path: Path) -> None:
    ran = check(tmp_path)
    assert ran.returncode == 2
    text = (tmp_path / "report.txt").read_text()
    assert "sees no GPU; `--cpu` runs the halves that need none" in text
    assert [part["name"] for part in json.loads((tmp_path / "results.json").read_text())["parts"]] == ["environment"]


def test_what_is_missing_is_named_in_one_line(tmp_path: Path) -> None:
    """A Python without any package, and `make` with it as PYTHON."""
    command = [sys.executable, "-S", "-m", "benchmarks.gpu_check", "--output", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert f"lacks {', '.join(NEEDED.values())}: pip install" in line
    assert missing_packages(("json", "no_such_module")) == ["no_such_module"]
    dry = subprocess.run(
        ["make", "--no-print-directory", "-n", "gpu-check", "PYTHON=py", "ARGS=--cpu"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert dry.stdout == "py -m benchmarks.gpu_check --cpu\n"


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    ran = check(tmp_path, "--only", "stage")
    assert ran.returncode == 2
    assert ran.stderr.startswith("gpu-check: --only stage: no such part; known are environment, suite, ")
    assert [part.name for part in chosen_parts(["steps", "stages"])] == ["stages", "steps"]


def fake(name: str, seconds: float = 10.0) -> Part:
    return Part(name, f"a part that is {name}", f"tests.benchmarks.gpu_check_parts.{name}", seconds, seconds)


@pytest.mark.slow
def test_a_part_that_crashes_or_hangs_leaves_what_was_found(tmp_path: Path) -> None:
    """Its findings so far, the other parts, and no process; the JSON and the page are written after every part."""
    pages: list[str] = []

    def report(results: list[PartResult]) -> None:
        pages.append(as_text(as_json(results, device="cpu", commit="abc", passed=False, complete=len(results) == 3)))

    parts = [fake("crashing", 20), fake("hanging", 6), fake("ending", 20)]
    crashed, hung, ended = run_parts(parts, Plan(tmp_path, "cpu"), tmp_path, 46.0, report, lambda line: None)
    assert (crashed.status, hung.status, ended.status) == (FAILED, TIMED_OUT, DONE)
    assert crashed.proofs == [{"name": "before the crash", "holds": True, "text": "kept"}]
    assert crashed.error.startswith("signal SIGSEGV; log: ")
    assert "the last words of the part" in crashed.error
    assert hung.seconds < hung.limit + 5
    until(lambda: is_gone(hung.rows["children"][0]["pid"]))
    assert ended.rows == {"numbers": [{"value": True}]}
    assert [page.splitlines()[0] for page in pages] == [
        "NOT COMPLETE: 1 of 1 proofs hold",
        "NOT COMPLETE: 1 of 1 proofs hold",
        "FAILED: 2 of 2 proofs hold",
    ]
    assert "crashing: failed: signal SIGSEGV" in pages[-1]
    assert "hanging: timed out: killed after" in pages[-1]


def is_gone(pid: int) -> bool:
    """Whether a process has ended; a zombie that its new parent has not yet waited for has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return True
    return state in "ZX"


def test_a_part_without_time_is_not_started(tmp_path: Path) -> None:
    result = run_part(fake("ending"), Plan(tmp_path, "cpu"), tmp_path, 1.0)
    assert (result.status, result.proofs) == (NO_TIME, [])
    assert not (tmp_path / "ending.log").exists()


def test_proofs_decide_and_measurements_do_not() -> None:
    """A proving part must be done and hold; a part that only measures may fail."""

    def result(name: str, status: str, holds: bool = True) -> PartResult:
        return PartResult(name, "", status, 1.0, 2.0, [{"name": "p", "holds": holds, "text": ""}], {}, [], "")

    parts = chosen_parts(["environment", "stages", "compile"])
    good = [result("environment", DONE), result("stages", DONE), result("compile", TIMED_OUT)]
    assert passed(good, parts, PROVING)
    assert not passed(good[:1], parts, PROVING)
    assert not passed([good[0], result("stages", TIMED_OUT), good[2]], parts, PROVING)
    assert not passed([*good[:2], result("compile", DONE, holds=False)], parts, PROVING)
    assert {part.name for part in PARTS} >= PROVING


def test_time_is_divided_by_the_shares_of_what_is_left() -> None:
    shares = [part.gpu_seconds for part in PARTS]
    left, limits = 480.0, []
    for number in range(len(shares)):
        limits.append(seconds_for(shares[number:], left))
        left -= limits[-1]
    assert left == pytest.approx(0)
    assert limits[0] / limits[-1] == pytest.approx(shares[0] / shares[-1])
    assert seconds_for([1.0, 1.0], 100.0) == 50.0
    assert seconds_for([1.0], -3.0) == 0.0


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "found.jsonl"
    record = Record(path, 60.0)
    record.proof("one", True, "text")
    record.row("table", value=1.5)
    record.note("x" * 1_000)
    assert record.has_time(1.0, "this")
    assert not record.has_time(100.0, "that")
    lines = path.read_text().splitlines()
    found = read_findings([*lines, lines[0][:20]])
    assert [proof["name"] for proof in found.proofs] == ["one"]
    assert found.rows == {"table": [{"value": 1.5}]}
    assert (len(found.notes[0]), found.notes[1]) == (243, "left out for lack of time: that")


def test_versions_outside_the_range_are_noted() -> None:
    assert version_notes((3, 12), {"torch": "2.11.0+cu130", "transformers": "5.23.1"}) == []
    notes = version_notes((3, 10), {"torch": "2.14.0", "transformers": "4.57.0"})
    assert [note.split(":")[0] for note in notes] == ["Python 3.10", "torch 2.14.0", "transformers 4.57.0"]


def test_outcomes_are_read_from_a_report_of_pytest(tmp_path: Path) -> None:
    xml: Any = (
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><skipped/></testcase>'
        '<testcase name="c"><failure message="assert 1 == 2&#10;more"/></testcase></testsuite></testsuites>'
    )
    (tmp_path / "suite.xml").write_text(xml)
    assert read_report(tmp_path / "suite.xml") == {"a": "passed", "b": "skipped", "c": "failure: assert 1 == 2"}
