"""One expert as a linear layer whose weight is a view of the stacked one, dense or in 4 bits."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import ops
from peftcore.experts.layout import experts_layout

_PATH = re.compile(r"(.+)\.(\d+)\.(\w+)")


def operand(module: nn.Module, name: str) -> Tensor | ops.PackedWeight:
    """Return a weight as operators take it: the parameter, or the packed weight of a quantized module."""
    packed = getattr(module, "packed_parameter", None)
    found = packed(name) if packed is not None else None
    return getattr(module, name) if found is None else found


def is_turned(weight: Tensor | ops.PackedWeight) -> bool:
    """Return whether the operand is the transpose of the parameter, of each expert."""
    return isinstance(weight, ops.PackedWeight) and weight.turned


def expert_path(path: str, name: str, expert: int) -> str:
    """Return the path of an expert's layer, as in a list of experts: `experts.3.down_proj` of `experts`."""
    return f"{path}.{expert}.{name}"


def split_expert_path(model: nn.Module, path: str) -> tuple[str, str, int] | None:
    """Return (path of the module of experts, name of the weight, expert) of an `expert_path`; None for other paths."""
    match = _PATH.fullmatch(path)
    if match is None:
        return None
    try:
        module = model.get_submodule(match[1])
    except AttributeError:
        return None
    layout = experts_layout(module)
    known = layout is not None and match[3] in layout.names and int(match[2]) < layout.count
    return (match[1], match[3], int(match[2])) if known else None


def expert_linear(module: nn.Module, name: str, expert: int) -> nn.Linear:
    """Return the layer of one expert of a module that has an `experts_layout`; each call makes a new one.

    Args:
        name: of the weight, one of the layout's `names`.
    """
    layout = experts_layout(module)
    assert layout is not None
    weight, bias = operand(module, name), None
    if layout.has_bias:
        bias = getattr(module, f"{name}_bias")[expert]
    if not isinstance(weight, Tensor):
        return PackedExpert(weight.expert(expert), bias, layout.transposed != weight.turned)
    own = weight[expert]
    return _linear(own.mT if layout.transposed else own, bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return an `nn.Linear` with these tensors, which need not be parameters."""
    layer = object.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = weight.shape
    tensors: Any = layer._parameters
    tensors.update(weight=weight, bias=bias)
    return layer


class PackedExpert(nn.Linear):
    """An expert in 4 bits. `weight` is dense and computed on each access; products use the packed weight.

    Args:
        packed: `[1, out, in]`; `transposed`: `[1, in, out]`.
        bias: `[out]`.
    """

    def __init__(self, packed: ops.PackedWeight, bias: Tensor | None, transposed: bool) -> None:
        nn.Module.__init__(self)
        self.packed, self.transposed = packed, transposed
        self.in_features, self.out_features = packed.shape[1:] if transposed else packed.shape[:0:-1]
        tensors: Any = self._parameters
        tensors["bias"] = bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # of nn.Linear an attribute
        """Dense weight `[out, in]` in fp32, or the value that was assigned."""
        given = self._parameters.get("weight")
        if given is not None:
            return given
        dense = ops.dequantize_4bit(self.packed, torch.float32)[0]
        return dense.mT if self.transposed else dense

    def forward(self, x: Tensor) -> Tensor:
        if self._parameters.get("weight") is not None:
            return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)
        rows = x.reshape(-1, x.shape[-1])
        offsets = torch.full((1,), len(rows), dtype=torch.int32, device=x.device)
        bias = None if self.bias is None else self.bias[None]
        y = ops.grouped_linear(rows, offsets, self.packed, bias, self.transposed)
        return y.view(*x.shape[:-1], y.shape[-1])

    def linear_operands(self, x: Tensor) -> tuple[ops.PackedWeight, Tensor | None] | None:
        """Return the operands that an adapter may multiply itself: see `peftcore.adaptation.adapted.Base`."""
        matrix = self.packed._replace(shape=tuple(self.packed.shape[1:]))
        return None if self.transposed else (matrix, self.bias)
