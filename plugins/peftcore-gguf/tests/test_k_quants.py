"""K-quants: what llama.cpp's library is given, and what becomes of its file."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from support.exported import llama, tokenizer

import peftcore
from peftcore import PeftcoreError


class Library(SimpleNamespace):
    """The two functions of llama.cpp that are called: a copy, or a failure. Its build takes minutes."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.seen = fails, {}

    def llama_model_quantize_default_params(self) -> Any:
        return SimpleNamespace(ftype=None)

    def llama_model_quantize(self, source: bytes, path: bytes, parameters: Any) -> int:
        kinds = {entry.name: entry.tensor_type.name for entry in gguf.GGUFReader(source.decode()).tensors}
        self.seen = {"ftype": parameters.ftype, "kind": kinds["blk.0.attn_q.weight"]}
        Path(path.decode()).write_bytes(b"quantized")
        return int(self.fails)


def write(file: Path, model: Any, kind: str) -> None:
    peftcore.export(model, file, format="gguf", tokenizer=tokenizer(), gguf_type=kind)


@pytest.mark.parametrize(
    ("kind", "dtype", "ftype", "before"),
    [
        ("q4_k_m", torch.float32, gguf.LlamaFileType.MOSTLY_Q4_K_M, "F32"),
        ("q5_K_M", torch.bfloat16, gguf.LlamaFileType.MOSTLY_Q5_K_M, "BF16"),
        ("q6_k", torch.float16, gguf.LlamaFileType.MOSTLY_Q6_K, "F16"),
        ("q2_k", torch.float32, gguf.LlamaFileType.MOSTLY_Q2_K, "F32"),
    ],
)
def test_llama_cpp_quantizes_the_unrounded_model(
    kind: str, dtype: torch.dtype, ftype: int, before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library()
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    write(tmp_path / "model.gguf", llama().to(dtype), kind)
    assert library.seen == {"ftype": ftype, "kind": before}
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("model.gguf", b"quantized")]


def test_without_llama_cpp_or_where_it_fails_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    file.write_text("what was there")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(PeftcoreError, match=r"llama-quantize model-f16\.gguf model\.gguf q4_k_m"):
        write(file, llama(), "q4_k_m")
    monkeypatch.setitem(sys.modules, "llama_cpp", Library(fails=True))
    with pytest.raises(PeftcoreError, match="failed to quantize the model to q4_k_m"):
        write(file, llama(), "q4_k_m")
    assert file.read_text() == "what was there" and len(list(tmp_path.iterdir())) == 1
