"""Write a GGUF file atomically, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftcore.plugin import PeftcoreError


class Entry(NamedTuple):
    """A tensor to write.

    Args:
        name: name in the file.
        tensor: the values; with `blocks`, a meta tensor with the shape of the encoded bytes.
        kind: ggml type.
        blocks: returns the encoded bytes of a 4-bit weight.
    """

    name: str
    tensor: Tensor
    kind: Any
    blocks: Callable[[], Tensor] | None = None


@contextmanager
def gguf_writer(path: Path, architecture: str) -> Iterator[Any]:
    """Yield a writer for `path`. The file is replaced when the block ends. After an error, the old file is unchanged.

    Raises:
        PeftcoreError: the package `gguf` is not installed, or the file cannot be written.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise PeftcoreError(
            f"exporting to GGUF needs '{error.name}', which is not installed. Install it: pip install gguf"
        ) from error
    temporary = path.with_name(f"{path.name}.part")
    writer = gguf.GGUFWriter(temporary, architecture)
    try:
        yield writer
        writer.close()
        temporary.replace(path)
    except OSError as error:
        # NumPy raises an OSError without an error number when the disk is full.
        reason = error.strerror or f"a write was incomplete ({error}), as on a full disk"
        raise PeftcoreError(f"cannot write '{path}': {reason}. Choose another path, or free some space") from error
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)


def write_tensors(writer: Any, entries: list[Entry]) -> None:
    """Write the list of tensors, and then their values. All keys must be added before."""
    import gguf
    import numpy as np

    for name, tensor, kind, blocks in entries:
        shape: tuple[int, ...] = tuple(tensor.shape)
        is_quantized = kind not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        disk_shape = gguf.quant_shape_to_byte_shape(shape, kind) if is_quantized and blocks is None else shape
        dtype: np.dtype[Any] = np.dtype(np.uint8)
        if not is_quantized:
            dtype = np.dtype(np.float16 if kind.name == "F16" else np.float32)
        writer.add_tensor_info(name, disk_shape, dtype, int(np.prod(disk_shape)) * dtype.itemsize, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor, kind, blocks in entries:
        if blocks is not None:
            writer.write_tensor_data(blocks().cpu().contiguous().numpy())
            continue
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        with np.errstate(over="ignore"):
            data = gguf.quantize(values, kind)
        if not np.isfinite(values).all() or (kind.name == "F16" and not np.isfinite(data).all()):
            raise PeftcoreError(
                f"'{name}' contains {abs(values).max():.3g}, which {kind.name} cannot represent. Choose a type with "
                "a larger range: bf16"
            )
        writer.write_tensor_data(data)
