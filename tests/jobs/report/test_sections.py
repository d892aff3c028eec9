"""What the sections of a report state, from results whose numbers are known."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

import jobs.report.cost_section
import jobs.report.material
import jobs.report.training_section
from jobs.report.classes_section import recalls
from jobs.report.cost_section import bars_of, lanes_of
from jobs.report.material import Material, material_of
from jobs.report.page import Cell, Figure, Section, Table
from jobs.report.speakers_section import read_predictions
from jobs.report.training_section import median_curve
from jobs.report.waiting import waiting_tables
from jobs.report.write import page_of
from jobs.store.scores import Confusion
from tests.jobs.report.cases import case, experiment_case, requested
from tests.jobs.table_cases import published
from tests.jobs.tables.test_measured import measured


@pytest.fixture
def material(tmp_path: Path) -> Material:
    return experiment_case(tmp_path)


def section(material: Material, name: str) -> Section:
    (found,) = [each for each in page_of(material).sections if each.name == name]
    return found


def figures(found: Section) -> dict[str, Figure]:
    """Title -> figure, those of scores other than UA left out."""
    return {part.title: part for part in found.parts if isinstance(part, Figure) and part.view.metric in ("", "ua")}


def tips(drawing: Figure) -> list[str]:
    return re.findall(r"<title>([^<]*)</title>", drawing.svg)


def texts(table: Table) -> list[list[str]]:
    return [[cell.text if isinstance(cell, Cell) else cell for cell in row.cells] for row in table.rows]


def test_differences_are_those_of_pairs(material: Material) -> None:
    """Of every pair of methods: each slot's difference, the means of folds, and the interval of the table."""
    found = section(material, "differences")
    drawing = figures(found)["TAPT − V-FT on demo"]
    assert [tip for tip in tips(drawing) if tip.startswith("fold 1")] == [f"fold 1, slot {slot}: −5.0" for slot in range(3)]
    assert tips(drawing).count("mean of the fold: −5.0") == 2
    (table,) = [part for part in found.parts if isinstance(part, Table) and part.view.metric == "ua"]
    rows = {row[0]: row for row in texts(table)}
    assert rows["TAPT − V-FT"][1:4] == ["−5.0", "−5.0 to −5.0", "6"]
    assert rows["P-TAPT − V-FT"][1] == "0.0"


def test_recall_and_confusion_by_class(material: Material) -> None:
    """Recall from the summed matrices, its range over folds, shares of the true class, and what a method changes."""
    found = figures(section(material, "classes"))
    (table,) = found["Recall per class on demo"].tables
    assert texts(table) == [
        ["V-FT", "80.0 (80.0 to 80.0)", "80.0 (80.0 to 80.0)"],
        ["TAPT", "80.0 (80.0 to 80.0)", "70.0 (70.0 to 70.0)"],
        ["P-TAPT", "80.0 (80.0 to 80.0)", "80.0 (80.0 to 80.0)"],
    ]
    assert "TAPT: true b, predicted a: 30" in tips(found["Confusion on demo"])
    assert texts(found["Confusion on demo"].tables[1]) == [["a", "48", "12"], ["b", "18", "42"]]
    assert "TAPT − V-FT: true b, predicted b: −10.0" in tips(found["What a method changes on demo"])


def test_curves_of_training(material: Material) -> None:
    """A figure for each kind of stage: shared stages once, runs by method; a run without curves is left out."""
    (warnings,) = [part for part in section(material, "training").parts if isinstance(part, Table)]
    assert texts(warnings) == [["tapt", "1", "100", "it learns nothing"]]
    found = figures(section(material, "training"))
    assert list(found) == [f"Curves of {name} on demo" for name in ("tapt (TAPT)", "V-FT: finetune", "TAPT: finetune", "P-TAPT: finetune")]
    drawing = found["Curves of V-FT: finetune on demo"]
    assert "5 finished stages" in drawing.description
    assert tips(drawing).count("fold 2, slot 1") == 2, "loss and accuracy, and no learning rate"
    assert "fold 1, slot 0" not in tips(drawing)
    assert ">loss of the class prior<" in drawing.svg
    assert [row[0] for row in texts(drawing.tables[0])] == ["train/loss", "train/accuracy"]
    assert texts(drawing.tables[0])[1][1:] == ["0.990"] * 3
    shared = found["Curves of tapt (TAPT) on demo"]
    assert texts(shared.tables[0])[2] == ["codebook/group_1/code_perplexity", "5.000", "5.000", "5.000"]
    assert ">entries of each group of the codebook<" in shared.svg


@pytest.mark.slow
def test_a_large_experiment_is_bounded(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some curves of all and their median, marks without tooltips, rows of the runs that need attention alone; runs.csv has all."""
    before = {name: section(material, name) for name in ("training", "spread", "differences", "cost", "origin")}
    for module in (jobs.report.material, jobs.report.cost_section):
        monkeypatch.setattr(module, "MANY_RUNS", 10)
    monkeypatch.setattr(jobs.report.training_section, "MOST_LINES", 18)
    drawing = figures(section(material, "training"))["Curves of TAPT: finetune on demo"]
    assert "2 of 6 finished stages" in drawing.description
    assert drawing.svg.count('class="line thin') == 5, "two of loss, two of accuracy, one of the legend"
    assert texts(drawing.tables[0]) == texts(figures(before["training"])["Curves of TAPT: finetune on demo"].tables[0])
    for name in ("spread", "differences", "cost"):
        many, few = figures(before[name]), figures(section(material, name))
        assert sum(len(tips(each)) for each in few.values()) < sum(len(tips(each)) for each in many.values()) / 2
        assert [figure.svg.count("<circle") for figure in few.values()] == [figure.svg.count("<circle") for figure in many.values()]
    assert [download.name for download in section(material, "origin").downloads] == ["runs.csv"]
    assert section(material, "origin").downloads[0] == before["origin"].downloads[0]
    runs = section(case(), "runs")
    (table,) = (part for part in runs.parts if isinstance(part, Table))
    assert [row[0] for row in texts(table)] == ["vft/DC/0", "vft/DC/1", "tapt/JE/1", "ptapt/KL/2"]
    assert "Of 37 runs those are listed that were dropped or have no result; all are in runs.csv below." in runs.sentences


def test_the_median_curve() -> None:
    """Step by step, of the steps that all have."""
    assert median_curve([[(1, 1.0), (2, 4.0)], [(1, 2.0), (2, 5.0), (3, 9.0)], [(2, 9.0), (1, 7.0)]]) == [(1, 2.0), (2, 5.0)]


def test_speakers_and_utterances(material: Material) -> None:
    """UA by speaker, the utterances that are wrong in most runs, and the calibration error by hand."""
    found = section(material, "speakers")
    (table,) = figures(found)["UA by speaker on demo"].tables
    assert texts(table) == [["one", "80.0", "80.0", "80.0"], ["two", "80.0", "70.0", "80.0"]]
    (worst,) = [part for part in found.parts if isinstance(part, Table)]
    assert worst.caption.startswith("4 of 20 utterances on demo")
    assert texts(worst) == [
        ["a8", "a", "b", "18 of 18"],
        ["a9", "a", "b", "18 of 18"],
        ["b0", "b", "a", "18 of 18"],
        ["b1", "b", "a", "14 of 18"],
    ]
    (ece,) = figures(found)["Reliability on demo"].tables
    # V-FT: 8 of 20 at 0.9 all right, 2 at 0.1 all wrong, 10 at 0.75 of which 8 right: (8 * 0.1 + 2 * 0.1 + 10 * 0.05) / 20
    assert texts(ece)[0] == ["V-FT", "7.5", "120"]


def test_predictions_that_cannot_be_read(tmp_path: Path, material: Material) -> None:
    """Other columns hold none; a row that is cut off or a probability that is none makes a file unreadable, and the report counts it."""
    file = tmp_path / "predictions.csv"
    for content in ("", "id,label\n1,a\n"):
        file.write_text(content)
        assert read_predictions(file) == []
    for row in ("x,s,a", "x,s,a,a,nan", "x,s,a,a,1.5", "x,s,a,a,?"):
        file.write_text(f"id,speaker,label,predicted,p_a\n{row}\n")
        with pytest.raises(ValueError, match=r"values for 5 columns|no probability|could not convert"):
            read_predictions(file)
    paths = [material.sources[0].artifact(run.key, "predictions.csv") for run in material.sources[0].graph.runs[:2]]
    for path in filter(None, paths):
        path.write_text("id,speaker,label,predicted,p_a,p_b\ntorn")
    assert "Without 2 runs whose predictions.csv cannot be read." in section(material, "speakers").sentences


def test_the_cost(material: Material) -> None:
    """Hours of GPUs and of cores apart, later attempts, and as many lanes a node as it computed at once."""
    found = section(material, "cost")
    (table,) = [part for part in found.parts if isinstance(part, Table)]
    assert [row[:7] for row in texts(table)] == [
        ["tapt", "1", "0.07", "0.00", "1.0", "1.0", "0"],
        ["finetune", "18", "0.00", "0.60", "1.0", "1.0", "1"],
        ["All", "19", "0.07", "0.60", "", "", ""],
    ]
    assert len(tips(figures(found)["When the stages ran"])) == 19
    lanes = lanes_of(bars_of(list(material.sources[0].results.values())))
    assert [(host, len(lane)) for host, lane in lanes] == [("node0", 5), ("node0", 5), ("node1", 5), ("node1", 4)]


def test_waiting_and_requests(material: Material) -> None:
    """By kind of stage, of jobs whose request is on record: others count with nothing. What would be enough, by the rule of requests."""
    results = list(material.sources[0].results.values())
    assert waiting_tables({"tapt": results[:1], "finetune": results[1:]}) == []
    known = [replace(each, provenance={**each.provenance, **requested(place)}) for place, each in enumerate(results)]
    waiting, requests = waiting_tables({"tapt": results[:1], "finetune": [*known[1:5], *results[5:]]})
    assert texts(waiting) == [["finetune", "4", "2.5", "4.0"]]
    # Two stages one after the other share the time of a task
    assert texts(requests) == [["finetune", "60", "1.0", "1.0", "8.0", "1.0", "4.0", "1.5", "1", "0"]]
    assert requests.note[1:] == (
        # 1 minute and 1 GiB, times 1.25 (1 + 1 / sqrt 4), and 3 minutes and 0.5 GB more
        "finetune: resources.finetune.minutes=5 and resources.finetune.memory_gb=2.5 would be enough (configured: 120 min and 16 GB), "
        "from 4 finished siblings: 95% took at most 1.0 min and 1.0 GB, and a margin.",
        "finetune: no stage used a GPU: set resources.finetune.gpus=0.",
    )


def test_recall_of_a_class_that_is_not_in_the_fold() -> None:
    """It has none, rather than zero."""
    assert recalls(Confusion(("a", "b", "c"), ((3, 1, 0), (0, 0, 0), (2, 0, 2)))) == {"a": 75.0, "c": 50.0}


def test_measured_corpora_have_their_table_alone() -> None:
    """Runs without a score: no means, no runs to drop, no switches."""
    page = page_of(material_of(measured(), published(None)))
    assert [each.name for each in page.sections] == ["result", "origin"]
    assert (page.metrics, page.runs) == ({}, {})
    assert page.sections[0].sentences == ("iemocap-shift is complete.",)
    (table,) = page.sections[0].parts
    assert isinstance(table, Table)
    assert texts(table)[0][1] == "55.43"


def test_questions_that_a_csv_file_cannot_answer_are_left_out() -> None:
    """Runs without results have no confusion matrices, curves and costs: those sections are not there."""
    assert [each.name for each in page_of(case()).sections] == ["result", "spread", "differences", "dropped", "runs", "origin"]
