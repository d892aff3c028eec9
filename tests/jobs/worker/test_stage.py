"""The worker: at most one effective execution, verified inputs, recorded outcomes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import UsageError
from jobs.experiment.graph import Node
from jobs.store.attempts import QUIET_SECONDS, new_claim
from jobs.store.cancellations import record_cancellation
from jobs.store.failures import FailureClass
from jobs.store.layout import StageFolder
from jobs.store.records import (
    Ending,
    Outcome,
    attempt_numbers,
    claim_attempt,
    read_claim,
    read_result,
    result_intact,
    write_outcome,
)
from jobs.store.snapshot import check_snapshot, snapshot_facts, take_snapshot
from jobs.worker.main import run_task
from jobs.worker.returned import NotFiniteError, check_returned
from jobs.worker.stage import Verdict, WorkerProcess, execute
from jobs.worker.task import compute, description_from_json, description_to_json, read_description, write_description
from tests.jobs.worker.places import Place, failing


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_stage_is_computed_once(place: Place) -> None:
    """The first worker publishes a result with everything that identifies it, the second exits at once."""
    assert place.execute(place.tapt) is Verdict.done
    assert place.execute(place.tapt) is Verdict.already
    assert place.starts(place.tapt) == 1
    result = place.result(place.tapt)
    assert result_intact(place.folder(place.tapt), result)
    assert set(result.artifacts) == {"sum.json", "parts/note.txt"}
    assert (result.stage, result.fold, result.corpus_digest, result.attempt) == ("tapt", "1", "d1", 1)
    assert result.confusion == ((3, 1), (0, 4))
    assert not place.folder(place.tapt).checkpoint.exists()


def test_provenance_is_complete(place: Place) -> None:
    """Commit from the launcher; versions, host, device, seed, times, memory and threads from the worker."""
    place.execute(place.tapt)
    provenance = place.result(place.tapt).provenance
    assert provenance["commit"] == "abc"
    assert provenance["packages"] == {"pytest": pytest.__version__, "no-such-package": None}
    assert provenance["threads"] == 1
    assert provenance["seed"] == 0
    assert provenance["device"] == "cpu"
    assert provenance["arithmetic"] == {"device": "abacus", "precision": "exact"}
    assert provenance["seconds"] >= 0
    assert provenance["peak_rss_bytes"] > 1 << 20
    assert {"host", "python", "started", "finished", "slurm"} <= set(provenance)


def test_artifacts_flow_downstream(place: Place) -> None:
    """A fine-tuning reads what its pretraining wrote."""
    assert run_task(place.process(place.tapt, place.runs[1]), 0) == 0
    output = place.folder(place.runs[1]).attempt(1).output
    assert json.loads((output / "sum.json").read_text())["sum"] == 45 + 45 + 1


def test_without_an_upstream_result_no_attempt_is_claimed(place: Place) -> None:
    """A task that starts too early claims no attempt and reports which result is missing; its exit code is neither success nor failure."""
    assert run_task(place.process(place.runs[0]), 0) == 3
    assert attempt_numbers(place.folder(place.runs[0])) == ()
    assert any("no result of tapt" in line for line in place.said)


def test_a_result_with_a_damaged_artifact_is_withdrawn(place: Place) -> None:
    """The stage that reads it notices, the result is withdrawn but kept, and its stage is computed again."""
    place.execute(place.tapt)
    artifact = place.folder(place.tapt).attempt(1).output / "sum.json"
    artifact.write_text('{"sum": 46}')
    assert place.execute(place.runs[0]) is Verdict.unready
    assert read_result(place.folder(place.tapt), place.tapt.key) is None
    assert (place.folder(place.tapt).attempt(1).path / "withdrawn.json").is_file()
    assert place.outcome(place.tapt).error == "ArtifactDamaged"
    assert place.execute(place.tapt) is Verdict.done
    assert place.result(place.tapt).attempt == 2
    assert place.execute(place.runs[0]) is Verdict.done


def test_an_artifact_that_cannot_be_read_is_not_damaged(place: Place) -> None:
    """An I/O error while it is read: the result stays, and the attempt that needed it ends with class `storage`, which is retried later."""
    place.execute(place.tapt)
    artifact = place.folder(place.tapt).attempt(1).output / "sum.json"
    kept = artifact.rename(artifact.with_name("kept"))
    artifact.symlink_to("/proc/self/mem")  # reading its start gives EIO
    assert place.execute(place.runs[0]) is Verdict.failed
    assert place.outcome(place.runs[0]).kind == FailureClass.storage.name
    assert place.result(place.tapt).attempt == 1
    artifact.unlink()
    kept.rename(artifact)
    assert place.execute(place.runs[0]) is Verdict.done


def test_a_missing_artifact_is_computed_again(place: Place) -> None:
    """A result without its artifacts counts as missing."""
    place.execute(place.tapt)
    (place.folder(place.tapt).attempt(1).output / "sum.json").unlink()
    assert place.execute(place.tapt) is Verdict.done
    assert place.result(place.tapt).attempt == 2


def test_an_upstream_result_that_becomes_visible_late_is_waited_for(place: Place) -> None:
    """A shared folder may lag: the worker checks again for `lag_seconds`."""
    place.execute(place.tapt)
    result = place.folder(place.tapt).result
    hidden = result.rename(result.with_name("hidden"))
    code = f"import time, os; time.sleep(0.4); os.rename({str(hidden)!r}, {str(result)!r})"
    with subprocess.Popen([sys.executable, "-c", code]):
        assert execute(place.process(place.runs[0], lag_seconds=20.0), place.runs[0]) is Verdict.done


def test_a_live_claim_is_left_alone(place: Place) -> None:
    """Another worker computes it: no second execution, and the task is unfinished."""
    claim_attempt(place.folder(place.tapt), 1, new_claim(1))
    assert run_task(place.process(place.tapt), 0) == 3
    assert place.starts(place.tapt) == 0
    assert any("works on it" in line for line in place.said)


def test_a_dead_claim_is_followed_by_the_next_attempt(place: Place) -> None:
    """The process that claimed it has ended: attempt 2 computes the stage."""
    claim_attempt(place.folder(place.tapt), 1, replace(new_claim(1), pid=2**22 - 1))
    assert place.execute(place.tapt) is Verdict.done
    assert place.result(place.tapt).attempt == 2


def test_an_attempt_folder_without_a_claim_is_the_next_attempt(place: Place) -> None:
    """Two workers that start at once use the same folder, and the claim decides: neither takes another number."""
    place.folder(place.tapt).attempt(1).path.mkdir(parents=True)
    assert place.execute(place.tapt) is Verdict.done
    assert place.result(place.tapt).attempt == 1


def test_a_claim_made_between_check_and_claim_wins(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage was unclaimed when it was checked and is claimed a moment later: the second claim fails, without taking the next number."""

    def look(process: WorkerProcess, folder: StageFolder, node: Node) -> str:
        claim_attempt(folder, 1, new_claim(1))
        return ""

    monkeypatch.setattr("jobs.worker.stage._wait_for_holder", look)
    assert place.execute(place.tapt) is Verdict.taken
    assert place.starts(place.tapt) == 0


def test_a_claim_on_another_node_without_heartbeats_is_waited_for(place: Place) -> None:
    """A worker killed on another node writes no outcome: the next neither exits nor starts before the heartbeat is old enough."""
    claim_attempt(place.folder(place.tapt), 1, replace(new_claim(1), process_start="", host="elsewhere", slurm_job="7_0"))
    heartbeat = time.time() - QUIET_SECONDS + 1.5
    os.utime(place.folder(place.tapt).attempt(1).claim, (heartbeat, heartbeat))
    assert place.execute(place.tapt) is Verdict.done
    assert place.result(place.tapt).attempt == 2
    begun = json.loads(place.folder(place.tapt).attempt(2).claim.read_text())["started"]
    assert begun >= heartbeat + QUIET_SECONDS


def test_an_exception_is_recorded(tmp_path: Path) -> None:
    """Class, first line and traceback; exit code 1; the next execution is a new attempt."""
    place = failing(tmp_path, "fail:1")
    assert run_task(place.process(place.tapt), 0) == 1
    outcome = place.outcome(place.tapt)
    assert (outcome.ending, outcome.error, outcome.message) == (Ending.failed, "ValueError", "made to fail, start 1")
    assert outcome.kind == FailureClass.code.name
    assert "_behave" in outcome.detail
    assert place.execute(place.tapt) is Verdict.done


def test_wrong_input_is_refused(tmp_path: Path) -> None:
    """Errors that carry `problems` are errors of the user; all lines are recorded."""
    place = failing(tmp_path, "refuse")
    assert place.execute(place.tapt) is Verdict.refused
    outcome = place.outcome(place.tapt)
    assert (outcome.ending, outcome.kind) == (Ending.refused, FailureClass.refused.name)
    assert outcome.message == "no such checkpoint: name another (and 1 more)"
    assert outcome.detail.splitlines()[1] == "and a second problem"


@pytest.mark.parametrize(("behaviour", "message"), [("nan", "metrics.ua is not a finite number"), ("diverge", "the loss is nan at step 7")])
def test_nan_is_never_published(tmp_path: Path, behaviour: str, message: str) -> None:
    """A NaN metric, or an error of the stage with `diverged`: the training diverged, and there is no result."""
    place = failing(tmp_path, behaviour)
    assert place.execute(place.tapt) is Verdict.failed
    outcome = place.outcome(place.tapt)
    assert outcome.message.startswith(message)
    assert outcome.kind == FailureClass.divergence.name
    assert read_result(place.folder(place.tapt), place.tapt.key) is None


def test_a_result_that_reports_divergence_is_published(tmp_path: Path) -> None:
    """The result holds the metrics and the reason why they do not count."""
    place = failing(tmp_path, "collapse")
    assert place.execute(place.tapt) is Verdict.done
    assert "class prior" in place.result(place.tapt).diverged


@pytest.mark.parametrize(
    ("behaviour", "failure"),
    [("oom:1", FailureClass.memory), ("hostoom:1", FailureClass.memory), ("comm:1", FailureClass.communication)],
)
def test_the_failure_class_is_recorded(tmp_path: Path, behaviour: str, failure: FailureClass) -> None:
    """The policy reads the class, not the message."""
    place = failing(tmp_path, behaviour)
    assert place.execute(place.tapt) is Verdict.failed
    assert place.outcome(place.tapt).kind == failure.name


def test_a_stage_that_has_diverged_is_not_computed_again(tmp_path: Path) -> None:
    """Neither by a job that turns up late, nor with a result that counts: the slot has moved on to another seed."""
    place = failing(tmp_path, "nan")
    assert place.execute(place.tapt) is Verdict.failed
    assert place.execute(place.tapt) is Verdict.diverged
    assert place.starts(place.tapt) == 1
    assert "diverged" in place.said[-1]


def test_a_result_of_a_stage_that_diverged_meanwhile_says_so(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt that counted as dead wrote its outcome while the next one computed."""
    claim_attempt(place.folder(place.tapt), 1, replace(new_claim(1), host="elsewhere", process_start=""))
    os.utime(place.folder(place.tapt).attempt(1).claim, (1, 1))

    def compute_meanwhile(*arguments: Any) -> Mapping[str, Any]:
        outcome = Outcome(1, Ending.failed, "NotFiniteError", "the loss is nan", "", "elsewhere", 1.0, kind=FailureClass.divergence.name)
        write_outcome(place.folder(place.tapt).attempt(1), outcome)
        return compute(*arguments)

    monkeypatch.setattr("jobs.worker.stage.compute", compute_meanwhile)
    assert place.execute(place.tapt) is Verdict.done
    assert (place.result(place.tapt).attempt, place.result(place.tapt).diverged) == (2, "NotFiniteError: the loss is nan")


def test_relief_reaches_the_stage_and_the_record(tmp_path: Path) -> None:
    """A stage that needs half the memory succeeds with relief 1; claim and result record it."""
    place = failing(tmp_path, "oom:1")
    process = place.process(place.tapt)
    process.description = replace(process.description, relief=1)
    assert execute(process, place.tapt) is Verdict.done
    claim = read_claim(place.folder(place.tapt).attempt(1))
    assert claim is not None
    assert claim.relief == place.result(place.tapt).provenance["relief"] == 1


def test_a_claim_records_the_log_and_the_checkpoint(place: Place) -> None:
    """From these the policy detects progress, and the user finds the output."""
    checkpoint = place.folder(place.tapt).checkpoint
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    os.utime(checkpoint / "state.json", (77.0, 77.0))
    process = place.process(place.tapt)
    process.log = "/logs/one.out"
    execute(process, place.tapt)
    claim = read_claim(place.folder(place.tapt).attempt(1))
    assert claim is not None
    assert (claim.log, claim.checkpoint, claim.relief) == ("/logs/one.out", 77.0, 0)
    assert claim.node


def test_another_corpus_is_refused(place: Place) -> None:
    """The corpus must still be the one of the launch."""
    (place.corpus / "digest").write_text("d2")
    assert place.execute(place.tapt) is Verdict.refused
    assert "was prepared again since the launch (digest d2" in place.outcome(place.tapt).message
    assert place.starts(place.tapt) == 0


def test_a_corpus_that_is_prepared_again_during_a_stage_gives_no_result(place: Place) -> None:
    """The stage may have read parts of both."""
    process = place.process(place.tapt)

    def report(line: str) -> None:
        if "start 1 with" in line:  # the stage is being computed
            (place.corpus / "digest").write_text("d2")

    process.report = report
    assert execute(process, place.tapt) is Verdict.refused
    assert "while the stage was computed" in place.outcome(place.tapt).message
    assert read_result(place.folder(place.tapt), place.tapt.key) is None
    assert place.starts(place.tapt) == 1


def test_changed_code_is_refused(place: Place, tmp_path: Path) -> None:
    """The snapshot of the launch is verified once in every process, before anything is computed."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "launch.py").write_text("print(1)\n")
    snapshot = take_snapshot(tmp_path / "source", place.layout)
    place.place = replace(place.place, code=snapshot_facts(snapshot))
    assert place.execute(place.tapt) is Verdict.done
    assert place.result(place.tapt).provenance["snapshot"] == snapshot.digest
    (snapshot.path / "launch.py").write_text("print(2)\n")
    assert place.execute(place.runs[0]) is Verdict.done  # this process has verified it
    check_snapshot.cache_clear()
    assert place.execute(place.runs[1]) is Verdict.refused
    assert "this copy of the code was changed since the launch (launch.py)" in place.outcome(place.runs[1]).message
    assert place.starts(place.runs[1]) == 0


def test_a_failed_stage_does_not_end_its_task(tmp_path: Path) -> None:
    """Runs of one task are independent: the one after a failure is computed; the exit code reports the failure."""
    place = Place(tmp_path, {"failing": {"finetune tapt 1 0": "fail:9"}})
    place.execute(place.tapt)
    assert run_task(place.process(*place.runs), 0) == 1
    assert [place.starts(node) for node in place.runs] == [1, 1, 1]
    assert place.result(place.runs[2]).metrics["ua"] == 50.0 + 92 % 50


def test_a_registry_that_cannot_be_imported_is_a_recorded_failure(place: Place) -> None:
    """Broken code counts as an attempt, so that it is not retried without end."""
    place.place = replace(place.place, registry="no_such_module:REGISTRY")
    assert place.execute(place.tapt) is Verdict.failed
    assert (place.outcome(place.tapt).error, place.outcome(place.tapt).kind) == ("ModuleNotFoundError", "code")


@pytest.mark.parametrize("lasting", [False, True])
def test_a_module_that_could_not_be_looked_up_is_a_storage_error(place: Place, monkeypatch: pytest.MonkeyPatch, lasting: bool) -> None:
    """The import system takes EIO for a missing file. `lasting`: until the outcome is written. Before: class `code`, never retried."""
    folder, stat = place.layout.root.parent / "code", os.stat
    folder.mkdir()
    (folder / "looked_up.py").write_text("from tests.jobs.fake_registry import REGISTRY\n")
    monkeypatch.syspath_prepend(str(folder))
    left = 1000 if lasting else 2

    def failing(path: Any, **named: Any) -> os.stat_result:
        nonlocal left
        if str(path).startswith(str(folder)) and left:
            left -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return stat(path, **named)

    place.place = replace(place.place, registry="looked_up:REGISTRY")
    monkeypatch.setattr("posix.stat", failing)  # of the import system
    monkeypatch.setattr("os.stat", failing)
    assert place.execute(place.tapt) is Verdict.failed
    assert (place.outcome(place.tapt).error, place.outcome(place.tapt).kind) == ("ModuleNotFoundError", "storage")


@pytest.mark.parametrize(
    ("returned", "error"),
    [
        ({"metrics": {"ua": [1.0, float("inf")]}}, NotFiniteError),
        ({"metrics": {"ua": object()}}, TypeError),
        ({"metrics": {}, "weights": [1]}, ValueError),
    ],
)
def test_invalid_return_values_are_errors(returned: dict[str, Any], error: type[Exception]) -> None:
    """Not finite, not JSON, not a known key."""
    with pytest.raises(error):
        check_returned(returned)


def test_a_description_is_read_as_it_was_written(place: Place, tmp_path: Path) -> None:
    """Another schema or an incomplete file is a UsageError."""
    description = place.process(*place.runs).description
    assert set(description.nodes) == {place.tapt.key, *(node.key for node in place.runs)}
    write_description(tmp_path / "tasks.json", description)
    assert read_description(tmp_path / "tasks.json") == description
    value = description_to_json(description)
    with pytest.raises(UsageError, match="schema 2"):
        description_from_json({**value, "schema": 2})
    with pytest.raises(UsageError, match="another version"):
        description_from_json({**value, "place": {**value["place"], "unheard": 1}})
    (tmp_path / "tasks.json").write_text("{")
    with pytest.raises(UsageError, match="no complete task description"):
        read_description(tmp_path / "tasks.json")


def test_a_stage_cancelled_since_the_launch_is_not_started(place: Place) -> None:
    """An array task that has other stages too cannot be cancelled: its worker skips the cancelled stage. A later launch lifts that."""
    record_cancellation(place.layout, [place.tapt.key], 1000.0)
    place.place = replace(place.place, launched=900.0)
    assert place.execute(place.tapt) is Verdict.cancelled
    assert place.starts(place.tapt) == 0
    place.place = replace(place.place, launched=1100.0)
    assert place.execute(place.tapt) is Verdict.done
