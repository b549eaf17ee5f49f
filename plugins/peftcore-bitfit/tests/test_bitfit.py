"""Which biases BitFit trains, what it saves, how it merges, and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_parameters, applied
from peftcore.plugin import disturb


def trained(model: nn.Module, adapter: str = "default") -> list[str]:
    return [name for name, _ in adapter_parameters(model, adapter)]


def test_all_biases_and_the_head_of_a_classifier() -> None:
    model = tiny.MODELS["bert"]()
    biases = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    peftcore.apply(model, "bitfit")
    assert sorted(trained(model)) == sorted({*biases, "classifier.weight"})
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {*biases, "classifier.weight"}
    headless = peftcore.apply(tiny.MODELS["bert"](), "bitfit", modules_to_save=[])
    assert sorted(trained(headless)) == sorted(biases)


def test_the_papers_subset_is_the_query_and_the_layer_to_the_inner_size() -> None:
    model = peftcore.apply(tiny.MODELS["bert"](), "bitfit", target_modules="query-intermediate", modules_to_save=[])
    layers = [f"bert.encoder.layer.{i}" for i in (0, 1)]
    names = ("attention.self.query.bias", "intermediate.dense.bias")
    assert trained(model) == [f"{layer}.{name}" for layer in layers for name in names]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (32 + 48)
    config = applied(model, "default").config
    assert config.target_modules == ["intermediate.dense", "query"]  # explicit, so that it means the same anywhere


def test_chosen_layers_and_modules() -> None:
    model = peftcore.apply(tiny.MODELS["gpt2"](), "bitfit", target_modules=["c_attn", "c_fc"], layers_to_transform=1)
    assert trained(model) == ["transformer.h.1.attn.c_attn.bias", "transformer.h.1.mlp.c_fc.bias"]
    model = peftcore.apply(tiny.MODELS["gpt2"](), "bitfit", exclude_modules=["ln_1", "ln_2", "ln_f"])
    assert len(trained(model)) == 2 * 4
    model = peftcore.apply(tiny.MODELS["gpt2"](), "bitfit", layers_to_transform=[0])
    assert len(trained(model)) == 6 and all(".h.0." in name for name in trained(model))


def test_only_the_trained_values_are_saved(tmp_path: Path) -> None:
    model = peftcore.apply(tiny.MODELS["bert"](), "bitfit")
    disturb(model, "default", seed=1)
    peftcore.save(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(tensors) == sorted(f"base_model.model.{name}" for name in trained(model))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BITFIT"
    twin = peftcore.load(tiny.MODELS["bert"](), tmp_path)
    assert torch.equal(tiny.logits(twin), tiny.logits(model))


def test_merging_puts_the_values_into_the_base() -> None:
    model = tiny.MODELS["bert"]()
    keys = list(model.state_dict())
    peftcore.apply(model, "bitfit")
    disturb(model, "default", seed=1)
    acting = tiny.logits(model)
    values = {name: p.detach().clone() for name, p in adapter_parameters(model, "default")}
    peftcore.merge(model)
    assert torch.equal(tiny.logits(model), acting)
    state = model.state_dict()
    assert list(state) == keys
    assert all(torch.equal(state[name], value) for name, value in values.items())


def test_the_error_for_a_model_without_biases_names_add_missing() -> None:
    with pytest.raises(peftcore.PeftcoreError, match=r"LlamaForCausalLM lacks biases.*Use add_missing=True"):
        peftcore.apply(tiny.llama(), "bitfit")
    with pytest.raises(peftcore.PeftcoreError, match=r"selects 6 linear layers without one, such as.*q_proj"):
        peftcore.apply(tiny.llama(), "bitfit", target_modules="query-intermediate")


def test_added_biases_are_added_biases(tmp_path: Path) -> None:
    """The same as a model whose layers have them; the base keeps its keys."""
    model, base = tiny.llama(), tiny.llama()
    peftcore.apply(model, "bitfit", add_missing=True)
    linear = [path for path, m in base.named_modules() if isinstance(m, nn.Linear) and path != "lm_head"]
    assert trained(model) == [f"{path}.bias" for path in linear]
    assert torch.equal(tiny.logits(model), tiny.logits(base))
    disturb(model, "default", seed=1)
    assert set(base.state_dict()) <= set(model.state_dict())
    values = dict(adapter_parameters(model, "default"))
    for path in linear:
        base.get_submodule(path).bias = nn.Parameter(values[f"{path}.bias"].detach().clone())
    torch.testing.assert_close(tiny.logits(model), tiny.logits(base), rtol=1e-5, atol=1e-6)

    peftcore.save(model, tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {f"base_model.model.{p}.bias" for p in linear}
    assert torch.equal(tiny.logits(peftcore.load(tiny.llama(), tmp_path)), tiny.logits(model))
    with pytest.raises(peftcore.PeftcoreError, match=r"'default' \(bitfit\) cannot be merged"):
        peftcore.merge(model, undo=True)


class Grouped(nn.Linear):
    """Groups of outputs, one of each group of inputs (DeepSeek-V4's)."""

    def forward(self, x: Tensor) -> Tensor:  # [..., groups, in] -> [..., groups, out / groups]
        return torch.einsum("...gi,gji->...gj", x, self.weight.unflatten(0, (x.shape[-2], -1)))


def test_a_grouped_layer_gets_a_bias_for_each_output() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"proj": Grouped(3, 8, bias=False)})
    model.forward = lambda x: model["proj"](x)  # type: ignore[method-assign]
    x = torch.randn(2, 5, 4, 3)
    before = model(x)
    peftcore.apply(model, "bitfit", add_missing=True)
    added = dict(adapter_parameters(model, "default"))["proj.bias"]
    with torch.no_grad():
        added.copy_(torch.arange(8.0))
    torch.testing.assert_close(model(x), before + torch.arange(8.0).view(4, 2))


def test_existing_biases_are_trained_beside_added_ones() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    x = torch.randn(3, 4)
    base = model(x)
    peftcore.apply(model, "bitfit", add_missing=True)
    assert sorted(trained(model)) == ["0.bias", "1.bias", "2.bias"]
    assert applied(model, "default").paths == ("2",)
    assert torch.equal(model(x), base)
    disturb(model, "default", seed=1)
    peftcore.remove(model)
    assert torch.equal(model(x), base)
    plain = peftcore.apply(model, "bitfit")
    assert trained(plain) == ["0.bias", "1.bias"]


def test_biases_of_other_names() -> None:
    """nn.MultiheadAttention: a fused bias of its own, and a projection that is never called."""
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).train(), torch.randn(2, 3, 8)
    peftcore.apply(model, "bitfit")
    assert "self_attn.in_proj_bias" in trained(model) and "self_attn.out_proj.bias" in trained(model)
    model(x).square().mean().backward()
    assert all(p.grad is not None for _, p in adapter_parameters(model, "default"))
    bare = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, bias=False)
    with pytest.raises(peftcore.PeftcoreError, match=r"without calling it"):
        peftcore.apply(bare, "bitfit", add_missing=True)
    assert peftcore.engine.state_of(bare) is None


def test_tasks_are_switched_and_mixed_with_lora(tmp_path: Path) -> None:
    alone: dict[str, Tensor] = {}
    for name, seed in (("a", 1), ("b", 2)):
        model = peftcore.apply(tiny.MODELS["gpt2"](), "bitfit", adapter=name)
        disturb(model, name, seed)
        alone[name] = tiny.logits(model)
        peftcore.save(model, tmp_path / name)
    model = tiny.MODELS["gpt2"]()
    base = tiny.logits(model)
    for name in ("a", "b"):
        peftcore.activate(model, []) if peftcore.engine.state_of(model) else None
        peftcore.load(model, tmp_path / name, adapter=name)
    for name in ("a", "b", "a"):
        peftcore.activate(model, name)
        assert torch.equal(tiny.logits(model), alone[name])
    torch.manual_seed(0)
    peftcore.apply(model, "lora", adapter="c", r=2, target_modules=["c_attn"])
    disturb(model, "c", seed=3)
    both = tiny.logits(model)
    assert (both - alone["a"]).abs().max() > 1e-3
    peftcore.merge(model, undo=True)
    torch.testing.assert_close(tiny.logits(model), both, rtol=1e-4, atol=1e-5)
    peftcore.unmerge(model)
    assert torch.equal(tiny.logits(model), both)
    for name in ("c", "a", "b"):
        peftcore.remove(model, name)
    assert torch.equal(tiny.logits(model), base)


def test_two_active_ones_cannot_train_one_bias() -> None:
    model = peftcore.apply(tiny.MODELS["gpt2"](), "bitfit", adapter="a")
    with pytest.raises(peftcore.PeftcoreError, match=r"the active adapter 'a' already trains"):
        peftcore.apply(model, "bitfit", adapter="b")


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("gpt2", {"target_modules": "query-intermediate"}, r"queries share a layer.*GPT-2: \['c_attn', 'c_fc'\]"),
        ("gpt2", {"target_modules": ["c_atn"]}, "'c_atn' matches no module .nearest: 'c_attn'"),
        ("gpt2", {"target_modules": ["wte"]}, "'wte' matches Embedding .such as 'transformer.wte'., which this method"),
        ("gpt2", {"layers_to_transform": [9]}, r"no targeted module is in layer \[9\]"),
        ("bert", {"modules_to_save": ["scores"]}, "'scores' matches no module with parameters"),
        ("gpt2", {"add_mising": True}, "no field 'add_mising' .nearest: 'add_missing'"),
    ],
)
def test_wrong_configs(kind: str, fields: dict[str, Any], message: str) -> None:
    model = tiny.MODELS[kind]()
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.apply(model, "bitfit", **fields)
    assert peftcore.engine.state_of(model) is None
