"""A copy of the code at launch, which jobs run: later edits do not reach queued jobs.

One folder per content, `results/EXPERIMENT/snapshots/DIGEST/`, holds the code, `snapshot.json` (commit, changed and untracked files) and
`dirty.diff` (the difference from the commit). It is made under a temporary name and renamed. A job that runs a snapshot and submits other
jobs passes on the same snapshot, with what git reported at launch.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from jobs import VERSION
from jobs.errors import UsageError
from jobs.store.disk_space import naming
from jobs.store.layout import Layout, shared_path
from jobs.store.module_files import module_files, top_level
from jobs.store.records import Decoder, write_json

SCHEMA = 1
CODE = ("launch.py", "jobs", "ser_core", "configs", "slurm_templates")  # what jobs need: files that git does not track are copied from here
NOT_CODE = ("tests", "docs", "benchmarks", "results", "data", "checkpoints")  # top-level folders that jobs never read
SECRET = (".env", ".env.*", ".netrc", "*.key", "*.pem")  # names of files that are never copied, tracked or not
DATA = (  # names of files that are data, in lower case: recordings, arrays, weights, archives
    *("*.wav", "*.flac", "*.mp3", "*.ogg", "*.sph", "*.m4a", "*.npy", "*.npz", "*.h5", "*.hdf5", "*.parquet", "*.arrow", "*.tfevents*"),
    *("*.pt", "*.pth", "*.ckpt", "*.bin", "*.safetensors", "*.onnx", "*.pkl", "*.zip", "*.tar", "*.tgz", "*.gz", "*.bz2", "*.xz", "*.7z"),
)
LARGEST = 8 * 2**20  # bytes; a larger file counts as data if it is not tracked, or outside of `CODE`
LARGE = 20_000_000  # bytes of a whole snapshot, above which its user is told
DIGEST_LENGTH = 16
GIT_SECONDS = 60
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """The code in the source folder now, and where its copy is or would be."""

    source: Path
    path: Path
    digest: str
    files: Mapping[str, int]  # relative name -> 1 if executable
    commit: str  # "" outside of git
    changed: tuple[str, ...]  # files that differ from the commit or are unknown to it
    left_out: tuple[str, ...]  # data, tracked or not, and what is untracked outside of `CODE`
    elsewhere: Mapping[str, Path] = field(default_factory=dict)  # relative name -> file outside of the source folder

    def file_of(self, name: str) -> Path:
        """The file that is copied under a relative name."""
        return self.elsewhere.get(name, self.source / name)

    @property
    def taken(self) -> bool:
        return (self.path / "snapshot.json").is_file()


@dataclass(frozen=True)
class _Record:
    """The fields of `snapshot.json` that are read again."""

    snapshot: str  # digest
    commit: str
    changed: tuple[str, ...]
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    contents: Mapping[str, str] = field(default_factory=dict)  # as `_contents`; empty: written by an earlier version


_RECORDS = Decoder(_Record, SCHEMA)


def plan_snapshot(source: Path, layout: Layout, registry: str = "") -> Snapshot:
    """Find the code in `source` and its digest, without writing anything. UsageError if there is none.

    `registry`: the experiment's own, `package.module:NAME`. Its package is code too, also untracked or installed elsewhere.
    """
    source = source.resolve()
    known = _known_snapshot(source, layout)
    if known is not None:
        return known
    in_git = _is_checkout(source)
    package = top_level(registry)
    code = (*CODE, package, f"{package}.py") if package else CODE
    tracked, untracked = _git_files(source) if in_git else (_walk(source, code), [])
    present = [name for name in {*tracked, *untracked} if _is_code(name) and (source / name).is_file()]
    new = set(untracked)
    elsewhere = module_files(package, source)
    names = sorted(name for name in present if not _is_data(source, name, code, tracked=name not in new) and name not in elsewhere)
    if not names:
        raise UsageError(f"{source}: no code to run there (expected {', '.join(CODE)})")
    files = _with_modes(source, sorted((*names, *elsewhere)), elsewhere)
    commit = _git(source, "rev-parse", "HEAD", check=False).strip() if in_git else ""
    changed = _git(source, "diff", "--name-only", "--relative", "-z", "HEAD", check=False).split("\0") if commit else []
    digest = _digest(source, files, elsewhere)
    return Snapshot(
        source=source,
        path=shared_path(layout.snapshots) / digest,
        digest=digest,
        files=files,
        commit=commit,
        changed=tuple(
            sorted(name for name in {*changed, *new.intersection(names)} if name and _is_code(name) and not _has_data_name(name))
        ),
        left_out=tuple(sorted(set(present) - set(names))),
        elsewhere=elsewhere,
    )


def take_snapshot(source: Path, layout: Layout, registry: str = "") -> Snapshot:
    """Copy the code unless the same content was copied before.

    UsageError if files change while they are copied, or if the earlier copy was changed since.
    """
    snapshot = plan_snapshot(source, layout, registry)
    if snapshot.taken:
        whole = all((snapshot.path / name).is_file() for name in snapshot.files)
        if not whole or _digest(snapshot.path, _with_modes(snapshot.path, snapshot.files)) != snapshot.digest:
            raise UsageError(f"{snapshot.path}: this copy of the code was changed: remove the folder when no job uses it, and launch again")
        return snapshot
    snapshot.path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{snapshot.digest}.", dir=snapshot.path.parent))
    try:
        for name in snapshot.files:
            target = temporary / name
            with naming(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(snapshot.file_of(name), target)
        if _digest(temporary, snapshot.files) != snapshot.digest:
            raise UsageError(f"{snapshot.source}: code changed while it was copied; launch again")
        (temporary / "dirty.diff").touch(mode=0o600)  # of files that may be readable by their user only
        with naming(temporary / "dirty.diff"):
            (temporary / "dirty.diff").write_text(_dirty_diff(snapshot), encoding="utf-8", errors="surrogateescape")
        lists = {"files": sorted(snapshot.files), "left_out": list(snapshot.left_out), "contents": _contents(temporary, snapshot.files)}
        record = {"schema": SCHEMA, **snapshot_facts(snapshot), **lists}
        write_json(temporary / "snapshot.json", record)
        temporary.chmod(0o755)
        if large := size_warning(temporary, snapshot.files):
            _log.warning("%s: %s", snapshot.path, large)
        _publish(temporary, snapshot.path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return snapshot


def size_warning(folder: Path, files: Iterable[str]) -> str:
    """What to tell about a snapshot above `LARGE`: its size, the largest files, what to do; "" below."""
    sizes = {name: (folder / name).stat().st_size for name in files}
    total = sum(sizes.values())
    if total <= LARGE:
        return ""
    largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
    named = ", ".join(f"{name} {sizes[name] / 1e6:.1f} MB" for name in largest)
    return (
        f"the copy of the code for jobs has {total / 1e6:.0f} MB, once for each version that is launched; largest: {named}; "
        f"what jobs do not read belongs into data/ or checkpoints/, or into .gitignore"
    )


@functools.cache
def check_snapshot(folder: Path, digest: str) -> None:
    """UsageError if `folder` is not the unchanged snapshot of that digest. The files are read once per process."""
    found = _intact(folder)
    if found is None or found[0].snapshot != digest:
        raise UsageError(
            f"{folder}: this copy of the code was changed since the launch{_first_changed(folder)}: "
            "remove the folder when no job uses it, and launch again"
        )


def _first_changed(folder: Path) -> str:
    """` (NAME)` of the first file that is missing or differs from the record; "" if that is not known."""
    record = _RECORDS.read(folder / "snapshot.json")
    for name in sorted(record.files) if record else ():
        if not (folder / name).is_file():
            return f" ({name} is missing)"
        known = record.contents.get(name) if record else None
        if known is not None and known != _contents(folder, _with_modes(folder, [name]))[name]:
            return f" ({name})"
    return ""


def snapshot_facts(snapshot: Snapshot) -> dict[str, object]:
    """Provenance for results: digest and folder of the code, commit, files that differ from it."""
    return {
        "snapshot": snapshot.digest,
        "folder": str(snapshot.path),
        "commit": snapshot.commit,
        "dirty": bool(snapshot.changed),
        "changed": list(snapshot.changed),
    }


def _known_snapshot(source: Path, layout: Layout) -> Snapshot | None:
    """The snapshot that `source` is; None if it is none, or its code was changed."""
    found = _intact(source)
    if found is None:
        return None
    record, files = found
    path = shared_path(layout.snapshots) / record.snapshot
    return Snapshot(source, path, record.snapshot, files, record.commit, record.changed, record.left_out)


def _intact(folder: Path) -> tuple[_Record, dict[str, int]] | None:
    """The record and the files of a snapshot; None if it is none, or its code was changed."""
    record = _RECORDS.read(folder / "snapshot.json")
    if record is None or not record.files or not all((folder / name).is_file() for name in record.files):
        return None
    files = _with_modes(folder, sorted(record.files))
    return (record, files) if _digest(folder, files) == record.snapshot else None


def _dirty_diff(snapshot: Snapshot) -> str:
    earlier = snapshot.source / "dirty.diff"
    if (snapshot.source / "snapshot.json").is_file() and earlier.is_file():
        return earlier.read_text(encoding="utf-8", errors="surrogateescape")
    without = [f":(exclude,icase,glob)**/{pattern}" for pattern in DATA]
    return _git(snapshot.source, "diff", "--binary", "--relative", "HEAD", "--", ".", *without, check=False) if snapshot.commit else ""


def _publish(temporary: Path, path: Path) -> None:
    try:
        temporary.rename(path)
    except OSError:  # another process has made the same snapshot
        if not (path / "snapshot.json").is_file():
            raise


def _with_modes(folder: Path, names: Iterable[str], elsewhere: Mapping[str, Path] = {}) -> dict[str, int]:
    """Name -> 1 if executable. `elsewhere`: name -> file of those that are not in the folder."""
    return {
        name: int(elsewhere.get(name, folder / name).stat().st_mode & 0o111 != 0) for name in names
    }  # os.access: false on a noexec mount


def _digest(folder: Path, files: Mapping[str, int], elsewhere: Mapping[str, Path] = {}) -> str:
    whole = hashlib.sha256()
    for name, content in _contents(folder, files, elsewhere).items():
        whole.update(f"{len(name)}:{name}:{content}\n".encode(errors="surrogateescape"))
    return whole.hexdigest()[:DIGEST_LENGTH]


def _contents(folder: Path, files: Mapping[str, int], elsewhere: Mapping[str, Path] = {}) -> dict[str, str]:
    """Name -> `EXECUTABLE:SHA-256` of each file, sorted by name."""
    paths = {name: elsewhere.get(name, folder / name) for name in files}
    return {name: f"{executable}:{hashlib.sha256(paths[name].read_bytes()).hexdigest()}" for name, executable in sorted(files.items())}


def _is_code(name: str) -> bool:
    parts = Path(name).parts
    if parts[0] in NOT_CODE or "__pycache__" in parts or name in ("snapshot.json", "dirty.diff"):
        return False
    return not any(fnmatchcase(parts[-1], pattern) for pattern in SECRET)


def _is_data(source: Path, name: str, code: Collection[str], *, tracked: bool) -> bool:
    in_code = Path(name).parts[0] in code
    if not (tracked or in_code) or _has_data_name(name):
        return True
    return not (tracked and in_code) and (source / name).stat().st_size > LARGEST


def _has_data_name(name: str) -> bool:
    return any(fnmatchcase(Path(name).name.lower(), pattern) for pattern in DATA)


def _walk(source: Path, code: Iterable[str]) -> list[str]:
    found: list[str] = []
    for name in code:
        top = source / name
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.is_file():
                found.append(str(path.relative_to(source)))
    return found


def _is_checkout(source: Path) -> bool:
    return _git(source, "rev-parse", "--is-inside-work-tree", check=False).strip() == "true" and bool(_git_files(source)[0])


def _git_files(source: Path) -> tuple[list[str], list[str]]:
    """Tracked files, and untracked files that git does not ignore."""
    tracked = _git(source, "ls-files", "-z", "--cached").split("\0")
    untracked = _git(source, "ls-files", "-z", "--others", "--exclude-standard").split("\0")
    return [name for name in tracked if name], [name for name in untracked if name]


def _git(source: Path, *arguments: str, check: bool = True) -> str:
    """Output of a git command. UsageError if it fails; without `check` "". UsageError in any case if it does not end in time."""
    command = ["git", "-C", str(source), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=GIT_SECONDS, check=False, env=_git_environment())
    except subprocess.TimeoutExpired as error:
        raise UsageError(f"{source}: `git {arguments[0]}` did not answer within {GIT_SECONDS} s") from error
    except FileNotFoundError as error:
        if check:
            raise UsageError(f"{source}: git is not installed") from error
        return ""
    if check and done.returncode != 0:
        raise UsageError(f"{source}: `git {' '.join(arguments)}` failed: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode(errors="surrogateescape") if done.returncode == 0 else ""


def _git_environment() -> dict[str, str]:
    """The environment without variables that point git elsewhere (as in a hook), and with the index left unwritten."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return {**clean, "GIT_OPTIONAL_LOCKS": "0"}


def code_facts(repository: Path) -> dict[str, Any]:
    """`commit` of a working tree and `dirty`, a digest of the code that differs from it ("" if none does).

    Of an untracked file that is too large to be code, only the size counts. Without git, or where git tracks nothing, as in an installed
    package, both are None, and `version` is that of this package. Called once per launch, never by workers.
    """
    installed = {"commit": None, "dirty": None, "version": VERSION}
    try:
        if not _is_checkout(repository):
            return installed
        commit = _git(repository, "rev-parse", "HEAD").strip()
        changed = _git(repository, "diff", "HEAD", "--binary")
        untracked = list(filter(_is_code, _git_files(repository)[1]))
    except UsageError:
        return installed
    digest = hashlib.sha256(os.fsencode(changed))
    for name in sorted(map(os.fsencode, untracked)):
        digest.update(b"\0" + name + b"\0" + _content(repository / os.fsdecode(name)))
    return {"commit": commit, "dirty": digest.hexdigest() if changed or untracked else ""}


def _content(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > LARGEST:
            return str(size).encode()
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:  # removed since it was listed, or a folder with a repository of its own: its name is in the digest
        return b""
