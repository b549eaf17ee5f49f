"""GPTQ's rounding: its formula, the order of layers, shared and unused layers, and models after an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.mixtures import INPUTS as EXPERTS_INPUTS, mixture
from support.quantized import INPUTS, llama
from support.tiny import gpt2
from torch import Tensor, nn

import peftcore
from peftcore.ops import quantize_affine4
from peftcore.quantization import QuantizedLinear, quantized_layers
from peftcore.quantization.gptq import inverse_factor, round_weight


def correlated(rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)
    return torch.randn(rows, width, generator=generator) @ mixed


def plainly(weight: Tensor, x: Tensor, blocksize: int) -> Tensor:
    """Return the rounded weight in float64: an inverse for each column instead of one Cholesky factor."""
    w, out = weight.double(), torch.empty(weight.shape, dtype=torch.float64)
    h = x.double().T @ x.double()
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    for i in range(w.shape[1]):
        if i % blocksize == 0:
            found = quantize_affine4(w[:, i : i + blocksize].float(), blocksize)
            scale, zero = found.absmax.double(), found.zeros.double()  # type: ignore[union-attr]
        out[:, i] = scale * (((w[:, i] / scale).round() + zero).clamp(0, 15) - zero)
        inverse = torch.linalg.inv(h[i:, i:])
        w[:, i:] -= ((w[:, i] - out[:, i]) / inverse[0, 0])[:, None] * inverse[0]
    return out


@pytest.mark.parametrize(("width", "blocksize"), [(96, 32), (256, 256)])
def test_the_formula(width: int, blocksize: int) -> None:
    x, weight = correlated(400, width), torch.randn(24, width, generator=torch.Generator().manual_seed(1))
    packed = round_weight(weight, inverse_factor(x.double().T @ x.double()), blocksize)
    assert packed.blocksize == blocksize and packed.dtype is torch.float32 and packed.absmax.dtype is torch.bfloat16
    found, expected = peftcore.ops.dequantize_4bit(packed).double(), plainly(weight, x, blocksize)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    nearest = peftcore.ops.dequantize_4bit(quantize_affine4(weight, blocksize)).double()
    wrong = [((each - weight.double()) @ x.double().T).norm() for each in (found, nearest)]
    assert wrong[0] < 0.7 * wrong[1]


def test_inputs_that_are_always_zero_are_rounded_to_nearest() -> None:
    x, weight = correlated(200, 64), torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    x[:, 32:] = 0
    packed = round_weight(weight, inverse_factor(x.double().T @ x.double()), 32)
    nearest = peftcore.ops.dequantize_4bit(quantize_affine4(weight, 32))
    assert torch.equal(peftcore.ops.dequantize_4bit(packed)[:, 32:], nearest[:, 32:])


def test_each_layer_has_the_inputs_of_the_quantized_ones_before_it() -> None:
    model, dense = llama(num_hidden_layers=1), llama(num_hidden_layers=1)
    batches = [{"input_ids": torch.arange(3, 67).view(2, 32) % 90, "attention_mask": torch.ones(2, 32)} for _ in "ab"]
    batches[1]["attention_mask"] = torch.ones(2, 32).tril(20)
    peftcore.quantize(model, "affine4", blocksize=32, batches=iter(batches))
    assert len(list(quantized_layers(model))) == 7
    for path, layer in quantized_layers(model):
        inputs: list[Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _m, args, inputs=inputs: inputs.append(args[0]))
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        hook.remove()
        rows = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(inputs, batches, strict=True)]).float()
        upper = inverse_factor(rows.T.double() @ rows.double())
        expected = round_weight(dense.get_submodule(path).weight.detach(), upper, 32)
        differ = (layer.packed.codes != expected.codes).float().mean()
        assert differ < 0.01, path  # sums of another order, at ties


def test_inputs_that_are_always_zero_do_not_matter() -> None:
    assert torch.equal(inverse_factor(torch.zeros(3, 3).double()).count_nonzero(), torch.tensor(3))


def test_shared_unused_and_conv1d_layers() -> None:
    torch.manual_seed(0)
    twice, unused = nn.Linear(32, 32), nn.Linear(32, 32)
    shared = nn.Linear(32, 32)
    shared.weight = twice.weight

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.shared, self.unused = twice, shared, unused

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.twice(self.twice(x)).relu())  # type: ignore[no-any-return]

    expected = quantize_affine4(unused.weight.detach(), 32)
    with pytest.warns(UserWarning, match=r"1 weights \('unused'\) are rounded to nearest .* no batch reaches them"):
        model = peftcore.quantize(Model(), "affine4", blocksize=32, batches=[torch.randn(8, 32)])
    first, second, third = (model.get_submodule(name) for name in ("twice", "shared", "unused"))
    assert first.weight is second.weight and torch.equal(third.packed.codes, expected.codes)  # type: ignore[union-attr]
    torch.testing.assert_close(first.packed.absmax, second.packed.absmax)  # type: ignore[union-attr]
    small = gpt2()
    before = small(**INPUTS).logits
    peftcore.quantize(small, "affine4", blocksize=32, batches=[INPUTS])
    assert all(isinstance(block.mlp.c_fc, QuantizedLinear) for block in small.transformer.h)
    assert (small(**INPUTS).logits - before).abs().max() < 0.2 * before.abs().max()


def test_experts_are_rounded_to_nearest() -> None:
    model = mixture("mixtral", num_hidden_layers=1)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    expected = quantize_affine4(experts.down_proj.detach(), 32)  # type: ignore[arg-type, operator]
    with pytest.warns(UserWarning, match=r"2 weights \('.*gate_up_proj'\) are rounded .* weights of experts"):
        peftcore.quantize(model, "affine4", blocksize=32, batches=[EXPERTS_INPUTS])
    assert torch.equal(experts.down_proj, expected.codes)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_an_interruption_the_same_call_rounds_the_rest(error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, uninterrupted = llama(num_hidden_layers=1).train(), llama(num_hidden_layers=1)
    uninterrupted.load_state_dict(model.state_dict())
    calls = []

    def stop(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:
            raise error
        return round_weight(*args)

    monkeypatch.setattr("peftcore.quantization.gptq.round_weight", stop)
    with pytest.raises(error):
        peftcore.quantize(model, "affine4", blocksize=32, batches=[INPUTS])
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 4
    assert model(**INPUTS).logits.isfinite().all()
    for each in (model, uninterrupted):
        peftcore.quantize(each, "affine4", blocksize=32, batches=[INPUTS])
    expected = uninterrupted.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_asked_for_wrongly() -> None:
    with pytest.raises(
        peftcore.PeftcoreError, match="batches only work with quant_type='affine4', found quant_type='nf4'"
    ):
        peftcore.quantize(llama(), "nf4", batches=[INPUTS])
    with pytest.raises(peftcore.PeftcoreError, match="`batches` is empty"):
        peftcore.quantize(llama(), "affine4", blocksize=32, batches=[])
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(peftcore.PeftcoreError, match="'0' cannot be rounded by GPTQ: the inputs are not finite"):
        peftcore.quantize(model, "affine4", blocksize=32, batches=[torch.full((2, 32), float("nan"))])
    assert type(model[0]) is nn.Linear
