"""Submission records: names, what survives being killed, who wins."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.control.facts import Request
from jobs.errors import UsageError
from jobs.slurm.client import UNDERWAY_SECONDS, SlurmClient
from jobs.slurm.submissions import Guard, State, Submission, SubmissionBook, Writer, base_name, new_submission, writer_gone
from jobs.store.attempts import process_start
from jobs.store.layout import Layout
from jobs.store.records import Decoder
from tests.jobs.slurm_cases import batch_of, layout_of, node

BATCH = batch_of([node("aa", "finetune"), node("bb", "finetune"), node("cc", "finetune")], 2)


@pytest.fixture
def book(tmp_path: Path) -> SubmissionBook:
    return SubmissionBook(layout_of(tmp_path))


def test_names_identify_what_is_submitted(tmp_path: Path) -> None:
    """Same batch, same name; any difference gives another one. Short, and safe in a shell and in patterns."""
    layout = layout_of(tmp_path)
    name = base_name(layout, BATCH)
    assert name == base_name(layout_of(tmp_path), BATCH)
    others = [
        base_name(Layout(layout.root, "other"), BATCH),
        base_name(layout_of(tmp_path / "elsewhere"), BATCH),
        base_name(layout, replace(BATCH, stage="tapt")),
        base_name(layout, replace(BATCH, method="tapt")),
        base_name(layout, replace(BATCH, tasks=BATCH.tasks[:1])),
        base_name(layout, replace(BATCH, request=Request(relief=1))),
        base_name(layout, replace(BATCH, request=Request(memory_factor=1.5))),
        base_name(layout, replace(BATCH, request=Request(exclude=("n1",)))),
        base_name(layout, batch_of([node("aa", "finetune"), node("bb", "finetune"), node("cc", "finetune")], 3)),
    ]
    assert len({name, *others}) == 10
    long = base_name(Layout(layout.root, "x" * 64), replace(BATCH, stage="s" * 40, method="ü b/$(x)" * 9))
    assert re.fullmatch(r"[A-Za-z0-9_.-]{1,60}", long)


def test_names_do_not_depend_on_symbolic_links(tmp_path: Path) -> None:
    """A results folder behind a symbolic link gives the names of the real folder."""
    layout = layout_of(tmp_path / "real")
    layout.root.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert base_name(layout, BATCH) == base_name(layout_of(tmp_path / "link"), BATCH)


def test_intent_submitted_ended(book: SubmissionBook) -> None:
    """Every state is read back as written; after an ended submission the next has a new number."""
    name = book.next_name(BATCH)
    assert name.endswith(".1")
    record = new_submission(name, BATCH, 100.0)
    assert book.begin(record)
    assert book.open() == (record,)
    assert record.tasks == (("aa", "bb"), ("cc",))
    submitted = book.change(record, state=State.submitted, job="12", ended={"0": "COMPLETED"})
    assert book.find(name) == submitted
    assert submitted.element(1) == "12_1"
    assert book.next_name(BATCH) == name, "still open"
    book.close(submitted, State.ended)
    assert book.open() == ()
    assert book.next_name(BATCH) == name.removesuffix("1") + "2"


def test_only_one_process_can_begin_a_submission(book: SubmissionBook) -> None:
    """Of two launchers at once the second gets False."""
    record = new_submission(book.next_name(BATCH), BATCH, 100.0)
    assert book.begin(record)
    assert not book.begin(replace(record, created=101.0))
    assert book.open() == (record,)


def test_a_lost_submission_is_repeated_under_its_name(book: SubmissionBook) -> None:
    """So that `singleton` keeps the lost array, if it turns up, from running beside the repetition."""
    name = book.next_name(BATCH)
    record = new_submission(name, BATCH, 100.0)
    book.begin(record)
    book.close(record, State.lost)
    assert book.open() == ()
    assert book.next_name(BATCH) == name
    assert book.begin(replace(record, created=200.0))
    assert [one.created for one in book.open()] == [200.0]


def test_killed_between_the_two_steps_of_closing(book: SubmissionBook) -> None:
    """A record in both folders counts as closed."""
    record = new_submission(book.next_name(BATCH), BATCH, 100.0)
    book.begin(record)
    content = (book.folder / f"{record.name}.json").read_bytes()
    book.close(record, State.ended)
    (book.folder / f"{record.name}.json").write_bytes(content)
    assert book.open() == ()
    assert book.next_name(BATCH).endswith(".2")


def test_files_that_are_no_records_are_ignored(book: SubmissionBook) -> None:
    """Torn, of another schema, or a user's notes."""
    book.folder.mkdir(parents=True)
    for name, text in (("torn.json", '{"schema": 1, "na'), ("other.json", '{"schema": 99}'), ("notes.txt", "x"), ("list.json", "[]")):
        (book.folder / name).write_text(text)
    assert book.open() == ()


def test_a_stale_copy_is_never_written_back(book: SubmissionBook) -> None:
    """Two processes read the same record and each adds a fact: both are recorded, and the first value of an element is kept."""
    record = new_submission(book.next_name(BATCH), BATCH, 100.0, (((0,), "afterok:3_0"),))
    book.begin(record)
    other = SubmissionBook(layout_of(book.folder.parents[2]))
    theirs = other.open()[0]
    book.change(record, state=State.submitted, job="12", cancelled=[1])
    book.change(record, left={"0": 130.0})
    seen = other.change(theirs, cancelled=[0], left={"0": 150.0, "1": 150.0}, ended={"1": "FAILED"}, refine=())
    assert book.find(record.name) == seen == other.open()[0]
    assert (seen.state, seen.job, seen.cancelled, seen.refine) == (State.submitted, "12", (0, 1), ())
    assert (seen.left, seen.ended) == ({"0": 130.0, "1": 150.0}, {"1": "FAILED"})
    assert (seen.all_left, seen.unexplained) == (True, (0,))
    book.close(record, State.ended, ended={"0": "", "1": "COMPLETED"})
    assert other.change(theirs, cancelled=[1]).cancelled == (1,)
    assert other.open() == ()
    assert other.closed()[0].ended == {"0": "", "1": "FAILED"}


def test_a_new_intent_is_not_changed_by_a_process_with_the_old_one(book: SubmissionBook) -> None:
    """Lost and submitted again under its name: a slower process neither overwrites nor closes the new record."""
    old = new_submission(book.next_name(BATCH), BATCH, 100.0)
    book.begin(old)
    book.close(old, State.lost)
    new = replace(old, created=200.0)
    book.begin(new)
    book.change(old, looked_up=250.0)
    book.close(old, State.lost)
    book.withdraw(old)
    assert book.open() == (new,)


def test_a_batch_whose_elements_have_left_can_be_submitted_again(book: SubmissionBook) -> None:
    """Under the next number, while accounting is still queried for the first."""
    record = new_submission(book.next_name(BATCH), BATCH, 100.0)
    book.begin(record)
    book.change(record, state=State.submitted, job="12", left={"0": 130.0, "1": 130.0})
    second = book.next_name(BATCH)
    assert second == record.name.removesuffix("1") + "2"
    book.begin(new_submission(second, BATCH, 140.0))
    book.close(record, State.ended)
    assert book.next_name(BATCH) == second


def test_unchanged_records_are_read_once(book: SubmissionBook, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until any process writes them again."""
    for number in range(3):
        batch = batch_of([node(f"k{number}", "states")])
        book.begin(new_submission(book.next_name(batch), batch, float(number)))
    first = book.open()
    reads: list[Path] = []

    load = Decoder.load

    def counted(decoder: Decoder[Any], path: Path) -> object:
        reads.append(path)
        return load(decoder, path)

    monkeypatch.setattr(Decoder, "load", counted)
    assert book.open() == first
    assert reads == []
    SubmissionBook(layout_of(book.folder.parents[2])).change(first[1], job="7")
    reads.clear()
    assert [record.job for record in book.open()] == ["", "7", ""]
    assert len(reads) == 1


def test_records_of_other_versions(book: SubmissionBook) -> None:
    """Fields that an older version did not write have their defaults; fields of a newer version are ignored."""
    record = new_submission(book.next_name(BATCH), BATCH, 100.0)
    book.begin(record)
    file = book.folder / f"{record.name}.json"
    value = json.loads(file.read_text())
    for name in ("writer", "refine", "tries", "cancelled", "left", "nodes"):
        del value[name]
    file.write_text(json.dumps({**value, "gone": 0.0, "something": [1]}))
    assert book.open() == (replace(record, writer=Writer()),)
    assert not writer_gone(book.open()[0])


def test_whether_the_writer_of_an_intent_has_ended(book: SubmissionBook) -> None:
    """True for an ended process of this machine; False for this process, another machine, or an unknown process."""
    record = new_submission(book.next_name(BATCH), BATCH, 100.0)
    assert record.writer.pid == os.getpid()
    assert not writer_gone(record)
    child = subprocess.Popen(["sleep", "60"])
    here = replace(record, writer=replace(record.writer, pid=child.pid, start=process_start(child.pid)))
    elsewhere = replace(record, writer=replace(record.writer, start="another boot/pid:[1]/7"))
    assert not writer_gone(here)
    child.kill()
    child.wait()
    assert writer_gone(here)
    assert not writer_gone(elsewhere)


def test_a_damaged_open_record_is_reported_by_path(tmp_path: Path) -> None:
    """It could never be closed, and its stages would count as submitted for ever."""
    book = SubmissionBook(Layout(tmp_path, "trial"))
    book.check("trial.states.vft.0.1")
    (book.folder / "trial.states.vft.0.1.json").parent.mkdir(parents=True)
    (book.folder / "trial.states.vft.0.1.json").write_text("{")
    with pytest.raises(UsageError, match=r"trial\.states\.vft\.0\.1\.json: a damaged record"):
        book.check("trial.states.vft.0.1")


class Looks:
    """An intent that is looked up at times of a test's choice, and never found; a process on this machine has written it, and has ended."""

    def __init__(self, book: SubmissionBook) -> None:
        self.now = 0.0
        self.book = book
        self.guard = Guard(book, SlurmClient(), settle_seconds=60, clock=lambda: self.now)
        child = subprocess.Popen(["sleep", "60"])
        self.intent = replace(new_submission("one", BATCH, 0.0), writer=Writer("here", child.pid, process_start(child.pid)))
        child.kill()
        child.wait()
        assert book.begin(self.intent)

    def at(self, seconds: float, job: str = "") -> Submission | None:
        self.now = seconds
        current = self.book.find("one")
        assert current is not None
        return self.guard.settle(current, job, abandoned=bool(self.guard.abandoned([current])))


def test_the_settle_time_starts_when_no_sbatch_is_running(book: SubmissionBook) -> None:
    """An sbatch outlives its launcher until its own time limit, and slurmctld may accept its job later still."""
    looks = Looks(book)
    with subprocess.Popen(
        [sys.executable, "-c", "input()", "sbatch", str(book.scripts)], stdin=subprocess.PIPE
    ) as orphan:  # told by its command line
        for seconds in (10, 70, 125):
            assert looks.at(seconds) is not None
        orphan.kill()
    for seconds in (126, 184):
        assert looks.at(seconds) is not None
    assert looks.at(186) is None
    assert book.open() != (), "what becomes of the record, the caller decides"


def test_the_settle_time_of_an_intent_of_another_machine(book: SubmissionBook) -> None:
    """Whether its writer is alive cannot be known here: the settle time starts when its sbatch must have ended."""
    looks = Looks(book)
    book.change(looks.intent, writer=Writer("there", 1, "another boot/pid:[1]/7"))
    for seconds in (1, UNDERWAY_SECONDS - 1, UNDERWAY_SECONDS + 59):
        assert looks.at(seconds) is not None
    assert looks.at(UNDERWAY_SECONDS + 60) is None
    found = looks.at(UNDERWAY_SECONDS + 60, "7")
    assert found is not None
    assert (found.state, found.job, book.open()) == (State.submitted, "7", (found,))
