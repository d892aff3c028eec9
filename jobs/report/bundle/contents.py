"""The files of a bundle, written into a folder that is then packed.

bundle.json          what the bundle is of, versions, and the digest of every other file
README.md            what is in it, and how it is verified
inputs.json          what tables are made of beside results (jobs.report.bundle.inputs)
experiment.yaml      the settings, resolved
manifest.json        of the corpus, with its digest; no other file of it
results/store/...    the results of all stages, with predictions and curves; no weights
tables/              tables, report and confusion matrices rendered from these results, and other files of the folder of tables
code/                the code, with its constraints
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from jobs.errors import UsageError
from jobs.experiment.graph import Graph
from jobs.report.bundle import scrub
from jobs.report.bundle.archive import is_safe, names
from jobs.report.bundle.inputs import Inputs, render, to_json
from jobs.store.layout import Layout
from jobs.store.records import SCHEMA as RESULT_SCHEMA
from jobs.store.records import Decoder, Result, file_digest, json_text
from jobs.store.snapshot import Snapshot
from jobs.text import counted

SCHEMA = 1
BUNDLE, INPUTS, CONFIGURATION, MANIFEST, README = "bundle.json", "inputs.json", "experiment.yaml", "manifest.json", "README.md"
RESULTS, TABLES, CODE = "results", "tables", "code"  # folders
CONSTRAINTS = ("constraints.txt", "requirements.txt")  # copied also where git does not name them
SITE = "configs/site/default.yaml"
NO_SITE = "# A bundle has no site profiles: they may hold secrets.\n{}\n"
PACKAGES = ("jinja2", "matplotlib", "numpy", "pillow", "pydantic", "scipy")  # that the bytes of tables and pictures depend on


@dataclass(frozen=True)
class Code:
    """The code of a bundle."""

    snapshot: str  # digest of the whole snapshot, of which site profiles and experiments are left out
    commit: str  # "": not known
    changed: bool  # it differs from the commit


@dataclass(frozen=True)
class Bundle:
    """The record `bundle.json`."""

    experiment: str
    complete: bool
    runs: int  # in the tables
    code: Code
    versions: Mapping[str, str]  # of Python and `PACKAGES`, by which the tables were rendered
    files: Mapping[str, str]  # every other file -> sha256
    copied: tuple[str, ...] = ()  # files of `tables` that were copied from the experiment's folder of tables
    left_out: tuple[str, ...] = ()  # `NAME: REASON`


RECORDS = Decoder(Bundle, SCHEMA)


@dataclass(frozen=True)
class Origin:
    """What a bundle is made from."""

    layout: Layout
    graph: Graph
    results: Mapping[str, Result]
    inputs: Inputs
    configuration: Mapping[str, Any]  # resolved, as it was launched
    manifest: Path
    code: Snapshot
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)  # value -> where it is from


def installed() -> dict[str, str]:
    """The versions of Python and of `PACKAGES` here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def fill(folder: Path, origin: Origin) -> Bundle:
    """Write the files of a bundle into an empty folder. UsageError where a record or table would contain a secret value."""
    left_out: list[str] = []
    _write(folder / INPUTS, json_text(to_json(origin.inputs)))
    _write(folder / CONFIGURATION, _yaml(origin))
    left_out.extend(_write_results(folder / RESULTS, origin))
    report = render(folder / RESULTS, origin.inputs, folder / TABLES)
    own = names(folder)
    for name in own:
        if where := scrub.secret_in((folder / name).read_bytes(), origin.secrets):
            raise UsageError(f"the value of {where} would be in {name} of the bundle: launch again without it, or with another value")
    left_out.extend(_write_manifest(folder / MANIFEST, origin))
    left_out.extend(_copy_code(folder / CODE, origin))
    left_out.extend(_copy_tables(folder / TABLES, origin))
    copied = [name.removeprefix(f"{TABLES}/") for name in names(folder) if name.startswith(f"{TABLES}/") and name not in own]
    runs = report.summary.finished
    _write(folder / README, _readme(origin, runs, report.complete))
    code = Code(origin.code.digest, origin.code.commit, bool(origin.code.changed))
    files = {name: file_digest(folder / name) for name in names(folder)}
    bundle = Bundle(origin.inputs.experiment, report.complete, runs, code, installed(), files, tuple(copied), tuple(left_out))
    _write(folder / BUNDLE, json_text(to_json(bundle, SCHEMA)))
    return bundle


def _write_results(root: Path, origin: Origin) -> list[str]:
    """The results as records, and their small artifacts; returns what was left out."""
    layout, left_out, hosts = Layout(root, origin.layout.experiment), [], scrub.host_names(origin.results.values())
    for key, given in origin.results.items():
        result = scrub.scrubbed_result(given, hosts)
        stage = layout.stage(result.stage, key)
        _write(stage.result, json_text({"schema": RESULT_SCHEMA, **asdict(result)}))
        source, target = (each.attempt(result.attempt).output for each in (origin.layout.stage(result.stage, key), stage))
        for name, digest in result.artifacts.items():
            problem = _copy(source / name, target / name, name, origin.secrets, most=scrub.LARGEST_ARTIFACT)
            if not problem and file_digest(target / name) != digest:
                (target / name).unlink()
                problem = "its digest is not that in the result"
            if problem:
                left_out.append(f"{name} of {result.stage} {key[:8]}: {problem}")
    return left_out


def _write_manifest(target: Path, origin: Origin) -> list[str]:
    digest = origin.inputs.corpus_digest
    try:
        text = scrub.scrubbed_manifest(origin.manifest.read_text(encoding="utf-8"), digest)
    except (OSError, UnicodeDecodeError) as error:
        return [f"{MANIFEST} of corpus {origin.inputs.corpus}: {getattr(error, 'strerror', None) or 'not UTF-8'}"]
    if text is None:
        return [f"{MANIFEST} of corpus {origin.inputs.corpus}: not that of the launch, whose digest is {digest[:12]}"]
    _write(target, text)
    return []


def _copy_code(folder: Path, origin: Origin) -> list[str]:
    source, left_out = origin.code.source, []
    wanted = [name for name in origin.code.files if not name.startswith(scrub.NOT_CODE)]
    wanted += [name for name in CONSTRAINTS if name not in origin.code.files and (source / name).is_file()]
    for name in wanted:
        if problem := _copy(origin.code.file_of(name), folder / name, f"{CODE}/{name}", origin.secrets):
            left_out.append(f"{CODE}/{name}: {problem}")
    _write(folder / SITE, NO_SITE)
    return left_out


def _copy_tables(folder: Path, origin: Origin) -> list[str]:
    """Copy the files of the experiment's folder of tables that were not rendered here."""
    source, left_out = origin.layout.tables, []
    for name in names(source) if source.is_dir() else ():
        if (folder / name).exists():
            continue
        if problem := _copy(source / name, folder / name, f"{TABLES}/{name}", origin.secrets, most=scrub.LARGEST_ARTIFACT):
            left_out.append(f"{TABLES}/{name}: {problem}")
    return left_out


def _copy(source: Path, target: Path, name: str, secrets: Mapping[str, str], *, most: int | None = None) -> str:
    """Copy a file; returns why it was not copied, or ""."""
    if not is_safe(name):
        return "a name that a bundle cannot have"
    try:
        if most is not None and source.stat().st_size > most:
            return f"larger than {most / 1e6:.0f} MB"
        data, executable = source.read_bytes(), source.stat().st_mode & 0o100
    except OSError as error:
        return error.strerror or str(error)
    if where := scrub.secret_in(data, secrets):
        return f"contains the value of {where}"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    target.chmod(0o755 if executable else 0o644)
    return ""


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")


def _yaml(origin: Origin) -> str:
    import yaml

    head = "# The settings of the experiment, resolved, without those of the site; absolute paths are shortened to their last part.\n"
    values = json.loads(json.dumps(scrub.scrubbed_configuration(origin.configuration)))
    return head + str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=140))


def _readme(origin: Origin, runs: int, complete: bool) -> str:
    """The text that a reader of the zip opens first."""
    name, corpus = origin.inputs.experiment, origin.inputs.corpus
    state = "" if complete else " It is incomplete: the tables mark what is missing."
    return f"""# {name}

Results of {counted(runs, "run")} on the corpus {corpus} (digest {origin.inputs.corpus_digest}).{state}

- `tables/`: what `collect` writes, rendered from the results in this bundle: open `report.html` first.
- `results/store/STAGE/KEY/`: the result of each stage, with the predictions of each run. No weights.
- `experiment.yaml`: the settings, resolved. `manifest.json`: the corpus, with its digest. No other file of the corpus.
- `inputs.json`: runs, seeds, outlier rule and published figures that the tables are made of.
- `code/`: the program, with the versions of its packages in `constraints.txt`.
- `bundle.json`: the digest of every file.

From a checkout of the program, with its packages installed:

    python launch.py verify {name}-bundle.zip

compares every file with its digest, judges the runs again, renders the tables again, and compares them byte for byte.
It needs no corpus, no GPU and no network.
"""
