"""Cross-entropy of any head, a function from hidden states to logits row by row, without the matrix of logits.

As `linear_cross_entropy`, whose pieces these are, with PyTorch's autograd for each piece: of heads with adapters. Sums
of losses get all gradients in the forward pass; the losses of rows multiply each piece again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftcore.ops.cross_entropy import (
    CrossEntropyRows,
    Settings,
    check_labels,
    check_settings,
    cross_entropy_rows_,
    labelled_pieces,
    wide,
)
from peftcore.ops.linear_cross_entropy import check_reduction, divisor, rows_in_piece
from peftcore.ops.weight import value


class HeadFunction(NamedTuple):
    """A head as a function.

    Args:
        function: gives logits `[rows, classes]` of hidden states `[rows, in]`, each row's from that row alone, and the
            same in every call.
        classes: size of the vocabulary.
        tensors: what the function reads that may have gradients.
    """

    function: Callable[[Tensor], Tensor]
    classes: int
    tensors: Sequence[Tensor]


@dataclass
class _Call:
    head: HeadFunction
    labels: Tensor
    class_weight: Tensor | None
    settings: Settings
    ignore_index: int
    summed: bool
    empty: bool = False  # whether no row has a label

    def pieces(self, hidden: Tensor, tensors: Sequence[Tensor], needs: Sequence[bool], rows_grad: Tensor | None) -> Any:
        """Return `[3, rows]`: losses, lse and entropies; and the gradients of hidden states and tensors."""
        rows = torch.zeros((3, len(hidden)), dtype=wide(hidden), device=hidden.device)
        dh = torch.zeros_like(hidden) if needs[0] else None
        sums: list[Tensor | None] = [None for _ in tensors]  # stays None for what the function does not read
        wanted = [i for i, needed in enumerate(needs[1:]) if needed]
        size = rows_in_piece(self.head.classes, hidden.dtype, hidden.device)
        pieces = list(labelled_pieces(self.labels, self.ignore_index, self.head.classes, size))
        self.empty = not pieces
        for piece in pieces or [slice(0)]:  # no rows give gradients of 0 to what the function reads
            x = hidden[piece].detach().requires_grad_(needs[0])
            with torch.set_grad_enabled(any(needs)):
                z = self.head.function(x)
            dz = z.detach().clone(memory_format=torch.contiguous_format)
            numbers = dz, self.labels[piece], self.class_weight, None, self.settings, self.ignore_index, any(needs)
            with torch.no_grad():
                if dz.dtype is torch.float64:
                    rows[:, piece] = CrossEntropyRows(*numbers).compute()
                else:
                    rows[:, piece] = cross_entropy_rows_(*numbers)
                if rows_grad is not None:
                    dz *= rows_grad[piece][:, None]
            if not any(needs):
                continue
            inputs = [*([] if dh is None else [x]), *(tensors[i] for i in wanted)]
            found = list(torch.autograd.grad(z, inputs, dz, allow_unused=True))
            if dh is not None:
                dh[piece] = found.pop(0)
            for i, one in zip(wanted, found, strict=True):
                if one is not None:
                    total = sums[i]
                    sums[i] = one.to(wide(one)) if total is None else total.add_(one)
        return rows, [dh, *(None if g is None else g.to(t.dtype) for g, t in zip(sums, tensors, strict=True))]


class _Pieces(torch.autograd.Function):
    """Losses `[rows]`, or their sum; and lse and entropies `[2, rows]`, whose gradient is not computed."""

    @staticmethod
    def forward(ctx: Any, call: _Call, hidden: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        needs = ctx.needs_input_grad[1:]
        rows, grads = call.pieces(hidden, tensors, needs if call.summed else [False] * len(needs), None)
        ctx.call = call
        ctx.save_for_backward(*(grads if call.summed else (hidden, *tensors)))
        return rows[0].sum() if call.summed else rows[0].clone(), rows[1:].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "head_cross_entropy cannot be differentiated twice (create_graph=True). "
                "Use F.cross_entropy of the head's logits instead"
            )
        if ctx.call.empty:
            grad = torch.zeros_like(grad)  # the mean of no losses divides by 0
        if ctx.call.summed:
            return None, *(None if g is None else (g * grad).to(g.dtype) for g in ctx.saved_tensors)
        hidden, *tensors = ctx.saved_tensors
        with torch._C._DisableAutocast():
            _, grads = ctx.call.pieces(hidden, tensors, ctx.needs_input_grad[1:], grad)
        return None, *grads


def _run(call: _Call, hidden: Tensor, op: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses of the rows or their sum, lse and entropies, and the number that a mean divides by."""
    labels, leading = call.labels, list(hidden.shape[:-1])
    value(labels.shape == hidden.shape[:-1], op, f"labels must be {leading}, found {list(labels.shape)}")
    call.labels, x = labels.reshape(-1), hidden.reshape(-1, hidden.shape[-1])
    if call.class_weight is not None:
        call.class_weight = call.class_weight.to(wide(x))
    check_labels(call.labels, len(x), x, call.head.classes, call.class_weight, op)
    check_settings(call.settings, op)
    loss, rest = _Pieces.apply(call, x, *call.head.tensors)  # type: ignore[no-untyped-call]
    counts = call.labels != call.ignore_index
    return loss, rest.detach(), divisor(call.labels, counts, call.class_weight, wide(x))


def head_cross_entropy(
    head: HeadFunction,
    hidden: Tensor,
    labels: Tensor,
    settings: Settings,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Return the cross-entropy of a head's logits with labels, without making all logits.

    Args:
        head: the head.
        hidden: `[..., in]`.
        labels: int64 `[...]`.
        settings: label smoothing, logit scale, soft cap and factor of the z-loss.
        class_weight, ignore_index, reduction: as in `linear_cross_entropy`.

    Returns:
        fp32 (for float64, float64): a scalar, or `[...]` with `reduction="none"`. Gradients for hidden and the head's
        tensors; they cannot be differentiated again.

    Raises:
        As `linear_cross_entropy`.
    """
    op = "head_cross_entropy"
    check_reduction(reduction, op)
    summed = reduction != "none"
    loss, _, total = _run(_Call(head, labels, class_weight, settings, ignore_index, summed), hidden, op)
    if not summed:
        return loss.reshape(labels.shape)
    return loss / total if reduction == "mean" else loss


def head_log_probs(
    head: HeadFunction, hidden: Tensor, tokens: Tensor, settings: Settings, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of tokens, and entropies, of a head's distributions, without making all logits.

    Args:
        head, hidden, settings: as in `head_cross_entropy`.
        tokens, ignore_index: as in `linear_log_probs`.

    Returns:
        As `linear_log_probs`.

    Raises:
        As `linear_cross_entropy`.
    """
    loss, rest, _ = _run(_Call(head, tokens, None, settings, ignore_index, False), hidden, "head_log_probs")
    return -loss.reshape(tokens.shape), rest[1].reshape(tokens.shape)
