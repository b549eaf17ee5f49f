"""Safe reading of files that may be untrusted, truncated, or not regular files.

No function blocks (as on a pipe) or uses more memory than the size of the file. Errors name the file.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import CheckpointError

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
JSON_BYTES = 16 << 20
_HEADER_BYTES = 100_000_000  # safetensors' own limit
_NAME_LENGTH = 1000
_NAMES = 200_000  # an adapter for each expert of the largest known mixture has 140,000
_DIMENSIONS = 16
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_bytes(file: Path, limit: int | None = None) -> bytearray:
    """Return the bytes of a regular file, following links.

    Args:
        file: its path.
        limit: maximum size in bytes; None means the machine's memory.

    Raises:
        FileNotFoundError: the file does not exist.
        CheckpointError: the path is a pipe, a device or a folder, or the file is too large or cannot be read.
    """
    with _open_regular(file, _memory() if limit is None else limit) as (stream, size):
        return _read_start(stream, size)


def read_header(file: Path) -> bytearray:
    """Return the beginning of a safetensors file, without its tensors. Raises the errors of `read_bytes`."""
    with _open_regular(file, None) as (stream, size):
        length = _read_start(stream, 8)
        return length + _read_start(stream, min(int.from_bytes(length, "little"), size, _HEADER_BYTES))


def _read_start(stream: BufferedReader, size: int) -> bytearray:
    content = bytearray(size)
    del content[stream.readinto(content) :]
    return content


@contextlib.contextmanager
def _open_regular(file: Path, limit: int | None) -> Iterator[tuple[BufferedReader, int]]:
    """Open a regular file; yield (file, its size)."""
    try:
        require_regular(file, os.stat(file).st_mode)  # opening a device may have side effects
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            require_regular(file, status.st_mode)
            if limit is not None and status.st_size > limit:
                raise CheckpointError(
                    f"'{file}' has {status.st_size:,} bytes, more than the limit of {limit:,}. It is not an "
                    "adapter's file"
                )
            yield stream, status.st_size
    except FileNotFoundError:
        raise
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"'{file}' cannot be read: {getattr(error, 'strerror', None) or error!r}") from error


def require_regular(file: Path, mode: int) -> None:
    """Raise a CheckpointError if `file`, whose `st_mode` is given, is a folder, a pipe or a device."""
    if not stat.S_ISREG(mode):
        kinds: dict[str, Callable[[int], bool]] = {
            "folder": stat.S_ISDIR,
            "pipe": stat.S_ISFIFO,
            "device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
            "socket": stat.S_ISSOCK,
        }
        kind = next((kind for kind, fits in kinds.items() if fits(mode)), "special file")
        raise CheckpointError(f"'{file}' is a {kind}, not a regular file")


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 40


def parse_json(content: bytes | bytearray, file: Path | str) -> Any:
    """Return the value of a JSON file. NaN and infinity are rejected, since they are not valid JSON.

    Raises:
        CheckpointError: the file is not JSON, is nested too deeply, or contains half a surrogate pair.
    """
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode()  # fails for half a surrogate pair
        return value
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise CheckpointError(f"'{file}' cannot be read as JSON: {reason}") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"it contains {name}, which is not a JSON number")


def parse_tensors(content: bytearray, file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors, metadata) of a safetensors file. The tensors are views of `content`.

    The format: 8 bytes for the length of a JSON header `{name: {dtype, shape, data_offsets}, __metadata__: {...}}`, and
    the tensors' bytes, which follow one another without gap (https://github.com/huggingface/safetensors).

    Raises:
        CheckpointError: the file is not complete, or not in this format.
    """
    begin, header, metadata = _header(content, file)
    try:
        spans = _spans(header)
    except ValueError as error:
        raise _wrong(file, content, f"its header cannot be read: {error}") from error
    views: dict[str, Tensor] = {}
    end = 0
    for first_byte, end_byte, name in sorted(spans):
        entry = header[name]
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        count = math.prod(shape)
        if first_byte != end or end_byte - first_byte != count * dtype.itemsize:
            size = count * dtype.itemsize
            problem = (
                f"'{name}' ({size:,} bytes) is at bytes {first_byte:,} to {end_byte:,}, but must start at byte {end:,}"
            )
            raise _wrong(file, content, problem)
        end, at = end_byte, begin + first_byte
        if begin + end > len(content):
            break
        if not count:
            views[name] = torch.empty(shape, dtype=dtype, device="cpu")
        elif at % dtype.itemsize:  # copied: kernels may expect aligned tensors
            views[name] = torch.frombuffer(content[at : begin + end_byte], dtype=dtype).view(shape)
        else:
            views[name] = torch.frombuffer(content, dtype=dtype, count=count, offset=at).view(shape)
    if begin + end != len(content):
        end = max((end_byte for _, end_byte, _ in spans), default=0)
        raise _wrong(file, content, f"its tensors would end at byte {begin + end:,}")
    return {name: views[name] for name in header}, metadata


def parse_metadata(content: bytearray, file: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, from its beginning.

    Raises:
        CheckpointError: the metadata cannot be read.
    """
    return _header(content, file)[2]


def _wrong(file: Path, content: bytearray, problem: str) -> CheckpointError:
    return CheckpointError(
        f"'{file}' ({len(content):,} bytes) is not a complete safetensors file: {problem}. The file may be "
        "truncated, so copy it again"
    )


def _header(content: bytearray, file: Path) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return (position of the first tensor, {name: entry}, metadata)."""
    begin = 8 + int.from_bytes(content[:8], "little")
    if len(content) < 8 or begin > min(len(content), _HEADER_BYTES) or content[8:9] != b"{":
        raise _wrong(file, content, f"its header would end at byte {begin:,}")
    _refuse_many(content.count(b'"data_offsets"', 8, begin), file)  # checked before the entries take memory
    try:
        header = json.loads(content[8:begin].decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_distinct)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ must be a table of strings")
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise _wrong(file, content, f"its header cannot be read: {reason}") from error
    _refuse_many(len(header), file)  # also finds names that are written with escapes
    return begin, header, metadata


def _refuse_many(names: int, file: Path) -> None:
    """Raise a CheckpointError if a header has more tensors than the limit."""
    if names > _NAMES:
        raise CheckpointError(f"'{file}' contains {names:,} tensors, more than the limit of {_NAMES:,}")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _spans(header: dict[str, Any]) -> list[tuple[int, int, str]]:
    """Return (first byte, byte after the last, name) of each tensor of a header.

    Raises:
        ValueError: an entry does not describe a tensor.
    """
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if len(name) > _NAME_LENGTH:
            raise ValueError(f"a name has {len(name):,} characters, more than the limit of {_NAME_LENGTH:,}")
        name.encode()  # fails for half a surrogate pair
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name!r} needs dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"{name!r} has dtype {dtype!r}, but only {', '.join(_DTYPES)} are supported")
        numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else []
        if (
            len(numbers) > _DIMENSIONS + 2
            or {*map(type, numbers)} != {int}
            or len(offsets) != 2
            or min(numbers) < 0
            or max(numbers) >= 1 << 40
        ):
            raise ValueError(f"{name!r} has shape={shape!r}, data_offsets={offsets!r}")
        spans.append((*offsets, name))
    return spans
