"""Weights in int4 and inputs in int8: the values of torchao, gradients, adapters, merging, and training."""

import json
from pathlib import Path

import peftcore_8da4w
import pytest
import torch
from support.commands import SPECIAL, WORDS, printed, save_tokenizer, write_jsonl
from torch import nn
from torch.nn import functional as F

import peftcore


def layer(inputs: int = 64, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 5, bias=bias))


def test_weights_are_multiples_of_a_scale_from_minus_8_to_7() -> None:
    weight = torch.tensor([[-1.5, 1.5, 0.3, 0.09, *[0.0] * 28], [*[0.2] * 16, *[-0.1] * 16]])
    rounded = peftcore_8da4w.round_weight(weight, 32)
    assert torch.allclose(rounded["scales"], torch.tensor([[0.2], [0.2 / 7.5]]))
    model = nn.Sequential(nn.Linear(32, 2, bias=False))
    model[0].weight.data.copy_(weight)
    peftcore.quantize(model, "8da4w")
    dense = peftcore_8da4w.read(model[0])  # 7.5 and -7.5 round to 8, which is cut to 7, and to -8
    assert torch.allclose(dense[0, :5], torch.tensor([-1.6, 1.4, 0.4, 0.0, 0.0]))
    assert torch.allclose(dense[1], torch.tensor([*[7 * 0.2 / 7.5] * 16, *[-4 * 0.2 / 7.5] * 16]))


def test_inputs_are_rounded_by_token_between_their_bounds_and_zero() -> None:
    x = torch.tensor([[0.0, 1.0, 2.55, 0.014], [-1.0, -2.55, -0.004, -0.006], [0.0, 0.0, 0.0, 0.0]])
    rounded = peftcore_8da4w.round_inputs(x)
    expected = [[0.0, 1.0, 2.55, 0.01], [-1.0, -2.55, 0.0, -0.01], [0.0, 0.0, 0.0, 0.0]]
    assert torch.allclose(rounded, torch.tensor(expected), atol=1e-6)
    assert peftcore_8da4w.round_inputs(x.bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize(("group", "name"), peftcore_8da4w.NAMES.items())
def test_the_values_and_gradients_are_those_of_torchao(group: int, name: str) -> None:
    qat = pytest.importorskip("torchao.quantization.qat", reason="torchao is not installed")
    inputs = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = qat.IntxFakeQuantizeConfig(torch.int4, group_size=group, is_symmetric=True)
    model = layer(512)
    torchao_layer = qat.FakeQuantizedLinear.from_linear(layer(512)[0], inputs, weights)
    peftcore.quantize(model, name)
    x = torch.randn(3, 512, requires_grad=True)
    x_copy = x.detach().clone().requires_grad_()
    assert torch.equal(peftcore_8da4w.read(model[0]), torchao_layer.weight_fake_quantizer(torchao_layer.weight))
    assert torch.equal(peftcore_8da4w.round_inputs(x), torchao_layer.activation_fake_quantizer(x_copy))
    output, expected = model(x), torchao_layer(x_copy)
    assert torch.allclose(output, expected, atol=1e-5)
    output.square().sum().backward()
    expected.square().sum().backward()
    assert x.grad is not None and x_copy.grad is not None and torch.allclose(x.grad, x_copy.grad, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_adapters_learn_over_the_rounded_base(method: str) -> None:
    model = layer()
    peftcore.quantize(model, "8da4w")
    x = torch.randn(4, 64)
    base, weight, bias = model(x), peftcore_8da4w.read(model[0]), model[0].bias
    assert torch.allclose(base, F.linear(peftcore_8da4w.round_inputs(x), weight, bias), atol=1e-5)
    more = {"feedforward_modules": []} if method == "ia3" else {}
    peftcore.apply(model, method, target_modules=["0"], **more)
    assert torch.allclose(model(x), base, atol=1e-4)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_lora_reads_inputs_that_are_not_rounded() -> None:
    model = layer()
    peftcore.quantize(model, "8da4w")
    x = torch.randn(4, 64)
    base = model(x)
    peftcore.apply(model, "lora", target_modules=["0"], init_lora_weights=False)
    factors = {name.rpartition(".")[2]: p for name, p in model.named_parameters() if p.requires_grad}
    assert torch.allclose(model(x) - base, x @ factors["lora_A"].T @ factors["lora_B"].T, atol=1e-5)


def test_merging_into_the_format_is_refused_since_lora_reads_inputs_as_they_are() -> None:
    model = layer()
    peftcore.quantize(model, "8da4w")
    peftcore.apply(model, "lora", target_modules=["0"], init_lora_weights=False)
    for dtype in (None, torch.float32):
        with pytest.raises(peftcore.PeftcoreError, match=r"merging .* would change the model's output"):
            peftcore.merge(model, dtype=dtype, undo=True)


def test_dequantizing_ends_the_rounding_of_inputs() -> None:
    model = layer()
    peftcore.quantize(model, "8da4w")
    x, weight = torch.randn(4, 64), peftcore_8da4w.read(model[0])
    peftcore.dequantize(model)
    assert type(model[0]) is nn.Linear and "scales" not in model[0]._buffers
    assert torch.allclose(model(x), F.linear(x, weight, model[0].bias), atol=1e-6)


def test_groups_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(peftcore.PeftcoreError, match=r"'0' .*: 8da4w with groups of 256 .* found 64. .* 8da4w-g128"):
        peftcore.quantize(layer(), "8da4w-g256")


@pytest.mark.filterwarnings("ignore")  # of models and trainers
def test_an_adapter_trains_and_is_measured_over_8da4w(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(SPECIAL + WORDS), **sizes)).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"the {word}", "completion": "is good"} for word in WORDS])
    run, asked = tmp_path / "run", ("--quantize", "8da4w", "--dtype", "fp32")
    status, output = printed(
        *("train", "-m", tmp_path / "base", "-d", data, "-o", run, "--method", "lora", *asked),
        *("--steps", "4", "--lr", "0.01", "--eval-data", data),
    )
    assert status == 0, output
    after = json.loads((run / "result.json").read_text())["after"]["loss"]
    status, output = printed("eval", run, "-d", data)
    assert status == 0 and f"{after:.4f}" in output  # the rounded base with the adapter, as in training
    status, output = printed("eval", run, "-d", data, "--dtype", "fp32", "--quantize", "none")
    assert status == 0 and f"{after:.4f}" not in output
    status, output = printed("merge", run, "-o", tmp_path / "rounded")
    assert status == 1 and "--quantize none" in output
    status, output = printed("merge", run, "-o", tmp_path / "merged", "--quantize", "none")
    assert status == 0, output
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear
