from __future__ import annotations

from ser_core.training.progress import Progress


def test_messages_are_limited_in_rate() -> None:
    """Ten thousand updates within an interval give no message; with interval 0 each gives one."""
    lines: list[str] = []
    quiet = Progress(lines.append, interval=60)
    for done in range(10_000):
        quiet.update(done + 1, 10_000, "utterance")
    assert lines == []
    chatty = Progress(lines.append, interval=0)
    for done in range(3):
        chatty.update(done + 1, 3, "utterance", " now")
    assert lines == ["utterance 1/3 now", "utterance 2/3 now", "utterance 3/3 now"]
