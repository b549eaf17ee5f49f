"""Operands of products and of quantization, and how close sums in fp32 must be to float64."""

import torch
from torch import Tensor

from peftcore import ops

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def values(shape, dtype=torch.float32, seed=1, grad=False):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_(grad)


def packed(n, k, double_quant=True, seed=9):
    """(a weight in 4 bits, the same in float64)."""
    weight = ops.quantize_4bit(values((n, k), seed=seed), double_quant=double_quant)
    return weight, weight.values(torch.float64)


def near(found, exact, magnitude, base=0.0):
    """Sums as of 16 bits or more, rounded to found's dtype, twice where the base's product was rounded before."""
    smallest = 2.0**-24 if found.dtype is torch.float16 else torch.finfo(found.dtype).tiny
    bound = 2.0**-16 * magnitude + EPS[found.dtype] / 2 * (exact.abs() + base) + smallest
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= bound).all()


def at_thresholds(code: Tensor) -> Tensor:
    """46 fp32 values, first the largest; some code depends on whether they are divided by it or times its inverse."""
    values = code.sort().values
    thresholds = ((values[:-1] + values[1:]) / 2).repeat(3)
    largest = 1 + torch.arange(1000) / 997
    x = largest[:, None] * thresholds
    x[:, 15:30] = x[:, 15:30].nextafter(torch.tensor(torch.inf))
    x[:, 30:] = x[:, 30:].nextafter(torch.tensor(-torch.inf))
    differ = (x / largest[:, None] <= thresholds) != (x * (1 / largest)[:, None] <= thresholds)
    row = int(differ.any(1).nonzero()[0])
    return torch.cat([largest[row : row + 1], x[row]])
