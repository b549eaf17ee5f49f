"""K-quants: llama.cpp's library (llama-cpp-python) quantizes a GGUF file in 16 or 32 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftcore.plugin import PeftcoreError

FILE_TYPES = {"q6_k": 18, "q5_k_m": 17, "q5_k_s": 16, "q4_k_m": 15, "q4_k_s": 14, "q3_k_m": 12, "q2_k": 10}  # llama.h


def library(gguf_type: str) -> Any:
    """Return llama.cpp's library.

    Raises:
        PeftcoreError: llama-cpp-python cannot be imported.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise PeftcoreError(
            f"{gguf_type} needs llama-cpp-python, which cannot be imported ({error}). Install it, "
            "or export f16 and run: "
            f"llama-quantize model-f16.gguf model.gguf {gguf_type}"
        ) from error
    return llama_cpp


def quantize(source: Path, path: Path, gguf_type: str) -> None:
    """Quantize the file at `source` and write `path`. After an error, the old file is unchanged.

    Raises:
        PeftcoreError: llama.cpp reported an error.
    """
    llama = library(gguf_type)
    temporary = path.with_name(f"{path.name}.part")
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[gguf_type]
    try:
        if llama.llama_model_quantize(str(source).encode(), str(temporary).encode(), parameters) != 0:
            raise PeftcoreError(f"llama.cpp failed to quantize the model to {gguf_type}. See llama.cpp's output above")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
