"""A report with every state that a run can have, and names that a page must escape."""

from __future__ import annotations

from dataclasses import replace

from jobs.control.outliers import Verdict, rule_in_words
from jobs.report.material import Material, material_of
from jobs.tables.published import Published
from jobs.tables.summary import CodeFacts, Entry, Scores, Status, summarise
from tests.jobs.table_cases import paper_like, published

HOSTILE = "<script>alert('1')</script> & \"quoted\" $x$"


def case() -> Material:
    """SAVEE with 3 seeds: a failed run, a dropped one with its replacement, a diverged one, an unresolved outlier."""
    runs = list(paper_like("savee_table2", seeds=3))
    runs.append(replace(runs[0], seed=1000, scores=Scores(71.0, 70.0, 69.0)))
    runs[0] = replace(runs[0], scores=Scores(14.3, 14.0, 5.0), status=Status.outlier, verdict=verdict(14.3))
    runs[1] = replace(runs[1], scores=Scores(20.0, 21.0, 8.0), status=Status.diverged)
    runs[-2] = replace(runs[-2], verdict=verdict(80.0), unreplaced=True)
    failed = next(place for place, run in enumerate(runs) if run.name == "tapt/JE/1")
    runs[failed] = replace(runs[failed], scores=None, status=Status.failed)
    code = CodeFacts(("0123456789abcdef",), True, {"torch": ("2.13.0",)}, (f"weights of {HOSTILE}",))
    found = summarise(runs, experiment="savee", outlier_rule=rule_in_words("pooled", 2.0, 3), code=code)
    return material_of(found, published("savee_table2"))


def hostile_case() -> Material:
    """Every name is markup."""
    runs = [
        Entry(HOSTILE, f"{HOSTILE}{method}", f"{HOSTILE}{fold}", slot, slot, Scores(60.0 + slot + fold, 61.0, 62.0), Status.accepted)
        for method in range(2)
        for fold in range(2)
        for slot in range(2)
    ]
    code = CodeFacts((HOSTILE,), True, {HOSTILE: (HOSTILE,)}, (HOSTILE,))
    found = summarise(runs, experiment=HOSTILE, outlier_rule=HOSTILE, code=code)
    return material_of(found, Published(HOSTILE, HOSTILE, {f"{HOSTILE}0": f"{HOSTILE} label"}, {f"{HOSTILE}0": HOSTILE}))


def verdict(ua: float) -> Verdict:
    return Verdict("DC", 0, 0, ua, 70.5, 1.5, abs(ua - 70.5) / 1.5, out=True)
