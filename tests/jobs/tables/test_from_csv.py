"""Results from elsewhere: what is read, what is refused and how, and that they are judged as a grid's own."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.control.facts import StageFacts
from jobs.control.outliers import rule_in_words
from jobs.control.rounds import replay
from jobs.errors import UsageError
from jobs.experiment.config import OutlierRule, Policy
from jobs.experiment.graph import Graph, Run
from jobs.store.layout import Layout
from jobs.store.scores import confusion_of
from jobs.tables.collect import collect, collect_csv
from jobs.tables.display import render_csv, render_methods_csv
from jobs.tables.from_csv import Judged, judge_runs, read_runs
from jobs.tables.summary import Entry, Scores, Status, Unreplaced, summarise
from tests.jobs.table_cases import entry, graph, published, result, summary

quick = settings(max_examples=100, deadline=None)
HEADER = "corpus,method,fold,slot,seed,ua"
UAS = {"1": (60.0, 61.0, 62.0, 63.0, 64.0), "2": (70.5, 71.5, 70.0, 72.0, 71.0)}


def written(tmp_path: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path = tmp_path / "elsewhere.csv"
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def rows_of(collapsed: str = "") -> list[str]:
    """Two folds of five runs; the one named FOLD/SLOT is at chance."""
    return [
        f"iemocap,vft,{fold},{slot},{slot},{25.0 if collapsed == f'{fold}/{slot}' else ua}"
        for fold, cell in UAS.items()
        for slot, ua in enumerate(cell)
    ]


def judged(path: Path, rule: OutlierRule | str = OutlierRule.pooled, rounds: int = 3) -> Judged:
    return judge_runs(read_runs(path), rule, 2.0, rounds)


def named(entries: Sequence[Entry]) -> list[tuple[str, int, Status]]:
    return [(each.name, each.seed, each.status) for each in entries]


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    """Any order of columns, more of them than needed, names in capitals, and blank lines."""
    path = written(
        tmp_path, "UA, note ,seed,slot,fold,method,corpus,wa", "", "62.25,x,7,0,1,vft,iemocap,63", ",,,,,,,", "0,,8,1,1,vft,iemocap,"
    )
    assert read_runs(path) == (
        Entry("iemocap", "vft", "1", 0, 7, Scores(62.25, 63.0), Status.accepted),
        Entry("iemocap", "vft", "1", 1, 8, Scores(0.0), Status.accepted),
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_byte_order_marks_and_semicolons_are_read(tmp_path: Path, encoding: str, end: str) -> None:
    """A byte order mark, semicolons and decimal commas are what spreadsheets of many countries write."""
    path = tmp_path / "tabelle.csv"
    text = end.join((HEADER.replace(",", ";"), 'é;vft;"a;b";0;0;62,25', "é;vft;c;0;0;25", ""))
    path.write_bytes(text.encode(encoding))
    found = read_runs(path)
    assert [(each.corpus, each.fold, each.scores) for each in found] == [("é", "a;b", Scores(62.25)), ("é", "c", Scores(25.0))]


def test_a_status_can_replace_scores(tmp_path: Path) -> None:
    """A run with a status that has no score needs none; an empty status is a run like any other."""
    path = written(tmp_path, f"{HEADER},status", "c,m,1,0,0,,failed", "c,m,1,1,1,,Pending", "c,m,1,2,2,25,diverged", "c,m,1,3,3,70,")
    assert [each.status.value for each in read_runs(path)] == ["failed", "pending", "diverged", "accepted"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "empty; expected a header with the columns corpus, method, fold, slot, seed, ua"),
        ([HEADER], "no runs below the header"),
        (["corpus,method,fold,slot,uar", "c,m,1,0,50"], "no column seed, ua; expected corpus"),
        ([f"{HEADER},UA", "c,m,1,0,0,50,50"], "column ua is there twice"),
        ([HEADER, "c,m,1,0,0,50", "c,m,1,1,1,fifty"], "line 3: ua 'fifty' is no number"),
        ([HEADER, "c,m,1,0,0,nan"], "line 2: ua 'nan' is no number"),
        ([HEADER, "c,m,1,0,0,1e999"], "line 2: ua '1e999' is no number"),
        ([HEADER, "c,m,1,0,0,100.1"], "line 2: ua 100.1 is no percentage"),
        ([HEADER, "c,m,1,0,0,-1"], "line 2: ua -1 is no percentage"),
        ([HEADER, '"a,b",m,1,0,0,"62,5"'], "line 2: ua '62,5' is no number"),
        ([f"{HEADER},wa", "c,m,1,0,0,50,x"], "line 2: wa 'x' is no number"),
        ([HEADER, "c,m,1,0,0,"], "line 2: ua is empty"),
        ([f"{HEADER},status", "c,m,1,0,0,,accepted"], "line 2: ua is empty"),
        ([f"{HEADER},status", "c,m,1,0,0,50,fine"], "line 2: status 'fine': known are accepted, outlier"),
        ([HEADER, "c,m,1,0.5,0,50"], "line 2: slot '0.5' is no whole number"),
        ([HEADER, "c,m,1,0,-1,50"], "line 2: seed '-1' is no whole number"),
        ([HEADER, "c, ,1,0,0,50"], "line 2: method is empty"),
        ([HEADER, "c,m,1,0,0"], "line 2: 5 values, but 6 columns"),
        ([HEADER, 'c,"m"x,1,0,0,50'], "line 2: ',' expected"),
        ([HEADER, "c,m,1,0,3,50", "", "c,m,1,0,3,51"], "line 4: seed 3 of m, fold 1, corpus c is already in line 2"),
        ([HEADER, "c,m,1,0,3,50", "c,m,1,1,3,50"], "line 3: seed 3 of m, fold 1, corpus c is already in line 2"),
        ([HEADER, "c,m,1,0,0,0.62", "c,m,1,1,1,1"], "every ua lies between 0 and 1, but percent is expected"),
    ],
)
def test_unreadable_rows_are_errors_in_one_line(tmp_path: Path, lines: list[str], message: str) -> None:
    """File, line and column are named, on one line, and nothing is guessed."""
    path = written(tmp_path, *lines)
    with pytest.raises(UsageError) as error:
        read_runs(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    """A missing file, a folder, and bytes that are no text."""
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00c")
    for name, message in (("missing.csv", "no such file"), (".", "directory"), ("binary.csv", "not UTF-8")):
        with pytest.raises(UsageError, match=message):
            read_runs(tmp_path / name)


def test_an_outlier_without_a_rerun_stays_in_the_mean(tmp_path: Path) -> None:
    """Without a rerun in the file a run that is out counts in the mean, is unresolved, and is asked for again."""
    found = judged(written(tmp_path, HEADER, *rows_of("2/3")))
    assert {each.status for each in found.entries} == {Status.accepted}
    assert found.unresolved == {("iemocap", "vft"): 1}
    assert named(found.rerun) == [("vft/2/3", 3, Status.accepted)]
    [method] = summarise(found.entries, experiment="e").methods
    assert (method.n, method.dropped, method.unresolved) == (10, 0, 1)
    assert method.cells[1].mean_ua == pytest.approx((sum(UAS["2"]) - 72.0 + 25.0) / 5)


def test_an_outlier_without_a_rerun_is_left_out_if_asked(tmp_path: Path) -> None:
    """It is dropped, the cell is complete without it, and the caption states both that and the number; means over all runs have it."""
    path = written(tmp_path, HEADER, *rows_of("2/3"))
    report = collect_csv(path, published(None), rule="pooled", sigmas=2.0, rounds=3, unreplaced=Unreplaced.drop)
    [method] = report.summary.methods
    assert report.complete
    assert (method.n, method.dropped, method.rerun, method.unresolved) == (9, 1, 0, 1)
    assert method.cells[1].mean_ua == pytest.approx((sum(UAS["2"]) - 72.0) / 4)
    assert method.cells[1].mean_ua_all_runs == pytest.approx((sum(UAS["2"]) - 72.0 + 25.0) / 5)
    assert named(report.judged.rerun) == [("vft/2/3", 3, Status.accepted)]
    text = (tmp_path / "elsewhere-tables/table.md").read_text(encoding="utf-8")
    assert "are left out of the mean" in text
    assert "†" not in text
    values = json.loads((tmp_path / "elsewhere-tables/summary.json").read_text(encoding="utf-8"))
    assert (values["unreplaced"], values["methods"][0]["cells"][1]["n"], values["methods"][0]["cells"][1]["dropped"]) == ("drop", 4, 1)


def test_each_run_has_its_verdict(tmp_path: Path) -> None:
    """The dropped run has that of the round that dropped it, its rerun the last one, and a run that diverged or was not judged none."""
    rows = [f"{row}," for row in rows_of("2/3")]
    path = written(
        tmp_path, f"{HEADER},status", *rows, "iemocap,vft,2,3,1003,71.2,", "iemocap,vft,1,5,5,,diverged", "iemocap,vft,1,5,1005,62,"
    )
    report = collect_csv(path, published(None), rule="pooled", sigmas=2.0, rounds=3)
    with (tmp_path / "elsewhere-tables/runs.csv").open(newline="") as file:
        found = {(row["fold"], row["seed"]): row for row in csv.DictReader(file)}
    assert [row["out"] for row in found.values()].count("true") == 1
    dropped, rerun = found["2", "3"], found["2", "1003"]
    assert (dropped["out"], dropped["status"], float(dropped["centre"])) == ("true", "outlier", 70.5)  # of 70.5 71.5 70 25 71
    scale = 1.4826 * 1.0  # of 0 1 1 2 2 and 0.5 0.5 1 45.5 together, which is more than of the second alone
    assert float(dropped["scale"]) == pytest.approx(scale)
    assert float(dropped["distance"]) == pytest.approx(45.5 / scale)
    assert (rerun["out"], rerun["status"], float(rerun["centre"])) == ("false", "accepted", 70.75)  # the dropped run is still there
    assert {found["1", "5"][name] for name in ("out", "centre", "scale", "distance")} == {""}
    runs = json.loads((tmp_path / "elsewhere-tables/summary.json").read_text(encoding="utf-8"))["methods"][0]["cells"][1]["runs"]
    assert [(run["seed"], run["out"], run["centre"]) for run in runs if run["slot"] == 3] == [(3, True, 70.5), (1003, False, 70.75)]
    pending = written(tmp_path, f"{HEADER},status", *rows, "iemocap,vft,1,5,5,,pending")
    assert {each.verdict for each in judged(pending).entries} == {None}
    assert report.summary.methods[0].unresolved == 0


def test_a_later_row_of_a_slot_is_its_rerun(tmp_path: Path) -> None:
    """A later row of the slot replaces the run that is out, which stays on record."""
    found = judged(written(tmp_path, HEADER, *rows_of("2/3"), "iemocap,vft,2,3,1003,71.2"))
    assert [each for each in named(found.entries) if each[0] == "vft/2/3"] == [
        ("vft/2/3", 3, Status.outlier),
        ("vft/2/3", 1003, Status.accepted),
    ]
    assert (found.unresolved, found.rerun, found.unused) == ({}, (), ())


def test_number_of_rounds_is_limited(tmp_path: Path) -> None:
    """After the last round a rerun that is out again is unresolved, and no further seed is asked for."""
    reruns = [f"iemocap,vft,2,3,{1000 * place + 3},{25.0 + place}" for place in (1, 2)]
    path = written(tmp_path, HEADER, *rows_of("2/3"), *reruns)
    found = judged(path, rounds=1)
    assert [each[1:] for each in named(found.entries) if each[0] == "vft/2/3"] == [(3, Status.outlier), (1003, Status.accepted)]
    assert (found.unresolved, found.rerun) == ({("iemocap", "vft"): 1}, ())
    assert named(found.unused) == [("vft/2/3", 2003, Status.accepted)]
    found = judged(path, rounds=3)
    assert [each[1] for each in named(found.entries) if each[2] is Status.outlier] == [3, 1003]
    assert named(found.rerun) == [("vft/2/3", 2003, Status.accepted)]


def test_later_rows_of_an_accepted_run_are_unused(tmp_path: Path) -> None:
    """A second run of a slot whose first is fine counts nowhere, and is named rather than chosen."""
    found = judged(written(tmp_path, HEADER, *rows_of(), "iemocap,vft,1,0,99,61.5"))
    assert named(found.unused) == [("vft/1/0", 99, Status.accepted)]
    assert 99 not in [each.seed for each in found.entries]


def test_the_rule_is_applied_when_all_runs_are_finished(tmp_path: Path) -> None:
    """With a run missing nothing is dropped: the judgement could come out otherwise."""
    rows = [f"{row}," for row in rows_of("2/3")]
    found = judged(written(tmp_path, f"{HEADER},status", *rows, "iemocap,vft,1,5,5,,pending", "iemocap,vft,2,3,1003,71.2,"))
    assert [each for each in named(found.entries) if each[0] == "vft/2/3"] == [("vft/2/3", 3, Status.accepted)]
    assert (found.unresolved, found.rerun) == ({}, ())


def test_diverged_runs_are_replaced_or_reported_for_a_rerun(tmp_path: Path) -> None:
    """What diverged is in no judgement; a row below takes its place, and without one another seed is asked for."""
    rows = [f"{row}," for row in rows_of()]
    path = written(tmp_path, f"{HEADER},status", *rows, "iemocap,vft,1,5,5,25,diverged", "iemocap,vft,1,5,1005,62,")
    found = judged(path)
    assert [each[2] for each in named(found.entries) if each[0] == "vft/1/5"] == [Status.diverged, Status.accepted]
    assert (found.unresolved, found.rerun) == ({}, ())
    found = judged(written(tmp_path, f"{HEADER},status", *rows, "iemocap,vft,1,5,5,,diverged"))
    assert named(found.rerun) == [("vft/1/5", 5, Status.diverged)]


def test_the_rule_is_applied_per_method_and_corpus(tmp_path: Path) -> None:
    """A run is compared with those of its own method and corpus."""
    others = [row.replace("vft", "tapt").replace(",6", ",2").replace(",7", ",3") for row in rows_of()]
    found = judged(written(tmp_path, HEADER, *rows_of(), *others))
    assert found.unresolved == {}


def test_rules_are_checked_against_the_smallest_cell(tmp_path: Path) -> None:
    """The literal rule is refused for five runs a cell, with its reason; no rounds are refused too."""
    path = written(tmp_path, HEADER, *rows_of(), "iemocap,vft,1,5,5,60")
    with pytest.raises(UsageError, match="can never drop a run of 5 seeds"):
        judged(path, OutlierRule.cell)
    with pytest.raises(UsageError, match="at least 1"):
        judged(path, rounds=0)
    assert judged(written(tmp_path, HEADER, *rows_of("2/3")), OutlierRule.none).unresolved == {}


@st.composite
def histories(draw: st.DrawFn) -> dict[tuple[str, int], list[float | None]]:
    """(fold, slot) -> UA of three runs one after another, None where one diverged."""
    ua = st.one_of(st.none(), st.just(25.0), *[st.integers(240, 260).map(lambda quarters: quarters / 4)] * 4)
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    return {(str(fold), slot): draw(st.lists(ua, min_size=3, max_size=3)) for fold, slots in enumerate(shape) for slot in range(slots)}


@quick
@given(histories(), st.sampled_from(["pooled", "none"]), st.integers(1, 4))
def test_decisions_agree_with_those_of_a_grid(history: dict[tuple[str, int], list[float | None]], rule: str, rounds: int) -> None:
    """The same results lead to the same drops, reruns and unresolved runs, whether from a file or from a grid's own records."""
    entries: list[Entry] = []
    runs: list[Run] = []
    facts: dict[str, StageFacts] = {}
    for (fold, slot), values in history.items():
        for generation, ua in enumerate(values):
            run = Run("vft", fold, slot, slot + 1000 * generation, f"{fold}-{slot}-{generation}", generation)
            runs.append(run)
            facts[run.key] = StageFacts(done=True, ua=ua, diverged="" if ua is not None else "NaN")
            entries.append(entry("vft", fold, slot, ua, None if ua is not None else Status.diverged, seed=run.seed))
    policy = Policy(outliers=OutlierRule[rule], sigmas=2.0, rounds=rounds, max_seeds=3)
    decided = replay(Graph({}, tuple(runs), "iemocap", "d", {}), facts, policy)
    found = judge_runs(entries, rule, 2.0, rounds)
    dropped = {(each.fold, each.slot, each.seed) for each in decided.dropped}
    filling = {(each.fold, each.slot): each.seed for each in found.entries if each.status is Status.accepted}
    assert filling == {
        slot: seed
        for slot in history
        if history[slot][(seed := slot[1] + 1000 * decided.generations.get(("vft", *slot), 0)) // 1000] is not None
    }
    assert {(each.fold, each.slot, each.seed) for each in found.entries if each.status is Status.outlier} == {
        each for each in dropped if history[each[:2]][each[2] // 1000] is not None
    }
    unresolved = found.unresolved.get(("iemocap", "vft"), 0)
    if len(filling) == len(history):
        assert unresolved == len(decided.unresolved)
    else:  # a slot without a run that counts: the grid is not there yet, the file may be all there is
        assert unresolved >= len(decided.unresolved)


def test_runs_csv_of_a_grid_gives_the_same_numbers(tmp_path: Path) -> None:
    """`runs.csv` of a grid with an outlier, a diverged and an unresolved run gives the same numbers when it is read back."""
    rows = [*rows_of("2/3"), "iemocap,vft,2,3,1003,30", "iemocap,vft,2,3,2003,31", "iemocap,vft,1,5,1005,62.25"]
    path = written(tmp_path, f"{HEADER},status", "iemocap,vft,1,5,5,,diverged", *(f"{row}," for row in rows))
    made = summarise(judged(path).entries, experiment="e")
    own = tmp_path / "runs.csv"
    own.write_text(render_csv(made), encoding="utf-8")
    again = judged(own)
    assert summarise(again.entries, experiment="e") == made
    assert made.methods[0].unresolved == 1
    assert made.methods[0].dropped == 3


@pytest.mark.slow
@pytest.mark.parametrize("pending", [False, True])
def test_collected_runs_csv_gives_the_same_summary(tmp_path: Path, pending: bool) -> None:
    """What `collect` writes is read by `collect --from`: same means, intervals, tests and counts, complete or not."""
    made = graph(methods=("vft", "tapt"), slots=5, corpus="iemocap")
    made = replace(
        made, superseded=tuple(replace(run, seed=run.seed + 50, key=f"{run.key}-") for run in made.runs if run.name == "tapt/2/3")
    )
    made = replace(made, runs=tuple(replace(run, generation=1) if run.name == "tapt/2/3" else run for run in made.runs))
    results = {run.key: result(run, ((70 + run.slot, 30 - run.slot), (40 - run.slot, 60 + run.slot)), ("a", "b")) for run in made.runs}
    results[made.superseded[0].key] = result(made.superseded[0], ((100, 0), (100, 0)), ("a", "b"))
    if pending:
        del results[made.superseded[0].key.removesuffix("-")]
    words = rule_in_words("pooled", 2.0, 3)
    facts = {key: StageFacts(done=True, ua=scores.ua) for key, found in results.items() if (scores := confusion_of(found))}
    judgements = replay(made, facts, Policy())
    own = collect(Layout(tmp_path, "demo"), made, results, {}, published(None), outlier_rule=words, judgements=judgements)
    assert {each.verdict is None for method in own.summary.methods[:1] for cell in method.cells for each in cell.runs} == {False}
    assert own.summary.methods[1].outliers.runs == 1
    report = collect_csv(tmp_path / "demo/tables/runs.csv", published(None), rule="pooled", sigmas=2.0, rounds=3)
    assert replace(report.summary, experiment="demo", code=own.summary.code) == own.summary
    assert report.complete is not pending
    assert report.notes == ()


@pytest.mark.parametrize("corpus", ["=HYPERLINK(1)", "+cmd", "-cmd|' /C calc'!A0", "@SUM(1)", "\tx", "'=1+1", "-1.5", "plain", "it's"])
def test_text_that_a_spreadsheet_would_execute_is_quoted(corpus: str, tmp_path: Path) -> None:
    """In every CSV table; read again it is the same. Numbers and other text stay as they are."""
    made = summary((entry("vft", "1", 0, 60.5, corpus=corpus), entry("vft", "1", 1, 61.5, corpus=corpus)))
    for text in (render_csv(made), render_methods_csv(made)):
        for row in csv.reader(io.StringIO(text, newline="")):
            assert row[0][0] not in "=+-@\t" or row[0] == "-1.5"
    file = tmp_path / "runs.csv"
    file.write_text(render_csv(made), encoding="utf-8")
    assert [run.corpus for run in read_runs(file)] == [corpus] * 2


def test_tables_of_a_csv_file(tmp_path: Path) -> None:
    """The same files as of a grid, beside the file that was read, with the rule, what is unresolved, and what to rerun."""
    path = written(tmp_path, HEADER, *rows_of("2/3"), "iemocap,vft,1,0,99,61.5")
    report = collect_csv(path, published(None), rule=OutlierRule.pooled, sigmas=2.0, rounds=3)
    folder = tmp_path / "elsewhere-tables"
    assert {file.name for file in folder.iterdir()} == {
        "tables.tex",
        "table1.tex",
        "table1-details.tex",
        "table.md",
        "runs.csv",
        "methods.csv",
        "summary.json",
    }
    assert set(report.paths) == set(folder.iterdir())
    assert report.notes == (
        "rerun with another seed, and add the row below: iemocap vft/2/3 seed 3 is out with UA 25",
        "not used, the rule keeps the run above it: iemocap vft/1/0 seed 99",
    )
    values = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert (values["experiment"], values["complete"], values["methods"][0]["unresolved"]) == ("elsewhere", True, 1)
    assert values["outlier_rule"].endswith("since the rule keeps an earlier one of their slot: 1")
    assert values["methods"][0]["cells"][0]["runs"][0] == {
        "slot": 0,
        "seed": 0,
        "ua": 60.0,
        "wa": None,
        "macro_f1": None,
        "status": "accepted",
        "out": False,
        "centre": 62.0,
        "scale": pytest.approx(1.4826 * 1.5),
        "distance": pytest.approx(2 / (1.4826 * 1.5)),
    }
    assert "‡ Unresolved" in (folder / "table.md").read_text(encoding="utf-8")
    assert "ddagger" in (folder / "table1.tex").read_text(encoding="utf-8")


def test_formats_and_folder_of_tables_from_csv(tmp_path: Path) -> None:
    """Formats and folder are as for a grid; an unknown format leaves nothing behind."""
    path = written(tmp_path, HEADER, *rows_of())
    with pytest.raises(UsageError, match="'pdf'"):
        collect_csv(path, published(None), rule="none", sigmas=2.0, rounds=3, formats=["pdf"])
    report = collect_csv(path, published(None), rule="none", sigmas=2.0, rounds=3, formats=["json"], out=tmp_path / "out")
    assert report.paths == (tmp_path / "out" / "summary.json",)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["elsewhere.csv", "out"]
