"""GGUF files as base models: one that cannot be read, or is not whole, is refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import exported
import pytest
import torch
from fuzz.gguf_files import Content

import peftcore
from peftcore import PeftcoreError
from peftcore.cli.bases import models


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    return peftcore.export(
        exported.llama(), folder / "model.gguf", format="gguf", tokenizer=exported.tokenizer(), gguf_type="f32"
    )


def drop(content: Content) -> None:
    content.tensors = [each for each in content.tensors if each[0] != "blk.0.attn_v.weight"]


def rename(content: Content) -> None:
    content.tensors = [(name.replace("blk.1.ffn", "blk.1.fnn"), *rest) for name, *rest in content.tensors]


def reshape(content: Content) -> None:
    content.tensors = [
        (name, [128] if name == "blk.1.ffn_norm.weight" else dims, *rest) for name, dims, *rest in content.tensors
    ]


def count_more_blocks(content: Content) -> None:
    content.keys = [(key, kind, 255 if key == "llama.block_count" else value) for key, kind, value in content.keys]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (count_more_blocks, "its header counts 255 blocks, and it has tensors of 2. Download it again"),
        (drop, r"the file lacks model\.layers\.0\.self_attn\.v_proj\.weight\. Download it again"),
        (rename, r"the file lacks model\.layers\.1\..*, .*, .* and 1 more\. Download it again"),
        (reshape, "its tensors and its config have different shapes"),
    ],
)
def test_what_is_not_whole_is_refused(
    file: Path, tmp_path: Path, change: Callable[[Content], None], message: str
) -> None:
    content = Content(file)
    change(content)
    (tmp_path / "changed.gguf").write_bytes(content.written())
    with pytest.raises(PeftcoreError, match=f"the model of '.*changed.gguf' cannot be loaded: {message}"):
        models.load_model(str(tmp_path / "changed.gguf"), "causal-lm", dtype="fp32", device="cpu")


def test_a_classifier_has_no_head_in_the_file(file: Path) -> None:
    model = models.load_model(str(file), "classification", labels=("a", "b"), dtype="fp32", device="cpu")
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, exported.llama().model.layers[1].mlp.up_proj.weight)
