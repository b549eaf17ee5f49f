"""What a file's config would place is made on the meta device, without values; what is not there has its own."""

import torch
from torch import nn

from peftcore.checkpoint.fitting import Unfilled


def test_only_what_is_on_the_meta_device_stays_without_values() -> None:
    with torch.device("meta"), Unfilled():
        meta = [torch.zeros(3), torch.ones(2, 3, requires_grad=True), nn.init.normal_(tensor=torch.empty(3))]
        zeros, ones = torch.zeros(3, device="cpu"), torch.ones((2, 3), device="cpu", dtype=torch.int32)
        drawn = nn.init.uniform_(torch.full((9,), 7.0, device="cpu"))
        with torch.device("cpu"):
            inside = torch.ones(5)
    assert all(tensor.is_meta for tensor in meta) and meta[1].requires_grad
    assert zeros.tolist() == [0, 0, 0] and ones.tolist() == 2 * [3 * [1]] and inside.sum() == 5
    assert drawn.max() < 1
