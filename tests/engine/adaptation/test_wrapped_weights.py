"""Adapters on weights that another library quantized, beside dense weights of the same values."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.against_peft import quiet
from support.composed_models import output
from support.wrapped_weights import Int8, WithoutGradient, unwrapped, wrap
from torch import Tensor, nn
from transformers import FineGrainedFP8Config

import peftcore
from peftcore.testing import disturb

FIELDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "dora": {"r": 4},
    "oft": {"oft_block_size": 4},
    "adapter": {},
    "ia3": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "prompt-tuning": {"num_virtual_tokens": 2},
}


def adapted(model: nn.Module, method: str, **fields: Any) -> nn.Module:
    torch.manual_seed(1)
    quiet(peftcore.apply, model, method, **(fields or FIELDS[method]))
    disturb(model, "default", seed=2)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    inputs = tiny.inputs(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", FIELDS)
def test_as_on_dense_weights(method: str, tmp_path: Path) -> None:
    model, beside = adapted(wrap(tiny.llama()), method), adapted(unwrapped(wrap(tiny.llama())), method)
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight, Int8)
    wanted = output(beside)
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=2e-5)
    found, theirs = gradients(model), gradients(beside)
    assert found.keys() == theirs.keys() and found
    for name, gradient in theirs.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)
    peftcore.save(model, tmp_path)
    for base, off in ((wrap(tiny.llama()), 2e-5), (tiny.llama(), 0.2)):  # which is the same base, in other bits
        torch.testing.assert_close(output(quiet(peftcore.load, base, tmp_path)), wanted, rtol=0, atol=off)
    peftcore.remove(model)
    assert torch.equal(output(model), output(wrap(tiny.llama())))


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_merging_makes_dense_weights_and_unmerging_takes_them_out(method: str) -> None:
    model = adapted(wrap(tiny.llama()), method)
    wanted, layer = output(model), model.model.layers[0].self_attn.q_proj
    own = layer.weight
    with pytest.raises(
        peftcore.PeftcoreError,
        match=r"the options of its .*wrapped_weights.Int8 are unknown.* "
        r"peftcore.merge.model, dtype=",
    ):
        peftcore.merge(model, undo=True)
    assert torch.equal(output(model), wanted)
    peftcore.merge(model, dtype=torch.float32, undo=True)
    assert type(layer.weight) is nn.Parameter
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-5)
    peftcore.unmerge(model)
    assert layer.weight is own and torch.equal(output(model), wanted)


def test_a_merged_model_says_which_layers_are_dense() -> None:
    model = wrap(tiny.llama())
    told = FineGrainedFP8Config()
    model.config.quantization_config, model.hf_quantizer = told, "theirs"
    adapted(model, "lora", target_modules=["q_proj"])
    peftcore.merge(model, dtype=torch.float32, undo=True)
    dense = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert model.config.quantization_config.modules_to_not_convert == ["lm_head", *dense]
    peftcore.unmerge(model)
    assert model.config.quantization_config.modules_to_not_convert == ["lm_head"] and model.hf_quantizer == "theirs"
    peftcore.remove(model)
    adapted(model, "lora")
    peftcore.merge(model, dtype=torch.float32)
    assert not hasattr(model.config, "quantization_config") and model.hf_quantizer is None
    assert told.modules_to_not_convert is None  # the caller's own


def test_first_values_of_the_weight_are_those_of_its_values() -> None:
    model, beside = wrap(tiny.llama()), unwrapped(wrap(tiny.llama()))
    base = output(model)
    for each in (model, beside):
        peftcore.apply(each, "lora", r=4, init_lora_weights="pissa")
    torch.testing.assert_close(output(model), base, rtol=0, atol=1e-5)
    found, wanted = (each.model.layers[0].self_attn.q_proj.peftcore["default"].lora_A for each in (model, beside))
    torch.testing.assert_close(found.abs(), wanted.abs(), rtol=1e-3, atol=1e-5)


def test_a_product_without_a_gradient_cannot_be_trained_through(tmp_path: Path) -> None:
    peftcore.save(adapted(tiny.llama(), "lora"), tmp_path)
    model = wrap(tiny.llama(), WithoutGradient)
    with pytest.raises(peftcore.PeftcoreError, match=r"q_proj.weight' .WithoutGradient. passes no gradient"):
        peftcore.apply(model, "lora")
    with pytest.warns(UserWarning, match="The adapter can be used for inference but not trained"):
        peftcore.load(model, tmp_path)
    torch.testing.assert_close(output(model), output(peftcore.load(wrap(tiny.llama()), tmp_path)))


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("straight", [True, False])  # whether the gradient passes the rounding
def test_layers_of_transformers_that_round_their_input(straight: bool) -> None:
    from transformers.integrations.bitnet import AutoBitLinear, BitLinear

    model = tiny.llama()
    for layer in model.model.layers:
        kind: Any = AutoBitLinear if straight else BitLinear
        new = kind(32, 48, bias=False, dtype=torch.float32)
        if not straight:
            new.weight.copy_(torch.arange(12 * 32).view(12, 32) % 171)  # four numbers of 2 bits in a byte
        layer.mlp.up_proj = new
    if straight:
        peftcore.apply(model, "prompt-tuning", num_virtual_tokens=2)
        return
    with pytest.raises(peftcore.PeftcoreError, match=r"up_proj' \(BitLinear\) passes no gradient or a wrong gradient"):
        peftcore.apply(model, "prompt-tuning", num_virtual_tokens=2)


def test_floats_of_8_bits_that_scales_multiply() -> None:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    model = tiny.llama()
    for layer in model.model.layers:
        layer.mlp.up_proj = FP8Linear(32, 48, block_size=(16, 16))
    why = "FP8Linear stores FP8 weights with scales, .*dequantize=True"
    with pytest.raises(peftcore.PeftcoreError, match=why):
        peftcore.apply(model, "lora", target_modules=["up_proj"], init_lora_weights="pissa")
    peftcore.apply(model, "lora", target_modules=["up_proj"])
    with pytest.raises(peftcore.PeftcoreError, match=why):
        peftcore.merge(model, dtype=torch.float32, undo=True)


def test_a_wrapped_weight_is_not_trained_whole() -> None:
    model = wrap(tiny.llama())
    with pytest.raises(
        peftcore.PeftcoreError, match=r"cannot train '.*o_proj.weight', which another library has quantized .*.Int8."
    ):
        peftcore.apply(model, "lora", target_modules=["q_proj"], modules_to_save=["o_proj"])
    peftcore.apply(model, "lora", target_modules=["q_proj"], modules_to_save=["lm_head"])  # which is dense


def test_what_is_quantized_already_is_not_quantized_again_nor_estimated() -> None:
    model = wrap(tiny.llama())
    with pytest.raises(peftcore.PeftcoreError, match=r"q_proj.weight' is already quantized by another library .Int8."):
        peftcore.quantize(model)
    with pytest.raises(peftcore.PeftcoreError, match=r"the weights are quantized .Int8., which cannot be estimated"):
        peftcore.estimate(model, "lora")


class Packed(nn.Module):
    """A layer of which nothing but its sizes is known, as HQQ's."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("words", layer.weight.detach().clone().view(torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.words.view(torch.float32).T


def packed(model: nn.Module, but: str = "") -> nn.Module:
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path not in ("lm_head", but):
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, Packed(module))
    return model


def test_layers_whose_weight_is_not_known_are_reported() -> None:
    with pytest.raises(peftcore.PeftcoreError, match=r"found no linear layers .* Its layers are Packed, whose weight"):
        peftcore.apply(packed(tiny.llama()), "lora")
    model = packed(tiny.llama(), but="model.layers.0.self_attn.q_proj")
    with pytest.warns(UserWarning, match=r"reaches .* left out: layers of Packed, whose weights cannot be read \(9"):
        peftcore.apply(model, "lora")


def test_a_forward_of_an_instance_may_call_that_of_its_class() -> None:
    """As compressed-tensors does, whose layers round their weight at each call."""
    model = tiny.llama()
    for module in model.modules():
        if isinstance(module, nn.Linear):

            def rounded(self: nn.Linear, x: Tensor) -> Tensor:
                return 2 * type(self).forward(self, x)

            module.forward = rounded.__get__(module)  # type: ignore[method-assign]
    base, beside = output(model), copy.deepcopy(model)
    adapted(model, "lora", target_modules=["q_proj"])
    layer, plain = (each.model.layers[0].self_attn.q_proj for each in (model, beside))
    x = torch.randn(3, 32)
    adapter = layer.peftcore["default"]
    thin = adapter.scale * x @ adapter.lora_A.T @ adapter.lora_B.T
    torch.testing.assert_close(layer(x), 2 * nn.functional.linear(x, plain.weight, plain.bias) + thin)
    with peftcore.disabled(model):
        assert torch.equal(output(model), base)
    peftcore.remove(model)
    assert torch.equal(output(model), base)
