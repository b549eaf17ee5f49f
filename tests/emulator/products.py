"""What tests of products share: numbers, memory that must stay as it is, and how far a sum may be off."""

import torch
from card.checks import limit_of
from emulator.structs import Dropout

from peftcore.ops.dropout import keep_mask, threshold

SEED = 0x123456789ABCDEF0  # of dropout
SEED_IN_MEMORY = None  # a tensor that kernels read, in tests of that


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def kept(x, p):
    return x.double() * keep_mask(*x.shape, p, SEED)


def dropout(p):
    if SEED_IN_MEMORY is not None:
        return Dropout(threshold(p), 0, 0, SEED_IN_MEMORY.data_ptr())
    return Dropout(threshold(p), SEED & 0xFFFFFFFF, SEED >> 32)


def check(found, wanted, magnitude):
    error = (found.double() - wanted).abs()
    assert (error <= limit_of(found.dtype, wanted, magnitude)).all(), error.max()


def guarded(*shape, dtype):
    """(memory, a view of it, whose surroundings must stay 7)."""
    count = torch.Size(shape).numel()
    memory = torch.full((count + 8,), 7, dtype=dtype)
    return memory, memory[4 : 4 + count].view(shape)


def untouched(memory):
    assert (memory[:4] == 7).all() and (memory[-4:] == 7).all()
