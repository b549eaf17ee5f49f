"""GGUF: `peftcore.export(..., format="gguf")` writes models and low-rank adapters for llama.cpp and Ollama."""

from __future__ import annotations

from pathlib import Path

from peftcore.plugin import Exporter, hookimpl
from peftcore_gguf.adapter_file import command, write_adapter
from peftcore_gguf.model import GgufOptions, write_model
from peftcore_gguf.tensor_names import family_of

__all__ = ["GgufOptions"]

peftcore_api = ">=3.1,<4"


def _usage(path: Path, base: str, part: str) -> list[str]:
    if part == "model":
        return [command(path)]
    return [command(base if base.endswith(".gguf") else "BASE.gguf", path)]


@hookimpl
def peftcore_exporters() -> list[Exporter]:
    return [
        Exporter(
            "gguf",
            "llama.cpp, Ollama",
            write_adapter=write_adapter,
            write_model=write_model,
            options=GgufOptions,
            adapter_file="adapter.gguf",
            model_file="model-{gguf_type}.gguf",
            check=family_of,
            usage=_usage,
        )
    ]
