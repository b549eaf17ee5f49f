"""4-bit weights as GGUF's blocks: the codes are kept, and the package gguf dequantizes them to the same values."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support.exported import apply, keys, llama, logits, qwen3moe, tokenizer

import peftcore
from peftcore import PeftcoreError
from peftcore.ops import affine4_weight
from peftcore.quantization.convert import convert

AFFINE = {"intermediate_size": 128}


def write(model: Any, file: Path, kind: str = "f32") -> Path:
    return peftcore.export(model, file, format="gguf", tokenizer=tokenizer(), gguf_type=kind)


def kinds(file: Path) -> Counter[str]:
    return Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors)


def dense(file: Path) -> dict[str, Any]:
    """Dequantized by the package gguf, [.., rows, in]."""
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(file).tensors}


def with_affine4(model: Any, dtype: torch.dtype, zeros: bool, group: int = 64, scale: float = 0.01) -> Any:
    """Give every linear layer but the head random codes and scales, as a GPTQ or W4A16 checkpoint has them."""
    generator = torch.Generator().manual_seed(0)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            out, width = layer.weight.shape
            codes = torch.randint(0, 16, (out, width), generator=generator)
            scales = (scale * (1 + torch.rand(out, width // group, generator=generator))).to(dtype)
            points = torch.randint(0, 16, scales.shape, generator=generator) if zeros else None
            convert(layer, affine4_weight(codes, scales, points, dtype=torch.float32), None)
    return model


def test_mxfp4_is_exact(tmp_path: Path) -> None:
    model = peftcore.quantize(llama(), "mxfp4")
    file = write(model, tmp_path / "model.gguf")
    assert kinds(file) == {"MXFP4": 14, "F32": 7}
    assert keys(file)["general.file_type"] == gguf.LlamaFileType.MOSTLY_MXFP4_MOE
    expected = model.model.layers[1].mlp.down_proj.dequantized(torch.float32)
    assert np.array_equal(dense(file)["blk.1.ffn_down.weight"], expected.numpy())


def test_symmetric_int4_is_exact_q4_0(tmp_path: Path) -> None:
    """Also to transformers' reader, which undoes the order of the rows of q and k."""
    from transformers import AutoModelForCausalLM

    model = with_affine4(llama(**AFFINE), torch.float16, zeros=False)
    file = write(model, tmp_path / "model.gguf")
    assert kinds(file) == {"Q4_0": 14, "F32": 7}
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name).eval()
    for path, layer in peftcore.quantization.quantized_layers(model):
        assert torch.equal(back.get_submodule(path).weight, layer.dequantized(torch.float32)), path
    torch.testing.assert_close(logits(back), logits(model), rtol=1e-4, atol=1e-4)


def test_zero_points_are_offsets_of_q4_1(tmp_path: Path) -> None:
    """Scales with few digits are exact; bf16's times zero points are rounded, with a warning."""
    exact = with_affine4(llama(**AFFINE), torch.float16, zeros=True)
    for _, layer in peftcore.quantization.quantized_layers(exact):
        layer.absmax.copy_(layer.absmax.to(torch.float8_e4m3fn))
    file = write(exact, tmp_path / "exact.gguf")
    assert kinds(file) == {"Q4_1": 14, "F32": 7}
    expected = exact.model.layers[0].mlp.up_proj.dequantized(torch.float32).numpy()
    assert np.array_equal(dense(file)["blk.0.ffn_up.weight"], expected)

    model = with_affine4(llama(**AFFINE), torch.bfloat16, zeros=True)
    with pytest.warns(
        UserWarning, match="13 matrices .such as 'model.layers.0.self_attn.q_proj.weight'. are rounded to fp16"
    ):
        file = write(model, tmp_path / "rounded.gguf")
    layer = model.model.layers[0].mlp.up_proj
    wrong = dense(file)["blk.0.ffn_up.weight"] - layer.dequantized(torch.float32).numpy()
    steps = layer.absmax.float().view(len(wrong), -1).repeat_interleave(64, 1).numpy()
    assert 0 < (abs(wrong) / steps).max() < 15 / 2**11


def test_experts_keep_their_codes(tmp_path: Path) -> None:
    model = peftcore.quantize(qwen3moe(), "mxfp4")
    dequantized = dense(write(model, tmp_path / "model.gguf"))
    experts = model.model.layers[1].mlp.experts
    up = experts.dequantized_parameter("gate_up_proj", torch.float32)
    assert np.array_equal(dequantized["blk.1.ffn_gate_exps.weight"], up[:, :32].numpy())
    assert np.array_equal(dequantized["blk.1.ffn_up_exps.weight"], up[:, 32:].numpy())
    down = experts.dequantized_parameter("down_proj", torch.float32)
    assert np.array_equal(dequantized["blk.1.ffn_down_exps.weight"], down.numpy())


def test_a_merged_model_in_4_bits(tmp_path: Path) -> None:
    model = apply(peftcore.quantize(llama(), "mxfp4"), r=2)
    with pytest.warns(UserWarning, match="requantizing"):
        peftcore.merge(model, max_error=1.0, undo=True)
    packed = dict(peftcore.quantization.quantized_layers(model))
    dequantized = dense(write(model, tmp_path / "model.gguf"))["blk.0.ffn_gate.weight"]
    assert np.array_equal(dequantized, packed["model.layers.0.mlp.gate_proj"].dequantized(torch.float32).numpy())


def test_what_no_type_of_gguf_has_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    model = with_affine4(llama(**AFFINE), torch.float32, zeros=False, scale=1e-6)
    with pytest.raises(PeftcoreError, match=r"q_proj.weight' has scales outside the range of fp16"):
        write(model, file)
    layer = model.model.layers[0].self_attn.q_proj
    codes, scales = torch.randint(0, 16, (64, 64)), torch.ones(64, 1)
    convert(layer, affine4_weight(codes, scales, permutation=torch.randperm(64)), None)
    with pytest.raises(
        PeftcoreError, match=r"q_proj.weight' has non-contiguous groups of inputs .*act-order.*peftcore.dequantize"
    ):
        write(model, file)
    with pytest.raises(PeftcoreError, match=r"k_m' needs dense weights, but '.*q_proj.weight' is in 4 bits"):
        write(model, file, "q4_k_m")
    assert list(tmp_path.iterdir()) == []
