"""What is recorded of operators while a stand-in runs."""

import pytest
import torch
from torch import Tensor, nn

from peftcore import ops
from peftcore.estimating.following import Following


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.half, device="meta")


@pytest.mark.parametrize(("rows", "on_card", "times"), [(65, True, 1), (60, True, 0), (65, False, 0)])
def test_a_card_unpacks_a_weight_for_many_rows(rows: int, on_card: bool, times: int) -> None:
    weight, following = ops.quantize_4bit(torch.ones(72, 64)).to("meta"), Following(on_card=on_card)
    with following.running(nn.Identity()):
        ops.linear_4bit(empty(rows, 64), weight)
    assert [storage.bytes for storage in following.storages].count(72 * 64 * 2) == times


@pytest.mark.parametrize(("rows", "times"), [(48, 0), (49, 1)])
def test_a_card_unpacks_all_experts_for_many_rows(rows: int, times: int) -> None:
    weight, following = ops.quantize_4bit(torch.ones(3, 72, 64)).to("meta"), Following(on_card=True)
    offsets = torch.empty(3, dtype=torch.int32, device="meta")
    with following.running(nn.Identity()):
        ops.grouped_linear(empty(rows, 64), offsets, weight)
    assert [storage.bytes for storage in following.storages].count(3 * 72 * 64 * 2) == times
