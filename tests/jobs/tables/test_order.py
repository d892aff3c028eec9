"""The warning that the outlier rule decides which method is better."""

from __future__ import annotations

from dataclasses import replace

from jobs.experiment.recipes import MethodRecipe
from jobs.tables.display import render_markdown
from jobs.tables.order import order_sentences
from jobs.tables.summary import Entry, Status
from tests.jobs.table_cases import entry, published, summary


def runs(method: str, kept: float, dropped: float | None = None, corpus: str = "iemocap") -> list[Entry]:
    """A slot with the mean `kept`, whose first run was dropped with the UA `dropped`."""
    first = [entry(method, "1", 0, dropped, Status.outlier, seed=0, corpus=corpus)] if dropped is not None else []
    return [*first, entry(method, "1", 0, kept, seed=1000, corpus=corpus)]


def test_an_order_that_depends_on_the_rule_is_named() -> None:
    """Both orders with their means, by corpus, on stderr and in the caption; nothing where they agree, or nothing was dropped."""
    turned = summary(
        (*runs("vft", 70.0), *runs("tapt", 71.0, 60.0), *runs("vft", 60.0, corpus="savee"), *runs("tapt", 50.0, corpus="savee"))
    )
    found = order_sentences(turned, {"vft": "V-FT", "tapt": "TAPT"})
    assert found == {
        "iemocap": "The order of methods depends on the dropped runs: over kept runs TAPT 71.0, V-FT 70.0; "
        "over all runs V-FT 70.0, TAPT 65.5."
    }
    text = render_markdown(turned, published(None))
    assert text.count("The order of methods depends on the dropped runs") == 1
    assert order_sentences(summary((*runs("vft", 70.0), *runs("tapt", 71.0, 70.5))), {}) == {}
    assert order_sentences(summary(tuple(runs("vft", 70.0))), {}) == {}
    parts = tuple(MethodRecipe(method, "paper", (), compared_within=(method,)) for method in ("vft", "tapt"))
    assert order_sentences(replace(turned, recipes=parts), {}) == {}, "methods that train on different parts of the data are not compared"
