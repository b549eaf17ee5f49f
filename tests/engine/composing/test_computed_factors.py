"""Products of which one factor is the adapter's own tensor and the other is computed from one are combined exactly."""

from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor, nn

import peftcore
from peftcore.plugin import Adapter, Architecture, Around, Method
from peftcore.plugin.adapter import LowRank


class Mixed(Adapter):
    """W + 2 exp(log_b) a, by its own a `[2, in]` and a computed b `[out, 2]`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.a = nn.Parameter(0.1 * torch.randn(2, inputs))
        self.log_b = nn.Parameter(0.1 * torch.randn(outputs, 2))

    def low_rank(self) -> list[LowRank]:
        return [LowRank(self.a, self.log_b.exp(), 2.0)]

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + 2 * self.log_b.exp() @ self.a, bias

    def forward(self, base: Any, x: Tensor) -> Tensor:
        return base(x) + 2 * x @ self.a.T @ self.log_b.exp().T


class Gated(Mixed):
    """The same with a gate for W, which is neutral at the first layer alone."""

    count = 0

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.gate = nn.Parameter(torch.tensor(1.0 + 0.5 * (Gated.count % 2)))
        Gated.count += 1

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return super().merged(weight * self.gate, bias)


def method_of(kind: type[Mixed]) -> Method:
    def place(model: nn.Module, config: Any, architecture: Architecture) -> list[Any]:
        layers = peftcore.model.targets.select(model, architecture, target_modules=config.target_modules)
        return [Around(path, kind(*peftcore.model.targets.sizes(layer))) for path, layer in layers.items()]

    return tiny.method("mixed", place)


def model_of(kind: type[Mixed]) -> nn.Module:
    """A model with an adapter 'mixed' and one 'lora' of random values."""
    torch.manual_seed(0)
    model = peftcore.apply(tiny.llama(), "mixed", adapter="mixed")
    return peftcore.apply(model, "lora", adapter="lora", r=3, target_modules=["q_proj"], init_lora_weights=False)


def test_cat_is_exact() -> None:
    with tiny.installed(method_of(Mixed)):
        model = model_of(Mixed)
        peftcore.combine(model, ["mixed", "lora"], adapter="sum", weights=[1.0, 1.0])
        wanted = tiny.logits(model)
        peftcore.activate(model, "sum")
        assert torch.allclose(tiny.logits(model), wanted, atol=1e-5)  # sums of float32 in another order
        assert peftcore.engine.applied(model, "sum").config.r == 5
        with peftcore.disabled(model):
            assert not torch.allclose(tiny.logits(model), wanted, atol=1e-2)


def test_what_is_more_than_the_product_is_refused_at_any_layer() -> None:
    with tiny.installed(method_of(Gated)):
        Gated.count = 0
        model = model_of(Gated)
        message = (
            r"'mixed' .* cannot be combined: .*layers\.1\.self_attn\.q_proj' is not just the product of its factors"
        )
        with pytest.raises(peftcore.PeftcoreError, match=message):
            peftcore.combine(model, ["mixed", "lora"], adapter="sum")
