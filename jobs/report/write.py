"""Writes the HTML report of an experiment, of several in one table, or of runs from a CSV file."""

from __future__ import annotations

from pathlib import Path

from jobs.report.classes_section import classes_section
from jobs.report.cost_section import cost_section
from jobs.report.differences_section import differences_section
from jobs.report.material import Material
from jobs.report.origin_section import origin_section
from jobs.report.page import METRICS, RUNS, Page, Section, render
from jobs.report.result_section import result_section
from jobs.report.runs_section import dropped_section, runs_section, spread_section
from jobs.report.speakers_section import speakers_section
from jobs.report.training_section import training_section
from jobs.store.records import write_text

FORMAT, FILE = "html", "report.html"


def page_of(material: Material) -> Page:
    """The report: one section for each question that the material can answer."""
    sections: list[Section | None] = [result_section(material)]
    if any(cell.n for method in material.summary.methods for cell in method.cells):
        sections += [spread_section(material), differences_section(material), classes_section(material)]
    scored = bool(material.summary.methods)
    sections += [training_section(material), dropped_section(material) if scored else None, speakers_section(material)]
    sections += [cost_section(material), runs_section(material) if scored else None, origin_section(material)]
    metrics = {name: material.heading(name) for name in METRICS if name in material.by_metric}
    return Page(
        f"Report of {material.summary.experiment}",
        tuple(filter(None, sections)),
        metrics if len(metrics) > 1 else {},
        RUNS if scored else {},
    )


def report_text(material: Material) -> str:
    """The report as one HTML file."""
    return render(page_of(material))


def write_report(folder: Path, material: Material) -> Path:
    """Write `report.html` into a folder of tables; returns its path."""
    path = folder / FILE
    write_text(path, report_text(material))
    return path
