"""The suite finds faults that are planted in a method, and does not blame a method for its base."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import peftcore
from peftcore.testing import CHECKS, Report, check_method

COMPILE = "torch.compile(fullgraph=True)"


class BreaksTheGraph(tiny.Scaled):
    def forward(self, base: Any, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(base, x)


class MergesWrong(tiny.Scaled):
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.gain * weight + 0.01, bias


class ForgetsAPart(tiny.Scaled):
    """Its second factor is drawn anew, and not saved."""

    def __init__(self, value: float) -> None:
        super().__init__(value)
        self.register_buffer("drawn", torch.rand(()), persistent=False)

    def forward(self, base: Any, x: Tensor) -> Tensor:
        return super().forward(base, x) * (1 + self.drawn)


class MovesTheBase(tiny.Scaled):
    def forward(self, base: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            base.module.weight.mul_(1.001)
        return super().forward(base, x)


def check(adapter: type[nn.Module], only: str, make_model: Any = tiny.llama) -> Report:
    def place(model: nn.Module, config: Any, architecture: peftcore.Architecture) -> list[Any]:
        return [peftcore.Around(path, adapter(config.value)) for path in tiny._paths(model, config, architecture)]

    assert only in CHECKS
    others = {name: "not asked here" for name in CHECKS if name != only}
    method = tiny.method("faulty", place)
    with tiny.installed(method):
        return check_method(method.config_class(), make_model=make_model, not_applicable=others)


def broken_llama() -> nn.Module:
    """Its own layers do not compile as one graph."""
    model = tiny.llama()
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    return model


@pytest.mark.parametrize(
    ("adapter", "name"),
    [
        (BreaksTheGraph, COMPILE),
        (MergesWrong, "merge equals forward, unmerge is bit exact"),
        (ForgetsAPart, "save and load are bit exact"),
        (MovesTheBase, "base untouched by training"),
    ],
)
def test_a_fault_is_found(adapter: type[nn.Module], name: str) -> None:
    check(tiny.Scaled, name)
    with pytest.raises(AssertionError, match="FAILED"):
        check(adapter, name)


def test_a_base_that_does_not_compile_is_no_fault_of_the_method() -> None:
    report = check(tiny.Scaled, COMPILE, broken_llama)
    (result,) = [result for result in report.results if result.name == COMPILE]
    assert result.reason == "the model without adapters does not compile as one graph here"
