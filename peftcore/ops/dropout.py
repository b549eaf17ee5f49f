"""Dropout of LoRA without a stored mask.

Philox generates the mask `keep` again from a seed, the row and the column, with the same bits on every device
(csrc/lora/dropout.h).
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftcore.ops._philox import LOW, philox
from peftcore.ops.weight import value


def threshold(p: float) -> int:
    """Return how many of 65536 equally likely numbers drop an element."""
    return min(round(p * 65536), 65535)


def keep_mask(rows: int, columns: int, p: float, seed: int | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Return the bool mask of the elements of x `[rows, columns]` that dropout keeps, as every kernel generates it.

    Philox4x32-7 (Salmon et al. 2011) of counter (column // 8, row mod 2³², row >> 32, 0) and key `seed` gives eight
    16-bit numbers, low half first, for eight columns; those below round(65536 p) drop theirs. So p is exact to 2⁻¹⁷.
    """
    row = torch.arange(rows, device=device).view(-1, 1)
    column = torch.arange(-(-columns // 8), device=device).expand(rows, -1)
    counter = (column, (row & LOW).expand_as(column), (row >> 32).expand_as(column), torch.zeros_like(column))
    if isinstance(seed, Tensor):  # a scalar on the CPU may be combined with tensors of any device
        seed = (seed if seed.device.type == "cpu" else seed.to(device)).view(())
    numbers = philox(counter, seed, rounds=7).flatten(1)
    return numbers[:, :columns] >= threshold(p)


def dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Return keep ∘ x for a matrix x."""
    return x if seed is None or not p else x.where(keep_mask(x.shape[0], x.shape[1], p, seed, x.device), 0)


def factor(scale: float, p: float, seed: Tensor | None) -> float:
    """Return c: the scale divided by the probability that dropout keeps an element."""
    return scale if seed is None else scale * 65536 / (65536 - threshold(p))


def check_dropout(op: str, x: Tensor, p: float, seed: Tensor | None) -> None:
    """Check dropout's arguments, with the conditions, messages and exception types of csrc/lora/arguments.h."""
    value(0 <= p < 1, op, f"dropout_p must be in [0, 1), found {p}")
    if seed is None:
        value(p == 0, op, f"dropout_p={p} needs a seed, found none")
    else:
        if seed.dtype != torch.int64:
            raise TypeError(f"{op}: seed must be torch.int64, found {seed.dtype}")
        value(seed.numel() == 1, op, f"seed must hold 1 element, found {seed.numel()}")
        places = dict.fromkeys(("cpu", str(x.device)))
        value(str(seed.device) in places, op, f"seed must be on {' or '.join(places)}, found {seed.device}")


def new_seed(x: Tensor) -> Tensor:
    """Return a seed from PyTorch's generator.

    It is drawn on the CPU, or on x's card where a CUDA graph may repeat the call, in a compiled model or during a
    capture: each replay draws another seed there, and kernels read it from the card's memory.
    """
    repeated = x.is_cuda and (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())
    return torch.randint(2**63 - 1, (), device=x.device if repeated else "cpu")


def refuse_capture(x: Tensor, seed: Tensor) -> None:
    """Refuse a seed on the CPU in a CUDA graph, which would drop the same elements at every replay."""
    if not x.is_cuda or seed.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "lora_linear: dropout with a seed on the CPU cannot be captured in a CUDA graph, whose replays would all "
            f"drop the same elements. Pass a seed on {x.device}, or none: it is then drawn there"
        )
