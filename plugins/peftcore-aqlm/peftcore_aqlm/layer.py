"""Linear layer whose weight is codes of AQLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore import PeftcoreError

_AT_ONCE = 1 << 22  # number of weights that are dequantized at once in fp32


def dequantized(codes: Tensor, codebooks: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the dense weight `[out, in]` in `dtype`, computed in fp32.

    Args:
        codes: integers `[out / out_group, in / in_group, codebooks]`, modulo the size of a codebook.
        codebooks: `[codebooks, 2^bits, out_group, in_group]`.
        scales: `[out / out_group, 1, 1, 1]`.
        dtype: dtype of the result.
    """
    out_groups, in_groups, _ = codes.shape
    _, entries, out_group, in_group = codebooks.shape
    books = codebooks.flatten(2).unbind()
    dense = torch.empty(out_groups, out_group, in_groups * in_group, dtype=dtype, device=codes.device)
    step = max(1, _AT_ONCE // (out_group * in_groups * in_group))
    for start in range(0, out_groups, step):
        part = slice(start, start + step)
        indices = (codes[part].long() & (entries - 1)).unbind(-1)
        values = F.embedding(indices[0], books[0]).float()
        for index, book in zip(indices[1:], books[1:], strict=True):
            values += F.embedding(index, book)
        values = values.unflatten(-1, (out_group, in_group)) * scales[part].float()
        dense[part] = values.transpose(1, 2).flatten(2)
    return dense.flatten(0, 1)


class _Product(torch.autograd.Function):
    """x Wᵀ + b, which keeps the codes for backward and no dense weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, codebooks, scales)
        ctx.has_bias = bias is not None
        return F.linear(x, dequantized(codes, codebooks, scales, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, Tensor | None]:
        codes, codebooks, scales = ctx.saved_tensors
        by_x = grad @ dequantized(codes, codebooks, scales, grad.dtype) if ctx.needs_input_grad[0] else None
        by_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias and ctx.needs_input_grad[4] else None
        return by_x, None, None, None, by_bias


class AqlmLinear(nn.Linear):
    """Linear layer with the codes as its `weight`, and buffers `codebooks` and `scales`.

    Merging can put a dense weight in the codes' place.
    """

    codebooks: Tensor  # [codebooks, 2^bits, out_group, in_group]
    scales: Tensor  # [out / out_group, 1, 1, 1]

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.is_floating_point():
            bias = None if self.bias is None else self.bias.to(self.weight.dtype)
            return F.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        product: Tensor = _Product.apply(x, self.weight, self.codebooks, self.scales, self.bias)  # type: ignore[no-untyped-call]
        return product

    def extra_repr(self) -> str:
        books, entries, out_group, in_group = self.codebooks.shape
        kind = f"aqlm, {books}x{entries.bit_length() - 1}, blocks of {out_group} x {in_group}"
        return f"{super().extra_repr()}, {kind}"


def matches(layer: nn.Module) -> bool:
    """Return whether the layer has codes."""
    if not isinstance(layer, AqlmLinear):
        return False
    weight = layer._parameters.get("weight")
    return weight is not None and not weight.is_floating_point()


def read(layer: AqlmLinear) -> Tensor:
    """Return the dense weight `[out, in]`, fp32."""
    return dequantized(layer.weight.detach(), layer.codebooks, layer.scales)


def write(layer: AqlmLinear, weight: Tensor) -> dict[str, Tensor]:
    """Raise PeftcoreError: finding codes for other values takes AQLM's own search over calibration data."""
    raise PeftcoreError(
        "a weight in AQLM's codes cannot take merged values: only AQLM's own calibration finds codes for them. Keep "
        "the adapter unmerged, merge into dense weights with peftcore.merge(model, dtype=torch.bfloat16), or call "
        "peftcore.dequantize(model) before apply"
    )


def decode(layer: AqlmLinear, stored: dict[str, Tensor]) -> Tensor:
    """Return the dense weight of stored tensors, fp32."""
    weight = stored["weight"]
    return weight.float() if weight.is_floating_point() else dequantized(weight, layer.codebooks, layer.scales)


def plain(layer: AqlmLinear) -> None:
    """Convert a layer whose weight is dense into an ordinary one."""
    layer.__class__ = nn.Linear  # type: ignore[assignment]
    del layer.codebooks, layer.scales
