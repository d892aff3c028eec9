"""Where the numbers come from: code, packages, devices, settings that differ from the published code, and the files of the tables."""

from __future__ import annotations

from jobs.experiment.recipes import recipe_sentences, training_sentences
from jobs.report.material import Material
from jobs.report.page import Download, Row, Section, Table
from jobs.store.records import json_text
from jobs.tables import published as published_figures
from jobs.tables.arithmetic import WEIGHTS
from jobs.tables.as_json import to_json
from jobs.tables.display import render_csv


def origin_section(material: Material) -> Section:
    """Commit, versions, devices, initial weights, changed settings, and `runs.csv` to download; `summary.json` too, if it is not large."""
    summary = material.summary
    code = summary.code
    changed = " with uncommitted changes" if code.modified else ""
    facts = [("Experiment", summary.experiment), ("Commit of the code", ", ".join(code.commits) + changed if code.commits else "not known")]
    facts += [(f"Initial weights{_place(place)}", weights) for place, weights in enumerate(code.weights)]
    values = {name: each for name, each in summary.arithmetic.values.items() if name != WEIGHTS}
    facts += [(f"{name.capitalize()} of the runs", " and ".join(each)) for name, each in values.items()]
    facts += [(f"Version of {name}", ", ".join(versions)) for name, versions in code.packages.items()]
    parts = [Table("What computed the runs", ("", "value"), tuple(map(Row, facts)), numbers=2)]
    differing = [(recipe, setting) for recipe in summary.recipes for setting in recipe.unlike_published]
    settings = [Row((material.label(recipe.method), recipe.preset, setting)) for recipe, setting in differing]
    if settings:
        columns = ("Method", "preset", "setting")
        parts.append(Table("Settings that differ from the published code", columns, tuple(settings), numbers=3))
    sentences = (*training_sentences(summary.recipes, material.labels), *recipe_sentences(summary.recipes, material.labels))
    downloads = [Download("runs.csv", "text/csv", render_csv(summary))]
    if not material.large:
        text = json_text(to_json(summary, published_figures.to_json(material.published)))
        downloads.append(Download("summary.json", "application/json", text))
    return Section("origin", "Where does it come from?", (*sentences, *summary.arithmetic.warnings), tuple(parts), tuple(downloads))


def _place(place: int) -> str:
    return f" ({place + 1})" if place else ""
