"""Checks of a .gguf file before transformers reads it."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress

from peftcore.cli.console import require
from peftcore.errors import PeftcoreError


def check_blocks(path: str) -> None:
    """Raise PeftcoreError if the file has tensors of fewer blocks than its header counts.

    transformers would build every block first, which takes it minutes for a few hundred. A file that cannot be read is
    left to transformers to refuse.
    """
    import gguf

    count, blocks = 0, set[str]()
    with suppress(Exception):  # the reader may raise anything on invalid bytes
        reader = gguf.GGUFReader(path)
        blocks = {block for tensor in reader.tensors for block in re.findall(r"\bblk\.(\d+)\.", tensor.name)}
        count = next(int(field.contents()) for key, field in reader.fields.items() if key.endswith(".block_count"))
    if count > len(blocks):
        raise PeftcoreError(
            f"the model of '{path}' cannot be loaded: its header counts {count} blocks, and it has tensors of "
            f"{len(blocks)}. Download it again"
        )


def stored_dtype(path: str) -> str:
    """Return the dtype that holds what the file's matrices hold: fp32, fp16, or bf16 for bf16 and fewer bits.

    Raises:
        PeftcoreError: the file cannot be read.
    """
    require("gguf", extra="gguf")
    import gguf

    try:
        kinds = Counter(tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1)
    except Exception as error:  # the reader may raise anything on invalid bytes
        raise PeftcoreError(f"the model of '{path}' cannot be loaded: {error}") from error
    most = kinds.most_common(1)[0][0] if kinds else gguf.GGMLQuantizationType.F32
    wide = {gguf.GGMLQuantizationType.F32: "fp32", gguf.GGMLQuantizationType.F16: "fp16"}
    return wide.get(most, "bf16")
