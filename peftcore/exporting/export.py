"""`export`: a model or an adapter as files for other programs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from peftcore.errors import PeftcoreError
from peftcore.exporting import gguf, onnx, serving

FORMATS = ("gguf", "vllm", "onnx")


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: str,
    adapter: str | None = None,
    tokenizer: Any = None,
    gguf_type: str = "f16",
    chat_template: str | None = None,
) -> Path:
    """Write a model or an adapter in the format of another program. The model is not changed.

    Args:
        model: the model.
        path: file or folder to write.
        format: "gguf" writes a file for llama.cpp and Ollama: the adapter if `adapter` is given, which must add
            low-rank products to weights; otherwise the model with its current weights, so merge first. Models of
            Llama, Mistral, Qwen2, Qwen3 (with experts), Gemma 2 and 3; byte-level BPE and SentencePiece BPE tokenizers.
            "vllm" writes a folder with the adapter for vLLM and SGLang, with one rank and scale for all modules.
            "onnx" writes a file with the model in evaluation mode and its active adapters, merged or not.
        adapter: name of the adapter. "vllm" needs it only if the model has several.
        tokenizer: required for a model in GGUF: a transformers tokenizer, or the path of a GGUF file that has one.
        gguf_type: type of the matrices of a model in GGUF: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0; with
            llama-cpp-python also q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s, q3_k_m or q2_k.
        chat_template: chat template for a model in GGUF; by default the tokenizer's.

    Returns:
        The path.

    Raises:
        PeftcoreError: the other program would compute something else, or the files cannot be written. `convert` makes
            a low-rank adapter from any adapter that changes weights.
    """
    target = Path(path)
    if format not in FORMATS:
        raise PeftcoreError(
            f"format={format!r} is not known. Known: {', '.join(FORMATS)}. For PEFT's format use peftcore.save"
        )
    if format == "vllm":
        return serving.write(model, target, adapter)
    if format == "onnx":
        return onnx.write(model, target)
    if adapter is not None:
        return gguf.write_adapter(model, target, adapter)
    if tokenizer is None:
        raise PeftcoreError("a model in GGUF contains its tokenizer. Pass export(..., tokenizer=tokenizer)")
    return gguf.write_model(model, target, tokenizer=tokenizer, gguf_type=gguf_type, template=chat_template)
