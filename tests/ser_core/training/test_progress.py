from __future__ import annotations

from ser_core.training.progress import Progress


def test_lines_come_at_a_bounded_rate() -> None:
    """Ten thousand updates within an interval are no line; with no interval each is one."""
    lines: list[str] = []
    quiet = Progress(lines.append, interval=60)
    for done in range(10_000):
        quiet.update(done + 1, 10_000, "utterance")
    assert lines == []
    chatty = Progress(lines.append, interval=0)
    for done in range(3):
        chatty.update(done + 1, 3, "utterance", " now")
    assert lines == ["utterance 1/3 now", "utterance 2/3 now", "utterance 3/3 now"]
