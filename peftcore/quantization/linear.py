"""A linear layer whose weight is kept in 4 bits: y = x Wᵀ + b, W dequantized on the way (`ops.linear_4bit`).

An `nn.Linear` whose `weight` is a frozen uint8 parameter `[ceil(out · in / 2), 1]`; scales and codebooks are buffers.
`state_dict()` has bitsandbytes' keys (see format.py). Casts of the module (`.to(dtype)`, `.half()`) change the bias
and leave the quantized weight as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore import ops
from peftcore.errors import CheckpointError, PeftcoreError
from peftcore.ops import PackedWeight
from peftcore.quantization.format import PARTS, from_tensors, to_tensors

BUFFERS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "nested_offset")


class QuantizedLinear(nn.Linear):
    """See the module. Made from a dense layer by `peftcore.quantize`, or empty, to be filled by `load_state_dict`.

    Args:
        compute_dtype: of the product; the input is cast to it and the output back. None: the input's.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype = compute_dtype
        weight = torch.zeros(out_features, in_features, device=device, dtype=dtype)
        self.bias: nn.Parameter | None  # type: ignore[assignment]  # as in nn.Linear, which does not say so
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.set_packed(ops.quantize_4bit(weight, quant_type, blocksize=blocksize, double_quant=double_quant))

    @property
    def is_quantized(self) -> bool:
        """False where merging has put a dense weight in."""
        return self.weight.dtype is torch.uint8

    @property
    def packed(self) -> PackedWeight:
        """The weight in 4 bits, where it lies."""
        # Past `nn.Module.__getattr__`, which costs more than what is called with them.
        parameters: dict[str, Any] = self._parameters
        buffers: dict[str, Any] = self._buffers
        return PackedWeight(
            parameters["weight"],
            buffers["absmax"],
            buffers["quant_map"],
            (self.out_features, self.in_features),
            self.blocksize,
            self.weight_dtype,
            self.quant_type,
            buffers["nested_absmax"],
            buffers["nested_quant_map"],
            buffers["nested_offset"],
            self.nested_blocksize,
        )

    def set_packed(self, weight: PackedWeight) -> None:
        """Take another weight of the layer's shape."""
        self.quant_type, self.blocksize, self.weight_dtype = weight.quant_type, weight.blocksize, weight.dtype
        self.nested_blocksize = weight.nested_blocksize
        held = self._parameters.get("weight")
        if held is not None and held.dtype is torch.uint8 and not held.is_meta:
            if held is not weight.codes:
                held.data = weight.codes
        else:
            self.weight = nn.Parameter(weight.codes, requires_grad=False)
        for name in BUFFERS:
            self.register_buffer(name, getattr(weight, name))

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight `[out, in]`, by default in the dtype that it had."""
        return ops.dequantize_4bit(self.packed, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_quantized:
            bias = self.bias if self.bias is None else self.bias.to(self.weight.dtype)
            return F.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)
        dtype = self.compute_dtype
        if dtype is None or dtype is x.dtype:
            return ops.linear_4bit(x, self.packed, self.bias)
        return ops.linear_4bit(x.to(dtype), self.packed, self.bias).to(x.dtype)

    def linear_operands(self, x: Tensor) -> tuple[PackedWeight, Tensor | None] | None:
        """What an adapter may multiply by itself: see `peftcore.adaptation.adapted.Base`."""
        weight: Any = self._parameters["weight"]
        if weight.dtype is not torch.uint8 or self.compute_dtype not in (None, x.dtype):
            return None
        return self.packed, self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # A cast to half precision would round the scales, and `type(dtype)` read bytes as numbers.
        kept = {id(self._buffers.get(name)) for name in BUFFERS} | ({id(self.weight)} if self.is_quantized else set())
        apply: Any = super()._apply
        return apply(lambda t: _moved(t, fn) if id(t) in kept else fn(t), recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, parameter in self._parameters.items():
            if parameter is not None:
                destination[prefix + name] = parameter if keep_vars else parameter.detach()
        if self.is_quantized and not self.weight.is_meta:
            for part, tensor in to_tensors(self.packed).items():
                destination[f"{prefix}weight.{part}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = f"{prefix}weight"
        # `set_model_state_dict` of torch.distributed.checkpoint adds the buffers themselves.
        own = {prefix + key for key in BUFFERS if state_dict.get(prefix + key, 0) is self._buffers.get(key)}
        parts = {part: state_dict[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in state_dict}
        if name in state_dict:
            try:
                self._load_weight(state_dict[name], parts, name)
            except (PeftcoreError, TypeError, ValueError) as error:
                error_msgs.append(str(error))
        elif strict:
            missing_keys.append(name)
        held = {key: self._buffers.pop(key) for key in BUFFERS if key in self._buffers}
        taken = {name, *(f"{name}.{part}" for part in parts), *own}
        rest = {key: value for key, value in state_dict.items() if key not in taken}
        weight = self._parameters.pop("weight")
        try:
            arguments = (rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
            super()._load_from_state_dict(*arguments)
        finally:
            self._buffers.update(held)
            self._parameters = {"weight": weight, **self._parameters}

    def _load_weight(self, weight: Tensor, parts: dict[str, Tensor], name: str) -> None:
        shape = (self.out_features, self.in_features)
        device = weight.device if self.weight.is_meta else self.weight.device
        if not parts and weight.is_floating_point():
            if tuple(weight.shape) != shape:
                raise PeftcoreError(f"'{name}' has shape {list(weight.shape)}, this layer {list(shape)}")
            refuse_non_finite(weight, name)
            packed = self.quantized(weight.to(device))
        else:
            packed = from_tensors(weight, parts, name)
            check_shape(packed, shape, name)
            packed = packed._replace(codes=packed.codes.to(device, copy=True))
        self.set_packed(packed.to(device))

    def quantized(self, weight: Tensor) -> PackedWeight:
        """A dense weight in 4 bits, as this layer keeps its own."""
        double_quant = self.nested_absmax is not None
        return ops.quantize_4bit(weight, self.quant_type, blocksize=self.blocksize, double_quant=double_quant)

    def _fqn_modifiers(self) -> dict[str, str]:
        """What torch.distributed.checkpoint asks: where it finds what a key such as `weight.absmax` names."""
        return {"weight": "_any_path"}

    @property
    def _any_path(self) -> _AnyPath:
        return _AnyPath()

    def extra_repr(self) -> str:
        kept = self.quant_type if self.is_quantized else "dense"
        double = ", double_quant" if self.nested_absmax is not None else ""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{text}, {kept}, blocksize={self.blocksize}{double}"


class _AnyPath:
    """It has every attribute, as keys below `weight` have no modules behind them."""

    def __getattr__(self, name: str) -> _AnyPath:
        if name.startswith("_"):
            raise AttributeError(name)
        return self


def check_shape(weight: PackedWeight, shape: tuple[int, ...], name: str) -> None:
    """Raise a CheckpointError unless the weight `name` has this shape."""
    if weight.shape != shape:
        raise CheckpointError(f"'{name}' has shape {list(weight.shape)}, this layer {list(shape)}")


def refuse_non_finite(weight: Tensor, name: str) -> None:
    """Raise a PeftcoreError that names the first value of `weight` that is NaN or infinite."""
    if weight.numel() and not all(bound.isfinite() for bound in torch.aminmax(weight)):
        index = (~weight.isfinite()).nonzero()[0].tolist()
        raise PeftcoreError(
            f"'{name}' holds {weight[tuple(index)].item()} at index {index}: a block with it cannot be quantized. "
            "Repair the weight, or leave the layer dense: skip=[...]"
        )


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """`fn`, which moves or casts, on the bytes of `tensor`; where it changes their dtype, only the move is kept."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    found = fn(flat)
    if found is flat:
        return tensor
    if found.dtype is not torch.uint8 or found.shape != flat.shape:
        return tensor.to(found.device)
    return found.view(tensor.dtype).view(tensor.shape)
