"""`bundle` and `verify`: what is in the zip, what is not, and how a changed one is reported."""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import launch
from jobs.commands.bundle import verify_bundle, write_bundle
from jobs.commands.collect import write_tables
from jobs.commands.session import Session
from jobs.errors import UsageError
from jobs.report.bundle.archive import names, pack, unpack
from jobs.report.bundle.verify import Verification, verify
from jobs.store.records import file_digest
from jobs.tables.latex import PLAIN, Numbers, Style, Width
from tests.command_line import ROOT, CommandLine
from tests.jobs.bundle_cases import DOTENV, PLANTED, SHARED, TOKEN, finished
from tests.slurm_cluster.users import as_user, require_user

INSIDE = [
    *("README.md", "bundle.json", "code/configs/recipe/paper.yaml", "code/configs/site/default.yaml", "code/constraints.txt"),
    *("code/jobs/statistics.py", "code/launch.py", "experiment.yaml", "inputs.json", "manifest.json"),
]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A finished experiment whose tables were collected, with a file beside them that leaks and one that does not."""
    found = finished(tmp_path_factory.mktemp("finished"))
    write_tables(found, found.look(ask_slurm=False))
    (found.launched.layout.tables / "mine.html").write_text(f"<p>{TOKEN}</p>")
    (found.launched.layout.tables / "notes.txt").write_text("mine")
    return found


@pytest.fixture(scope="module")
def bundle(session: Session) -> Path:
    """Its bundle."""
    assert write_bundle(session, None, None, PLAIN)
    return session.launched.layout.bundle


@pytest.fixture(scope="module")
def unpacked(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    unpack(bundle, folder)
    return folder


@pytest.mark.slow
def test_a_bundle_holds_what_the_tables_are_made_of(session: Session, unpacked: Path) -> None:
    """Settings, code, manifest, results with predictions, and the tables as `collect` writes them; no weights, no audio."""
    found = names(unpacked)
    assert [name for name in found if not name.startswith(("results/", "tables/"))] == INSIDE
    stages = {name.split("/")[3] for name in found if name.startswith("results/store/finetune/")}
    assert len(stages) == 11, "ten slots and a run that was replaced"
    assert {Path(name).name for name in found if name.startswith("results/")} == {"result.json", "predictions.csv"}
    collected = session.launched.layout.tables
    for name in ("tables.tex", "table1.tex", "table.md", "runs.csv", "methods.csv", "summary.json", "predictions.csv", "notes.txt"):
        assert (unpacked / "tables" / name).read_bytes() == (collected / name).read_bytes(), name
    assert ",outlier," in (unpacked / "tables" / "runs.csv").read_text()
    assert "Fine-tuned" in (unpacked / "tables" / "table.md").read_text()
    assert SHARED in (unpacked / "tables" / "table.md").read_text()
    assert "Fine-tuned" in (unpacked / "tables" / "report.html").read_text()
    manifest = json.loads((unpacked / "manifest.json").read_text())
    assert manifest == {"digest": "d1", "source": {"path": "fake", "kind": "csv"}, "utterances": [{"id": "u1", "label": "/a/"}]}


def test_no_secret_is_in_a_bundle(session: Session, unpacked: Path) -> None:
    """None of the planted webhooks, tokens, users, hosts and accounts is in any file or name; what would leak is left out and named."""
    assert "annaliese" in str(session.launched.layout.root)
    for name in names(unpacked):
        data = (unpacked / name).read_bytes()
        assert [text for text in PLANTED if text.encode() in data or text in name] == [], name
    stated = json.loads((unpacked / "bundle.json").read_text())
    assert stated["left_out"] == [
        "code/jobs/leaks.py: contains the value of .env: NAME",
        "tables/mine.html: contains the value of slurm.environment.API",
    ]
    assert (session.root / "jobs" / "leaks.py").read_text() == f"# export NAME={DOTENV}\n"


def test_a_table_with_a_secret_is_refused(tmp_path: Path) -> None:
    """A method that is labelled with the token: no bundle is written."""
    found = finished(tmp_path, label=f"with {TOKEN}")
    with pytest.raises(UsageError, match=r"the value of slurm\.environment\.API would be in experiment\.yaml"):
        write_bundle(found, None, None, PLAIN)
    assert not found.launched.layout.bundle.exists()


def test_the_same_results_give_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    """Another folder, other times of files, another umask, no folder of tables but the same files in it."""
    mask = os.umask(0o077)
    try:
        other = finished(tmp_path)
        tables = other.launched.layout.tables
        tables.mkdir(parents=True)
        (tables / "mine.html").write_text(f"<p>{TOKEN}</p>")
        (tables / "notes.txt").write_text("mine")
        assert write_bundle(other, tmp_path / "new" / "b.zip", None, PLAIN)
    finally:
        os.umask(mask)
    assert (tmp_path / "new" / "b.zip").read_bytes() == bundle.read_bytes()
    with zipfile.ZipFile(bundle) as archive:
        assert [entry.filename for entry in archive.infolist()] == sorted(archive.namelist())
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_options_of_the_tables_are_kept(session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tables are rendered again with the options given; a note says that they differ from the folder of tables."""
    assert write_bundle(session, tmp_path / "b.zip", "drop", Style(Width.column, Numbers.siunitx, bold=False))
    assert "table1.tex, tables.tex in" in (told := capsys.readouterr().err)
    assert "differ from those in the bundle: written with other options, by another version" in told
    assert verify_bundle(tmp_path / "b.zip", tmp_path / "rendered", ROOT)
    assert "\\num{" in (tmp_path / "rendered" / "table1.tex").read_text()
    with pytest.raises(UsageError, match="not an empty folder"):
        verify_bundle(tmp_path / "b.zip", tmp_path / "rendered", ROOT)


def test_an_incomplete_experiment_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run without a result: the bundle is written and verified, and `bundle` reports that it is incomplete."""
    found = finished(tmp_path)
    run = found.look(ask_slurm=False).graph.runs[-1]
    found.launched.layout.stage("finetune", run.key).result.unlink()
    assert not write_bundle(found, None, None, PLAIN)
    assert "incomplete: `python launch.py collect exp" in capsys.readouterr().err
    assert verify_bundle(found.launched.layout.bundle, None, ROOT)


def test_a_measured_corpus_is_bundled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run without a score (the stage of Table 3): its table and files are rendered again, and a changed value is found."""
    found = finished(tmp_path, measured=True)
    write_tables(found, found.look(ask_slurm=False))
    assert write_bundle(found, None, None, PLAIN)
    assert ": 1 run, 1 result, " in capsys.readouterr().out
    assert write_bundle(found, tmp_path / "again.zip", None, PLAIN)
    assert (tmp_path / "again.zip").read_bytes() == found.launched.layout.bundle.read_bytes()
    assert verify_bundle(found.launched.layout.bundle, tmp_path / "rendered", ROOT)
    assert ": exp, 1 run, " in capsys.readouterr().out
    assert (tmp_path / "rendered" / "measured.csv").read_bytes() == (found.launched.layout.tables / "measured.csv").read_bytes()
    assert (tmp_path / "rendered" / "measured.csv").read_text().splitlines()[1:] == ["fake,length,length,12.5", "fake,length,utterances,8"]
    unpack(found.launched.layout.bundle, tmp_path / "unpacked")

    def longer(folder: Path) -> None:
        edit(next((folder / "results").rglob("result.json")), lambda value: value["metrics"].update(length=12.6))

    problems = changed(tmp_path / "unpacked", tmp_path / "changed", longer, sign=True).problems
    assert {problem.split(":")[0] for problem in problems} == {
        f"tables/{name}" for name in ("measured.csv", "measured.tex", "report.html", "summary.json", "table.md")
    }


def changed(unpacked: Path, folder: Path, change: Callable[[Path], None], *, sign: bool) -> Verification:
    """The verification of a copy of a bundle after a change; `sign`: the digests are brought up to date, as somebody who cheats would."""
    shutil.copytree(unpacked, folder / "copy")
    change(folder / "copy")
    if sign:
        record = json.loads((folder / "copy" / "bundle.json").read_text())
        record["files"] = {name: file_digest(folder / "copy" / name) for name in names(folder / "copy") if name != "bundle.json"}
        (folder / "copy" / "bundle.json").write_text(json.dumps(record))
    return verify(folder / "copy", folder / "out", ROOT)


def result_of(folder: Path, number: int = 0) -> Path:
    """One of its results."""
    return sorted(folder.glob("results/store/finetune/*/result.json"))[number]


def edit(path: Path, change: Callable[[dict], None]) -> None:  # type: ignore[type-arg]
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def better(folder: Path, number: int = 0) -> None:
    edit(result_of(folder, number), lambda values: values.update(confusion=[[50, 0], [0, 50]]))


def several(folder: Path) -> None:
    """A result that was changed, one that was removed, tables that were removed and added, other code."""
    better(folder)
    result_of(folder, 1).unlink()
    (folder / "tables" / "runs.csv").unlink()
    (folder / "tables" / "more.txt").write_text("x")
    (folder / "code" / "launch.py").write_text("x")


def test_a_changed_bundle_is_told(unpacked: Path, tmp_path: Path) -> None:
    """By file, with the first line that differs, and what may be the cause: here code of another program than that of the bundle."""
    found = changed(unpacked, tmp_path, several, sign=False)
    told = "\n".join(found.problems)
    for text in (
        *("result.json: changed since the bundle was written: sha256 ", "result.json: missing", "code/launch.py: changed since the bundle"),
        *("tables/runs.csv: missing", "tables/runs.csv: not in the bundle, but rendered from its results"),
        *("tables/more.txt: added since", "tables/more.txt: not rendered from the results"),
        *("tables/table.md: line ", "tables/summary.json: line ", "tables/report.html: line ", "tables/confusion/plain.png: other bytes"),
    ):
        assert text in told
    assert found.reasons[0] == "the code that runs here is not that of the bundle: jobs/statistics.py"


def cheated(folder: Path) -> None:
    """Other settings, a better result, an outlier rule that drops nothing, a prettier table."""
    edit(result_of(folder), lambda values: values.update(settings={"work": 11}))
    better(folder, 1)
    edit(folder / "inputs.json", lambda values: values.update(sigmas=50.0))
    file = folder / "tables" / "table.md"
    file.write_text(file.read_text().replace("Fine-tuned", "Ours"))


def test_changes_with_matching_digests_are_told(unpacked: Path, tmp_path: Path) -> None:
    """The digests are those of the changed files: keys, the outlier rule and the tables still disagree."""
    found = changed(unpacked, tmp_path, cheated, sign=True)
    told = "\n".join(found.problems)
    assert "changed since" not in told
    for text in (
        "its settings, fold, seed or corpus are not those of its key",
        "the outlier rule gives other runs to 1 slot: plain/1/3",
        "tables/methods.csv: line 2: in the bundle ",
        "tables/runs.csv: line ",
    ):
        assert text in told
    row = next(line for line in found.problems if line.startswith("tables/table.md: line 6"))
    assert "in the bundle '| Ours |" in row
    assert "rendered here '| Fine-tuned |" in row


def test_what_is_equal_has_no_problems(unpacked: Path, tmp_path: Path) -> None:
    """An unchanged copy; a file that only was copied into the tables is named as not rendered."""
    found = changed(unpacked, tmp_path, lambda folder: None, sign=True)
    assert found.problems == ()
    assert found.results == 11
    assert {"tables.tex", "runs.csv", "summary.json", "confusion/plain.png"} <= set(found.rendered)
    assert "not rendered again, only its digest is verified: tables/notes.txt" in found.notes


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda folder: (folder / "bundle.json").unlink(), "no bundle.json"),
        (lambda folder: (folder / "bundle.json").write_text("{"), "bundle.json in the bundle: Invalid JSON"),
        (lambda folder: (folder / "inputs.json").unlink(), "no inputs.json"),
        (lambda folder: edit(folder / "inputs.json", lambda values: values.update(schema=2)), "another version of the program"),
        (
            lambda folder: edit(folder / "inputs.json", lambda values: values.update(rounds="three")),
            "rounds: Input should be a valid integer",
        ),
        (
            lambda folder: edit(folder / "inputs.json", lambda values: values["runs"].append(values["runs"][0])),
            "its tables cannot be rendered: run plain/1/0 of corpus fake is accepted twice",
        ),
        (lambda folder: edit(folder / "inputs.json", lambda values: values.update(experiment="../../x")), "experiment '../../x'"),
        (
            lambda folder: edit(folder / "inputs.json", lambda values: values["stages"][0].update(stage="../../../etc")),
            "stage '../../../etc'",
        ),
    ],
)
def test_what_is_no_bundle_is_refused(change: Callable[[Path], None], expected: str, unpacked: Path, tmp_path: Path) -> None:
    """In one line that names the record and what is wrong with it."""
    with pytest.raises(UsageError) as raised:
        changed(unpacked, tmp_path, change, sign=False)
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_another_user_verifies_a_bundle(bundle: Path) -> None:
    """Who has no rights on the results, and only reads the zip."""
    user = require_user()
    assert as_user(user, verify_bundle, bundle, None, ROOT)


@pytest.mark.slow
def test_a_bundle_is_verified_in_another_place(bundle: Path, tmp_path: Path) -> None:
    """Another process, without corpus, results and home, with another hash seed, time zone and locale."""
    copy = shutil.copy(bundle, tmp_path / "supplement.zip")
    variables = {"HOME": "/nonexistent", "PYTHONHASHSEED": "4711", "TZ": "Asia/Tokyo", "LC_ALL": "C", "COLUMNS": "60"}
    done = CommandLine(tmp_path / "no-data", tmp_path / "no-results", variables)("verify", str(copy))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "byte for byte" in done.stdout
    assert not (tmp_path / "no-results").exists()


def test_exit_codes_of_verify(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """1 with what differs and a cause; 2 in one line for what is no bundle."""

    def main(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["launch.py", *words])
        try:
            return launch.main()
        except SystemExit as ending:
            return int(ending.code or 0)

    unpack(bundle, tmp_path / "changed")
    better(tmp_path / "changed")
    pack(tmp_path / "changed", tmp_path / "changed.zip")
    assert main("verify", str(tmp_path / "changed.zip")) == 1
    told = capsys.readouterr().out
    assert "differs: tables/runs.csv: line " in told
    assert "cause: the code that runs here is not that of the bundle: jobs/statistics.py" in told
    assert main("verify", str(ROOT / "README.md")) == 2
    told = capsys.readouterr().err
    assert "README.md: no zip file" in told
    assert len(told.splitlines()) == 1
