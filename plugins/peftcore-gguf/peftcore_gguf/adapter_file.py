"""A low-rank adapter as a GGUF file that llama.cpp (`--lora`) and Ollama (`ADAPTER`) load with a model.

W x + (alpha / r) B (A x), with one alpha for the file and r the rank of each pair (llama.cpp's src/llama-adapter.cpp),
so a scale s is folded into B' = (s r / alpha) B. A of an embedding is transposed.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from torch import nn

from peftcore.plugin import PeftcoreError, adapter_products, modules_tied_to
from peftcore_gguf.file import Entry, write_tensors, writing
from peftcore_gguf.model import EMBEDDING, GgufOptions
from peftcore_gguf.tensor_names import Names


def command(model: str | Path, adapter: Path | None = None) -> str:
    """Return the command that runs a GGUF file, with an adapter if one is given."""
    lora = [] if adapter is None else ["--lora", str(adapter)]
    return shlex.join(["llama-cli", "-m", str(model), *lora])


def write_adapter(model: nn.Module, path: Path, adapter: str, _options: GgufOptions) -> None:
    """Write the file, in fp32, for a GGUF file of the base of any type.

    Raises:
        PeftcoreError: the adapter does more than add low-rank products to weights, or changes modules that llama.cpp
            does not adapt.
    """
    names = Names(model)
    found = adapter_products(model, adapter, "be written as an adapter of llama.cpp")
    for place in found:
        tied = modules_tied_to(model, place)
        if tied:
            raise PeftcoreError(
                f"'{adapter}' cannot be written as an adapter of llama.cpp: it changes '{place}', which shares "
                f"its weight with '{tied[0]}', and llama.cpp has one tensor for both. Merge it (untie=True) and "
                "export the model"
            )
    first = next(iter(found.values()))
    alpha = first.scale * len(first.a) or 1.0  # 0 would mean no scale
    with writing(path, names.family.architecture) as writer:
        import gguf

        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        entries: list[Entry] = []
        for place, product in found.items():
            name, a = names.of(f"{place}.weight"), product.a
            b = names.rows(place, product.b) * (product.scale * len(a) / alpha)
            if name == EMBEDDING:  # rows are looked up: A'[token] for each token, then B'
                a, b = b, a.T
            for end, tensor in (("lora_a", a), ("lora_b", b)):
                entries.append(Entry(f"{name}.{end}", tensor, gguf.GGMLQuantizationType.F32))
        write_tensors(writer, entries)
