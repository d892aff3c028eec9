"""Convert audio files to 16 kHz mono 16-bit samples, and read the samples of a prepared utterance.

A file that is already 16 kHz, mono, 16 bit is copied bit for bit. Any other is averaged over its channels, unless one of them is named,
resampled in float64 (soxr, highest quality) and rounded to 16 bit; the rounding noise is 98 dB below full scale, less than that of any
recording.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from ser_core.corpora.manifest import MANIFEST_NAME, SAMPLE_RATE, Manifest, Utterance
from ser_core.corpora.recordings import WHOLE, Excerpt
from ser_core.disk import check_readable, raise_storage_error
from ser_core.errors import InputError

LOWEST_RATE = 8_000  # Hz, telephone speech; a header with a lower rate is broken
HIGHEST_RATE = 192_000  # Hz
FULL_SCALE = 1 << 15
# Samples of one emotion state, the longest receptive field of all models: a wav2vec v1 frame covers 465 samples, frames are 160 samples
# apart, and the emotion-state convolution has kernel 4 (authors' code).
SHORTEST = 465 + 3 * 160
STREAMED = 0x7FFF_0000  # bytes; a wav header that declares at least this size was written to a pipe
LONGER = 0.01  # s; how far a stated end may lie beyond that of the file, from rounding
OVERSHOOT = 1.1  # peak up to which a float file is clipped without an error, as resampling may overshoot; above it the scale is wrong

Samples = NDArray[np.int16]


@dataclass(frozen=True)
class Converted:
    """Samples of one utterance and their digest."""

    samples: Samples  # (samples,), 16 kHz mono
    digest: str  # sha256 of the samples, little endian

    @property
    def constant(self) -> bool:
        """Whether all samples are equal: a silent recording."""
        return bool(self.samples.min() == self.samples.max())


class AudioError(Exception):
    """Why a file cannot be used. The message does not contain the file's name; the caller adds it."""


def convert(path: Path, excerpt: Excerpt = WHOLE) -> Converted:
    """Decode an excerpt of `path` to 16 kHz mono 16 bit.

    Raises AudioError for a file that cannot be decoded, is empty, truncated or too short, lacks the excerpt's channel or times, holds NaN
    or infinite samples, has a sample rate outside 8 to 192 kHz, or has float samples beyond full scale.
    """
    try:
        if path.stat().st_size == 0:
            raise AudioError("empty: the file has no bytes")
        missing = _bytes_cut_off(path)
        if missing:
            raise AudioError(f"unreadable: cut off, {missing} bytes of samples are missing")
        with soundfile.SoundFile(os.fsencode(path)) as stream:  # a name need not be UTF-8
            rate, subtype, declared = stream.samplerate, stream.subtype, stream.frames
            if not LOWEST_RATE <= rate <= HIGHEST_RATE:
                raise AudioError(f"wrong rate: the header says {rate} Hz; {LOWEST_RATE} to {HIGHEST_RATE} Hz can be read")
            if declared == 0:
                raise AudioError("empty: it holds no samples")
            if excerpt.channel is not None and excerpt.channel > stream.channels:
                raise AudioError(f"no channel {excerpt.channel}: it has {stream.channels}; convert the original with all its channels")
            first, declared = _frames(excerpt, rate, declared)
            stream.seek(first)
            one_channel = stream.channels == 1 or excerpt.channel is not None
            exact = rate == SAMPLE_RATE and one_channel and subtype in ("PCM_16", "PCM_U8", "PCM_S8", "ULAW", "ALAW")
            decoded: NDArray[Any] = stream.read(declared, dtype="int16" if exact else "float64", always_2d=True)
    except (soundfile.SoundFileError, OSError, RuntimeError) as error:
        _raise_if_not_readable(path, error)
        raise AudioError(f"unreadable: {_first_line(error)}") from error
    if len(decoded) < declared:
        raise AudioError(f"unreadable: cut off after {len(decoded)} of {declared} samples")
    if excerpt.channel is not None:
        decoded = decoded[:, [excerpt.channel - 1]]
    samples = decoded[:, 0] if exact else to_target_rate(decoded, rate)
    if len(samples) < SHORTEST:
        raise AudioError(
            f"too short: {len(samples) / SAMPLE_RATE * 1000:.0f} ms; one frame of every model needs {SHORTEST / SAMPLE_RATE * 1000:.0f} ms"
        )
    samples = np.ascontiguousarray(samples, dtype=np.int16)
    return Converted(samples, samples_digest(samples))


def _frames(excerpt: Excerpt, rate: int, frames: int) -> tuple[int, int]:
    """The first frame of an excerpt of a file of `frames` frames, and the number of its frames."""
    if excerpt.start is None and excerpt.end is None:
        return 0, frames
    first = round((excerpt.start or 0.0) * rate)
    last = frames if excerpt.end is None else round(excerpt.end * rate)
    if not 0 <= first < last <= frames + LONGER * rate:
        raise AudioError(f"no samples from {excerpt.start or 0:g} to {last / rate:g} s: it is {frames / rate:g} s long")
    return first, min(last, frames) - first


def to_target_rate(decoded: NDArray[np.float64], rate: int) -> Samples:
    """Average the channels of (frames, channels) in ±1, resample from `rate` Hz to 16 kHz and round to 16 bit: (samples,)."""
    if not np.isfinite(decoded).all():
        raise AudioError(f"holds {int((~np.isfinite(decoded)).sum())} NaN or infinite samples")
    peak = float(np.abs(decoded).max())
    if peak > OVERSHOOT:
        raise AudioError(f"its samples reach {peak:.4g}; float samples must lie within ±1")
    mono = decoded.mean(axis=1)
    if rate != SAMPLE_RATE:
        import soxr  # only to prepare a corpus, so that stages run in an environment without it

        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="VHQ")
    rounded: Samples = np.clip(np.rint(mono * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)
    return rounded


def samples_digest(samples: Samples) -> str:
    """Return the sha256 (hex) of the samples as 16-bit little endian, independent of the file format."""
    return hashlib.sha256(samples.astype("<i2", copy=False).tobytes()).hexdigest()


def encode(samples: Samples) -> bytes:
    """Encode as FLAC, 16 kHz mono 16 bit, lossless."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def load_audio(manifest: Manifest, utterance: Utterance) -> NDArray[np.float32]:
    """Return a prepared utterance: (samples,) float32 in ±1, 16 kHz.

    Raises InputError if the file is missing, or if its samples are not those whose digest the manifest has.
    """
    path = manifest.audio_path(utterance)
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=False)
    except (soundfile.SoundFileError, OSError, RuntimeError) as error:
        _raise_if_not_readable(path, error)
        raise InputError(f"{path}: {_first_line(error)}; run `python launch.py prepare` again") from error
    if rate != SAMPLE_RATE or samples.shape != (utterance.samples,):
        raise InputError(
            f"{path}: {samples.shape} samples at {rate} Hz instead of ({utterance.samples},) at {SAMPLE_RATE} Hz; "
            "run `python launch.py prepare` again"
        )
    result: NDArray[np.float32] = samples
    if utterance.audio_digest and _stored_digest(result) != utterance.audio_digest:
        raise InputError(
            f"{path}: not the recording that was prepared: its samples have another digest than in {MANIFEST_NAME}; "
            "run `python launch.py prepare` again"
        )
    return result


def _stored_digest(samples: NDArray[np.float32]) -> str:
    """Digest of float samples as 16 bit, which they have in a prepared corpus; others have another digest than any prepared samples."""
    return samples_digest(np.clip(np.rint(samples * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16))


def _bytes_cut_off(path: Path) -> int:
    """Return the number of sample bytes declared in a wav header that the file lacks; soundfile reads a truncated file without an error."""
    with path.open("rb") as stream:
        if stream.read(12)[:4] != b"RIFF":
            return 0
        end = path.stat().st_size
        while len(header := stream.read(8)) == 8:
            name, size = struct.unpack("<4sI", header)
            if name == b"data":
                # Programs that write to a pipe do not know the size and declare one near 2 or 4 GiB.
                return 0 if size >= STREAMED else max(0, size - (end - stream.tell()))
            stream.seek(size + size % 2, io.SEEK_CUR)
    return 0


def _raise_if_not_readable(path: Path, error: Exception) -> None:
    """Raise OSError if the file system failed, which libsndfile reports like a damaged file."""
    try:
        check_readable(path)
    except OSError as found:
        raise_storage_error(found)
    raise_storage_error(error)


def _first_line(error: Exception) -> str:
    """Return the error message of libsndfile or the system without the path, which the caller adds."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.strip() or type(error).__name__).splitlines()[0].rpartition("': ")[2].removeprefix("Error : ")
