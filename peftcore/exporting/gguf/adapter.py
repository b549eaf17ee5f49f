"""A low-rank adapter as the GGUF file that llama.cpp puts beside a model (`--lora`), and Ollama (`ADAPTER`).

W x + (alpha / r) B (A x), one alpha in a file and r the rank of each pair (llama.cpp's src/llama-adapter.cpp); so a
scale s of its own becomes B' = (s r / alpha) B. Of an embedding it reads A transposed.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from torch import nn

from peftcore.engine.trained import modules_tied_to
from peftcore.errors import PeftcoreError
from peftcore.exporting.gguf.file import Entry, write_tensors, writing
from peftcore.exporting.gguf.model import EMBEDDING
from peftcore.exporting.gguf.tensor_names import Names
from peftcore.exporting.thin import products


def command(model: str | Path, adapter: Path | None = None) -> str:
    """What runs a GGUF file, with an adapter beside it."""
    beside = [] if adapter is None else ["--lora", str(adapter)]
    return shlex.join(["llama-cli", "-m", str(model), *beside])


def write_adapter(model: nn.Module, path: Path, adapter: str) -> Path:
    """Write the file, in fp32, for a GGUF file of the model's base of any type.

    Raises:
        PeftcoreError: it does something else than add thin products to weights, or stands where llama.cpp reads none.
    """
    names = Names(model)
    found = products(model, adapter, "be written as an adapter of llama.cpp")
    for place in found:
        tied = modules_tied_to(model, place)
        if tied:
            raise PeftcoreError(
                f"'{adapter}' cannot be written as an adapter of llama.cpp: it changes '{place}', whose weight "
                f"'{tied[0]}' shares, and llama.cpp has one tensor for both. Merge it (untie=True) and write the model"
            )
    first = next(iter(found.values()))
    alpha = first.scale * first.rank or 1.0  # 0 is read as: no scale
    with writing(path, names.family.architecture) as writer:
        import gguf

        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        entries: list[Entry] = []
        for place, (b, a, scale) in found.items():
            name = names.of(f"{place}.weight")
            b = names.rows(place, b) * (scale * b.shape[1] / alpha)
            if name == EMBEDDING:  # its rows are looked up: A'[token] for each token, then B'
                a, b = b, a.T
            for end, tensor in (("lora_a", a), ("lora_b", b)):
                entries.append(Entry(f"{name}.{end}", tensor, gguf.GGMLQuantizationType.F32))
        write_tensors(writer, entries)
    return path
