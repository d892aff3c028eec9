"""Verifies a bundle: digests of its files, content keys of its results, and its tables rendered again, compared byte for byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from jobs.errors import UsageError
from jobs.report.bundle import contents
from jobs.report.bundle.archive import names
from jobs.report.bundle.inputs import RECORDS as INPUTS
from jobs.report.bundle.inputs import Inputs, judged, render, results_of, unlike_their_keys
from jobs.store.records import DamagedRecordError, Decoder, RecordT, Result, file_digest
from jobs.text import counted, first_line, listed

SHOWN = 100  # characters of a line that differs


@dataclass(frozen=True)
class Verification:
    """What a bundle holds, and how it differs from what it should hold."""

    bundle: contents.Bundle
    rendered: tuple[str, ...]  # files that were rendered again and are equal
    results: int  # they were rendered from
    problems: tuple[str, ...]  # a line each; none: equal
    reasons: tuple[str, ...]  # what may have caused them: code, versions, files
    notes: tuple[str, ...]  # what was not verified

    @property
    def equal(self) -> bool:
        return not self.problems


def verify(folder: Path, out: Path, code: Path) -> Verification:
    """Verify an unpacked bundle. The tables are rendered into `out`; `code`: folder of the program that runs here.

    UsageError for a folder that is no bundle, or whose tables cannot be rendered.
    """
    bundle = _record(contents.RECORDS, folder / contents.BUNDLE)
    files = _changed_files(folder, bundle.files)
    inputs = _record(INPUTS, folder / contents.INPUTS)
    root = folder / contents.RESULTS
    results = results_of(root, inputs)
    try:
        rule_problems = _rule_problems(inputs, results)
        render(root, inputs, out)
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:  # of a record whose parts do not fit together
        raise UsageError(f"its tables cannot be rendered: {type(error).__name__}: {first_line(error)}{_hint(files)}") from error
    except UsageError as error:
        raise UsageError(f"its tables cannot be rendered: {error}{_hint(files)}") from error
    problems = [
        *files,
        *(
            f"{_result(inputs, key)}: its settings, fold, seed or corpus are not those of its key"
            for key in unlike_their_keys(inputs, results)
        ),
        *rule_problems,
    ]
    kept, copied = folder / contents.TABLES, set(bundle.copied)
    before, now = (set(names(each)) if each.is_dir() else set() for each in (kept, out))
    differing = {name: _difference(kept / name, out / name) for name in sorted(before & now)}
    problems.extend(f"{contents.TABLES}/{name}: {difference}" for name, difference in differing.items() if difference)
    problems.extend(f"{contents.TABLES}/{name}: not in the bundle, but rendered from its results" for name in sorted(now - before))
    problems.extend(f"{contents.TABLES}/{name}: not rendered from the results in the bundle" for name in sorted(before - now - copied))
    reasons = (*_code_reasons(folder / contents.CODE, code), *_version_reasons(bundle.versions)) if problems else ()
    notes = [f"not rendered again, only its digest is verified: {contents.TABLES}/{name}" for name in sorted(copied & before)]
    notes.extend(f"left out of the bundle: {line}" for line in bundle.left_out)
    equal = tuple(name for name, difference in differing.items() if not difference)
    return Verification(bundle, equal, len(results), tuple(problems), tuple(reasons), tuple(notes))


def _record(decoder: Decoder[RecordT], path: Path) -> RecordT:
    try:
        record = decoder.load(path)
    except DamagedRecordError as error:
        raise UsageError(
            f"{path.name} in the bundle: {error}: nothing can be verified; verify it with the program in its folder code/"
        ) from error
    if record is None:
        raise UsageError(f"the bundle has no {path.name}: not a bundle that `bundle` wrote, or not the whole of it")
    return record


def _changed_files(folder: Path, stated: Mapping[str, str]) -> list[str]:
    """A line for each file that is missing, has another digest, or is not stated."""
    present = set(names(folder)) - {contents.BUNDLE}
    missing = [f"{name}: missing" for name in sorted(stated.keys() - present)]
    unknown = [f"{name}: added since the bundle was written" for name in sorted(present - stated.keys())]
    changed = [
        f"{name}: changed since the bundle was written: sha256 {found[:12]}, stated {stated[name][:12]}"
        for name in sorted(present & stated.keys())
        if (found := file_digest(folder / name)) != stated[name]
    ]
    return [*missing, *changed, *unknown]


def _hint(files: Sequence[str]) -> str:
    """The end of an error's line: which files were changed, if any."""
    return f" ({listed(files)})" if files else ""


def _rule_problems(inputs: Inputs, results: Mapping[str, Result]) -> list[str]:
    """Whether the outlier rule, replayed on the results, lets the same runs fill the slots."""
    stated = {(run.method, run.fold, run.slot): run.generation for run in inputs.runs if run.generation}
    found = judged(inputs, results).generations
    differing = ["/".join(map(str, slot)) for slot in sorted(stated.keys() | found.keys()) if stated.get(slot) != found.get(slot)]
    return [f"the outlier rule gives other runs to {counted(len(differing), 'slot')}: {listed(differing)}"] if differing else []


def _difference(before: Path, now: Path) -> str:
    """How two files differ: the first line that is another one, or their size; "" if they are equal."""
    old, new = before.read_bytes(), now.read_bytes()
    if old == new:
        return ""
    try:
        lines = zip_longest(old.decode().splitlines(), new.decode().splitlines(), fillvalue="(end)")
    except UnicodeDecodeError:
        return f"other bytes ({len(old)} in the bundle, {len(new)} rendered here)"
    number, (first, second) = next(((number, pair) for number, pair in enumerate(lines, 1) if pair[0] != pair[1]), (0, ("", "")))
    if not number:
        return "other line ends"
    start = max(0, next((place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0) - SHOWN // 4)
    return f"line {number}: in the bundle {_part(first, start)}, rendered here {_part(second, start)}"


def _part(line: str, start: int) -> str:
    """A piece of a line, around what differs."""
    return repr(f"{'...' if start else ''}{line[start : start + SHOWN]}{'...' if len(line) > start + SHOWN else ''}")


def _code_reasons(bundled: Path, here: Path) -> list[str]:
    """Files of the bundle's `jobs` that are others here."""
    of_tables = [name for name in names(bundled) if name.startswith("jobs/")] if bundled.is_dir() else []
    if not of_tables:
        return ["the bundle has no code to compare with the one that runs here"]
    differing = [name for name in of_tables if not (here / name).is_file() or file_digest(here / name) != file_digest(bundled / name)]
    return [f"the code that runs here is not that of the bundle: {listed(differing)}"] if differing else []


def _version_reasons(bundled: Mapping[str, str]) -> list[str]:
    here = contents.installed()
    differing = [f"{name} {here[name]} here, {bundled[name]} in the bundle" for name in here if bundled.get(name, here[name]) != here[name]]
    return [f"other versions: {', '.join(differing)}"] if differing else []


def _result(inputs: Inputs, key: str) -> str:
    stage = next(each for each in inputs.stages if each.key == key)
    return f"{contents.RESULTS}/store/{stage.stage}/{key}/result.json"


def report_lines(found: Verification, name: str) -> list[str]:
    """What `verify` prints: problems with what may have caused them, or that all is equal."""
    code = f"code {found.bundle.code.snapshot}" + (f" of commit {found.bundle.code.commit[:12]}" if found.bundle.code.commit else "")
    head = f"{name}: {found.bundle.experiment}, {counted(found.bundle.runs, 'run')}, {code}"
    if found.equal:
        files = f"{counted(len(found.rendered), 'file')} of tables, rendered again from {counted(found.results, 'result')}"
        return [head, f"equal: {files}, byte for byte; the digests of {counted(len(found.bundle.files), 'file')}"]
    causes = [f"cause: {reason}" for reason in found.reasons] or [
        "cause: code and versions are those of the bundle, so its files were changed"
    ]
    return [head, *(f"differs: {problem}" for problem in found.problems), *causes]
