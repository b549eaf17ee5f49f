"""K-quants, which llama.cpp makes of a file in 16 or 32 bits: by its library, where llama-cpp-python is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftcore.errors import PeftcoreError

FILE_TYPES = {"q6_k": 18, "q5_k_m": 17, "q5_k_s": 16, "q4_k_m": 15, "q4_k_s": 14, "q3_k_m": 12, "q2_k": 10}  # llama.h


def library(kind: str) -> Any:
    """llama.cpp's functions.

    Raises:
        PeftcoreError: they are not here.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise PeftcoreError(
            f"{kind} is quantized to by llama.cpp itself, whose Python package, llama-cpp-python, cannot be imported "
            f"({error}). Its program does it, too: write f16, then llama-quantize model-f16.gguf model.gguf {kind}"
        ) from error
    return llama_cpp


def quantize(source: Path, path: Path, kind: str) -> None:
    """Write `path`, whole or not at all, of the file at `source`.

    Raises:
        PeftcoreError: llama.cpp could not.
    """
    llama = library(kind)
    part = path.with_name(f"{path.name}.part")
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[kind]
    try:
        if llama.llama_model_quantize(str(source).encode(), str(part).encode(), parameters) != 0:
            raise PeftcoreError(f"llama.cpp could not quantize the model to {kind}; what it printed above says why")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
