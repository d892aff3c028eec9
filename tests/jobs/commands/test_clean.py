"""What `clean` frees, and what it never touches: real experiments of a small registry that share a store."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.commands.clean import Asked, clean
from jobs.commands.disk import in_units, list_lines, rows_of, usage_lines, usage_of
from jobs.commands.owners import Opening, experiment_names, read_experiments
from jobs.commands.session import Session
from jobs.control.controller import Report
from jobs.control.executor_protocol import Batch, Task
from jobs.errors import UsageError
from jobs.experiment.config import Experiment, OutlierRule, Policy
from jobs.experiment.launched import Corpus, launch, reopen, store
from jobs.experiment.sweep_section import SweepSettings
from jobs.slurm.submissions import SubmissionBook, new_submission
from jobs.store.attempts import new_claim
from jobs.store.cancellations import record_cancellation
from jobs.store.layout import Layout, StageFolder
from jobs.store.records import Ending, Outcome, claim_attempt, read_result, write_outcome
from jobs.store.usage import ASIDE, Size, remove, size_of, stored_stages
from jobs.sweeps.stages import every_stage
from jobs.worker.stage import WorkerProcess, execute
from jobs.worker.task import describe
from tests.command_line import ROOT
from tests.jobs.fake_registry import REGISTRY, make_corpus
from tests.jobs.local_launch import workplace
from tests.jobs.sweeps.fake_registry import load, make_sweep, place_of

FAILING = {"finetune vft 1 1": "diverge", "finetune vft 2 0": "fail:9", "finetune vft 2 1": "collapse"}
LARGE = bytes(1 << 20)


class Folder:
    """A results folder: launches experiments of the small registry, whose stages the real worker computes in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "results"
        self.corpus = make_corpus(folder / "corpus")

    def layout(self, name: str) -> Layout:
        return Layout(self.root, name)

    def run(self, name: str, *methods: str, seeds: int = 2, **recipe: Any) -> Report:
        experiment = Experiment(
            name=name,
            corpus="fake",
            methods=list(methods),
            seeds=seeds,
            recipe=recipe,
            policy=Policy(outliers=OutlierRule.none, max_seeds=1),
        )
        launched = launch(experiment, Corpus("fake", "d1", ("1", "2"), str(self.corpus)), REGISTRY, self.layout(name))
        store(launched)
        place = replace(workplace(self.folder), experiment=name, launched=launched.since)
        for node in launched.graph.nodes.values():
            log = self.layout(name).log_of(node.stage, node.key)
            log.parent.mkdir(exist_ok=True)
            description = describe(place, launched.graph, [[node.key]])
            with log.open("a") as file:
                execute(WorkerProcess(description, 1, lambda line: print(line, file=file), log=str(log), lag_seconds=0.0), node)
        return self.session(name).look()

    def session(self, name: str) -> Session:
        launched = reopen(self.layout(name), REGISTRY, dict)
        return Session(launched, workplace(self.folder), ROOT, ROOT / "configs" / "published.yaml", patient=False)

    @property
    def opening(self) -> Opening:
        def no_sweep(name: str, digest: str) -> Any:
            raise AssertionError(f"{name} has no sweep {digest}")

        return Opening(self.session, no_sweep)

    def clean(self, experiment: str = "", **options: Any) -> None:
        clean(self.root, self.opening, Asked(experiment, **options))

    def stage(self, report: Report, name: str) -> Path:
        """Folder of the last stage of a run, with something large in its checkpoint."""
        run = next(run for run in report.graph.runs if run.name == name)
        folder = self.layout("one").stage("finetune", run.key)
        folder.checkpoint.mkdir(exist_ok=True)
        (folder.checkpoint / "step1").write_bytes(LARGE)
        return folder.path

    def interrupted(self, report: Report, name: str) -> Path:
        """The same, of a run whose attempt was interrupted before it had a result."""
        path = self.stage(report, name)
        (path / "result.json").unlink()
        write_outcome(StageFolder(path).attempt(1), Outcome(1, Ending.interrupted, "Interrupted", "at step 1", "", "here", 1.0))
        return path


def tree(folder: Path) -> dict[str, int]:
    """Every path below a folder, with its size."""
    return {str(path.relative_to(folder)): path.lstat().st_size for path in folder.rglob("*")}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_leftovers_of_what_failed_are_freed_and_nothing_else(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """Checkpoints and outputs of a diverged run, a failed one, and beside a result; results, logs, records and tables stay."""
    report = folder.run("one", "vft", "tapt", failing=FAILING)
    kept = {key: read_result(folder.layout("one").stage(report.graph.nodes[key].stage, key), key) for key in report.graph.nodes}
    diverged, failed, done = (folder.stage(report, name) for name in ("vft/1/1", "vft/2/0", "vft/1/0"))
    before = tree(folder.root)
    folder.clean(dry_run=True)
    shown = capsys.readouterr().out
    for line in ("would free 1.1 MB: 1 x checkpoint/ of finetune (diverged)", "1 x checkpoint/ of finetune (given up)"):
        assert line in shown
    assert tree(folder.root) == before
    folder.clean()
    printed = capsys.readouterr().out
    assert "frees 1.1 MB: 1 x checkpoint/ of finetune (diverged)" in printed
    assert printed.splitlines()[-1].startswith("freed 3.2 MB, ")
    gone = before.keys() - tree(folder.root).keys()
    assert {name.split("/")[3] for name in gone if name.count("/") >= 3} <= {"checkpoint", "attempts"}
    for path in (diverged, failed, done):
        assert not (path / "checkpoint").exists()
        assert (path / "attempts" / "0001" / "claim.json").is_file()
        assert (path / "attempts" / "0001" / "output").exists() == (path == done)
    after = {key: read_result(folder.layout("one").stage(report.graph.nodes[key].stage, key), key) for key in report.graph.nodes}
    assert after == kept
    now = folder.session("one").look()
    assert (now.plan, now.judgements) == (report.plan, report.judgements)
    folder.clean()
    assert capsys.readouterr().out == "nothing to free\n"
    folder.clean(experiment="one")
    assert "the results and tables of one stay; `python launch.py clean one --whole` removes them" in capsys.readouterr().out


def test_what_may_be_continued_is_kept_until_it_is_cancelled(folder: Folder) -> None:
    """An unfinished stage without a reason against it keeps its checkpoint; a cancelled one does not."""
    report = folder.run("one", "vft", seeds=1)
    path = folder.interrupted(report, "vft/1/0")
    folder.clean()
    assert (path / "checkpoint" / "step1").is_file()
    record_cancellation(folder.layout("one"), None, time.time())
    folder.clean()
    assert not (path / "checkpoint").exists()


def test_what_another_experiment_may_continue_is_kept(folder: Folder) -> None:
    """Two experiments have the same stage: cancelled in one of them, it keeps its checkpoint for the other."""
    report = folder.run("one", "vft", seeds=1)
    folder.run("two", "vft", seeds=1)
    path = folder.interrupted(report, "vft/1/0")
    record_cancellation(folder.layout("one"), None, time.time())
    folder.clean()
    assert (path / "checkpoint" / "step1").is_file()
    record_cancellation(folder.layout("two"), None, time.time())
    folder.clean()
    assert not (path / "checkpoint").exists()


def test_what_a_process_computes_is_not_touched(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """A claim of a living process, on a stage that is cancelled; or a submission that is not known to have ended."""
    report = folder.run("one", "vft", failing={"finetune vft * *": "fail:9"})
    computed, queued = (folder.stage(report, name) for name in ("vft/1/0", "vft/2/1"))
    for stage in ("vft/1/0", "vft/2/1"):
        run = next(run for run in report.graph.runs if run.name == stage)
        if stage == "vft/1/0":
            assert claim_attempt(folder.layout("one").stage("finetune", run.key), 2, new_claim(2))
        else:
            batch = Batch("finetune", "vft", (Task((run.key,)),))
            assert SubmissionBook(folder.layout("one")).begin(new_submission("a.1", batch, time.time()))
    folder.clean()
    assert (computed / "checkpoint").exists()
    assert (queued / "checkpoint").exists()
    with pytest.raises(UsageError, match=r"one: 2 stages in the queue or running: `cancel` it first"):
        folder.clean("one", whole=True, yes=True)
    folder.clean(unneeded=True)
    assert computed.exists()
    assert queued.exists()


def test_a_whole_experiment_leaves_what_another_one_needs(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """The stages that two experiments share stay, and the logs of those; the other one is complete as before."""
    folder.run("one", "vft", "tapt")
    folder.run("two", "tapt", seeds=1)
    shared = set(folder.session("two").launched.graph.nodes)
    logs = {stage.logs for stage in stored_stages(folder.root) if stage.key in shared}
    assert all(log.startswith(str(folder.layout("one").logs)) for found in logs for log in found)
    with pytest.raises(UsageError, match=r"nothing was removed; add --yes"):
        folder.clean("one", whole=True)
    folder.clean("one", whole=True, yes=True)
    assert experiment_names(folder.root) == ("two",)
    assert {stage.key for stage in stored_stages(folder.root)} == shared
    assert {str(path) for path in folder.layout("one").folder.rglob("*") if path.is_file()} == {log for found in logs for log in found}
    assert folder.session("two").look().complete
    capsys.readouterr()
    folder.clean("two", whole=True, yes=True)
    assert not list(stored_stages(folder.root))
    assert not folder.layout("two").folder.exists()


def test_tables_stay_if_asked(folder: Folder) -> None:
    """`--keep-tables` leaves tables, confusion matrices and the bundle, and nothing else."""
    folder.run("one", "vft", seeds=1)
    folder.layout("one").bundle.write_text("")
    for name in ("tables", "confusion"):
        (folder.layout("one").folder / name).mkdir()
        (folder.layout("one").folder / name / "kept").write_text("")
    folder.clean("one", whole=True, keep_tables=True, yes=True)
    assert sorted(tree(folder.layout("one").folder)) == ["confusion", "confusion/kept", "one-bundle.zip", "tables", "tables/kept"]


def test_results_that_nobody_needs_are_freed_only_if_asked(folder: Folder) -> None:
    """Of a seed that is not launched any more. Those younger than `--older-than` stay."""
    folder.run("one", "tapt", seeds=2)
    folder.run("one", "tapt", seeds=1)
    needed = set(folder.session("one").launched.graph.nodes)
    folder.clean()
    assert len(list(stored_stages(folder.root))) == 6
    folder.clean(unneeded=True, days=1)
    assert len(list(stored_stages(folder.root))) == 6
    folder.clean(unneeded=True)
    assert {stage.key for stage in stored_stages(folder.root)} == needed


def test_nothing_is_removed_that_an_unknown_experiment_may_need(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """An experiment whose record cannot be read: refused in one line, with its name; it can be removed itself."""
    folder.run("one", "vft", seeds=1)
    folder.run("two", "tapt", seeds=1)
    folder.layout("two").experiment_file.write_text("torn")
    before = tree(folder.root / "store")
    for options in ({"unneeded": True}, {"experiment": "one", "whole": True, "yes": True}):
        with pytest.raises(UsageError, match=r"two: its stages are not known .*could remove what it needs"):
            folder.clean(**options)
    folder.clean()
    assert tree(folder.root / "store") == before
    folder.clean("two", whole=True, yes=True)
    assert {stage.stage for stage in stored_stages(folder.root)} == {"finetune"}
    assert folder.session("one").look().complete


def test_an_interrupted_removal_is_finished_by_the_next(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is half removed has another name: no pass takes it for a stage, and the next `clean` removes the rest."""
    report = folder.run("one", "vft", seeds=1)

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    path = folder.stage(report, "vft/1/0")
    monkeypatch.setattr("shutil.rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        remove(path)
    monkeypatch.undo()
    assert not path.exists()
    assert [each.name.startswith(ASIDE) for each in path.parent.iterdir()].count(True) == 1
    assert path.name not in {stage.key for stage in stored_stages(folder.root)}
    folder.clean()
    assert not [each for each in path.parent.iterdir() if each.name.startswith(ASIDE)]


def test_damaged_results_keep_their_artifacts(folder: Folder) -> None:
    """Which attempt a torn `result.json` is of is not known: nothing of the stage is freed."""
    report = folder.run("one", "vft", seeds=1)
    path = folder.stage(report, "vft/1/0")
    (path / "result.json").write_text("torn")
    folder.clean()
    assert (path / "attempts" / "0001" / "output").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"whole": True}, "--whole goes with the name of an experiment"),
        ({"experiment": "one", "keep_tables": True}, "--keep-tables goes with --whole"),
        ({"experiment": "one", "unneeded": True}, "--unneeded is of all experiments together"),
        ({"days": -1}, "--older-than -1"),
        ({"experiment": "nemo"}, "experiment 'nemo': nothing of that name in .*; there are none"),
    ],
)
def test_wrong_usage(folder: Folder, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        folder.clean(**options)


@pytest.mark.slow
def test_lists(folder: Folder) -> None:
    """A line for each experiment; sizes as `du` counts them; what one has alone and what no experiment needs."""
    folder.run("one", "vft", "tapt")
    folder.run("two", "tapt", seeds=1)
    folder.run("one", "vft")
    experiments, stages = read_experiments(folder.root, folder.opening), tuple(stored_stages(folder.root))
    rows = rows_of(folder.root, experiments, stages)
    lines = list_lines(rows)
    assert [line.split()[:4] for line in lines[1:]] == [["one", "4", "of", "4"], ["two", "2", "of", "2"]]
    assert rows[0].alone.bytes < rows[0].size.bytes
    usage = usage_of(folder.root, experiments, stages)
    assert usage.stages == 10
    assert usage.unneeded is not None
    assert usage.unneeded == sum((stage.size for stage in stages if stage.key in _second_seeds_of_tapt(folder)), Size())
    assert "stages that no experiment needs" in usage_lines(usage)[-1]
    assert list_lines([]) == []


def _second_seeds_of_tapt(folder: Folder) -> set[str]:
    known = {key for name in ("one", "two") for key in folder.session(name).launched.graph.nodes}
    return {stage.key for stage in stored_stages(folder.root)} - known


def test_sizes_are_those_of_du(tmp_path: Path) -> None:
    """Allocated blocks, links not followed; units as they are read."""
    import subprocess

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "large").write_bytes(LARGE)
    (tmp_path / "a" / "link").symlink_to(tmp_path)
    (tmp_path / "sparse").touch()
    counted = subprocess.run(["du", "--block-size=1", "--summarize", tmp_path], capture_output=True, text=True, check=True)
    inodes = subprocess.run(["du", "--inodes", "--summarize", tmp_path], capture_output=True, text=True, check=True)
    assert size_of(tmp_path) == Size(int(counted.stdout.split()[0]), int(inodes.stdout.split()[0]))
    assert size_of(tmp_path / "missing") == Size()
    shown: Callable[[int], str] = lambda number: in_units(Size(number))  # noqa: E731
    assert [shown(each) for each in (0, 999, 1000, 1234567, 12 * 10**9)] == ["0 B", "999 B", "1.0 kB", "1.2 MB", "12 GB"]


def test_stages_of_a_sweep_are_needed_by_it(tmp_path: Path) -> None:
    """Those of its points, and what it has computed besides; they go with the experiment that it is of. Ray is not asked."""
    sweep = make_sweep(tmp_path, SweepSettings(counts=[16, 64]))
    graph = every_stage(sweep)
    node = next(iter(graph.nodes.values()))
    other = replace(node, key="0" * len(node.key))  # as of a reserve seed, which no point names
    for each in (node, other):
        description = describe(place_of(sweep), replace(graph, nodes={each.key: each}), [[each.key]])
        log = str(sweep.own_layout.log_of(each.stage, each.key))
        execute(WorkerProcess(description, 1, lambda line: None, log=log, lag_seconds=0.0), each)
    root = sweep.layout.root

    def no_grid(name: str) -> Session:
        raise UsageError(f"{name}: was not launched as a grid")

    opening = Opening(no_grid, lambda name, digest: load(sweep))
    (line,) = list_lines(rows_of(root, read_experiments(root, opening), ()))[1:]
    assert line.startswith("exp ")
    assert line.endswith("-, 1 sweep")
    clean(root, opening, Asked(unneeded=True))
    assert {stage.key for stage in stored_stages(root)} == {node.key, other.key}
    clean(root, opening, Asked("exp", whole=True, yes=True))
    assert not list(stored_stages(root))
    assert not sweep.layout.folder.exists()
