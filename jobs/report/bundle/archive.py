"""The zip file of a bundle: a folder packed so that the same files give the same bytes, and unpacked without trusting the archive."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from jobs.errors import UsageError
from jobs.store.records import sync

OLDEST = (1980, 1, 1, 0, 0, 0)  # the first date of the format, for every entry
MOST_ENTRIES = 500_000
MOST_BYTES = 8 * 2**30  # of all files together, unpacked
ROOM = 0.9  # of the free space that unpacking may take
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
UNIX = 3  # code of the system whose file modes an entry has
_COPY = 1 << 20


def pack(folder: Path, target: Path) -> None:
    """Write all files of a folder into a zip, atomically: sorted by name, without times and owners."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry in names(folder):
                path = folder / entry
                info = zipfile.ZipInfo(entry, OLDEST)
                info.create_system, info.compress_type, info.file_size = UNIX, zipfile.ZIP_DEFLATED, path.stat().st_size
                info.external_attr = (stat.S_IFREG | (0o755 if path.stat().st_mode & 0o100 else 0o644)) << 16
                with path.open("rb") as source, archive.open(info, "w") as packed:
                    shutil.copyfileobj(source, packed, _COPY)
        temporary.chmod(0o644)
        sync(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    sync(target.parent)


def names(folder: Path) -> list[str]:
    """The files below a folder as relative POSIX paths, sorted by their bytes."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(found, key=os.fsencode)


def unpack(file: Path, folder: Path) -> None:
    """Unpack a bundle into a new or empty folder.

    UsageError, before anything is written, for a file that is no zip, for names that lead out of the folder, for links, encrypted entries
    and more than `MOST_ENTRIES` files or `MOST_BYTES`; later for entries whose content is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if problem := _problem(entries, shutil.disk_usage(folder).free):
                raise UsageError(f"{file}: {problem}: not a bundle that `bundle` wrote")
            for entry in entries:
                if not entry.is_dir():
                    _extract(archive, entry, folder / entry.filename)
    except FileNotFoundError as error:
        raise UsageError(f"{file}: no such file; `python launch.py bundle EXPERIMENT` writes a bundle") from error
    except IsADirectoryError as error:
        raise UsageError(f"{file}: a folder; name the zip file that `bundle` wrote") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise UsageError(f"{file}: no zip file, or a damaged one ({error}): copy it again") from error


def _problem(entries: Iterable[zipfile.ZipInfo], free: int) -> str:
    """Why entries are not unpacked; "" if they are."""
    seen: set[str] = set()
    total = 0
    for number, entry in enumerate(entries, 1):
        name, mode = entry.filename, entry.external_attr >> 16
        if not is_safe(name.removesuffix("/") if entry.is_dir() else name):
            return f"the name {name!r} does not lie below one folder"
        if name in seen:
            return f"{name} is in it twice"
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            return f"{name} is no plain file"
        if entry.flag_bits & 1 or entry.compress_type not in COMPRESSIONS:
            return f"{name} is encrypted, or compressed in an unusual way"
        seen.add(name)
        total += entry.file_size
        if number > MOST_ENTRIES or total > min(MOST_BYTES, ROOM * free):
            return f"more than {MOST_ENTRIES} files, or {total / 1e9:.1f} GB and more, of {free / 1e9:.1f} GB free"
    folders = {str(parent) for name in seen for parent in PurePosixPath(name).parents}
    inside = sorted(folders & seen)
    return f"{inside[0]} is both a file and a folder" if inside else ""


def is_safe(name: str) -> bool:
    """Whether an entry may have this name: relative, in POSIX form, printable, without `..`, `:` and `\\`."""
    return name.isprintable() and not {":", "\\"} & set(name) and all(part not in ("", ".", "..") for part in name.split("/"))


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    """Write one entry; at most as many bytes as it states are read, and its checksum is compared."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(entry) as packed, target.open("xb") as file:
        shutil.copyfileobj(packed, file, _COPY)
