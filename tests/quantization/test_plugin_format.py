"""A 4-bit format that is one module of a user: the int4 of docs/plugin-hooks.md, registered through the hook."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.exported import apply, llama, logits, qwen3moe, tokenizer
from torch import nn

import peftcore
from peftcore.plugin import PeftcoreError, WeightFormat, hookimpl, original_class
from peftcore.plugin.registry import registry

PAGE = Path(__file__).parents[2] / "docs/plugin-hooks.md"
WIDE = {"intermediate_size": 128, "num_hidden_layers": 1}  # rows are whole groups of 64


@pytest.fixture
def int4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (source,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "Int4Linear(" in code)
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin/peftcore_int4.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path / "plugin")
    module = importlib.import_module("peftcore_int4")
    registry.register("int4", module, "peftcore-int4", "1.0")
    yield module
    registry.unregister("int4")
    del sys.modules["peftcore_int4"]


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Symmetric int4 with groups of 64, written down once more."""
    groups = weight.float().reshape(len(weight), -1, 64)
    scale = groups.abs().max(-1, keepdim=True).values / 7
    return (torch.round(groups / scale) * scale).reshape(weight.shape)


def test_quantize_and_dequantize(int4: ModuleType) -> None:
    model, reference = llama(**WIDE), llama(**WIDE)
    assert peftcore.quantize(model, "int4") is model
    kinds = {type(module).__name__ for module in model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {"Int4Linear", "Linear"} and original_class(model.lm_head) is nn.Linear  # the head stays dense
    for path, module in reference.model.named_modules():
        if isinstance(module, nn.Linear):
            found = model.model.get_submodule(path)
            assert found.weight.dtype is torch.uint8 and found.weight.numel() * 2 == module.weight.numel()
            assert torch.allclose(found.dense(), rounded(module.weight.detach()), atol=1e-6)
    before = logits(model)
    peftcore.dequantize(model)
    assert not any(isinstance(module, int4.Int4Linear) for module in model.modules())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_train_save_and_merge(int4: ModuleType, tmp_path: Path, method: str) -> None:
    model = peftcore.quantize(llama(**WIDE), "int4")
    base = logits(model)
    apply(model, method, r=4, target_modules=["q_proj", "down_proj"])
    expected = logits(model)
    assert (expected - base).abs().max() > 0.1
    loss = model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    peftcore.save(model, tmp_path)
    again = peftcore.load(peftcore.quantize(llama(**WIDE), "int4"), tmp_path).eval()
    assert torch.equal(logits(again), expected)

    errors = peftcore.merge_error(model)
    assert len(errors) == 2 and all(0 < error < 1 for error in errors.values())
    with pytest.raises(PeftcoreError, match="2 merged layers loses"):
        peftcore.merge(model, max_error=1e-3, undo=True)
    with pytest.warns(UserWarning, match="2 merged layers loses"):
        peftcore.merge(model, max_error=1.0, undo=True)
    assert all(type(m).__name__ == "Int4Linear" for m in (model.model.layers[0].mlp.down_proj,))
    peftcore.unmerge(model)
    assert torch.equal(logits(model), expected)
    peftcore.merge(model, dtype=torch.float32)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert (logits(model) - expected).abs().max() < 1e-4


def test_load_and_the_command_line(int4: ModuleType, tmp_path: Path) -> None:
    from support.commands import invoke

    for part in (llama(**WIDE), tokenizer()):
        part.save_pretrained(tmp_path / "base")
    loaded = peftcore.quantization.load(tmp_path / "base", "int4", dtype=torch.float32).eval()
    assert torch.equal(logits(loaded), logits(peftcore.quantize(llama(**WIDE), "int4")))
    model = apply(peftcore.quantize(llama(**WIDE), "int4"), r=4, target_modules=["q_proj"])
    peftcore.save(model, tmp_path / "adapter")
    given = (tmp_path / "adapter", "-m", tmp_path / "base", "--quantize", "int4")
    found = invoke("merge", *given, "-o", tmp_path / "out")
    assert found.exit_code == 0, found.output
    merged = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert (logits(merged) - logits(model)).abs().max() < 1e-4


def test_what_is_refused(int4: ModuleType) -> None:
    with pytest.raises(
        PeftcoreError, match=r"unknown quant_type 'int5'\. Choose one of: nf4, fp4, mxfp4, nvfp4, affine4, .*int4$"
    ):
        peftcore.quantize(llama(**WIDE), "int5")
    with pytest.raises(
        PeftcoreError, match="quant_type='int4' does not support double_quant, blocksize and compute_dtype"
    ):
        peftcore.quantize(llama(**WIDE), "int4", blocksize=32)
    for name in ("int4", "nf5"):  # sharded loading has the core's types only
        with pytest.raises(PeftcoreError, match=rf"unknown quant_type '{name}'\. Choose one of: nf4, fp4"):
            peftcore.load_sharded("folder", name)
    model = llama(num_hidden_layers=1)  # intermediate_size=96
    who = r"'model.layers.0.mlp.down_proj' cannot be quantized: `quantize` of the plugin 'int4' .* failed"
    with pytest.raises(peftcore.PluginError, match=who):
        peftcore.quantize(model, "int4")


def test_experts_stay_dense(int4: ModuleType) -> None:
    model = qwen3moe(num_hidden_layers=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peftcore.quantize(model, "int4")
    told = "2 weights of experts ('model.layers.0.mlp.experts.gate_up_proj') are left dense, because quant_type='int4'"
    assert any(str(each.message).startswith(told) for each in caught)
    assert model.model.layers[0].mlp.experts.down_proj.is_floating_point()
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Int4Linear"


def test_a_fused_path_does_not_read_the_bytes(int4: ModuleType) -> None:
    """`nn.TransformerEncoderLayer` in evaluation mode would read quantized weights as dense ones."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    x = torch.randn(2, 5, 64)
    dense = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    dense.load_state_dict(layer.state_dict())
    for name in ("linear1", "linear2"):
        linear: Any = getattr(dense, name)
        linear.weight.data = rounded(linear.weight.data)
    with pytest.warns(UserWarning, match="nn.MultiheadAttention"), torch.no_grad():
        peftcore.quantize(layer, "int4", skip=[])
        assert torch.allclose(layer(x), dense(x), atol=1e-5)


def test_a_format_that_leaves_the_layer_as_it_was_is_refused(int4: ModuleType) -> None:
    (own,) = int4.peftcore_weight_formats()

    class Idle:
        @hookimpl
        def peftcore_weight_formats(self) -> list[WeightFormat]:
            idle = replace(own, name="idle", quantize=lambda layer: None)
            return [idle, replace(idle, name="one way", plain=None)]

    registry.register("idle", Idle(), "peftcore-idle", "1.0")
    try:
        with pytest.raises(
            peftcore.PluginError, match=r"`quantize` of the plugin 'idle' .* left '.*' in another format"
        ):
            peftcore.quantize(llama(**WIDE), "idle")
        with pytest.raises(peftcore.PluginError, match=r"'one way' of the plugin 'idle' .* lacks `decode` or `plain`"):
            peftcore.quantize(llama(**WIDE), "one way")
    finally:
        registry.unregister("idle")
