"""Records with values of the wrong type: reported by path, counted as missing, and never an exception that stops a look or a pass."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.commands.explain import print_explanation
from jobs.commands.notify import Notice, read_notices
from jobs.commands.session import Session
from jobs.commands.status import read_status
from jobs.commands.status_report import problem_lines, status_to_json
from jobs.control.controller import run_local
from jobs.control.facts import Asked
from jobs.control.result_index import facts_of
from jobs.errors import UsageError
from jobs.experiment.config import Experiment
from jobs.experiment.launched import Corpus, Launched, launch, reopen, store
from jobs.local.executor import LocalExecutor
from jobs.slurm.chain import ControllerRecord, LinkState, read_record, record_file, write_record
from jobs.slurm.submissions import State, Submission, SubmissionBook, Writer
from jobs.store.attempts import claim_alive
from jobs.store.cancellations import read_cancellations, record_cancellation
from jobs.store.identity import _KNOWN, identity_of, record_identity
from jobs.store.launches import launched_at
from jobs.store.layout import IDENTITY, AttemptFolder, Layout, StageFolder
from jobs.store.records import (
    Claim,
    Ending,
    Outcome,
    Result,
    claim_attempt,
    damaged_records,
    read_claim,
    read_outcome,
    read_result,
    write_json,
    write_outcome,
    write_result,
)
from jobs.store.snapshot import plan_snapshot, take_snapshot
from jobs.sweeps.driver_lock import driver_of
from jobs.sweeps.records import Proposal, Sweep, began, load_sweep, read_proposals, store_sweep, write_proposals
from jobs.sweeps.space import Point
from jobs.text import moment
from tests.jobs import fake_registry, local_launch
from tests.jobs.sweeps.fake_registry import REGISTRY

RESULT = Result(
    key="k1",
    stage="finetune",
    version=1,
    fold="1",
    seed=0,
    corpus="fake",
    corpus_digest="d1",
    settings={"lr": 1e-4},
    upstream={"backbone": "k0"},
    attempt=1,
    metrics={"ua": 0.5},
    provenance={
        "seconds": 2.5,
        "seconds_before": 0.5,
        "peak_rss_bytes": 5.0,
        "processes": 1.0,
        "slurm": {"job_partition": "main"},
    },
    artifacts={"model.bin": "e" * 64},
    confusion=((3, 1), (0, 4)),
    classes=("angry", "sad"),
)
CLAIM = Claim(1, "h", 2, "boot/ns/5", 3.5, "7_0", "n1", "/logs/7_0.out", 1, 2.5, "n1,n2", 1000, "c1")
SUBMISSION = Submission(
    name="exp.finetune.vft.0.1",
    stage="finetune",
    method="vft",
    tasks=(("k1", "k2"), ("k3",)),
    created=100.5,
    state=State.submitted,
    job="7",
    writer=Writer("h", 2, "boot/ns/5"),
    refine=(((0, 1), "afterok:6"),),
    cancelled=(1,),
    left={"0": 101.5},
    ended={"0": "LAUNCH_FAILED"},
    nodes={"0": "n1"},
    asked=Asked(10, 1000, 20, 2000),
)


@dataclass(frozen=True)
class Kind:
    """One kind of record: how a sound one is written, and how it is read and used. `free`: fields that may hold anything."""

    write: Callable[[Path], Path]
    read: Callable[[Path], object]
    free: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()  # fields whose values are the matter of another test
    optional: tuple[str, ...] = ()  # fields that may be null
    refused: bool = False  # a damaged one is a UsageError that names the file: it is the user's to decide


def _layout(folder: Path) -> Layout:
    return Layout(folder / "results", "exp")


def _write_identity(folder: Path) -> Path:
    record_identity(folder)
    return folder / IDENTITY


def _use_identity(folder: Path) -> object:
    _KNOWN.clear()
    return identity_of(folder)


def _write_result(folder: Path) -> Path:
    write_result(StageFolder(folder), RESULT)
    return StageFolder(folder).result


def _use_result(folder: Path) -> object:
    result = read_result(StageFolder(folder), "k1")
    return result and facts_of(result, 5)


def _write_claim(folder: Path) -> Path:
    assert claim_attempt(StageFolder(folder), 1, CLAIM)
    return StageFolder(folder).attempt(1).claim


def _use_claim(folder: Path) -> object:
    claim = read_claim(StageFolder(folder).attempt(1))
    return claim and (claim_alive(claim, 5.0, live_jobs={"7_0"}, now=6.0), claim.team.split(","), moment(claim.started))


def _write_outcome(folder: Path) -> Path:
    attempt = AttemptFolder(folder, 1)
    write_outcome(attempt, Outcome(1, Ending.failed, "E", "m", "d", "h", 1.5, "7_0", "code", "n1"))
    return attempt.outcome


def _write_submission(folder: Path) -> Path:
    book = SubmissionBook(_layout(folder))
    assert book.begin(SUBMISSION)
    return book.folder / f"{SUBMISSION.name}.json"


def _use_submission(folder: Path) -> object:
    found = SubmissionBook(_layout(folder)).open()
    return found and [(each.unexplained, each.all_left, each.job_name, moment(each.created)) for each in found]


def _write_cancellations(folder: Path) -> Path:
    record_cancellation(_layout(folder), ["k1"], 5.5)
    return _layout(folder).cancellations


def _write_experiment(folder: Path) -> Path:
    experiment = Experiment(name="exp", corpus="fake", methods=["vft"], recipe={})
    store(launch(experiment, Corpus("fake", "d1", ("1", "2"), str(folder)), fake_registry.REGISTRY, _layout(folder), "demo"))
    return _layout(folder).experiment_file


def _write_launch_time(folder: Path) -> Path:
    write_json(_layout(folder).experiment_file, {"schema": 1, "launched": 5.5})
    return _layout(folder).experiment_file


def _write_link(folder: Path) -> Path:
    write_record(_layout(folder), ControllerRecord(LinkState.running, "7", "h", 1.5, 2.5, 3, 4.5, 1, 6.5, "E", "8", "p", "m"))
    return record_file(_layout(folder))


def _write_notice(folder: Path) -> Path:
    file = _layout(folder).folder / "notified-mail-5.000-1.json"
    write_json(file, {"schema": 1, **asdict(Notice("mail", "a@b", "sent", 5.5, "h"))})
    return file


def _write_snapshot(folder: Path) -> Path:
    source = folder / "source"
    source.mkdir()
    (source / "launch.py").write_text("first")
    return take_snapshot(source, _layout(folder)).path / "snapshot.json"


def _use_snapshot(folder: Path) -> object:
    (snapshot,) = (path for path in _layout(folder).snapshots.iterdir() if path.name[0] != ".")
    return plan_snapshot(snapshot, _layout(folder))


def _sweep(folder: Path) -> Sweep:
    experiment, corpus = Experiment("exp", "fake", recipe={}), Corpus("fake", "d1", ("1", "2"), "/corpus")
    return Sweep(
        experiment=experiment,
        file="exp",
        corpus=corpus,
        layout=_layout(folder),
        validation={"1": ("a", "b")},
        launched=2.5,
        began=1.5,
        digest="0123456789ab",
        registry=REGISTRY,
        code=folder,
    )


def _write_sweep(folder: Path) -> Path:
    store_sweep(_sweep(folder))
    return _sweep(folder).own_layout.experiment_file


def _use_sweep(folder: Path) -> object:
    sweep = load_sweep(_layout(folder), "0123456789ab", REGISTRY, dict, folder)
    return sweep.folds, sweep.folder, sweep.validation.get("1"), began(_layout(folder), "0123456789ab")


def _write_proposals(folder: Path) -> Path:
    write_proposals(_sweep(folder), [[Proposal({"size": "1"}, Point((16,), (("lr", 0.5),)))]])
    return _sweep(folder).folder / "proposals.json"


def _use_proposals(folder: Path) -> object:
    return [(hash(each.point), each.point.label) for batch in read_proposals(_sweep(folder)) for each in batch]


def _write_turn(folder: Path) -> Path:
    file = folder / "driver" / "0001.json"
    write_json(file, asdict(replace(CLAIM, process_start="")))
    return file


KINDS = {
    "result": Kind(
        *(_write_result, _use_result),
        free=("settings.lr", "metrics.ua"),
        optional=tuple(f"provenance.{name}" for name in RESULT.provenance),
    ),
    "claim": Kind(_write_claim, _use_claim, optional=("uid",)),
    "outcome": Kind(_write_outcome, lambda folder: read_outcome(AttemptFolder(folder, 1))),
    "submission": Kind(_write_submission, _use_submission, optional=("asked",)),
    "cancellations": Kind(
        *(_write_cancellations, lambda folder: read_cancellations(_layout(folder), 0.0)),
        optional=("cancelled.0.keys",),
        refused=True,
    ),
    "experiment": Kind(
        *(_write_experiment, lambda folder: reopen(_layout(folder), fake_registry.REGISTRY, dict)),
        elsewhere=("config",),
        optional=("user",),
        refused=True,
    ),
    "launch time": Kind(_write_launch_time, lambda folder: launched_at(_layout(folder)), free=("schema",)),
    "link": Kind(_write_link, lambda folder: read_record(_layout(folder))),
    "notice": Kind(_write_notice, lambda folder: read_notices(_layout(folder), 5.0)),
    "snapshot": Kind(_write_snapshot, _use_snapshot, free=("folder", "dirty")),
    "sweep": Kind(_write_sweep, _use_sweep, elsewhere=("config",), optional=("user",), refused=True),
    "proposals": Kind(_write_proposals, _use_proposals, free=("batches.0.0.parameters", "batches.0.0.point.settings.lr")),
    "identity": Kind(_write_identity, _use_identity, refused=True),
    "turn": Kind(_write_turn, driver_of, optional=("uid",)),
}
WRONG: tuple[Any, ...] = (
    *(None, True, -1, 5, 10**400, 1.5, 1e300, "text", "", [], [None], ["text"], [[1.5]], {}, {"text": None}),
    *(float("nan"), float("inf")),
)


def _paths(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place in a JSON value, at every depth."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from _paths(inner, (*path, key))


def _put(value: Any, path: tuple[str | int, ...], wrong: object) -> Any:
    changed = copy.deepcopy(value)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = wrong
    return changed


def _at(value: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _same_type(sound: object, wrong: object) -> bool:
    """Whether JSON has one type for both; a whole number is a number too."""
    if isinstance(sound, bool) or isinstance(wrong, bool):
        return isinstance(sound, bool) and isinstance(wrong, bool)
    if isinstance(sound, float):
        return isinstance(wrong, int | float)
    return isinstance(wrong, type(sound))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_field_of_every_record_may_hold_anything(name: str, tmp_path: Path) -> None:
    """Of the wrong type at any depth, a value makes the file damaged and its path known; what is accepted can be used."""
    kind = KINDS[name]
    file = kind.write(tmp_path)
    sound = json.loads(file.read_text())
    kind.read(tmp_path)
    assert not damaged_records(tmp_path)
    tried = 0
    for path in _paths(sound):
        dotted = ".".join(map(str, path))
        if any(dotted.startswith(f"{each}.") for each in kind.elsewhere):
            continue
        free = any(f"{dotted}.".startswith(f"{each}.") for each in kind.free)
        for wrong in WRONG:
            if path == ("schema",) and wrong is True:
                continue  # equals 1
            file.write_text(json.dumps(_put(sound, path, wrong)))
            tried += 1
            refusal = ""
            try:
                kind.read(tmp_path)
            except UsageError as error:
                refusal = str(error)
            assert not refusal or (kind.refused and (f"{file}: damaged" in refusal or "stored configuration" in refusal)), refusal
            damaged = bool(refusal or damaged_records(file))
            fits = free or _same_type(_at(sound, path), wrong) or (wrong is None and dotted in kind.optional)
            assert damaged or fits, f"{dotted} = {wrong!r} was accepted"
            assert not damaged or all(each.startswith(str(file)) for each in damaged_records(tmp_path))
    assert tried >= len(WRONG)
    file.write_text(json.dumps(sound))
    kind.read(tmp_path)
    assert not damaged_records(tmp_path), "a file that was mended is not damaged any more"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=st.sampled_from(sorted(KINDS)), place=st.integers(min_value=0), value=JSON_VALUES, cut=st.integers(0, 400) | st.none())
def test_any_json_in_any_place_stops_nothing(
    tmp_path_factory: pytest.TempPathFactory, name: str, place: int, value: object, cut: int | None
) -> None:
    """Values that no list of wrong ones holds, and files that end too early."""
    folder = tmp_path_factory.mktemp("record")
    kind = KINDS[name]
    file = kind.write(folder)
    sound = json.loads(file.read_text())
    paths = [path for path in _paths(sound) if path[0] not in kind.elsewhere]
    file.write_bytes(json.dumps(_put(sound, paths[place % len(paths)], value)).encode()[:cut])
    try:
        kind.read(folder)
    except UsageError:
        assert kind.refused


def test_a_damaged_file_is_reported_once_and_again_when_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One warning for each file and process, with the path and the field; the list names it until it is mended or removed."""
    file = _write_claim(tmp_path)
    file.write_text(file.read_text().replace("3.5", "null"))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert read_claim(StageFolder(tmp_path).attempt(1)) is None
    assert [record.getMessage() for record in caplog.records] == [
        f"{file}: damaged record, counts as missing: started: Input should be a valid number"
    ]
    assert damaged_records(tmp_path) == (f"{file}: started: Input should be a valid number",)
    assert damaged_records(tmp_path / "elsewhere") == ()
    file.unlink()
    assert damaged_records(tmp_path) == ()


def test_a_file_name_that_is_not_utf_8_does_not_damage_a_record(tmp_path: Path) -> None:
    """Python writes it with lone surrogates, which other readers of JSON refuse."""
    attempt = AttemptFolder(tmp_path, 1)
    outcome = Outcome(1, Ending.failed, "FileNotFoundError", "caf\udce9.wav", "\N{GRINNING FACE}", "h", 1.5)
    write_outcome(attempt, outcome)
    assert read_outcome(attempt) == replace(outcome, message="caf?.wav")


def _spoil(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.slow
def test_one_bad_file_in_a_shared_store_stops_no_other_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`status` and `explain` name the file; a launch of another experiment computes what is missing to its end."""
    recipe: dict[str, object] = {}
    with local_launch.executor(tmp_path) as executor:
        assert run_local(local_launch.desired(tmp_path, recipe), executor).complete
    desired = local_launch.desired(tmp_path, recipe)
    layout = Layout(desired.layout.root, "other")
    desired = replace(desired, layout=layout)
    slurm, started = (desired.graph.nodes[run.key] for run in desired.graph.runs if (run.method, run.fold) == ("vft", "1"))
    bad_result, bad_claim = layout.stage(slurm.stage, slurm.key).result, layout.stage(started.stage, started.key).attempt(1).claim
    _spoil(bad_result, provenance={**json.loads(bad_result.read_text())["provenance"], "slurm": "text"})
    _spoil(bad_claim, started=None, slurm_job=5)
    layout.stage(started.stage, started.key).result.unlink()

    corpus = Corpus("fake", "d1", ("1", "2"), str(tmp_path))
    assert desired.refill is not None
    launched = Launched(Experiment(name="other", corpus="fake"), corpus, desired.graph, layout, desired.since, desired.refill)
    session = Session(launched, local_launch.workplace(tmp_path), tmp_path, tmp_path / "published.yaml")
    status = read_status(session, session.look())
    counts = {(row.method, row.stage): row.counts for row in status.stages}
    assert (counts["vft", "finetune"]["done"], counts["vft", "finetune"]["missing"]) == (2, 2)
    assert status.damaged == (
        *sorted((f"{bad_claim}: started: Input should be a valid number", f"{bad_result}: provenance.slurm: Input should be an object")),
    )
    assert status_to_json(status)["damaged"] == list(status.damaged)
    assert [line for line in problem_lines(status) if str(bad_result) in line]
    print_explanation(session, slurm.key)
    assert f"damaged record, counts as missing: {bad_result}" in capsys.readouterr().out

    place = replace(local_launch.workplace(tmp_path), experiment="other")
    first = local_launch.executor(tmp_path)
    with LocalExecutor(place, layout, first.resources, first.capacity, first.preload) as executor:
        report = run_local(desired, executor)
    assert report.complete
    assert read_result(layout.stage(slurm.stage, slurm.key), slurm.key) is not None
    assert damaged_records(bad_result) == ()
