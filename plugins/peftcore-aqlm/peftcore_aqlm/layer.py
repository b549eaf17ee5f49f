"""Linear layer whose weight is stored as AQLM codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore import PeftcoreError

_CHUNK_VALUES = 1 << 22  # number of values that are dequantized at once in fp32, to bound temporary memory


def dequantize(codes: Tensor, codebooks: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the dense weight `[out, in]` in `dtype`, computed in fp32.

    Args:
        codes: int8 or int16 `[out / out_group, in / in_group, codebooks]`, modulo the size of a codebook.
        codebooks: `[codebooks, 2^bits, out_group, in_group]`.
        scales: `[out / out_group, 1, 1, 1]`.
        dtype: dtype of the result.
    """
    out_groups, in_groups, _ = codes.shape
    _, entries, out_group, in_group = codebooks.shape
    books = codebooks.flatten(2).unbind()
    dense = torch.empty(out_groups, out_group, in_groups * in_group, dtype=dtype, device=codes.device)
    step = max(1, _CHUNK_VALUES // (out_group * in_groups * in_group))
    for start in range(0, out_groups, step):
        rows = slice(start, start + step)
        indices = (codes[rows].long() & (entries - 1)).unbind(-1)  # the number of entries is a power of 2
        values = F.embedding(indices[0], books[0]).float()
        for index, book in zip(indices[1:], books[1:], strict=True):
            values += F.embedding(index, book)
        values = values.unflatten(-1, (out_group, in_group)) * scales[rows].float()
        dense[rows] = values.transpose(1, 2).flatten(2)
    return dense.flatten(0, 1)


class _AqlmProduct(torch.autograd.Function):
    """x Wᵀ + b. It saves the codes for backward instead of the dense weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, codebooks, scales)
        ctx.has_bias = bias is not None
        weight = dequantize(codes, codebooks, scales, x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, Tensor | None]:
        codes, codebooks, scales = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dequantize(codes, codebooks, scales, grad.dtype)
        if ctx.has_bias and ctx.needs_input_grad[4]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, None, None, None, grad_bias


class AqlmLinear(nn.Linear):
    """Linear layer with the codes as its `weight`, and buffers `codebooks` and `scales`.

    Merging with a dtype replaces the codes by a dense weight.
    """

    codebooks: Tensor  # [codebooks, 2^bits, out_group, in_group]
    scales: Tensor  # [out / out_group, 1, 1, 1]

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.is_floating_point():
            bias = None if self.bias is None else self.bias.to(self.weight.dtype)
            return F.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = _AqlmProduct.apply(x, self.weight, self.codebooks, self.scales, self.bias)  # type: ignore[no-untyped-call]
        return y

    def extra_repr(self) -> str:
        books, entries, out_group, in_group = self.codebooks.shape
        label = f"aqlm, {books}x{entries.bit_length() - 1}, blocks of {out_group} x {in_group}"
        return f"{super().extra_repr()}, {label}"


def has_codes(layer: nn.Module) -> bool:
    """Return whether the layer's weight is stored as AQLM codes."""
    if not isinstance(layer, AqlmLinear):
        return False
    weight = layer._parameters.get("weight")
    return weight is not None and not weight.is_floating_point()


def read(layer: AqlmLinear) -> Tensor:
    """Return the dense weight `[out, in]`, fp32."""
    return dequantize(layer.weight.detach(), layer.codebooks, layer.scales)


def write(layer: AqlmLinear, weight: Tensor) -> dict[str, Tensor]:
    """Raise a PeftcoreError: only AQLM's search over calibration data finds codes for new values."""
    raise PeftcoreError(
        "cannot merge into AQLM codes: only AQLM's own calibration finds codes for new values. Keep the adapter "
        "unmerged, merge into dense weights with peftcore.merge(model, dtype=torch.bfloat16), or call "
        "peftcore.dequantize(model) before apply"
    )


def decode(layer: AqlmLinear, tensors: dict[str, Tensor]) -> Tensor:
    """Return the dense weight `[out, in]` of stored tensors, fp32."""
    weight = tensors["weight"]
    return weight.float() if weight.is_floating_point() else dequantize(weight, layer.codebooks, layer.scales)


def to_linear(layer: AqlmLinear) -> None:
    """Convert a layer whose weight is dense again into an nn.Linear."""
    layer.__class__ = nn.Linear  # type: ignore[assignment]
    del layer.codebooks, layer.scales
