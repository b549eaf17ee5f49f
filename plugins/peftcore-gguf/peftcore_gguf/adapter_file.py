"""Writes a low-rank adapter as a GGUF file, for llama.cpp's `--lora` and Ollama's `ADAPTER`.

llama.cpp computes W x + (alpha / r) B (A x), with one alpha per file, and r the rank of each pair
(src/llama-adapter.cpp). The file stores B' = (s r / alpha) B, so that each pair has the scale s. The matrix A of an
embedding is transposed.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from torch import nn

from peftcore.plugin import PeftcoreError, adapter_products, modules_tied_to
from peftcore_gguf.file import Entry, gguf_writer, write_tensors
from peftcore_gguf.model import EMBEDDING, GgufOptions
from peftcore_gguf.tensor_names import Names


def command(model: str | Path, adapter: Path | None = None) -> str:
    """Return the command that runs a GGUF file, optionally with an adapter."""
    lora = [] if adapter is None else ["--lora", str(adapter)]
    return shlex.join(["llama-cli", "-m", str(model), *lora])


def write_adapter(model: nn.Module, path: Path, adapter: str, _options: GgufOptions) -> None:
    """Write the adapter in fp32. The adapter works with GGUF files of the base in any type.

    Raises:
        PeftcoreError: the adapter does not just add low-rank products to weights, or changes modules that llama.cpp
            cannot adapt.
    """
    names = Names(model)
    products = adapter_products(model, adapter, "be written as an adapter of llama.cpp")
    for module_path in products:
        tied = modules_tied_to(model, module_path)
        if tied:
            raise PeftcoreError(
                f"cannot write '{adapter}' as an adapter of llama.cpp: it changes '{module_path}', whose weight is "
                f"tied to '{tied[0]}', and llama.cpp stores one tensor for both. Merge the adapter (untie=True) and "
                "export the model"
            )
    any_product = next(iter(products.values()))
    alpha = any_product.scale * len(any_product.a) or 1.0  # llama.cpp interprets an alpha of 0 as a scale of 1
    with gguf_writer(path, names.family.architecture) as writer:
        import gguf

        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        entries: list[Entry] = []
        for module_path, product in products.items():
            name, a = names.disk_name(f"{module_path}.weight"), product.a
            b = names.rows(module_path, product.b) * (product.scale * len(a) / alpha)
            if name == EMBEDDING:  # llama.cpp looks up rows of the first factor, one per token
                a, b = b, a.T
            for suffix, tensor in (("lora_a", a), ("lora_b", b)):
                entries.append(Entry(f"{name}.{suffix}", tensor, gguf.GGMLQuantizationType.F32))
        write_tensors(writer, entries)
