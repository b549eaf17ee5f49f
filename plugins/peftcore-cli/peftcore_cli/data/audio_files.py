"""Recordings as arrays of samples.

WAV files are read by the standard library, other formats by soundfile, and other rates are resampled by soxr.
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

_UNKNOWN = 0x7FFF0000  # bytes from which on a header's size stands for a recording whose end was not known
SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")


def samples(path: str, rate: int, longest: int | None = None) -> Any:
    """Return the samples of a recording, [samples] in float32 from -1 to 1; several channels are averaged.

    A recording with another sampling rate is resampled as transformers does it.

    Args:
        path: the file.
        rate: samples per second.
        longest: number of samples at most; None for no limit.

    Raises:
        PeftcoreError: it is damaged, empty or too long, or its rate is another and soxr is not installed.
    """
    found, its_rate = _of_wave(path) if path.lower().endswith(".wav") else _of_soundfile(path)
    if not len(found):
        raise PeftcoreError(f"'{path}' has no samples. Replace it, or remove it")
    if not np.isfinite(found).all():
        raise PeftcoreError(f"'{path}' has samples that are NaN or infinite. Replace it, or remove it")
    if longest is not None and len(found) * rate > longest * its_rate:
        raise PeftcoreError(
            f"'{path}' has {len(found) / its_rate:.1f} seconds, and the model reads {longest / rate:g}. Split the "
            "recording and its transcript"
        )
    mono = found.mean(1)
    return mono if its_rate == rate else _resampled(path, mono, its_rate, rate)


def _resampled(path: str, found: Any, its_rate: int, rate: int) -> Any:
    try:
        soxr: Any = importlib.import_module("soxr")
    except ImportError as error:
        raise PeftcoreError(
            f"'{path}' has {its_rate:,} samples per second, and the model reads {rate:,}. Install soxr, which "
            f"resamples recordings: pip install peftcore[audio]; or convert it: ffmpeg -i IN -ar {rate} -ac 1 OUT.wav"
        ) from error
    resampled = soxr.resample(found, its_rate, rate, quality="HQ")
    if not len(resampled):
        raise PeftcoreError(f"'{path}' has {len(found)} samples, too few to resample. Replace it, or remove it")
    return resampled


def _of_wave(path: str) -> tuple[Any, int]:
    try:
        with wave.open(path, "rb") as file:
            channels, width, rate, count = file.getparams()[:4]
            data = file.readframes(count)
    except (wave.Error, EOFError, OSError, ValueError) as error:
        if "unknown format" in str(error):  # floating point, or the extended header of more than 16 bits
            return _of_soundfile(path)
        why = str(error) or "it ends too early"
        raise PeftcoreError(f"'{path}' cannot be read as WAV: {why}. Replace it, or remove it") from error
    if rate < 1:
        raise PeftcoreError(f"'{path}' cannot be read as WAV: its header has {rate} samples per second. Replace it")
    frames = len(data) // (width * channels)
    if frames < count and count * width * channels < _UNKNOWN:
        raise PeftcoreError(
            f"'{path}' is cut off: it has {frames:,} of the {count:,} samples that its header names. Replace it, or "
            "remove it"
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
            f"'{path}' is not a plain WAV file of whole numbers, and other formats are read by soundfile. Install it: "
            "pip install peftcore[audio], or convert it: ffmpeg -i IN -ar 16000 -ac 1 -c:a pcm_s16le OUT.wav"
        ) from error
    try:
        found, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except Exception as error:  # libsndfile's errors are of several classes
        raise PeftcoreError(f"'{path}' cannot be read as a recording: {error}. Replace it, or remove it") from error
    return found, int(rate)


def named(where: str, key: str, value: Any) -> str:
    """Return the path of a row's recording, which is relative to the folder of the data file.

    Raises:
        PeftcoreError: the file does not exist; the message begins with `where`.
    """
    found = value.get("path") if isinstance(value, dict) else value
    if not isinstance(found, str):
        raise PeftcoreError(f"{where}: '{key}' must be the path of a recording, found {short(value)}")
    if found.startswith(("http://", "https://")):
        raise PeftcoreError(f"{where}: '{found[:80]}' is not a local file. Download the recording and name the file")
    path = os.path.join(os.path.dirname(where.rpartition(":")[0]), os.path.expanduser(found))
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        raise PeftcoreError(
            f"{where}: the recording '{path}' {what}. Pass paths of local files, relative to the folder of the data "
            "file"
        )
    if Path(path).suffix.lower() not in SUFFIXES:
        raise PeftcoreError(f"{where}: '{path}' must be one of {', '.join(SUFFIXES)}. Convert it with ffmpeg")
    return path
