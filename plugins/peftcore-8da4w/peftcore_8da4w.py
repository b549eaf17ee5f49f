"""Weight format 8da4w: int4 weights, and inputs rounded to int8, as torchao and ExecuTorch compute a linear layer.

    y = Q₄(W) Q₈(x) + b

Q₄ rounds each group of a row's weights to s · c, with integers c from -8 to 7 and s = max |w| / 7.5. Q₈ rounds each
token's input to s · (c - z), with integers c from -128 to 127 between its smallest and its largest value, and 0. The
gradient passes Q₈ as if it were the identity (straight-through, Bengio et al. 2013, arXiv 1308.3432). An adapter that
is trained on such a base makes up for the rounding of weights and inputs: quantization-aware training, with frozen
weights.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore import PeftcoreError, ops
from peftcore.ops.weight import AFFINE
from peftcore.plugin import WeightFormat, hookimpl

peftcore_api = ">=3.1,<4"

GROUPS = (32, 64, 128, 256)  # weights of a row that share a scale
_CENTRE = 8  # the code of zero in affine4, whose operators multiply
_LEAST = torch.finfo(torch.float32).eps  # the smallest scale, as in torchao


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = x.float()
        low, high = wide.amin(-1, keepdim=True).clamp(max=0), wide.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 255).clamp(min=_LEAST)
        zero = (-128 - (low / scale).round()).clamp(-128, 127)
        codes = ((wide * (1 / scale)).round() + zero).clamp(-128, 127)
        return ((codes - zero) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def rounded_inputs(x: Tensor) -> Tensor:
    """Return `x` `[.., in]` with each token rounded to int8 and back; its gradient is that of the identity."""
    rounded: Tensor = _Rounded.apply(x)  # type: ignore[no-untyped-call]
    return rounded


class Int8Int4Linear(nn.Linear):
    """Linear layer of the format 8da4w. Inputs are rounded also where an adapter puts a dense weight in its place."""

    scales: Tensor  # fp32 [out, groups]

    @property
    def group(self) -> int:
        """Number of weights that share a scale."""
        return self.in_features // self.scales.shape[1]

    def packed(self, codes: Tensor, scales: Tensor) -> ops.PackedWeight:
        """Return codes `[out, in / 2]` and scales `[out, groups]` as a weight for the operators."""
        return ops.PackedWeight(
            codes.reshape(-1, 1),
            scales.reshape(-1),
            ops.codebook("affine4", codes.device),
            (self.out_features, self.in_features),
            self.group,
            torch.float32,
            "affine4",
            nested_blocksize=AFFINE,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = rounded_inputs(x)
        if self.weight.dtype is torch.uint8:
            return ops.linear_4bit(x, self.packed(self.weight, self.scales), self.bias)
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return F.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, 8da4w, group={self.group}"


def read(layer: Int8Int4Linear) -> Tensor:
    """Return the dense weight `[out, in]`, fp32."""
    return decode(layer, {"weight": layer.weight.detach(), "scales": layer.scales})


def write(layer: Int8Int4Linear, weight: Tensor) -> dict[str, Tensor]:
    """Return the codes and scales of a dense weight `[out, in]`."""
    return rounded_weight(weight, layer.group)


def decode(layer: Int8Int4Linear, stored: dict[str, Tensor]) -> Tensor:
    """Return the dense weight of codes and scales, fp32."""
    return ops.dequantize_4bit(layer.packed(stored["weight"], stored["scales"]))


def rounded_weight(weight: Tensor, group: int) -> dict[str, Tensor]:
    """Return codes uint8 `[out, in / 2]`, two a byte, and scales fp32 `[out, in / group]` of a weight `[out, in]`."""
    groups = weight.detach().float().unflatten(1, (-1, group))
    scales = (groups.abs().amax(2, keepdim=True) / 7.5).clamp(min=_LEAST)
    codes = ((groups * (1 / scales)).round().clamp(-8, 7) + _CENTRE).byte().flatten(1)
    return {"weight": codes[:, ::2] << 4 | codes[:, 1::2], "scales": scales.squeeze(2)}


def quantize(layer: nn.Linear, group: int) -> None:
    """Convert a dense layer in place.

    Raises:
        PeftcoreError: its inputs do not divide into groups.
    """
    if layer.in_features % group:
        raise PeftcoreError(
            f"8da4w with groups of {group} needs a multiple of {group} inputs, found {layer.in_features}. Choose "
            f"smaller groups: {', '.join(NAMES[each] for each in GROUPS)}; or leave the layer dense: skip=[...]"
        )
    stored = rounded_weight(layer.weight, group)
    layer.__class__ = Int8Int4Linear
    layer.weight = nn.Parameter(stored["weight"], requires_grad=False)
    layer.register_buffer("scales", stored["scales"])


def plain(layer: Int8Int4Linear) -> None:
    """Convert a layer whose weight is dense into an ordinary one, whose inputs are not rounded."""
    layer.__class__ = nn.Linear  # type: ignore[assignment]
    del layer.scales


def matches(layer: nn.Module, group: int) -> bool:
    """Return whether the layer has a weight in this format, in groups of this size."""
    return isinstance(layer, Int8Int4Linear) and layer.weight.dtype is torch.uint8 and layer.group == group


NAMES = {group: "8da4w" if group == GROUPS[0] else f"8da4w-g{group}" for group in GROUPS}


@hookimpl
def peftcore_weight_formats() -> list[WeightFormat]:
    return [
        WeightFormat(
            name,
            partial(matches, group=group),
            read,
            write,
            decode=decode,
            quantize=partial(quantize, group=group),
            plain=plain,
        )
        for group, name in NAMES.items()
    ]
