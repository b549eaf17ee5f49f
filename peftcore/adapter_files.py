"""The two files of an adapter folder, in Hugging Face PEFT's format, written so that being cut off harms nothing.

Both are written beside the old ones and then renamed. A full disk or a killed process leaves an adapter
that loads, the old one or the new one: a kill between the two renames leaves new tensors and the new
config under its temporary name, and the tensors' metadata hold the config's hash, by which it is found.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from peftcore.errors import CheckpointError

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_HASH = "peftcore_config_sha256"


def write(folder: Path, fields: dict[str, Any], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write an adapter's config and tensors (on the CPU, contiguous) to `folder`.

    Raises:
        CheckpointError: the folder cannot be written. What lay there is unharmed.
    """
    config = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    content = to_bytes(tensors, {"format": "pt", **metadata, _HASH: _sha256(config)})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _finish_cut_off(folder)
        try:
            _write_beside(folder / CONFIG, config.encode())
            _write_beside(folder / TENSORS, content)
        except OSError:
            for name in (CONFIG, TENSORS):
                _beside(folder / name).unlink(missing_ok=True)
            raise
        for name in (TENSORS, CONFIG):
            os.replace(_beside(folder / name), folder / name)
        _sync(folder)
    except OSError as error:
        raise CheckpointError(
            f"the adapter could not be saved to '{folder}': {error.strerror or error}. "
            "What lay there before is unharmed"
        ) from error


def read_config(folder: Path, metadata: dict[str, str] | None = None) -> dict[str, Any]:
    """The fields of `adapter_config.json`."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder '{folder}'")
    file = folder / CONFIG
    if _was_cut_off(folder, metadata or {}):
        file = _beside(file)
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"'{folder}' holds no adapter: {CONFIG} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"'{file}' cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("peft_type"), str):
        raise CheckpointError(f"'{file}' names no peft_type: it is no adapter in the format of Hugging Face PEFT")
    return fields


def read_tensors(folder: Path, name: str = TENSORS) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of `adapter_model.safetensors`, or of another file of the folder."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder '{folder}'")
    file = folder / name
    if not file.exists():
        pickles = [name for name in os.listdir(folder) if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
        if pickles:
            raise CheckpointError(
                f"'{folder}' holds '{pickles[0]}', a pickle, which can run any code and is never read here. "
                f"Have its author save it as {name}, or convert it where you trust it"
            )
        raise CheckpointError(f"'{folder}' holds no adapter: {name} is missing")
    with _opened(file) as archive:
        return {key: archive.get_tensor(key) for key in archive.keys()}, archive.metadata() or {}  # noqa: SIM118


def read_metadata(folder: Path) -> dict[str, str]:
    """The metadata of `adapter_model.safetensors`; empty where the folder has no such file."""
    if not (folder / TENSORS).is_file():
        return {}
    with _opened(folder / TENSORS) as archive:
        return archive.metadata() or {}


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as archive:
            yield archive
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size if file.is_file() else 0
        raise CheckpointError(
            f"'{file}' ({size:,} bytes) is no whole safetensors file: {error}. It may be cut off; copy it again"
        ) from error


def _was_cut_off(folder: Path, metadata: dict[str, str]) -> bool:
    """Was a save killed between its two renames? Then the config of the tensors with `metadata` lies beside."""
    beside, wanted = _beside(folder / CONFIG), metadata.get(_HASH)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return wanted is not None and beside.exists() and _sha256(beside.read_text(encoding="utf-8")) == wanted
    return False


def _finish_cut_off(folder: Path) -> None:
    """Make the second rename of a save that was killed before it: the next save writes over what lies beside."""
    with contextlib.suppress(CheckpointError):  # tensors that are no whole file have no config to save
        if _was_cut_off(folder, read_metadata(folder)):
            os.replace(_beside(folder / CONFIG), folder / CONFIG)


def _beside(file: Path) -> Path:
    return file.with_name(f".{file.name}.tmp")


def _write_beside(file: Path, content: bytes) -> None:
    with open(_beside(file), "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
