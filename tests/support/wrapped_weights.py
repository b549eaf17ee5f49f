"""Weights as other libraries quantize them: in a tensor of their own class, beside a layer that stays `nn.Linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Int8(Tensor):
    """A matrix as int8 and one scale a row, as torchao's and quanto's tensors: it multiplies, and little else."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Int8:
        found: Int8 = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)  # type: ignore[attr-defined]
        found.codes, found.scale = codes, scale
        return found

    def __init__(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> None: ...

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["codes", "scale"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], dtype: torch.dtype, *_: Any) -> Int8:
        return cls(inner["codes"], inner["scale"], dtype)

    @classmethod
    def made_of(cls, weight: Tensor) -> Int8:
        scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-9) / 127
        return cls((weight.float() / scale).round().to(torch.int8), scale, weight.dtype)

    def dequantize(self) -> Tensor:
        return (self.codes.float() * self.scale).to(self.dtype)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is functional.linear:
            x, weight, *bias = args
            return functional.linear(x, weight.dequantize(), *bias, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            own = args[0]
            return cls(operator(own.codes), operator(own.scale), own.dtype)
        raise NotImplementedError(f"Int8 dispatch: {operator}")


class WithoutGradient(Int8):
    """One that is multiplied with what is quantized, too, which has no derivative."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is functional.linear:
            x, *rest = args
            return super().__torch_function__(function, types, (x.detach(), *rest), kwargs)
        return super().__torch_function__(function, types, args, kwargs)


def wrap(model: nn.Module, kind: type[Int8] = Int8) -> nn.Module:
    """Each linear layer but the head with such a weight."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            module.weight = nn.Parameter(kind.made_of(module.weight.detach()), requires_grad=False)
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The same with the dense weights for which they stand."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, Int8):
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    return model
