"""Values at the thresholds between the codes of 4 bits."""

import torch
from torch import Tensor


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
