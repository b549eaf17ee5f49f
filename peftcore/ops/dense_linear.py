"""y = x Wᵀ + b of a dense W that is frozen: for few rows, which PyTorch multiplies slowly in bf16.

Decoding a token reads every weight once. PyTorch's product of bf16 does so at half the speed of memory; the kernel, for
up to 4 rows on CPUs with dot products of bf16, at that speed. Everything else is PyTorch's.

Without gradients: where x requires one, `F.linear` is to be called.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.ops._library import define_by, transformed
from peftcore.ops.weight import check_linear

_OPS = torch.ops.peftcore


@dataclass
class DenseLinear:
    x: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        check_linear(self.x, self.weight, self.bias, "dense_linear")

    def compute(self) -> Tensor:
        return F.linear(self.x, self.weight, self.bias)

    def empty(self) -> Tensor:
        return self.x.new_empty((*self.x.shape[:-1], self.weight.shape[0]))


define_by("dense_linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", DenseLinear)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, rounded once.

    Args:
        x: fp32, fp16 or bf16 `[..., in]`. weight: `[out, in]`, and bias `[out]`, of its dtype; neither gets a gradient.

    Returns:
        `[..., out]` in x's dtype, without a gradient for x.

    Raises:
        TypeError, ValueError: an argument that does not fit the others.
    """
    if transformed():
        return F.linear(x, weight, bias)
    result: Tensor = _OPS.dense_linear(x, weight, bias)
    return result
