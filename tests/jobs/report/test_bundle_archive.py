"""The zip file of a bundle: what is packed is unpacked, and an archive that is not what `pack` writes does no harm."""

from __future__ import annotations

import stat
import zipfile
from pathlib import Path

import pytest

from jobs.errors import UsageError
from jobs.report.bundle import archive
from jobs.report.bundle.archive import names, pack, unpack


def test_what_is_packed_is_unpacked(tmp_path: Path) -> None:
    """Names, also of other scripts, bytes and the mode of what is executable; a file that was there is replaced."""
    source = tmp_path / "source"
    for name, data in {"b/ü.csv": b"\0\xff", "a.txt": b"a" * 100_000, "b.txt": b""}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    (source / "run.sh").write_text("#!/bin/sh\n")
    (source / "run.sh").chmod(0o700)
    (tmp_path / "b.zip").write_text("former")
    pack(source, tmp_path / "b.zip")
    (tmp_path / "target").mkdir()
    unpack(tmp_path / "b.zip", tmp_path / "target")
    assert names(tmp_path / "target") == ["a.txt", "b.txt", "b/ü.csv", "run.sh"]
    assert all((tmp_path / "target" / name).read_bytes() == (source / name).read_bytes() for name in names(source))
    with zipfile.ZipFile(tmp_path / "b.zip") as packed:
        modes = {entry.filename: stat.S_IMODE(entry.external_attr >> 16) for entry in packed.infolist()}
    assert modes == {"a.txt": 0o644, "b.txt": 0o644, "b/ü.csv": 0o644, "run.sh": 0o755}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def entry(name: str, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([entry("../outside")], "the name '../outside' does not lie below one folder"),
        ([entry("a/../../outside")], "does not lie below one folder"),
        ([entry("/outside")], "does not lie below one folder"),
        ([entry("c:outside")], "does not lie below one folder"),
        ([entry("..\\outside")], "does not lie below one folder"),
        ([entry("a//b")], "does not lie below one folder"),
        ([entry("a\nb")], "does not lie below one folder"),
        ([entry("link", stat.S_IFLNK | 0o777)], "link is no plain file"),
        ([entry("pipe", stat.S_IFIFO | 0o644)], "pipe is no plain file"),
        ([entry("a"), entry("a")], "a is in it twice"),
        ([entry("a"), entry("a/b")], "a is both a file and a folder"),
        ([entry("a"), entry("b"), entry("c"), entry("d")], "more than 3 files"),
    ],
)
def test_an_archive_that_leads_elsewhere_is_refused(
    entries: list[zipfile.ZipInfo], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is written."""
    monkeypatch.setattr(archive, "MOST_ENTRIES", 3)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as packed:
        for each in entries:
            packed.writestr(each, "../../etc/passwd")
    (tmp_path / "target").mkdir()
    with pytest.raises(UsageError) as raised:
        unpack(tmp_path / "b.zip", tmp_path / "target")
    assert expected in str(raised.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["b.zip", "target"]


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the sizes that it states; one that states less than it has is damaged, and no more than it states is written."""
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("zeros", bytes(1_000_000))
    (tmp_path / "target").mkdir()
    data = (tmp_path / "b.zip").read_bytes()
    (tmp_path / "lies.zip").write_bytes(data.replace((1_000_000).to_bytes(4, "little"), (1_000).to_bytes(4, "little")))
    with pytest.raises(UsageError, match="damaged"):
        unpack(tmp_path / "lies.zip", tmp_path / "target")
    assert sum(path.stat().st_size for path in (tmp_path / "target").iterdir()) <= 1_000
    monkeypatch.setattr(archive, "MOST_BYTES", 999_999)
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match="more than"):
        unpack(tmp_path / "b.zip", tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "flipped", "encrypted", "unusual"])
def test_a_damaged_archive_is_one_line(damage: str, tmp_path: Path) -> None:
    """What is no zip, is cut off, has other bytes than its checksum states, is encrypted or compressed in another way."""
    file = tmp_path / "b.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_BZIP2 if damage == "unusual" else zipfile.ZIP_STORED) as packed:
        packed.writestr("a", "unmistakable")
    data = file.read_bytes()
    central = data.index(b"PK\1\2")
    file.write_bytes(
        {
            "text": b"no zip",
            "empty": b"",
            "cut": data[:-10],
            "flipped": data.replace(b"unmistakable", b"Unmistakable"),
            "encrypted": data[: central + 8] + b"\1" + data[central + 9 :],
            "unusual": data,
        }[damage]
    )
    (tmp_path / "target").mkdir()
    with pytest.raises(UsageError) as raised:
        unpack(file, tmp_path / "target")
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "expected"), [("nothing.zip", "no such file"), ("", "a folder")])
def test_a_bundle_that_is_not_there_is_one_line(name: str, expected: str, tmp_path: Path) -> None:
    """A missing file, and a folder in place of one."""
    with pytest.raises(UsageError, match=expected):
        unpack(tmp_path / name, tmp_path)
