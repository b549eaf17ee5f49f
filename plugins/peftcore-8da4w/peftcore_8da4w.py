"""Weight format 8da4w: int4 weights and inputs rounded to int8, as in the linear layers of torchao and ExecuTorch.

    y = Q₄(W) Q₈(x) + b

Q₄ rounds each group of weights in a row to s · c, with integers c from -8 to 7 and s = max |w| / 7.5. Q₈ rounds the
input of each token to s · (c - z), with integers c from -128 to 127 that span its values and 0. The gradient treats Q₈
as the identity (straight-through, Bengio et al. 2013, arXiv 1308.3432). An adapter trained on such a base learns to
compensate for the rounding: quantization-aware training with frozen weights.
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
_ZERO_CODE = 8  # code of the value 0 in affine4, whose operators compute the products
_MIN_SCALE = torch.finfo(torch.float32).eps  # as in torchao


class _RoundInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x_fp32 = x.float()
        low, high = x_fp32.amin(-1, keepdim=True).clamp(max=0), x_fp32.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 255).clamp(min=_MIN_SCALE)
        zero = (-128 - (low / scale).round()).clamp(-128, 127)
        # torchao multiplies by the reciprocal, whose rounding differs from a division's.
        codes = ((x_fp32 * (1 / scale)).round() + zero).clamp(-128, 127)
        return ((codes - zero) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def round_inputs(x: Tensor) -> Tensor:
    """Round each token of `x` `[..., in]` to int8 and back; the gradient passes unchanged."""
    y: Tensor = _RoundInputs.apply(x)  # type: ignore[no-untyped-call]
    return y


class Int8Int4Linear(nn.Linear):
    """Linear layer of the format 8da4w. It also rounds inputs while an adapter replaces its weight by a dense one."""

    scales: Tensor  # fp32 [out, groups]

    @property
    def group(self) -> int:
        """Number of weights that share a scale."""
        return self.in_features // self.scales.shape[1]

    def pack(self, codes: Tensor, scales: Tensor) -> ops.PackedWeight:
        """Return codes `[out, in / 2]` and scales `[out, groups]` as an affine4 weight, which operators accept."""
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
        x = round_inputs(x)
        if self.weight.dtype is torch.uint8:
            return ops.linear_4bit(x, self.pack(self.weight, self.scales), self.bias)
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return F.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, 8da4w, group={self.group}"


def read(layer: Int8Int4Linear) -> Tensor:
    """Return the dense weight `[out, in]`, fp32."""
    return decode(layer, {"weight": layer.weight.detach(), "scales": layer.scales})


def write(layer: Int8Int4Linear, weight: Tensor) -> dict[str, Tensor]:
    """Round a dense weight `[out, in]` to the layer's codes and scales."""
    return round_weight(weight, layer.group)


def decode(layer: Int8Int4Linear, tensors: dict[str, Tensor]) -> Tensor:
    """Return the dense weight `[out, in]` of codes and scales, fp32."""
    return ops.dequantize_4bit(layer.pack(tensors["weight"], tensors["scales"]))


def round_weight(weight: Tensor, group: int) -> dict[str, Tensor]:
    """Round a weight `[out, in]` to codes, uint8 `[out, in / 2]` (two a byte), and scales, fp32 `[out, in / group]`."""
    groups = weight.detach().float().unflatten(1, (-1, group))
    scales = (groups.abs().amax(2, keepdim=True) / 7.5).clamp(min=_MIN_SCALE)
    codes = ((groups * (1 / scales)).round().clamp(-8, 7) + _ZERO_CODE).byte().flatten(1)
    return {"weight": codes[:, ::2] << 4 | codes[:, 1::2], "scales": scales.squeeze(2)}


def quantize(layer: nn.Linear, group: int) -> None:
    """Convert a dense layer in place.

    Raises:
        PeftcoreError: the number of inputs is not a multiple of `group`.
    """
    if layer.in_features % group:
        raise PeftcoreError(
            f"8da4w with groups of {group} needs a multiple of {group} inputs, found {layer.in_features}. Choose "
            f"smaller groups ({', '.join(NAMES.values())}), or leave the layer dense: skip=[...]"
        )
    tensors = round_weight(layer.weight, group)
    layer.__class__ = Int8Int4Linear
    layer.weight = nn.Parameter(tensors["weight"], requires_grad=False)
    layer.register_buffer("scales", tensors["scales"])


def to_linear(layer: Int8Int4Linear) -> None:
    """Convert a layer whose weight is dense again into an nn.Linear, which does not round its inputs."""
    layer.__class__ = nn.Linear  # type: ignore[assignment]
    del layer.scales


def matches(layer: nn.Module, group: int) -> bool:
    """Return whether the layer's weight is in this format with groups of this size."""
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
            plain=to_linear,
        )
        for group, name in NAMES.items()
    ]
