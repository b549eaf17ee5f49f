"""Checkpoints in NVFP4 of ModelOpt and llm-compressor, loaded without these libraries: values, training, experts."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nvfp4_checkpoints import config, tensors, values, write_folder
from safetensors.torch import load_file, save_file
from support.mixtures import mixture
from support.quantized import INPUTS, llama, logits
from torch import Tensor, nn

import peftcore
from peftcore.quantization import quantized_experts, quantized_layers
from peftcore.quantization.checkpoint_layouts import find_layout

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TOOLS = pytest.mark.parametrize("tool", ["modelopt", "compressed-tensors"])


def write_case(folder: Path, tool: str, **options: Any) -> tuple[dict[str, Tensor], nn.Module]:
    """A folder, the dense weights of its layers in NVFP4, and the dense model with them."""
    model = llama(num_hidden_layers=1)
    dense = write_folder(model, folder, tool, config(tool), **options)
    for name, weight in dense.items():
        model.get_parameter(name).data = weight
    return dense, model


@TOOLS
def test_values_are_the_tools_bit_for_bit(tool: str, tmp_path: Path) -> None:
    dense, reference = write_case(tmp_path, tool)
    for dtype in (torch.float32, torch.bfloat16):
        model = peftcore.quantization.load(tmp_path, dtype=dtype)
        layers = dict(quantized_layers(model))
        assert len(layers) == len(dense) == 7
        for name, weight in dense.items():
            layer = layers[name.removesuffix(".weight")]
            assert layer.quant_type == "nvfp4" and layer.blocksize == 16 and layer.packed.dtype == dtype
            assert torch.equal(layer.dequantized(torch.float32), weight)
            assert torch.equal(layer.dequantized(), weight.to(dtype))
        assert model.lm_head.weight.dtype is dtype
    torch.testing.assert_close(logits(peftcore.quantization.load(tmp_path)), logits(reference), rtol=1e-4, atol=1e-4)


@TOOLS
def test_lora_trains_saves_and_merges(tool: str, tmp_path: Path) -> None:
    _, reference = write_case(tmp_path / "base", tool)
    model = peftcore.quantization.load(tmp_path / "base")
    for each in (model, reference):
        torch.manual_seed(0)
        peftcore.apply(each, "lora", r=4, init_lora_weights=False)
        each(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    actual, expected = ([p.grad for p in each.parameters() if p.requires_grad] for each in (model, reference))
    for grad, expected_grad in zip(actual, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-5)
    adapted, before = logits(model), {name: t.clone() for name, t in model.state_dict().items()}
    peftcore.save(model, tmp_path / "adapter")
    reloaded = peftcore.load(peftcore.quantization.load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(reloaded.eval()), adapted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peftcore.merge(model, max_error=None, undo=True)  # into NVFP4, whose scales multiply whatever the file's did
    assert all(layer.quant_type == "nvfp4" for _, layer in quantized_layers(model))
    change = (logits(model) - adapted).norm() / adapted.norm()
    assert 0 < change < 0.5
    peftcore.unmerge(model)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())
    peftcore.merge(reloaded, dtype=torch.float32)
    torch.testing.assert_close(logits(reloaded), adapted, rtol=1e-4, atol=1e-4)


@TOOLS
def test_a_model_is_saved_with_its_bits(tool: str, tmp_path: Path) -> None:
    dense, _ = write_case(tmp_path / "theirs", tool, keep="k_proj")
    assert len(dense) == 6
    model = peftcore.quantization.load(tmp_path / "theirs")
    assert isinstance(model.model.layers[0].self_attn.k_proj, nn.Linear)
    assert model.model.layers[0].self_attn.k_proj.weight.is_floating_point()
    model.save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours/config.json").read_text())["quantization_config"]
    assert (saved["quant_method"], saved["quant_type"]) == ("peftcore_4bit", "nvfp4") and "stored" not in saved
    reloaded = peftcore.quantization.load(tmp_path / "ours")
    actual, expected = reloaded.state_dict(), model.state_dict()
    assert actual.keys() == expected.keys() and all(torch.equal(actual[name], t) for name, t in expected.items())
    assert ("model.layers.0.mlp.up_proj.weight.nested_quant_map" in actual) == (tool == "compressed-tensors")
    assert torch.equal(logits(reloaded), logits(model))


def test_modelopts_file_next_to_the_config_is_enough(tmp_path: Path) -> None:
    """Older versions of ModelOpt do not change config.json. Inputs in 4 bits are reported."""
    dense = write_folder(llama(num_hidden_layers=1), tmp_path, "modelopt", None)
    with pytest.warns(UserWarning, match="specifies 4-bit inputs of layers, which peftcore does not"):
        model = peftcore.quantization.load(tmp_path)
    for path, layer in quantized_layers(model):
        assert torch.equal(layer.dequantized(torch.float32), dense[f"{path}.weight"])
    estimate = peftcore.estimate(tmp_path, "lora", r=2, batch_size=2, length=8, dtype=torch.float32)
    assert estimate.summary.packed_parameters == sum(weight.numel() for weight in dense.values())


@TOOLS
def test_the_estimate_knows_the_checkpoint(tool: str, tmp_path: Path) -> None:
    write_case(tmp_path, tool)
    packed = [layer for _, layer in quantized_layers(peftcore.quantization.load(tmp_path))]
    summary = peftcore.estimate(tmp_path, "lora", r=2, batch_size=2, length=8, dtype=torch.float32).summary
    assert summary.packed_parameters == sum(layer.in_features * layer.out_features for layer in packed)
    assert summary.packed_bytes == sum(t.nbytes for one in packed for t in (one.weight, *one.buffers()))


@pytest.mark.parametrize("one_scale", [True, False])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gemma4_text"])
@TOOLS
def test_experts_stored_one_by_one_become_one_parameter(
    tool: str, family: str, one_scale: bool, tmp_path: Path
) -> None:
    dense = write_folder(mixture(family, num_hidden_layers=1), tmp_path, tool, config(tool), one_scale=one_scale)
    model = peftcore.quantization.load(tmp_path)
    ((path, experts),) = quantized_experts(model)
    names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    prefix = path.replace("mlp", "block_sparse_moe") if family == "mixtral" else path
    gate, up, down = (torch.stack([dense[f"{prefix}.{i}.{name}.weight"] for i in range(4)]) for name in names)
    is_exact = tool == "modelopt" or one_scale  # else quotients by different scales are products with reciprocals
    for name, expected in (("gate_up_proj", torch.cat((gate, up), 1)), ("down_proj", down)):
        actual = experts.dequantized_parameter(name, torch.float32)
        assert experts.packings[name].quant_type == "nvfp4"
        torch.testing.assert_close(actual, expected, rtol=0 if is_exact else 2.0**-22, atol=0)
    reference = peftcore.dequantize(peftcore.quantization.load(tmp_path))
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "ours")
    reloaded = peftcore.quantization.load(tmp_path / "ours")
    assert torch.equal(logits(reloaded), logits(model))
    byte_count = sum(t.nbytes for _, layer in quantized_layers(model) for t in (layer.weight, *layer.buffers()))
    byte_count += sum(experts.get_parameter(name).nbytes for name in experts.packings)
    byte_count += sum(t.nbytes for t in experts.buffers())
    assert peftcore.estimate(tmp_path, "lora", r=2, length=8, dtype=torch.float32).summary.packed_bytes == byte_count


UP = "model.layers.0.mlp.up_proj."
CHANGES: list[tuple[str, Callable[[dict[str, Tensor]], Any], str]] = [
    ("modelopt", lambda s: s.pop(f"{UP}weight_scale"), f"lacks '{UP}weight_scale'"),
    ("modelopt", lambda s: s.pop(f"{UP}weight"), "a tensor of ModelOpt: only weights"),
    (
        "modelopt",
        lambda s: s.update({f"{UP}pre_quant_scale": torch.ones(64)}),
        "pre_quant_scale', a tensor of ModelOpt",
    ),
    (
        "modelopt",
        lambda s: s.update({"model.layers.0.mlp.experts.up_proj_weight_scale_2": torch.ones(4)}),
        "up_proj_weight_scale_2', a tensor of ModelOpt: only weights",
    ),
    ("modelopt", lambda s: s[f"{UP}weight_scale_2"].zero_(), "'weight_scale_2' .* = 0.0, expected a number"),
    ("modelopt", lambda s: s.update({f"{UP}weight_scale_2": torch.ones(2)}), r"'weight_scale_2' torch.float32 \[2\]"),
    (
        "modelopt",
        lambda s: [s.pop(k) for k in [*s] if k.endswith(("_scale", "_scale_2")) or s[k].dtype is torch.uint8],
        "was quantized by ModelOpt, but it has no 'weight_scale_2'",
    ),
    (
        "modelopt",
        lambda s: [s.pop(k) for k in [*s] if k.endswith("_scale_2")],
        "down_proj.weight', a tensor of ModelOpt: only weights",
    ),
    ("compressed-tensors", lambda s: s.pop(f"{UP}weight_packed"), f"lacks '{UP}weight_packed'"),
    ("compressed-tensors", lambda s: s.pop(f"{UP}weight_global_scale"), f"lacks '{UP}weight_global_scale'"),
    (
        "compressed-tensors",
        lambda s: s.update({f"{UP}weight_scale": torch.full((128, 4), torch.nan).to(torch.float8_e4m3fn)}),
        "has a scale of NaN",
    ),
    (
        "compressed-tensors",
        lambda s: s.update({f"{UP}weight_scale": s[f"{UP}weight_scale"].float()}),
        "'weight_scale' torch.float32",
    ),
    (
        "compressed-tensors",
        lambda s: s.update({k.replace("layers.0", "layers.7"): s.pop(k) for k in [*s] if "layers.0.mlp" in k}),
        r"has 3 NVFP4 weights of compressed-tensors \('model.layers.7",
    ),
]


@pytest.mark.parametrize(("tool", "change", "message"), CHANGES)
def test_folders_that_are_refused(tool: str, change: Any, message: str, tmp_path: Path) -> None:
    write_case(tmp_path, tool)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.quantization.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (config("modelopt", quant_algo="FP8"), "ModelOpt in 'FP8', but only 'NVFP4' and 'W4A16_NVFP4' can be read"),
        (config("modelopt", quant_algo="MIXED_PRECISION"), "ModelOpt in 'MIXED_PRECISION'"),
        (config("modelopt", group_size=32), "ModelOpt in groups of 32"),
        (
            config("compressed-tensors", scheme={"format": "float-quantized"}),
            "in several formats, one of them 'float-quantized' with weights of float4",
        ),
        (config("compressed-tensors", transform_config={"a": 1}), "transforms of the activations"),
        (config("compressed-tensors", sparsity_config={"format": "sparse-24"}), "sparse weights"),
    ],
)
def test_layouts_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match=message):
        find_layout(settings, "folder")


def test_inputs_in_four_bits_are_reported() -> None:
    inputs = {"num_bits": 4, "type": "float", "dynamic": "local"}
    layout = find_layout(config("compressed-tensors", scheme={"input_activations": inputs}), "folder")
    assert layout is not None and layout.warning.startswith("'folder' specifies 4-bit inputs of layers")
    assert find_layout(config("modelopt", quant_algo="NVFP4"), "folder").warning == layout.warning
    assert not find_layout(config("compressed-tensors"), "folder").warning


@TOOLS
def test_a_weight_is_read(tool: str) -> None:
    layout, weight_values = find_layout(config(tool), "folder"), values(24, 48, tool)
    assert layout is not None
    parts = {"weight_packed" if part == "weight" else part: t for part, t in tensors(weight_values, tool).items()}
    weight = layout.pack(layout.read(parts, "layer"), torch.bfloat16, "layer")
    assert weight.dtype is torch.bfloat16 and torch.equal(weight.values(torch.float32), weight_values.dense(tool))
