"""y = x Wᵀ + bias + Sᵢ Bᵢᵀ with Sᵢ = scaleᵢ x Aᵢᵀ, where i is the adapter of each sample of x (see lora.py).

One operator serves several adapters at once, as in Punica (arXiv 2310.18547). It has no gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.ops._library import define_by
from peftcore.ops.calling import frozen_operands, permute_inputs
from peftcore.ops.lora import check_factors, frozen_linear, wide_dtype
from peftcore.ops.weight import PackedWeight, check_linear, check_tensor, require, weight_from_operands

_OP = "lora_linear_per_sample"


@dataclass
class LoraLinearPerSample:
    x: Tensor
    weight: Sequence[Tensor]
    packing: Sequence[int]
    bias: Tensor | None
    a: Sequence[Tensor]
    b: Sequence[Tensor]
    scales: Sequence[float]
    index: Tensor

    def __post_init__(self) -> None:
        x, a, b, index = self.x, self.a, self.b, self.index
        frozen = weight_from_operands(self.weight, self.packing, _OP)
        check_linear(x, frozen, self.bias, _OP)
        self.out_features = frozen.shape[0]
        require(x.dim() > 1, _OP, f"x must be [samples, .., in], found {list(x.shape)}")
        sizes = f"{len(a)}, {len(b)} and {len(self.scales)}"
        same_length = len(a) == len(b) == len(self.scales)
        require(same_length, _OP, f"a, b and scales must be of one length, found {sizes}")
        for i, factors in enumerate(zip(a, b, strict=True)):
            check_factors(_OP, x, *factors, self.out_features, (f"a[{i}]", f"b[{i}]"))
        check_tensor(index, torch.int64, x.device, _OP, "index")
        requirement = f"index must be [{x.shape[0]}], one for each sample of x"
        require(index.shape == x.shape[:1], _OP, f"{requirement}, found {list(index.shape)}")

    def compute(self) -> Tensor:
        x, dtype, adapter_of_sample = self.x, wide_dtype(self.x), self.index.tolist()
        for i in adapter_of_sample:
            require(-1 <= i < len(self.a), _OP, f"index must be -1 (none) to {len(self.a) - 1}, found {i}")
        y = frozen_linear(x, self.weight, self.packing, self.bias)
        for i in sorted(set(adapter_of_sample) - {-1}):
            rows = self.index == i
            s = F.linear(x[rows].to(dtype), self.a[i].to(dtype)) * self.scales[i]
            y[rows] = (y[rows] + F.linear(s, self.b[i].to(dtype))).to(x.dtype)
        return y

    def empty(self) -> Tensor:
        return self.x.new_empty((*self.x.shape[:-1], self.out_features))


define_by(
    "lora_linear_per_sample(Tensor x, Tensor[] weight, SymInt[] packing, Tensor? bias, Tensor[] a, Tensor[] b, "
    "float[] scales, Tensor index) -> Tensor",
    LoraLinearPerSample,
)


def lora_linear_per_sample(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    index: Tensor,
) -> Tensor:
    """Return x Wᵀ + bias, plus the low-rank product of adapter `index[i]` for each sample i. It has no gradients.

    Args:
        x, weight, bias: as in `lora_linear`; x is `[samples, ..., in]`.
        a, b, scales: `[r, in]`, `[out, r]` and the scale of each adapter; ranks may differ.
        index: int64 `[samples]` on x's device: the adapter of each sample, or -1 for none.

    Returns:
        `[samples, ..., out]`.
    """
    a = [permute_inputs(factor, weight) for factor in a]
    x, tensors, packing, bias = frozen_operands(x, weight, bias)
    arguments = x, tensors, packing, bias, a, b, scales, index
    if x.dtype is torch.float64:
        return LoraLinearPerSample(*arguments).compute()
    return torch.ops.peftcore.lora_linear_per_sample(*arguments)
