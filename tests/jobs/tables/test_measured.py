"""Measured corpora: their runs beside those with a score, and their table in every format and of several experiments."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from scipy import stats

from jobs.errors import UsageError
from jobs.experiment.graph import Graph, Node, Run
from jobs.report.material import Source, material_of
from jobs.report.write import report_text
from jobs.store.layout import Layout
from jobs.tables.collect import collect, summary_of, text_of
from jobs.tables.display import print_tables
from jobs.tables.latex import PLAIN, fragments
from jobs.tables.plain import plain_tables
from jobs.tables.published import load_published
from jobs.tables.several import Part, joint_published, joint_summary
from jobs.tables.summary import Summary
from tests.jobs.table_cases import CONFIGS, graph, published, result

RUN = Run("pretraining_loss", "all", 0, 0, "f" * 20)
LOSSES = {"loss": 55.427, "loss_standard_error": 0.4, "loss_per_frame": 2.7714, "utterances": 5531, "seconds": 4.55}


def measuring(corpus: str = "iemocap") -> Graph:
    node = Node(RUN.key, "pretraining_loss", 1, {}, {}, {}, "", 0, RUN.method)
    return Graph({RUN.key: node}, (RUN,), corpus, "d", {RUN.key: ()}, measurements=frozenset((RUN.method,)))


def part(corpus: str, loss: float | None) -> Part:
    results = {} if loss is None else {RUN.key: result(RUN, (), (), metrics={**LOSSES, "loss": loss})}
    return Part(f"{corpus}-shift", measuring(corpus), results, {RUN.key: "running"}, "none", None, ())


def measured(loss: float | None = 55.427) -> Summary:
    found = part("iemocap", loss)
    return summary_of(found.name, found.graph, found.results, found.states)


def test_the_table_has_the_columns_of_table_3_and_the_published_losses() -> None:
    """A row for the corpus by its label, a dash for a metric that is not there; the published figures below, and what they are."""
    [table] = plain_tables(measured(), published("domain_shift"))
    ours, theirs = table.blocks
    assert ours == (("IEMOCAP", "55.43", "54.64 to 56.21", "–", "2.771", "–", "–", "–", "4.6", "5531"),)
    assert [row[:2] for row in theirs] == [
        ("LibriSpeech test-clean, published", "32.04"),
        ("SAVEE, published", "41.37"),
        ("IEMOCAP, published", "55.42"),
    ]
    assert "inferred from the published code" in " ".join(table.caption)


@pytest.mark.parametrize(("loss", "place"), [(55.427, "inside"), (56.21, "below"), (54.5, "above")])
def test_published_losses_are_compared_with_our_interval(loss: float, place: str) -> None:
    """Student's t over utterances, as scipy has it; the published loss has no spread, so only its place is stated."""
    low, high = stats.t.interval(0.95, df=LOSSES["utterances"] - 1, loc=loss, scale=LOSSES["loss_standard_error"])
    [table] = plain_tables(measured(loss), published("domain_shift"))
    assert table.blocks[0][0][2] == f"{low:.2f} to {high:.2f}"
    what = "A published figure lies inside, below or above our 95 % interval of the same corpus (no test: it has no spread)"
    assert f"{what}: IEMOCAP {place}." in table.caption


def test_without_a_spread_there_is_no_comparison() -> None:
    """A single utterance, a result without a standard error, a corpus for which nothing was published: a dash, or no sentence."""
    found = part("iemocap", 55.427)
    for metrics in ({**LOSSES, "utterances": 1}, {name: value for name, value in LOSSES.items() if name != "loss_standard_error"}):
        summary = summary_of(found.name, found.graph, {RUN.key: result(RUN, (), (), metrics=metrics)}, {})
        [table] = plain_tables(summary, published("domain_shift"))
        assert table.blocks[0][0][2] == "–"
        assert "no test" not in " ".join(table.caption)
    other = part("demo", 50.0)
    [table] = plain_tables(summary_of(other.name, other.graph, other.results, {}), published("domain_shift"))
    assert table.blocks[0][0][2] == "49.22 to 50.78"
    assert "no test" not in " ".join(table.caption)


def test_without_an_entry_every_metric_is_a_column() -> None:
    [table] = plain_tables(measured(), published(None))
    assert table.columns == ("", *LOSSES)
    assert table.blocks == ((("iemocap", "55.43", "0.40", "2.77", "5531.00", "4.55"),),)


def test_it_is_complete_with_its_result(tmp_path: Path) -> None:
    """Before, the row is marked and the run is missing; complete tables are not overwritten by incomplete ones."""
    layout, entry = Layout(tmp_path, "iemocap-shift"), published("domain_shift")
    done, open_ = part("iemocap", 55.427), part("iemocap", None)
    assert collect(layout, done.graph, done.results, done.states, entry).complete
    report = collect(layout, open_.graph, open_.results, open_.states, entry)
    assert "complete tables of 1 run are not overwritten with incomplete ones of 0" in report.kept
    assert report.missing == ("pretraining_loss/all/0 (running)",)
    assert not report.complete
    [table] = plain_tables(measured(None), entry)
    assert table.blocks[0] == (("IEMOCAP (running)†", *["–"] * 9),)


def test_it_is_in_every_format(tmp_path: Path) -> None:
    """Files and standard output; no table of UA, no confusion matrix."""
    found, entry = part("iemocap", 55.427), published("domain_shift")
    report = collect(Layout(tmp_path, "iemocap-shift"), found.graph, found.results, found.states, entry)
    names = {path.name for path in report.paths}
    assert names == {"tables.tex", "measured.tex", "table.md", "runs.csv", "methods.csv", "measured.csv", "summary.json"}
    folder = report.paths[0].parent
    assert (folder / "measured.csv").read_text().splitlines()[:2] == ["corpus,method,metric,value", "iemocap,pretraining_loss,loss,55.427"]
    assert json.loads((folder / "summary.json").read_text())["measured"] == [
        {"corpus": "iemocap", "method": "pretraining_loss", "status": "accepted", "metrics": LOSSES}
    ]
    assert "IEMOCAP & 55.43 & 54.64 to 56.21 & " in fragments(measured(), entry, PLAIN)["measured.tex"]
    assert "| IEMOCAP | 55.43 |" in (folder / "table.md").read_text()
    assert text_of("csv", measured(), entry, PLAIN) == (folder / "measured.csv").read_text()
    text = io.StringIO()
    print_tables(measured(), entry, Console(file=text, width=250))
    assert "IEMOCAP, published" in text.getvalue()


def test_the_report_has_its_table(tmp_path: Path) -> None:
    """And no section that asks for scores, with or without a result."""
    for loss in (55.427, None):
        found = part("iemocap", loss)
        source = Source(found.graph, found.results, Layout(tmp_path, "iemocap-shift"))
        text = report_text(material_of(measured(loss), published("domain_shift"), [source]))
        assert ("55.43" in text, "(running)†" in text) == (loss is not None, loss is None)
        assert "41.37" in text


def test_several_corpora_are_one_table() -> None:
    """Each experiment's corpus in a row, with the entry that all of them name."""
    parts = [part("savee", 41.0), part("iemocap", 55.4), part("mine", None)]
    summary, labels = joint_summary(parts)
    [table] = plain_tables(summary, joint_published([published("domain_shift")] * 3, labels))
    assert [row[:2] for row in table.blocks[0]] == [("SAVEE", "41.00"), ("IEMOCAP", "55.40"), ("mine (running)†", "–")]
    assert not summary.complete
    assert joint_summary(parts[:2])[0].complete


def test_beside_methods_with_a_score() -> None:
    """The run is in no table of UA, and its result is not asked for one."""
    scored = graph(("vft",))
    both = dataclasses.replace(
        scored, nodes={**scored.nodes, **measuring("demo").nodes}, runs=(*scored.runs, RUN), measurements=frozenset((RUN.method,))
    )
    results = {run.key: result(run, ((3, 1), (0, 4)), ("angry", "sad")) for run in scored.runs}
    summary = summary_of("demo", both, {**results, RUN.key: result(RUN, (), (), metrics=LOSSES)}, {})
    assert [method.method for method in summary.methods] == ["vft"]
    assert [each.metrics for each in summary.measured] == [LOSSES]
    assert summary.complete
    assert not summary_of("demo", both, results, {}).complete


def test_an_interval_without_a_count_is_refused(tmp_path: Path) -> None:
    """One line that names the column."""
    loaded = yaml.safe_load((CONFIGS / "published.yaml").read_text())
    loaded["tables"]["domain_shift"]["measured"]["columns"][1].pop("count")
    (tmp_path / "published.yaml").write_text(yaml.safe_dump(loaded))
    with pytest.raises(UsageError, match=r"domain_shift: measured: column 95 % interval: an interval is of a standard_error and a count"):
        load_published(tmp_path / "published.yaml", "domain_shift")


@pytest.mark.parametrize(("values", "message"), [({"los": 1.0}, "no column for los"), ({"loss": "high"}, "could not convert")])
def test_an_entry_that_fits_no_table_is_refused(values: dict[str, object], message: str, tmp_path: Path) -> None:
    """One line with the file and the table."""
    loaded = yaml.safe_load((CONFIGS / "published.yaml").read_text())
    loaded["tables"]["domain_shift"]["measured"]["rows"][0]["values"] = values
    (tmp_path / "published.yaml").write_text(yaml.safe_dump(loaded))
    with pytest.raises(UsageError, match=rf"tables\.domain_shift: .*{message}"):
        load_published(tmp_path / "published.yaml", "domain_shift")
