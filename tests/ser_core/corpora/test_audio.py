"""Any audio file becomes 16 kHz mono 16 bit, or one line with the reason why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ser_core.corpora.audio import SHORTEST, AudioError, convert, encode, load_audio, samples_digest
from ser_core.corpora.manifest import Manifest, Utterance
from ser_core.errors import InputError
from tests.ser_core.corpora.sources import noise


@pytest.mark.parametrize("ending", ["wav", "flac"])
def test_16_khz_mono_16_bit_is_kept_bit_for_bit(tmp_path: Path, ending: str) -> None:
    """No sample of a recording that needs no conversion changes, through storage and back."""
    samples = np.concatenate([np.array([-32768, 32767, 0, 1, -1], dtype=np.int16), noise(0.5)])
    soundfile.write(tmp_path / f"in.{ending}", samples, 16_000, subtype="PCM_16")
    converted = convert(tmp_path / f"in.{ending}")
    np.testing.assert_array_equal(converted.samples, samples)
    assert converted.digest == samples_digest(samples)
    (tmp_path / "out.flac").write_bytes(encode(converted.samples))
    stored = Utterance("u", "out.flac", len(samples), "a", "s", "1")
    loaded = load_audio(Manifest("c", "", ("a",), ("1",), (stored,), tmp_path), stored)
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded * 32768, samples.astype(np.float32))


@settings(max_examples=30, deadline=None)
@given(arrays.arrays(np.int16, st.integers(1, 3000), elements=st.integers(-32768, 32767)))
def test_storage_is_lossless(samples: np.ndarray) -> None:
    """FLAC gives back the samples it was given, whatever they are."""
    import io

    decoded, rate = soundfile.read(io.BytesIO(encode(samples)), dtype="int16")
    assert rate == 16_000
    np.testing.assert_array_equal(decoded, samples)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("ending", "subtype"), [("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "FLOAT"), ("flac", "PCM_16")])
def test_a_tone_stays_the_same_tone(tmp_path: Path, rate: int, channels: int, ending: str, subtype: str) -> None:
    """A 440 Hz tone of amplitude 0.25 is one at 16 kHz mono, whatever the rate, the channels and the container were."""
    time = np.arange(rate) / rate
    tone = 0.25 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(tmp_path / f"in.{ending}", np.stack([tone] * channels, axis=1), rate, subtype=subtype)
    samples = convert(tmp_path / f"in.{ending}").samples / 32768
    assert abs(len(samples) - 16_000) <= 1
    expected = 0.25 * np.sin(2 * np.pi * 440 * np.arange(len(samples)) / 16_000)
    middle = slice(2_000, 14_000)
    np.testing.assert_allclose(samples[middle], expected[middle], atol=2e-4)


def test_channels_are_averaged(tmp_path: Path) -> None:
    """The mono signal is the mean of the channels, not one of them."""
    left, right = noise(0.2, seed=1), noise(0.2, seed=2)
    soundfile.write(tmp_path / "in.wav", np.stack([left, right], axis=1), 16_000)
    expected = np.rint((left.astype(float) + right.astype(float)) / 2)
    np.testing.assert_array_equal(convert(tmp_path / "in.wav").samples, expected)


def test_what_lies_above_the_new_limit_is_removed(tmp_path: Path) -> None:
    """10 kHz at 44.1 kHz would fold down to 6 kHz at 16 kHz; it must vanish."""
    tone = 0.5 * np.sin(2 * np.pi * 10_000 * np.arange(44_100) / 44_100)
    soundfile.write(tmp_path / "in.wav", tone, 44_100)
    assert np.abs(convert(tmp_path / "in.wav").samples[500:-500]).max() <= 1


def no_samples(path: Path) -> None:
    soundfile.write(path, noise(0), 16_000)


def no_bytes(path: Path) -> None:
    path.write_bytes(b"")


def no_audio(path: Path) -> None:
    path.write_bytes(b"<html>not found</html>" * 50)


def absent(path: Path) -> None:
    path.unlink(missing_ok=True)


def cut_off(path: Path) -> None:
    soundfile.write(path, noise(1), 16_000)
    path.write_bytes(path.read_bytes()[:9_000])


def too_short(path: Path) -> None:
    soundfile.write(path, noise(1)[: SHORTEST - 1], 16_000)


def not_a_number(path: Path) -> None:
    samples = noise(1) / 32768
    samples[[7, 9]] = np.nan, np.inf
    soundfile.write(path, samples, 16_000, subtype="FLOAT")


def wrongly_scaled(path: Path) -> None:
    soundfile.write(path, noise(1).astype(float), 16_000, subtype="FLOAT")


def low_rate(path: Path) -> None:
    soundfile.write(path, noise(1), 160)


def high_rate(path: Path) -> None:
    soundfile.write(path, noise(1), 16_000_000)


@pytest.mark.parametrize(
    ("write", "line"),
    [
        (no_samples, "empty: it holds no samples"),
        (no_bytes, "empty: the file has no bytes"),
        (no_audio, "unreadable: Format not recognised"),
        (absent, "unreadable: No such file"),
        (cut_off, "unreadable: cut off, 23044 bytes"),
        (too_short, "too short: 59 ms"),
        (not_a_number, "2 NaN or infinite samples"),
        (wrongly_scaled, "float samples must lie within ±1"),
        (low_rate, "wrong rate: the header says 160 Hz"),
        (high_rate, "wrong rate: the header says 16000000 Hz"),
    ],
)
def test_each_defect_of_a_recording_is_reported(tmp_path: Path, write: Callable[[Path], None], line: str) -> None:
    """Each defect has its own message of one line."""
    write(tmp_path / "bad.wav")
    with pytest.raises(AudioError, match=line) as caught:
        convert(tmp_path / "bad.wav")
    assert "\n" not in str(caught.value)


def test_damaged_flac_is_unreadable(tmp_path: Path) -> None:
    """FLAC carries checksums: a hole in the middle is an error, not noise."""
    soundfile.write(tmp_path / "bad.flac", noise(1), 16_000)
    whole = (tmp_path / "bad.flac").read_bytes()
    (tmp_path / "bad.flac").write_bytes(whole[:9_000] + bytes(500) + whole[9_500:])
    with pytest.raises(AudioError, match="unreadable"):
        convert(tmp_path / "bad.flac")


def test_a_wav_written_to_a_pipe_is_not_truncated(tmp_path: Path) -> None:
    """Programs that cannot seek leave a huge size in the header; that is no cut."""
    soundfile.write(tmp_path / "in.wav", noise(0.3), 16_000)
    content = bytearray((tmp_path / "in.wav").read_bytes())
    position = content.index(b"data") + 4
    content[position : position + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "in.wav").write_bytes(content)
    np.testing.assert_array_equal(convert(tmp_path / "in.wav").samples, noise(0.3))


def test_changed_stored_audio_is_an_input_error(tmp_path: Path) -> None:
    """A stage never trains on a file of another length than the manifest says, nor on one that is gone."""
    (tmp_path / "u.flac").write_bytes(encode(noise(0.5)))
    wrong = Utterance("u", "u.flac", 9_000, "a", "s", "1")
    gone = Utterance("v", "v.flac", 8_000, "a", "s", "1")
    manifest = Manifest("c", "", ("a",), ("1",), (wrong, gone), tmp_path)
    for utterance in (wrong, gone):
        with pytest.raises(InputError, match=r"run `python launch.py prepare` again"):
            load_audio(manifest, utterance)


def test_other_samples_of_the_same_length_are_an_input_error(tmp_path: Path) -> None:
    """A file replaced by silence after the corpus was prepared; another file format with the same samples is accepted."""
    digest = samples_digest(noise(0.5))
    utterance = Utterance("u", "u.flac", 8_000, "a", "s", "1", audio_digest=digest)
    manifest = Manifest("c", "", ("a",), ("1",), (utterance,), tmp_path)
    (tmp_path / "u.flac").write_bytes(encode(noise(0.5)))
    np.testing.assert_array_equal(load_audio(manifest, utterance), noise(0.5).astype(np.float32) / 32768)
    soundfile.write(tmp_path / "u.flac", noise(0.5).astype(np.int32) << 16, 16_000, format="WAV", subtype="PCM_24")
    np.testing.assert_array_equal(load_audio(manifest, utterance), noise(0.5).astype(np.float32) / 32768)
    for other in (np.zeros(8_000, dtype=np.int16), noise(0.5) + 1):
        (tmp_path / "u.flac").write_bytes(encode(other))
        with pytest.raises(InputError, match=r"u\.flac: not the recording that was prepared.*prepare` again"):
            load_audio(manifest, utterance)


def test_an_error_of_the_file_system_is_not_taken_for_a_damaged_file(tmp_path: Path) -> None:
    """Reading the start of a process's memory gives EIO; libsndfile calls that a bad file."""
    (tmp_path / "u.flac").symlink_to("/proc/self/mem")
    utterance = Utterance("u", "u.flac", 8_000, "a", "s", "1")
    with pytest.raises(OSError, match="Input/output error"):
        load_audio(Manifest("c", "", ("a",), ("1",), (utterance,), tmp_path), utterance)
