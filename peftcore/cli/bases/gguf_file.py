"""Checks of a .gguf file before transformers reads it."""

from __future__ import annotations

import re
from contextlib import suppress

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
