"""Summaries to be rendered: complete, incomplete, and with names that need escaping."""

from __future__ import annotations

from dataclasses import replace

from jobs.control.outliers import Verdict, rule_in_words
from jobs.experiment.recipes import Adaptation, MethodRecipe, MetricColumn
from jobs.tables.further import further_of
from jobs.tables.published import Published, PublishedRow
from jobs.tables.summary import CodeFacts, Entry, Scores, Status, Summary, summarise
from tests.jobs.table_cases import entry, paper_like, published, summary

NASTY = "a_b%c&d\\e{f}g#h$i~j^k|l<m>n`o'p\"q--r*[s] ±×– é ĩ ß 喜\t\nu"
CODE = CodeFacts(
    ("0123456789abcdef",),
    True,
    {"torch": ("2.13.0",), "transformers": ("5.22.0", "5.23.0"), "unlisted": ("1",)},
    ("wav2vec 2.0 of revision 2dcc7b7f9b", "wav2vec v1 wav2vec_large.pt"),
)


def complete_case() -> tuple[Summary, Published]:
    return replace(summary(paper_like("iemocap_table1")), code=CODE), published("iemocap_table1")


def incomplete_case() -> tuple[Summary, Published]:
    """SAVEE with the human row, 3 seeds: a failed run, a cell that is not in, two dropped runs (one replaced), one unresolved."""
    runs = list(paper_like("savee_table2", seeds=3))
    for place, item in enumerate(runs):
        if (item.method, item.fold) == ("tapt", "JK") or item.name == "ptapt/DC/1":
            runs[place] = replace(item, scores=None, status=Status.failed if item.method == "ptapt" else Status.running)
    runs.append(replace(runs[0], seed=99, scores=Scores(14.3, 14.0, 5.0), status=Status.outlier))
    runs[1] = replace(runs[1], scores=Scores(20.0), status=Status.diverged)
    last = next(place for place, item in enumerate(runs) if item.name == "ptapt/DC/2")
    verdict = Verdict("DC", 2, 0, 80.0, 70.5, 1.5, 9.5 / 1.5, out=True)
    runs[last] = replace(runs[last], verdict=verdict, unreplaced=True)
    rule = rule_in_words("pooled", 2.0, 3)
    return summarise(tuple(runs), experiment="savee", outlier_rule=rule), published("savee_table2")


def adapted_case() -> tuple[Summary, Published]:
    """Two sources and a method without one on the corpus natural, one of the sources on the corpus phone; two folds, three seeds."""
    column = MetricColumn("ua_target_before", "target, first", 3, "UA after the first stage.")

    def recipe(method: str, source: str) -> MethodRecipe:
        return MethodRecipe(method, "paper", (), metrics=(column,), adaptation=Adaptation(source, column.name, 100.0))

    recipes = (MethodRecipe("direct", "paper", ()), recipe("two-stage", "acted"), recipe("read first", "read"))
    level = {"direct": 50.0, "two-stage": 56.0, "read first": 53.0}
    runs = tuple(
        entry(method, fold, slot, level[method] + 2.5 * slot + (4.0 if fold == "2" else 0.0) + (slot == place) * 0.5, corpus=corpus)
        for corpus in ("natural", "phone")
        for place, method in enumerate(level)
        if (corpus, method) != ("phone", "read first")
        for fold in ("1", "2")
        for slot in range(3)
    )
    found = summarise(runs, experiment="adapted", recipes=recipes)
    metrics = {
        (run.corpus, run.method, run.fold, run.slot, run.seed): {column.name: 0.4 if run.fold == "1" else 0.5}
        for run in runs
        if run.method != "direct"
    }
    labels = {"two-stage": "Two stages"}
    return replace(found, further=further_of(found, metrics)), replace(published(None), labels=labels)


def nasty_case() -> tuple[Summary, Published]:
    runs = tuple(
        Entry(NASTY, name, fold, slot, slot, Scores(70.0 + slot, 70.0, 70.0), Status.accepted)
        for name in (NASTY, f"[{NASTY}", f"*{NASTY}")
        for fold in (NASTY,)
        for slot in range(2)
    )
    beside = Published(NASTY, NASTY, {}, {NASTY: NASTY}, (PublishedRow(None, NASTY, {NASTY: 1.0}, {NASTY: 2.0}, 3.0),))
    return summary(runs, NASTY), beside
