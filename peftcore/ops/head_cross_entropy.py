"""Cross-entropy of any head, a function from hidden states to logits row by row, without the matrix of logits.

For heads with adapters: rows are taken in the pieces of `linear_cross_entropy`, and PyTorch's autograd differentiates
each. For a sum or mean of losses, the forward pass computes all gradients; for the losses of single rows, the backward
pass runs the head again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftcore.ops.cross_entropy import (
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
        function: hidden states `[rows, in]` -> logits `[rows, classes]`. The logits of a row depend on that row alone,
            and are the same in every call.
        classes: size of the vocabulary.
        tensors: tensors that the function reads and that may need gradients.
    """

    function: Callable[[Tensor], Tensor]
    classes: int
    tensors: Sequence[Tensor]


@dataclass
class _Call:
    """Arguments of a call that get no gradients.

    Args:
        head, settings, ignore_index: as in `head_cross_entropy`.
        labels: int64 `[rows]`.
        class_weight: `[classes]` in the wide dtype of the hidden states.
        summed: the result is the sum of the losses, so that the forward pass can compute the gradients.
        has_labels: whether any row has a label; set by `pieces`.
    """

    head: HeadFunction
    labels: Tensor
    class_weight: Tensor | None
    settings: Settings
    ignore_index: int
    summed: bool
    has_labels: bool = True

    def pieces(
        self, hidden: Tensor, tensors: Sequence[Tensor], needs: Sequence[bool], loss_grad: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return losses, lse and entropies `[3, rows]`, and the gradients of the hidden states and of each tensor.

        Args:
            hidden: `[rows, in]`.
            tensors: `head.tensors`.
            needs: whether the hidden states, and each tensor, need a gradient; others get None.
            loss_grad: gradient of each loss `[rows]`; None: 1.
        """
        rows = torch.zeros((3, len(hidden)), dtype=wide(hidden), device=hidden.device)
        hidden_grad = torch.zeros_like(hidden) if needs[0] else None
        wanted = [i for i, needed in enumerate(needs[1:]) if needed]
        sums: list[Tensor | None] = [None for _ in tensors]  # stays None for what the function does not read
        size = rows_in_piece(self.head.classes, hidden.dtype, hidden.device)
        pieces = list(labelled_pieces(self.labels, self.ignore_index, self.head.classes, size))
        self.has_labels = bool(pieces)
        for piece in pieces or [slice(0)]:  # no rows give gradients of 0 to what the function reads
            x = hidden[piece].detach().requires_grad_(needs[0])
            with torch.set_grad_enabled(any(needs)):
                logits = self.head.function(x)
            logits_grad = logits.detach().clone(memory_format=torch.contiguous_format)
            options = self.class_weight, None, self.settings, self.ignore_index, any(needs)
            with torch.no_grad():
                rows[:, piece] = cross_entropy_rows_(logits_grad, self.labels[piece], *options)
                if loss_grad is not None:
                    logits_grad *= loss_grad[piece][:, None]
            if not any(needs):
                continue
            inputs = [*([x] if needs[0] else []), *(tensors[i] for i in wanted)]
            grads = list(torch.autograd.grad(logits, inputs, logits_grad, allow_unused=True))
            if hidden_grad is not None:
                hidden_grad[piece] = grads.pop(0)
            for i, grad in zip(wanted, grads, strict=True):
                if grad is not None:
                    total = sums[i]
                    sums[i] = grad.to(wide(grad)) if total is None else total.add_(grad)
        return rows, [hidden_grad, *(None if g is None else g.to(t.dtype) for g, t in zip(sums, tensors, strict=True))]


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
        if not ctx.call.has_labels:
            grad = torch.zeros_like(grad)  # the mean of no losses divides by 0
        if ctx.call.summed:
            return None, *(None if g is None else (g * grad).to(g.dtype) for g in ctx.saved_tensors)
        hidden, *tensors = ctx.saved_tensors
        with torch._C._DisableAutocast():
            _, grads = ctx.call.pieces(hidden, tensors, ctx.needs_input_grad[1:], grad)
        return None, *grads


def _run(
    head: HeadFunction,
    hidden: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    settings: Settings,
    ignore_index: int,
    summed: bool,
    op: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses `[rows]` or their sum, lse and entropies `[2, rows]`, and the number that a mean divides by."""
    leading = list(hidden.shape[:-1])
    value(list(labels.shape) == leading, op, f"labels must be {leading}, found {list(labels.shape)}")
    labels, x = labels.reshape(-1), hidden.reshape(-1, hidden.shape[-1])
    if class_weight is not None:
        class_weight = class_weight.to(wide(x))
    check_labels(labels, len(x), x, head.classes, class_weight, op)
    check_settings(settings, op)
    call = _Call(head, labels, class_weight, settings, ignore_index, summed)
    loss, rest = _Pieces.apply(call, x, *head.tensors)  # type: ignore[no-untyped-call]
    return loss, rest.detach(), divisor(labels, labels != ignore_index, class_weight, wide(x))


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
    loss, _, total = _run(head, hidden, labels, class_weight, settings, ignore_index, summed, op)
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
    loss, rest, _ = _run(head, hidden, tokens, None, settings, ignore_index, False, "head_log_probs")
    return -loss.reshape(tokens.shape), rest[1].reshape(tokens.shape)
