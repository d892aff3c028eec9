"""Submission records: names, what survives being killed, who wins."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.layout import Layout
from jobs.submissions import State, SubmissionBook, base_name, new_submission
from tests.jobs.slurm_cases import batch_of, layout_of, node

BATCH = batch_of([node("aa", "finetune"), node("bb", "finetune"), node("cc", "finetune")], 2)


@pytest.fixture
def book(tmp_path: Path) -> SubmissionBook:
    return SubmissionBook(layout_of(tmp_path))


def test_names_tell_what_is_submitted(tmp_path: Path) -> None:
    """Same batch, same name; any difference another one; short, and safe in every shell and pattern."""
    layout = layout_of(tmp_path)
    name = base_name(layout, BATCH)
    assert name == base_name(layout_of(tmp_path), BATCH)
    others = [
        base_name(Layout(layout.root, "other"), BATCH),
        base_name(layout_of(tmp_path / "elsewhere"), BATCH),
        base_name(layout, replace(BATCH, stage="tapt")),
        base_name(layout, replace(BATCH, method="tapt")),
        base_name(layout, replace(BATCH, tasks=BATCH.tasks[:1])),
        base_name(layout, batch_of([node("aa", "finetune"), node("bb", "finetune"), node("cc", "finetune")], 3)),
    ]
    assert len({name, *others}) == 7
    long = base_name(Layout(layout.root, "x" * 64), replace(BATCH, stage="s" * 40, method="ü b/$(x)" * 9))
    assert re.fullmatch(r"[A-Za-z0-9_.-]{1,60}", long)


def test_a_folder_reached_by_another_way_is_the_same(tmp_path: Path) -> None:
    """Through a symbolic link the names are those of the real folder."""
    layout = layout_of(tmp_path / "real")
    layout.root.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert base_name(layout, BATCH) == base_name(layout_of(tmp_path / "link"), BATCH)


def test_intent_submitted_ended(book: SubmissionBook) -> None:
    """Read back as written at every step; an ended one gives the next a new number."""
    name = book.next_name(BATCH)
    assert name.endswith(".1")
    record = new_submission(name, BATCH, 100.0)
    assert book.begin(record)
    assert book.open() == (record,)
    assert record.tasks == (("aa", "bb"), ("cc",))
    submitted = book.update(replace(record, state=State.submitted, job="12", ended={"0": "COMPLETED"}))
    assert book.find(name) == submitted
    assert submitted.element(1) == "12_1"
    assert book.next_name(BATCH) == name, "still open"
    book.close(submitted, State.ended)
    assert book.open() == ()
    assert book.next_name(BATCH) == name.removesuffix("1") + "2"


def test_only_one_may_begin(book: SubmissionBook) -> None:
    """Two launchers at once: the second is told."""
    record = new_submission(book.next_name(BATCH), BATCH, 100.0)
    assert book.begin(record)
    assert not book.begin(replace(record, created=101.0))
    assert book.open() == (record,)


def test_a_lost_submission_keeps_its_name(book: SubmissionBook) -> None:
    """So that Slurm itself keeps the lost job, should it turn up, from running beside its double."""
    name = book.next_name(BATCH)
    record = new_submission(name, BATCH, 100.0)
    book.begin(record)
    book.close(record, State.lost)
    assert book.open() == ()
    assert book.next_name(BATCH) == name
    assert book.begin(replace(record, created=200.0))
    assert [one.created for one in book.open()] == [200.0]


def test_killed_between_the_two_steps_of_closing(book: SubmissionBook) -> None:
    """A record that lies in both folders is closed."""
    record = new_submission(book.next_name(BATCH), BATCH, 100.0)
    book.begin(record)
    content = (book.folder / f"{record.name}.json").read_bytes()
    book.close(record, State.ended)
    (book.folder / f"{record.name}.json").write_bytes(content)
    assert book.open() == ()
    assert book.next_name(BATCH).endswith(".2")


def test_what_is_not_a_record_is_not_read(book: SubmissionBook) -> None:
    """Torn, of another schema, or somebody's notes."""
    book.folder.mkdir(parents=True)
    for name, text in (("torn.json", '{"schema": 1, "na'), ("other.json", '{"schema": 99}'), ("notes.txt", "x"), ("list.json", "[]")):
        (book.folder / name).write_text(text)
    assert book.open() == ()
