"""Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in PyTorch; csrc/common/philox.h.

A counter and a key determine four 32-bit words, independent of earlier calls and with the same bits on every device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LOW = 0xFFFFFFFF


def philox(counter: Sequence[Tensor], key: int | Tensor, rounds: int) -> Tensor:
    """Return the four random words of each counter as eight 16-bit numbers, the low half of each word first.

    Args:
        counter: four int64 tensors of one shape with the counters' 32-bit words.
        key: 64-bit key. The host does not read the value of a tensor.
        rounds: number of rounds. 7 is the smallest that passes BigCrush; the authors recommend 10.

    Returns:
        int64 `[*shape, 8]`.
    """
    a, b, c, d = counter
    key0, key1 = key & LOW, key >> 32 & LOW
    for _ in range(rounds):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57  # int64 wraps modulo 2⁶⁴, which leaves the bits right
        a, b, c, d = (q >> 32 & LOW) ^ b ^ key0, q & LOW, (p >> 32 & LOW) ^ d ^ key1, p & LOW
        key0, key1 = key0 + 0x9E3779B9 & LOW, key1 + 0xBB67AE85 & LOW
    words = torch.stack([a, b, c, d], -1)
    return torch.stack([words & 0xFFFF, words >> 16], -1).flatten(-2)
