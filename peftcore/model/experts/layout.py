"""Layout of a module of experts, from transformers' experts interface (`use_experts_implementation`).

The decorator records the layout of the weights on every instance, and `config._experts_implementation` selects the
forward. One forward therefore works for all models with the interface (transformers 5, integrations/moe.py).

`expert_linear` makes a linear layer of one expert, whose weight is a view of the stacked weight, dense or 4-bit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import ops
from peftcore.plugin.layers import shape_of

# transformers' implementations, which all compute the same.
IMPLEMENTATIONS = {None, "eager", "grouped_mm", "batched_mm", "deepgemm", "sonicmoe"}
FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")


@dataclass(frozen=True)
class ExpertsLayout:
    """Layout of the weights of a module of experts.

    Args:
        count: number of experts.
        up: name of the parameter of the first product: `gate_up_proj`, or `up_proj` without a gate.
        down: name of the parameter of the second product.
        transposed: the parameters are `[experts, in, out]` instead of `[experts, out, in]`.
        interleaved: gate and up outputs alternate; otherwise all gate outputs come first.
        has_bias: the module has biases `<name>_bias` `[experts, out]`.
    """

    count: int
    up: str
    down: str
    transposed: bool
    interleaved: bool
    has_bias: bool

    @property
    def names(self) -> tuple[str, str]:
        """Names of the parameters in order of use."""
        return self.up, self.down

    def bias_name(self, name: str) -> str | None:
        return f"{name}_bias" if self.has_bias else None


def experts_layout(module: nn.Module) -> ExpertsLayout | None:
    """Return the layout of a module with the interface; None for any other module."""
    if not hasattr(module, "_is_expert_parallel"):
        return None
    flags: Any = {flag: getattr(module, flag, None) for flag in FLAGS}
    if not {*map(type, flags.values())} <= {bool}:
        return None
    up = "gate_up_proj" if flags["has_gate"] else "up_proj"
    weight = module._parameters.get(up)
    if weight is None or module._parameters.get("down_proj") is None:
        return None
    return ExpertsLayout(
        count=shape_of(module, up)[0],  # under expert parallelism, `num_experts` counts only this rank's experts
        up=up,
        down="down_proj",
        transposed=flags["is_transposed"],
        interleaved=not flags["is_concatenated"],
        has_bias=flags["has_bias"],
    )


def has_interface_forward(module: Any, forward: Any) -> bool:
    """Return whether the class's `forward` is the interface's. See `why_not_fused`."""
    return why_not_fused(module, forward) is None


def why_not_fused(module: Any, forward: Any) -> str | None:
    """Return the reason why `experts_forward` cannot replace the class's `forward`; None if it can.

    A subclass may override the forward, and `config._experts_implementation` may name a user's own implementation.
    """
    forward = getattr(forward, "over_dense", forward)  # set for 4-bit weights (`quantization.packed_experts`)
    # transformers' decorator, `use_experts_implementation`, defines the forward in this module.
    if getattr(forward, "__globals__", {}).get("__name__") != "transformers.integrations.moe":
        return "its forward is custom, not the one of transformers' experts interface"
    implementation = getattr(module.config, "_experts_implementation", None)
    return (
        None
        if implementation in IMPLEMENTATIONS
        else (f"_experts_implementation={implementation!r} is not one of transformers")
    )


def stacked_weights(module: nn.Module) -> tuple[str, ...]:
    """Return the names of parameters that stack the weights of a module's experts, dense or packed.

    With transformers' interface, the layout names them. Otherwise they are the three-dimensional parameters whose first
    dimension equals an attribute with the number of experts (Llama 4's `num_experts`).
    """
    layout = experts_layout(module)
    if layout is not None:
        return tuple(name for name in module._parameters if name in layout.names)
    if not module._parameters:
        return ()
    counts = set()
    for name, value in vars(module).items():
        if "expert" in name and type(value) is int and value > 1:
            counts.add(value)
    if not counts:
        return ()
    return tuple(
        name
        for name, parameter in module._parameters.items()
        if parameter is not None and (parameter.is_floating_point() or parameter.dtype is torch.uint8)
        if len(shape := shape_of(module, name)) == 3 and shape[0] in counts and min(shape[1:]) > 1
    )


def expert_biases(module: nn.Module) -> tuple[str, ...]:
    """Return the names of parameters that stack the biases of a module's experts, `[experts, out]`."""
    layout = experts_layout(module)
    return () if layout is None or not layout.has_bias else tuple(f"{name}_bias" for name in layout.names)


_PATH = re.compile(r"(.+)\.(\d+)\.(\w+)")


def operand(module: nn.Module, name: str) -> Tensor | ops.PackedWeight:
    """Return a weight as an operand of `ops`: the parameter, or the packed weight of a quantized module."""
    packed_parameter = getattr(module, "packed_parameter", None)
    packed_weight = packed_parameter(name) if packed_parameter is not None else None
    return getattr(module, name) if packed_weight is None else packed_weight


def is_operand_transposed(weight: Tensor | ops.PackedWeight) -> bool:
    """Return whether the operand stores each expert transposed relative to the parameter."""
    return isinstance(weight, ops.PackedWeight) and weight.turned


def expert_path(path: str, name: str, expert: int) -> str:
    """Return the path of a single expert as in a list of experts: `experts.3.down_proj`."""
    return f"{path}.{expert}.{name}"


def split_expert_path(model: nn.Module, path: str) -> tuple[str, str, int] | None:
    """Split an `expert_path` into (path of the module, name of the weight, expert index); None for other paths."""
    match = _PATH.fullmatch(path)
    if match is None:
        return None
    try:
        module = model.get_submodule(match[1])
    except AttributeError:
        return None
    layout = experts_layout(module)
    is_expert = layout is not None and match[3] in layout.names and int(match[2]) < layout.count
    return (match[1], match[3], int(match[2])) if is_expert else None


def expert_linear(module: nn.Module, name: str, expert: int) -> nn.Linear:
    """Return a new linear layer for one expert of a module that has an `experts_layout`.

    Args:
        module: module of experts.
        name: name of the weight, from the layout's `names`.
        expert: index of the expert.
    """
    layout = experts_layout(module)
    assert layout is not None
    weight, bias = operand(module, name), None
    if layout.has_bias:
        bias = getattr(module, f"{name}_bias")[expert]
    if not isinstance(weight, Tensor):
        return PackedExpert(weight.expert(expert), bias, layout.transposed != weight.turned)
    expert_weight = weight[expert]
    return _linear(expert_weight.mT if layout.transposed else expert_weight, bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return an `nn.Linear` with these tensors, which need not be parameters."""
    layer = object.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = weight.shape
    tensors: Any = layer._parameters
    tensors.update(weight=weight, bias=bias)
    return layer


class PackedExpert(nn.Linear):
    """A 4-bit expert. A packed `weight` is dequantized on each access; products use the packed data.

    Args:
        packed: `[1, out, in]`, or `[1, in, out]` if `transposed`.
        bias: `[out]`.
        transposed: see `packed`.
    """

    def __init__(self, packed: ops.PackedWeight, bias: Tensor | None, transposed: bool) -> None:
        nn.Module.__init__(self)
        self.packed, self.transposed = packed, transposed
        self.in_features, self.out_features = packed.shape[1:] if transposed else packed.shape[:0:-1]
        tensors: Any = self._parameters
        tensors["bias"] = bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # nn.Linear has it as an attribute
        """Dense weight `[out, in]` in fp32, or a value assigned to it."""
        assigned = self._parameters.get("weight")
        if assigned is not None:
            return assigned
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
        """Return the operands for adapters that compute the product themselves, see `peftcore.plugin.adapter.Base`."""
        matrix = self.packed._replace(shape=tuple(self.packed.shape[1:]))
        return None if self.transposed else (matrix, self.bias)
