"""Adapters of any kind inside an encoder of PyTorch act in evaluation, too; without them the fused path is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor, nn

import peftcore
from peftcore.plugin import After

X = torch.randn(2, 4, 16)
PADDING = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoder(layer, 2)).eval()


class Grown(nn.Module):
    """y -> 1.5 y."""

    def forward(self, y: Tensor) -> Tensor:
        return 1.5 * y


def behind(path: str) -> Any:
    def place(model: nn.Module, config: Any, architecture: Any) -> list[Any]:
        return [After(path, Grown())]

    return place


def fused(model: nn.Module, x: Tensor = X) -> bool:
    """Does evaluation without gradients call none of the layers' parts?"""
    calls: list[str] = []
    for layer in model[1].layers:
        layer.__dict__["_ff_block"] = lambda x, layer=layer: calls.append("") or type(layer)._ff_block(layer, x)
    with torch.no_grad():
        model(x)
    for layer in model[1].layers:
        del layer.__dict__["_ff_block"]
    return not calls


@pytest.mark.parametrize(
    "path", ["1.layers.0.linear1", "1.layers.1.norm2", "1.layers.1.self_attn", "1.layers.0.dropout"]
)
def test_an_adapter_inside_acts(path: str) -> None:
    with tiny.installed(tiny.method("inside", behind(path))):
        model, base = peftcore.apply(encoder(), "inside"), encoder()
        wanted = model(X).detach()
        assert fused(base) and not fused(model)
        with torch.no_grad():
            torch.testing.assert_close(model(X), wanted)
            assert (base(X) - wanted).abs().max() > 1e-2
            with peftcore.disabled(model):
                torch.testing.assert_close(model(X), base(X))
            masked = model.train()(X)
            assert masked.shape == X.shape
        peftcore.remove(model)
        assert fused(model.eval()) and type(model[1].layers[0].activation_relu_or_gelu) is int


@pytest.mark.parametrize("part", ["linear1", "self_attn", "norm2"])
def test_a_part_that_is_adapted_alone_acts_in_what_holds_it(part: str) -> None:
    """`apply` is given the part, which knows nothing of the layer around it."""
    with tiny.installed(tiny.method("alone", behind(""))):
        model, base = encoder(), encoder()
        layer = model[1].layers[0]
        peftcore.apply(layer.get_submodule(part), "alone")
        wanted = model(X).detach()
        assert (base(X) - wanted).abs().max() > 1e-2
        assert not fused(model)
        with torch.no_grad():
            torch.testing.assert_close(model(X), wanted)
        peftcore.remove(layer.get_submodule(part))
        assert fused(model) and type(layer.activation_relu_or_gelu) is int


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_adapters_outside_leave_the_fused_path() -> None:
    with tiny.installed(tiny.method("outside", behind("0"))):
        model = peftcore.apply(encoder(), "outside")
        assert fused(model)
        with torch.no_grad():
            padded = model[1](model[0](X), src_key_padding_mask=PADDING)
        assert torch.equal(padded[0, 3], torch.zeros(16))  # what comes of nested tensors


def test_trained_parameters_are_read_by_the_fused_path() -> None:
    with tiny.installed(tiny.method("train", tiny.PLACES["train"])):
        model = peftcore.apply(encoder(), "train", names=("1.layers.0.linear1.weight",))
        with torch.no_grad():
            model[1].layers[0].linear1.weight.add_(0.3)
        wanted = model(X).detach()
        with torch.no_grad():
            torch.testing.assert_close(model(X), wanted)
