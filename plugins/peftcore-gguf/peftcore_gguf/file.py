"""Write a GGUF file atomically, one tensor after the other."""

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
        name: its name in the file. kind: its ggml type.
        tensor: its values; or, on the meta device, the shape of its bytes.
        blocks: returns its bytes, if they are not made from `tensor`.
    """

    name: str
    tensor: Tensor
    kind: Any
    blocks: Callable[[], Tensor] | None = None


@contextmanager
def writing(path: Path, architecture: str) -> Iterator[Any]:
    """Yield a writer for `path`. The file appears when the block ends; after an error the old file is unchanged.

    Raises:
        PeftcoreError: the package `gguf` is not installed, or the file cannot be written.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise PeftcoreError(
            f"exporting to GGUF needs '{error.name}', which is not installed: pip install gguf"
        ) from error
    part = path.with_name(f"{path.name}.part")
    writer = gguf.GGUFWriter(part, architecture)
    try:
        yield writer
        writer.close()
        part.replace(path)
    except OSError as error:
        why = error.strerror or f"a write stopped early ({error}), as on a full disk"  # NumPy gives no error number
        raise PeftcoreError(f"'{path}' cannot be written: {why}. Choose another path, or free space") from error
    finally:
        writer.close()
        part.unlink(missing_ok=True)


def write_tensors(writer: Any, entries: list[Entry]) -> None:
    """Write the list of tensors and their values. All keys must have been added before."""
    import gguf
    import numpy as np

    for name, tensor, kind, blocks in entries:
        shape: tuple[int, ...] = tuple(tensor.shape)
        quantized = kind not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        stored = gguf.quant_shape_to_byte_shape(shape, kind) if quantized and blocks is None else shape
        number = np.dtype(np.uint8 if quantized else np.float16 if kind.name == "F16" else np.float32)
        writer.add_tensor_info(name, stored, number, int(np.prod(stored)) * number.itemsize, raw_dtype=kind)
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
                f"'{name}' contains {abs(values).max():.3g}, which {kind.name} cannot represent. Use a type with "
                "a larger range: bf16"
            )
        writer.write_tensor_data(data)
