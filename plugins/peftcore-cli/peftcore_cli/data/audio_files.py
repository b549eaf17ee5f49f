"""Decode recordings to arrays of samples.

The standard library reads WAV files, soundfile other formats, and soxr resamples to the model's rate.
"""

from __future__ import annotations

import importlib
import os
import wave
from pathlib import Path
from typing import Any

import numpy as np

from peftcore.errors import PeftcoreError
from peftcore_cli.data.labels import short

_UNKNOWN = 0x7FFF0000  # written to the header by programs that do not know the length in advance
SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")


def samples(path: str, rate: int, longest: int | None = None) -> Any:
    """Read a recording as mono samples, [samples] in float32 from -1 to 1.

    A recording with another sampling rate is resampled as in transformers.

    Args:
        path: the file.
        rate: sampling rate to return, in Hz.
        longest: maximum number of samples; None for no limit.

    Raises:
        PeftcoreError: the file is damaged, empty or too long, or soxr is not installed and the file must be resampled.
    """
    values, file_rate = _of_wave(path) if path.lower().endswith(".wav") else _of_soundfile(path)
    if not len(values):
        raise PeftcoreError(f"the recording '{path}' has no samples. Replace the file, or remove its row")
    if not np.isfinite(values).all():
        raise PeftcoreError(
            f"the recording '{path}' has samples that are NaN or infinite. Replace the file, or remove its row"
        )
    if longest is not None and len(values) * rate > longest * file_rate:
        raise PeftcoreError(
            f"the recording '{path}' is {len(values) / file_rate:.1f} seconds long, but the model reads at most "
            f"{longest / rate:g}. Split the recording and its transcript"
        )
    mono = values.mean(1)
    return mono if file_rate == rate else _resample(path, mono, file_rate, rate)


def _resample(path: str, values: Any, file_rate: int, rate: int) -> Any:
    try:
        soxr: Any = importlib.import_module("soxr")
    except ImportError as error:
        raise PeftcoreError(
            f"the recording '{path}' has a sampling rate of {file_rate:,} Hz, but the model needs {rate:,} Hz. "
            "Install soxr to resample recordings (pip install peftcore[audio]), or convert the file: ffmpeg -i IN "
            f"-ar {rate} -ac 1 OUT.wav"
        ) from error
    result = soxr.resample(values, file_rate, rate, quality="HQ")
    if not len(result):
        raise PeftcoreError(
            f"the recording '{path}' has too few samples to resample ({len(values)}). Replace the file, or remove "
            "its row"
        )
    return result


def _of_wave(path: str) -> tuple[Any, int]:
    try:
        with wave.open(path, "rb") as file:
            channels, width, rate, count = file.getparams()[:4]
            data = file.readframes(count)
    except (wave.Error, EOFError, OSError, ValueError) as error:
        if "unknown format" in str(error):  # floating point, or the extended header for more than 16 bits
            return _of_soundfile(path)
        reason = str(error) or "it ends too early"
        raise PeftcoreError(f"cannot read '{path}' as WAV: {reason}. Replace the file, or remove its row") from error
    if rate < 1:
        raise PeftcoreError(
            f"cannot read '{path}' as WAV: the header has a sampling rate of {rate} Hz. Replace the file"
        )
    frames = len(data) // (width * channels)
    if frames < count and count * width * channels < _UNKNOWN:
        raise PeftcoreError(
            f"the recording '{path}' is truncated: the file has {frames:,} samples, but its header says {count:,}. "
            "Replace the file, or remove its row"
        )
    raw = np.frombuffer(data[: frames * width * channels], dtype=np.uint8).reshape(-1, width)
    if width == 1:  # unsigned, unlike wider samples
        values = raw[:, 0].astype(np.float32) / 128 - 1
    else:
        wide = np.zeros((len(raw), 4), dtype=np.uint8)
        wide[:, 4 - width :] = raw
        values = (wide.view("<i4")[:, 0].astype(np.float64) / (1 << 31)).astype(np.float32)
    return values.reshape(-1, channels), rate


def _of_soundfile(path: str) -> tuple[Any, int]:
    try:
        soundfile: Any = importlib.import_module("soundfile")
    except ImportError as error:
        raise PeftcoreError(
            f"'{path}' is not an integer WAV file, and other formats need soundfile. Install soundfile (pip install "
            "peftcore[audio]), or convert the file: ffmpeg -i IN -ar 16000 -ac 1 -c:a pcm_s16le OUT.wav"
        ) from error
    try:
        values, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except Exception as error:  # libsndfile raises errors of several classes
        raise PeftcoreError(
            f"cannot read the recording '{path}': {error}. Replace the file, or remove its row"
        ) from error
    return values, int(rate)


def path_of(location: str, key: str, value: Any) -> str:
    """Return the path of a row's recording, which may be relative to the folder of the data file.

    Raises:
        PeftcoreError: the file does not exist. The message begins with `location`.
    """
    source = value.get("path") if isinstance(value, dict) else value
    if not isinstance(source, str):
        raise PeftcoreError(f"{location}: '{key}' must be the path of a recording, found {short(value)}")
    if source.startswith(("http://", "https://")):
        raise PeftcoreError(f"{location}: '{source[:80]}' is not a local file. Download the file and pass its path")
    path = os.path.join(os.path.dirname(location.rpartition(":")[0]), os.path.expanduser(source))
    if not os.path.isfile(path):
        problem = "is a folder" if os.path.isdir(path) else "does not exist"
        raise PeftcoreError(
            f"{location}: the recording '{path}' {problem}. Pass the path of a local file, relative to the folder of "
            "the data file"
        )
    if Path(path).suffix.lower() not in SUFFIXES:
        raise PeftcoreError(
            f"{location}: the recording '{path}' has an unsupported file type. Convert it with ffmpeg (supported: "
            f"{', '.join(SUFFIXES)})"
        )
    return path
