"""GGUF files as base models: one that cannot be read, or is not whole, is refused in a sentence."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from fuzz.gguf_files import Content
from peftcore_cli.bases import base_files, dtype_choice, gguf_file, models
from support import exported
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import peftcore
from peftcore import PeftcoreError
from peftcore.ops import processor


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
        (count_more_blocks, "the header promises 255 blocks, but the file has tensors of 2. Download it again"),
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
    with pytest.raises(PeftcoreError, match=f"cannot load the model of '.*changed.gguf': {message}"):
        models.load_model(str(tmp_path / "changed.gguf"), "causal-lm", dtype="fp32", device="cpu")


def test_a_classifier_has_no_head_in_the_file(file: Path) -> None:
    model = models.load_model(str(file), "classification", labels=("a", "b"), dtype="fp32", device="cpu")
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, exported.llama().model.layers[1].mlp.up_proj.weight)


@pytest.fixture(scope="module")
def in_8_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf4")
    return peftcore.export(
        exported.llama(), folder / "model.gguf", format="gguf", tokenizer=exported.tokenizer(), gguf_type="q8_0"
    )


def test_tensors_read_one_by_one_are_those_that_transformers_reads(in_8_bits: Path) -> None:
    loaded = models.load_model(str(in_8_bits), "causal-lm", dtype="bf16", device="cpu")
    whole = AutoModelForCausalLM.from_pretrained(in_8_bits.parent, gguf_file=in_8_bits.name, dtype=torch.bfloat16)
    wanted = whole.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())


def test_weights_are_quantized_as_they_are_read(in_8_bits: Path) -> None:
    loaded = models.load_model(str(in_8_bits), "causal-lm", dtype="fp32", device="cpu", quantize="nf4")
    wanted = peftcore.quantize(models.load_model(str(in_8_bits), "causal-lm", dtype="fp32", device="cpu")).state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())


def test_quantizing_holds_few_dense_weights_at_a_time(in_8_bits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, largest = [], 0

    def read(tensor: gguf_file.LazyTensor, item: object) -> torch.Tensor:
        nonlocal largest
        weight = read_tensor(tensor, item)
        if weight.ndim == 2:
            weights.append(weakref.ref(weight))
        largest = max(largest, sum(weight() is not None for weight in weights))
        return weight

    read_tensor = gguf_file.LazyTensor.__getitem__
    monkeypatch.setattr(gguf_file.LazyTensor, "__getitem__", read)
    models.load_model(str(in_8_bits), "causal-lm", dtype="fp32", device="cpu", quantize="nf4")
    assert len(weights) == 16 and largest <= 4  # the embedding, which stays dense, and weights that are being read


def test_the_header_has_what_the_gguf_package_reads(in_8_bits: Path) -> None:
    found, reader = gguf_file.header(str(in_8_bits)), gguf.GGUFReader(in_8_bits)
    assert {name: entry.start for name, entry in found.tensors.items()} == {
        tensor.name: tensor.data_offset for tensor in reader.tensors
    }
    assert found.architecture == "llama" and found.fields["llama.block_count"] == 2


def test_config_and_tokenizer_are_those_that_transformers_reads(in_8_bits: Path) -> None:
    place = {"pretrained_model_name_or_path": in_8_bits.parent, "gguf_file": in_8_bits.name}
    config, tokenizer = AutoConfig.from_pretrained(**place), AutoTokenizer.from_pretrained(**place)
    assert base_files.load_pretrained(AutoConfig.from_pretrained, str(in_8_bits), "configuration") == config
    loaded = base_files.load_pretrained(AutoTokenizer.from_pretrained, str(in_8_bits), "tokenizer")
    assert type(loaded) is type(tokenizer)
    assert loaded.init_kwargs == tokenizer.init_kwargs
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"GGML" + bytes(40), "does not begin with GGUF"), (b"GGUF\x01\0\0\0" + bytes(40), "has GGUF version 1")],
)
def test_files_with_another_header_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "other.gguf").write_bytes(data)
    with pytest.raises(PeftcoreError, match=message):
        gguf_file.header(str(tmp_path / "other.gguf"))


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, "bf16"), (False, "fp32")])
def test_the_dtype_of_few_bits_is_chosen_and_printed(
    in_8_bits: Path, file: Path, monkeypatch: pytest.MonkeyPatch, has_bf16: bool, dtype: str
) -> None:
    monkeypatch.setattr(processor, "has_instructions", lambda _: has_bf16)
    found = dtype_choice.choose_for_inference(str(in_8_bits), "causal-lm", "auto", "cpu")
    assert found.dtype == dtype and f"--dtype auto: {dtype}" in str(found.message)
    assert dtype_choice.choose_for_inference(str(file), "causal-lm", "auto", "cpu").dtype == "fp32"  # as its tensors
