"""`export`: a model, or an adapter, as files that other programs read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from peftcore.errors import PeftcoreError
from peftcore.exporting import gguf, onnx, serving

TARGETS = ("gguf", "vllm", "onnx")


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    to: str,
    adapter: str | None = None,
    tokenizer: Any = None,
    kind: str = "f16",
    chat_template: str | None = None,
) -> Path:
    """Write files for another program; the model is left as it is.

    Args:
        to: "gguf": the file `path` for llama.cpp and Ollama, of `adapter` if one is named, which must be thin products
            added to weights, else of the model's weights as they stand: merge first. Models of Llama, Mistral, Qwen2,
            Qwen3 (and its experts), Gemma 2 and 3, tokenizers of byte-level BPE or of SentencePiece's BPE.
            "vllm": the folder `path` with `adapter` as vLLM and SGLang read it, one rank and scale for all modules.
            "onnx": the file `path` of the model in evaluation mode, with what acts on it, merged or not.
        adapter: its name. May be left out of "vllm" where there is one.
        tokenizer: for a model in GGUF: of transformers, or the path of a GGUF file that has it.
        kind: of a model in GGUF: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0; with llama-cpp-python q6_k, q5_k_m,
            q5_k_s, q4_k_m, q4_k_s, q3_k_m or q2_k.
        chat_template: for a model in GGUF, in place of the tokenizer's own.

    Returns:
        `path`.

    Raises:
        PeftcoreError: the other program would compute something else, or the files cannot be written. `convert` makes
            thin products of any adapter that changes weights.
    """
    place = Path(path)
    if to not in TARGETS:
        raise PeftcoreError(f"to={to!r} is not known. Known: {', '.join(TARGETS)}; PEFT's own format is that of save")
    if to == "vllm":
        return serving.write(model, place, adapter)
    if to == "onnx":
        return onnx.write(model, place)
    if adapter is not None:
        return gguf.write_adapter(model, place, adapter)
    if tokenizer is None:
        raise PeftcoreError("a GGUF file of a model has its tokenizer inside: export(..., tokenizer=tokenizer)")
    return gguf.write_model(model, place, tokenizer=tokenizer, kind=kind, template=chat_template)
