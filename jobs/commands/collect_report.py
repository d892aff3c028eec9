"""The HTML report beside the tables that `collect` writes: when it is written, and what it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from jobs.commands.session import Session
    from jobs.report.material import Source
    from jobs.tables.collect import CollectReport
    from jobs.tables.published import Published
    from jobs.tables.several import Part
    from jobs.tables.summary import Summary

HTML = "html"  # the format of jobs.report, beside those of jobs.tables
Written = TypeVar("Written", bound="CollectReport")


def with_report(
    written: Written, formats: Sequence[str] | None, folder: Path, published: Published, sources: Sequence[Source] = ()
) -> Written:
    """Write the report of tables that were written into `folder`, and return the files with it.

    It is written by default, where `formats` name it, and where the folder has one already, so that all files have the same runs.
    """
    from jobs.report.material import material_of
    from jobs.report.write import FILE, write_report

    if written.kept or not (formats is None or HTML in formats or (folder / FILE).is_file()):
        return written
    path = write_report(folder, material_of(written.summary, published, sources))
    return replace(written, paths=(*written.paths, path))


def report_text_of(summary: Summary, published: Published, sources: Sequence[Source] = ()) -> str:
    """The report as one text."""
    from jobs.report.material import material_of
    from jobs.report.write import report_text

    return report_text(material_of(summary, published, sources))


def source_of(session: Session, part: Part, names: Mapping[str, str] | None = None) -> Source:
    """What the report reads of an experiment. `names`: method of the experiment -> method of the summary, where they differ."""
    from jobs.report.material import Source

    return Source(part.graph, part.results, session.launched.layout, names or {})
