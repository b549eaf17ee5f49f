"""What DoRA computes: of stacks, 4 bits, dropout, rows of zeros; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.quantized import llama as wide_llama, logits as wide_logits
from torch import Tensor, nn

import peftcore
from peftcore import ops
from peftcore.plugin import disturb


def layer(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24, bias=bias)).to(dtype)


def moved(model: nn.Module, adapter: str = "default", seed: int = 1) -> Any:
    disturb(model, adapter, seed)
    return peftcore.engine.adapter_modules(model, adapter)


X = torch.linspace(-2, 2, 5 * 16).sin().view(5, 16)


def product(weight: Tensor, dora: Any) -> Tensor:
    """m (W + scale · B A) / n in float64."""
    weight = weight.double() + dora.lora.scale * dora.lora.lora_B.double() @ dora.lora.lora_A.double()
    return weight * (dora.lora_magnitude_vector.double() / weight.norm(dim=1))[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_formula(dtype: torch.dtype, bias: bool) -> None:
    model = peftcore.apply(layer(bias, dtype), "dora", target_modules=["0"], r=4)
    base = layer(bias, dtype)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(model(X.to(dtype)), base(X.to(dtype)), rtol=tolerance, atol=tolerance)
    ((_, dora),) = moved(model)
    expected = X.to(dtype).double() @ product(base[0].weight, dora).T
    expected = expected if base[0].bias is None else expected + base[0].bias.double()
    torch.testing.assert_close(model(X.to(dtype)).double(), expected, rtol=tolerance, atol=tolerance)


def test_gradients_take_the_norms_for_constants() -> None:
    model = peftcore.apply(layer(dtype=torch.float64), "dora", target_modules=["0"], r=4)
    ((_, dora),) = moved(model)
    x = X.double().requires_grad_()
    model(x).square().sum().backward()
    arguments = x, dora.lora.lora_A, dora.lora.lora_B, dora.lora_magnitude_vector
    inputs, a, b, m = (t.detach().clone().requires_grad_() for t in arguments)
    change = model[0].weight.detach() + dora.lora.scale * b @ a
    y = inputs @ (change * (m / change.detach().norm(dim=1))[:, None]).T + model[0].bias.detach()
    y.square().sum().backward()
    for actual, expected in zip(arguments, (inputs, a, b, m), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-9, atol=1e-9)


def test_dropout_is_of_what_a_reads() -> None:
    """And of nothing else: y = m/n (W x + scale · B A drop(x)) + bias."""
    model = peftcore.apply(layer(), "dora", target_modules=["0"], r=4, lora_dropout=0.5)
    ((_, dora),) = moved(model.train())
    torch.manual_seed(3)
    actual = model(X)
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, ())
    x = X * ops.keep_mask(5, 16, 0.5, seed) * 2
    weight, bias = model[0].weight, model[0].bias
    u = X @ weight.T + dora.lora.scale * x @ dora.lora.lora_A.T @ dora.lora.lora_B.T
    n = (weight + dora.lora.delta()).norm(dim=1)
    torch.testing.assert_close(actual, u * (dora.lora_magnitude_vector / n) + bias)


@pytest.mark.parametrize("order", [["other", "dora"], ["dora", "other"]])
@pytest.mark.parametrize("method", ["lora", "ia3", "dora"])
def test_a_stack_is_one_weight(method: str, order: list[str]) -> None:
    fields = {"lora": {"r": 3}, "dora": {"r": 3}, "ia3": {"feedforward_modules": []}}[method]
    model, base = layer(), layer()
    stacked = base(X)
    for name in order:
        chosen = {"r": 4} if name == "dora" else fields
        peftcore.apply(model, "dora" if name == "dora" else method, target_modules=["0"], adapter=name, **chosen)
        torch.testing.assert_close(model(X), stacked, rtol=0, atol=1e-5)  # whatever stands inside
        moved(model, name, len(name))
        stacked = model(X)
    merged = peftcore.merge(model, undo=True)(X)
    torch.testing.assert_close(merged, stacked, rtol=0, atol=1e-5)
    assert (merged - base(X)).abs().max() > 1e-2
    peftcore.unmerge(model)
    assert torch.equal(model(X), stacked)
    for name in order:
        peftcore.remove(model, name)
    assert torch.equal(model(X), base(X))


def test_on_four_bits() -> None:
    packed = peftcore.quantize(wide_llama())
    dense = peftcore.dequantize(peftcore.quantize(wide_llama()))
    for model in (packed, dense):
        torch.manual_seed(0)
        peftcore.apply(model, "dora", r=4, target_modules=["q_proj", "up_proj"])
        disturb(model, "default", 1)
    torch.testing.assert_close(wide_logits(packed), wide_logits(dense), rtol=0, atol=1e-5)


def test_resting_and_samples_of_their_own() -> None:
    model, base = tiny.llama(), tiny.logits(tiny.llama())
    for seed, name in enumerate(("a", "b")):
        peftcore.apply(model, "dora", r=2, adapter=name)
        disturb(model, name, seed)
    alone = []
    for name in ("a", "b"):
        peftcore.activate(model, name)
        alone.append(tiny.logits(model))
    peftcore.activate(model, ["b", None], per_sample=True)
    together = tiny.logits(model)
    torch.testing.assert_close(together[0], alone[1][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(together[1], base[1], rtol=0, atol=1e-5)
    peftcore.activate(model, [])
    assert torch.equal(tiny.logits(model), base)


def test_a_row_of_zeros_stays_one() -> None:
    model = layer()
    with torch.no_grad():
        model[0].weight[3] = 0
    peftcore.apply(model, "dora", target_modules=["0"], r=4)
    y = model(X)
    y.square().sum().backward()
    assert (y[:, 3] == model[0].bias[3]).all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_files_name_their_method(tmp_path: Path) -> None:
    for method in ("lora", "dora"):
        model = peftcore.apply(tiny.llama(), method, r=2)
        disturb(model, "default", 1)
        peftcore.save(model, tmp_path / method)
        reloaded = peftcore.load(tiny.llama(), tmp_path / method)
        assert peftcore.engine.applied(reloaded, "default").method == method
        assert torch.equal(tiny.logits(reloaded), tiny.logits(model))
    fields = json.loads((tmp_path / "dora/adapter_config.json").read_text())
    assert fields["peft_type"] == "LORA" and fields["use_dora"] is True


def test_a_config_of_peft_says_so() -> None:
    import peft

    model = peftcore.apply(tiny.llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    assert peftcore.engine.applied(model, "default").method == "dora"
    with pytest.raises(peftcore.PeftcoreError, match="no field 'use_dora'"):
        peftcore.apply(tiny.llama(), "lora", use_dora=True)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2)
        self.conv = nn.Conv1d(4, 4, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x)[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["mha"]}, r"DoRA cannot adapt 'mha'.*exclude_modules=\['mha'\]"),
        (
            {"target_modules": ["conv"]},
            r"DoRA cannot adapt 'conv', a grouped.*PEFT divides .*exclude_modules=\['conv'\]",
        ),
        ({"target_modules": ["conv"], "lora_bias": True}, "lora_bias=True is not supported with DoRA. Leave it out"),
        ({"r": 0}, "r must be a positive whole number"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    model = Attention()
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.apply(model, "dora", **{"r": 2, **fields})
    assert all(p.requires_grad for p in model.parameters())


def test_data_says_nothing_of_the_magnitudes() -> None:
    """`train` gives its examples to every method with first values."""
    models = []
    for batches in (None, [{"input_ids": tiny.TOKENS}]):
        torch.manual_seed(0)
        models.append(peftcore.apply(tiny.llama(), "dora", r=2, batches=batches))
    assert torch.equal(tiny.logits(models[0]), tiny.logits(models[1]))
