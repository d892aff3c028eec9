"""Transcripts in manifests: IEMOCAP's files, a column of a CSV file, and a digest of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.report.bundle.scrub import scrubbed_manifest
from ser_core.corpora import iemocap
from ser_core.corpora.iemocap_text import transcripts_of
from ser_core.corpora.manifest import load_manifest
from ser_core.corpora.prepare import prepare
from ser_core.errors import InputError
from tests.ser_core.corpora import sources


def test_lines_of_transcripts() -> None:
    """The text begins after the first `]:`; tags are left out, and may be all of it; other lines are no turns."""
    lines = [
        "Ses01F_impro01_F000 [006.2901-008.2357]: Excuse me.",
        "Ses01F_impro01_M000 [007.5712-010.4750]: Do you have [x]: your  forms? [LAUGHTER]",
        "Ses01F_impro01_F001 [010.9266-011.7850]: [BREATHING]",
        "Ses01F_impro01_FXX0 [012.0-013.0]: both speak",
        "M: sorry",
        "",
        "Ses01F_script01_1b_F002 [014.0-015.0]:Yeah \ufffd",
    ]
    assert transcripts_of(lines) == {
        "Ses01F_impro01_F000": "Excuse me.",
        "Ses01F_impro01_M000": "Do you have [x]: your forms?",
        "Ses01F_impro01_F001": "",
        "Ses01F_script01_1b_F002": "Yeah \ufffd",
    }


def test_transcripts_of_iemocap_do_not_change_the_digest(tmp_path: Path) -> None:
    """With transcripts the same corpus, whose manifest has them and their digest; a bundle does not; an altered one is refused."""
    source = sources.iemocap(tmp_path / "source", sessions=(1, 2))
    before = prepare("iemocap", source, tmp_path / "out")
    assert before.text_digest == ""
    assert "text" not in (tmp_path / "out" / "manifest.json").read_text()
    sources.iemocap_texts(source)
    after = prepare("iemocap", source, tmp_path / "out")
    assert after.digest == before.digest
    assert len(after.text_digest) == 64
    assert after == load_manifest(tmp_path / "out")
    assert after.utterances[0].text == "I said to F000]: no."
    file = tmp_path / "out" / "manifest.json"
    bundled = scrubbed_manifest(file.read_text(), after.digest)
    assert bundled is not None
    assert "I said" not in bundled
    assert {name for each in json.loads(bundled)["utterances"] for name in each} >= {"id", "label", "audio_digest"}
    file.write_text(file.read_text().replace("I said to F000]: no.", "I said yes."))
    with pytest.raises(InputError, match="does not fit its digest"):
        load_manifest(tmp_path / "out")


def test_a_turn_without_a_transcript_is_named(tmp_path: Path) -> None:
    """With the file that should have it; a label that is dropped needs none, and a file in another encoding is read."""
    source = sources.iemocap_texts(sources.iemocap(tmp_path, sessions=(2,)))
    file = source / "Session2/dialog/transcriptions/Ses02F_impro01.txt"
    lines = [line for line in file.read_text().splitlines() if not line.startswith(("Ses02F_impro01_F000", "Ses02F_impro01_F005"))]
    file.write_bytes("\n".join([*lines, "M: caf\u00e9"]).encode("latin-1"))
    reading = iemocap.read(source, required=None)
    assert reading.problems == (
        "Session2/dialog/transcriptions/Ses02F_impro01.txt: no transcript of turn Ses02F_impro01_F000; unpack the whole release",
    )


def test_a_column_of_a_csv_file(tmp_path: Path) -> None:
    """`text` is optional, and may be empty: that is a transcript without words."""
    rows = [
        {
            "path": f"{speaker}{label}.wav",
            "label": label,
            "speaker": speaker,
            "fold": speaker,
            "text": f"it is {label}" if speaker == "a" else "",
        }
        for speaker in "ab"
        for label in ("calm", "loud")
    ]
    plain = prepare("csv", sources.csv_corpus(tmp_path / "plain", rows), tmp_path / "p")
    texts = prepare("csv", sources.csv_corpus(tmp_path / "texts", rows, "path,label,speaker,fold,text"), tmp_path / "t")
    assert plain.digest == texts.digest
    assert [u.text for u in plain.utterances] == [None] * 4
    assert [u.text for u in texts.utterances] == ["it is calm", "it is loud", "", ""]
    assert texts.text_digest != plain.text_digest == ""
