"""Dropout without a stored mask, for LoRA, for attention, and on its own.

Philox regenerates the mask `keep` from a seed, the row and the column, with the same bits on every device
(csrc/common/dropout.h).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.ops._extension import KERNEL_DEVICES
from peftcore.ops._library import define_by
from peftcore.ops._philox import LOW, philox
from peftcore.ops.calling import has_active_transform, operator_for
from peftcore.ops.weight import check_dtype, require

_OPS = torch.ops.peftcore


def threshold(p: float) -> int:
    """Return the 16-bit threshold below which a random number drops its element."""
    return min(round(p * 65536), 65535)


def keep_mask(rows: int, columns: int, p: float, seed: int | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Return the bool mask of the elements of x `[rows, columns]` that dropout keeps, the same as in every kernel.

    Philox4x32-7 (Salmon et al. 2011) of counter (column // 8, row mod 2³², row >> 32, 0) and key `seed` gives eight
    16-bit numbers, low half first, for eight columns. Numbers below round(65536 p) drop their element, so p is exact to
    2⁻¹⁷.
    """
    row = torch.arange(rows, device=device).view(-1, 1)
    column = torch.arange(-(-columns // 8), device=device).expand(rows, -1)
    counter = (column, (row & LOW).expand_as(column), (row >> 32).expand_as(column), torch.zeros_like(column))
    if isinstance(seed, Tensor):  # a scalar on the CPU may be combined with tensors of any device
        seed = (seed if seed.device.type == "cpu" else seed.to(device)).view(())
    numbers = philox(counter, seed, rounds=7).flatten(1)
    return numbers[:, :columns] >= threshold(p)


def apply_mask(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Return keep ∘ x for a matrix x."""
    return x if seed is None or not p else x.where(keep_mask(x.shape[0], x.shape[1], p, seed, x.device), 0)


def factor(scale: float, p: float, seed: Tensor | None) -> float:
    """Return c, the scale divided by the probability of keeping an element."""
    return scale if seed is None else scale * 65536 / (65536 - threshold(p))


def check_dropout(op: str, x: Tensor, p: float, seed: Tensor | None) -> None:
    """Check dropout's arguments, with the conditions and errors of csrc/common/dropout_arguments.h."""
    require(0 <= p < 1, op, f"dropout_p must be in [0, 1), found {p}")
    if seed is None:
        require(p == 0, op, f"dropout_p={p} needs a seed, found none")
    else:
        if seed.dtype != torch.int64:
            raise TypeError(f"{op}: seed must be torch.int64, found {seed.dtype}")
        require(seed.numel() == 1, op, f"seed must hold 1 element, found {seed.numel()}")
        places = dict.fromkeys(("cpu", str(x.device)))
        require(str(seed.device) in places, op, f"seed must be on {' or '.join(places)}, found {seed.device}")


def new_seed(x: Tensor) -> Tensor:
    """Return a seed from PyTorch's generator.

    The seed is drawn on the CPU, unless a CUDA graph may replay the call (in a compiled model, or during a capture). It
    is then drawn on x's GPU, where kernels read it from device memory, so that each replay draws a new seed.
    """
    repeated = x.is_cuda and (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())
    return torch.randint(2**63 - 1, (), device=x.device if repeated else "cpu")


def _refuse_capture(x: Tensor, seed: Tensor) -> None:
    """Raise a RuntimeError for a CPU seed during a CUDA graph capture: every replay would drop the same elements."""
    if not x.is_cuda or seed.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "dropout with a seed on the CPU cannot be captured in a CUDA graph: all replays would drop the same "
            f"elements. Pass a seed on {x.device}, or none to draw one there"
        )


def seed_of_call(x: Tensor, seed: Tensor | None) -> Tensor:
    """Return the seed of a call with dropout: `seed`, or by default a new one."""
    if seed is None:
        return new_seed(x)
    _refuse_capture(x, seed)
    return seed


def _formula(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if seed is None or not p:
        return x.clone()
    keep = keep_mask(x.shape[:-1].numel(), x.shape[-1], p, seed, x.device).view(x.shape)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * factor(1.0, p, seed)).to(x.dtype).where(keep, 0)


@dataclass
class Dropout:
    x: Tensor
    dropout_p: float
    seed: Tensor | None = None

    def __post_init__(self) -> None:
        check_dtype(self.x.dtype, "dropout")
        require(self.x.dim() > 0, "dropout", "x must have at least one dimension, found a scalar")
        check_dropout("dropout", self.x, self.dropout_p, self.seed)

    def compute(self) -> Tensor:
        return _formula(self.x, self.dropout_p, self.seed)

    def empty(self) -> Tensor:
        return self.x.new_empty(self.x.shape)


define_by("dropout(Tensor x, float dropout_p, Tensor? seed=None) -> Tensor", Dropout)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: Tensor) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p = p
        return operator_for("dropout", seed)(x, p, seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        return dropout(grad, ctx.p, seed), None, None


def dropout(x: Tensor, p: float, seed: Tensor | None = None) -> Tensor:
    """Return keep ∘ x / (1 - p). The mask is regenerated for the gradient instead of stored.

    Args:
        x: `[..., columns]`; fp32, fp16, bf16 or float64.
        p: probability of dropping an element, rounded to a multiple of 1/65536.
        seed: int64 `[]` on CPU or x's device, which determines the mask (see `keep_mask`). By default the seed is drawn
            from PyTorch's generator.

    Returns:
        A differentiable tensor with x's shape and dtype.
    """
    if has_active_transform():
        return F.dropout(x, p)
    seed = seed_of_call(x, seed)
    if x.device.type not in KERNEL_DEVICES or x.dtype is torch.float64:
        check_dropout("dropout", x, p, seed)
        return _formula(x, p, seed)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Dropout.apply(x, p, seed)  # type: ignore[no-untyped-call]
    y: Tensor = operator_for("dropout", seed)(x, p, seed)
    return y
