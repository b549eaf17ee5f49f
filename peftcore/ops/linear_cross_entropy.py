"""Cross-entropy of a language model's head, h Wᵀ + b, without materializing the logits.

Rows are processed in chunks. The logits of a chunk are written to a bounded workspace, `cross_entropy_rows_` computes
the losses and overwrites the logits with their gradient, and dh = dlogits W follows immediately. The full logits, their
fp32 copy and their gradient, each [rows, vocabulary], are never materialized. Rows without a label are skipped.

Where `linear_cross_entropy_rows` has a kernel, all rows form one chunk and the classes are processed in blocks. In
fp32, the two products then take 0.89 of the time with AVX2 and 0.78 with AVX-512 (1024 rows, 49,152 classes).

    forward     losses [rows], dh [rows, in]        two products, the same as for a head with a frozen weight
    backward    dh · dloss
                dW and db, if they train: recomputed from h and lse in pieces of the vocabulary, with one more product
                than PyTorch

Logits of a 16-bit head are rounded to its dtype, as in the head's forward; everything else is fp32. The gradient cannot
be differentiated again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.ops._library import define_by
from peftcore.ops.calling import frozen_operands, has_active_transform
from peftcore.ops.cross_entropy import (
    BLOCK_CLASSES,
    BLOCK_ROWS,
    Settings,
    apply_soft_cap,
    capturing,
    check_labels,
    check_settings,
    cross_entropy_rows_,
    factors,
    has_blocks,
    labelled_pieces,
    wide_dtype,
)
from peftcore.ops.dense_linear import FASTER
from peftcore.ops.quant4 import dequantize_4bit
from peftcore.ops.weight import PackedWeight, check_linear, require, weight_from_operands

_OPS = torch.ops.peftcore
# Bytes of logits per chunk. The size is the same on every machine, since sums may depend on it.
PIECE_BYTES = {"cpu": 1 << 25, "cuda": 1 << 28}
_ROW_GRAIN = 128
_LEAST_ROWS = 256  # with fewer rows, reading the weight dominates: chunks of 128 rows take 1.1 times as long


def rows_in_piece(classes: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the number of rows whose logits are computed together."""
    limit = PIECE_BYTES.get(device.type, PIECE_BYTES["cuda"])
    return max(_LEAST_ROWS, limit // max(1, classes * dtype.itemsize) // _ROW_GRAIN * _ROW_GRAIN)


def workspace(x: Tensor, weight: Sequence[Tensor], packing: Sequence[int], classes: int, device: torch.device) -> int:
    """Return the bytes of logits that `linear_cross_entropy` needs on a device, for tensors of these shapes."""
    if not packing and has_blocks(x.dtype, device):
        return min(len(x), BLOCK_ROWS) * (min(classes, BLOCK_CLASSES) * x.dtype.itemsize + 4 * x.shape[1])
    return min(len(x), rows_in_piece(classes, x.dtype, device)) * classes * x.dtype.itemsize


def workspace_of_weight(x: Tensor, classes: int, device: torch.device) -> int:
    """Return the bytes of logits that `linear_cross_entropy_weight` needs on a device."""
    wide_and_rounded = 4 + (2 * x.dtype.itemsize if x.dtype.itemsize < 4 else 0)
    return len(x) * min(classes, classes_in_piece(len(x), 4, device)) * wide_and_rounded


def classes_in_piece(rows: int, itemsize: int, device: torch.device) -> int:
    """Return the number of classes for which the gradient of a head's weight is computed together."""
    limit = PIECE_BYTES.get(device.type, PIECE_BYTES["cuda"])
    return max(_ROW_GRAIN, limit // max(1, rows * itemsize))


class _Head:
    """Computes the logits of rows with a frozen head, and the gradient of the hidden states."""

    def __init__(self, weight: Sequence[Tensor], packing: Sequence[int], bias: Tensor | None, x: Tensor, rows: int):
        self.weight, self.packing, self.bias = weight, packing, bias
        self.uses_kernel = not packing and x.device.type == "cpu" and x.dtype in FASTER
        dense = not packing and not self.uses_kernel
        self.buffer = x.new_empty((rows, weight[0].shape[0])) if dense else None

    def logits(self, x: Tensor) -> Tensor:
        if self.packing:
            return _OPS.linear_4bit(x, self.weight, self.packing, self.bias)
        if self.buffer is None:
            return _OPS.dense_linear(x, self.weight[0], self.bias)
        out = self.buffer[: x.shape[0]]
        if self.bias is None:
            return torch.mm(x, self.weight[0].t(), out=out)
        return torch.addmm(self.bias, x, self.weight[0].t(), out=out)

    def gradient(self, grad: Tensor) -> Tensor:
        if self.packing:
            return _OPS.linear_4bit_backward(grad, self.weight, self.packing)
        return _OPS.dense_linear(grad, self.weight[0].t()) if self.uses_kernel else grad @ self.weight[0]


@dataclass
class LinearCrossEntropy:
    hidden: Tensor
    weight: Sequence[Tensor]
    packing: Sequence[int]
    bias: Tensor | None
    labels: Tensor
    class_weight: Tensor | None
    grad_scale: Tensor | None
    settings: Sequence[float]
    ignore_index: int
    gradient: bool

    def __post_init__(self) -> None:
        op, frozen = "linear_cross_entropy", weight_from_operands(self.weight, self.packing, "linear_cross_entropy")
        check_linear(self.hidden, frozen, self.bias, op)
        require(self.hidden.dim() == 2, op, f"hidden must be [rows, in], found {list(self.hidden.shape)}")
        self.classes = frozen.shape[0]
        check_labels(self.labels, self.hidden.shape[0], self.hidden, self.classes, self.class_weight, op)
        check_settings(self.settings, op)

    def compute(self) -> tuple[Tensor, Tensor]:
        x, count = self.hidden, self.hidden.shape[0]
        rows = x.new_zeros((3, count), dtype=wide_dtype(x))
        grad = torch.zeros_like(x) if self.gradient else x.new_empty(0)
        if self._has_blocks():
            for piece in self._pieces(max(1, count)):  # all rows in one chunk
                operands = x[piece], self.weight[0], self.bias, self.labels[piece], self.class_weight, self.grad_scale
                rows[:, piece], dx = _OPS.linear_cross_entropy_rows(*operands, self.settings, self.gradient)
                if self.gradient:
                    grad[piece] = dx
            return rows, grad
        size = rows_in_piece(self.classes, x.dtype, x.device)
        pieces = self._pieces(size)
        head = _Head(self.weight, self.packing, self.bias, x, min(size, count))
        options = self.class_weight, self.grad_scale, self.settings, self.ignore_index, self.gradient
        for piece in pieces:
            logits = head.logits(x[piece]).contiguous()
            rows[:, piece] = cross_entropy_rows_(logits, self.labels[piece], *options)
            if self.gradient:
                grad[piece] = head.gradient(logits)
            del logits  # frees the memory before the next chunk is allocated
        return rows, grad

    def _has_blocks(self) -> bool:
        """Return whether `linear_cross_entropy_rows` has a kernel for these arguments."""
        if self.packing or not self.weight[0].is_contiguous() or Settings(*self.settings).label_smoothing:
            return False
        return has_blocks(self.hidden.dtype, self.hidden.device)

    def _pieces(self, size: int) -> list[slice | Tensor]:
        return list(labelled_pieces(self.labels, self.ignore_index, self.classes, size))

    def empty(self) -> tuple[Tensor, Tensor]:
        rows = self.hidden.new_empty((3, self.hidden.shape[0]), dtype=wide_dtype(self.hidden))
        return rows, self.hidden.new_empty(self.hidden.shape if self.gradient else (0,))


@dataclass
class LinearCrossEntropyWeight:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    class_weight: Tensor | None
    lse: Tensor
    coefficients: Tensor  # the gradient of each row's loss; 0 for rows without a label
    settings: Sequence[float]
    needs: Sequence[bool]

    def __post_init__(self) -> None:
        op = "linear_cross_entropy_weight"
        check_linear(self.hidden, self.weight, self.bias, op)
        check_labels(self.labels, self.hidden.shape[0], self.hidden, self.weight.shape[0], self.class_weight, op)
        self.numbers = check_settings(self.settings, op)

    def compute(self) -> tuple[Tensor, Tensor]:
        x, w, dtype, smoothing = self.hidden, self.weight, wide_dtype(self.hidden), self.numbers.label_smoothing
        classes, (grad, bias_grad) = w.shape[0], self.empty()
        has_label = (self.labels >= 0) & (self.labels < classes) & (self.coefficients != 0)
        rows_with_label = has_label.nonzero()[:, 0] if not capturing(x) else torch.arange(len(x), device=x.device)
        x, labels, lse = (
            x[rows_with_label],
            self.labels[rows_with_label].clamp(0, classes - 1),
            self.lse[rows_with_label],
        )
        coefficients = self.coefficients[rows_with_label]
        of_softmax, of_label = factors(lse, labels, self.class_weight, self.numbers, classes)
        size = classes_in_piece(len(rows_with_label), dtype.itemsize, x.device)
        for start in range(0, classes, size):
            columns = slice(start, min(start + size, classes))
            bias = None if self.bias is None else self.bias[columns]
            z, scale = F.linear(x, w[columns], bias).to(dtype), self.numbers.logit_scale
            z, slope = apply_soft_cap(z, self.numbers) if self.numbers.soft_cap else (z.mul_(scale), scale)
            dz = z.sub_(lse[:, None]).exp_().mul_(of_softmax[:, None])
            if smoothing:
                dz -= smoothing / classes * (1.0 if self.class_weight is None else self.class_weight[columns])
            in_block = (labels >= columns.start) & (labels < columns.stop)
            target = (labels - start).where(in_block, 0)
            dz.scatter_add_(1, target[:, None], -(of_label * in_block)[:, None])
            dz *= slope
            dz *= coefficients[:, None]
            if self.needs[0]:
                torch.mm(dz.to(x.dtype).t(), x, out=grad[columns])
            if self.needs[1]:
                bias_grad[columns] = dz.sum(0).to(bias_grad.dtype)
        return grad, bias_grad

    def empty(self) -> tuple[Tensor, Tensor]:
        w, classes = self.weight, self.weight.shape[0]
        return w.new_empty(w.shape if self.needs[0] else (0,)), w.new_empty(classes if self.needs[1] else 0)


define_by(
    "linear_cross_entropy(Tensor hidden, Tensor[] weight, SymInt[] packing, Tensor? bias, Tensor labels, "
    "Tensor? class_weight, Tensor? grad_scale, float[] settings, int ignore_index, bool gradient) "
    "-> (Tensor rows, Tensor grad)",
    LinearCrossEntropy,
)
define_by(
    "linear_cross_entropy_weight(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? class_weight, "
    "Tensor lse, Tensor coefficients, float[] settings, bool[2] needs) -> (Tensor dw, Tensor db)",
    LinearCrossEntropyWeight,
)


# --- public functions ------------------------------------------------------------------------------------------------


class _Rows(torch.autograd.Function):
    """Losses `[rows]` with a gradient, and lse and entropies `[2, rows]` without one."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        class_weight: Tensor | None,
        grad_scale: Tensor | None,
        numbers: tuple[Settings, int, list[int]],
        *weight: Tensor,
    ) -> tuple[Tensor, Tensor]:
        settings, ignore_index, packing = numbers
        needs_grad, trains = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or any(ctx.needs_input_grad[6:])
        arguments = hidden, weight, packing, bias, labels, class_weight, grad_scale, settings, ignore_index, needs_grad
        rows, grad = _OPS.linear_cross_entropy(*arguments)
        loss, statistics = rows[0].clone(), rows[1:].clone()
        saved_tensors = (hidden, bias, class_weight, statistics, weight[0]) if trains else (None,) * 5
        ctx.save_for_backward(grad if needs_grad else None, grad_scale, labels, *saved_tensors)
        ctx.numbers = settings, ignore_index
        return loss, statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_cross_entropy cannot be differentiated twice (create_graph=True). "
                "Use F.cross_entropy(F.linear(hidden, weight, bias), labels) instead"
            )
        hidden_grad, scale, labels, hidden, bias, class_weight, statistics, weight = ctx.saved_tensors
        settings, ignore_index = ctx.numbers
        grad = grad.masked_fill(labels == ignore_index, 0)  # a mean without any label divides by 0
        dh = dw = db = None
        if ctx.needs_input_grad[0]:
            factor = grad if scale is None else grad / scale  # `hidden_grad` already includes `scale`
            dh = (hidden_grad * factor[:, None]).to(hidden_grad.dtype)
        needs = [any(ctx.needs_input_grad[6:]), ctx.needs_input_grad[1]]
        if any(needs):
            arguments = hidden, weight, bias, labels, class_weight, statistics[0], grad, settings, needs
            dw, db = (
                g if n else None for g, n in zip(_OPS.linear_cross_entropy_weight(*arguments), needs, strict=True)
            )
        return dh, db, None, None, None, None, dw, *(None for _ in ctx.needs_input_grad[7:])


def divisor(labels: Tensor, has_label: Tensor, class_weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the denominator of a mean: the number of labels, or the sum of their class weights."""
    if class_weight is None:
        return has_label.sum().to(dtype)
    return class_weight[labels.where(has_label, 0).clamp(0, len(class_weight) - 1)].mul(has_label).sum()


def _rows(
    hidden: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    settings: Settings,
    ignore_index: int,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses, lse and entropies of the rows, and the denominator of a mean."""
    op = "linear_cross_entropy"
    require(
        labels.shape == hidden.shape[:-1], op, f"labels must be {list(hidden.shape[:-1])}, found {list(labels.shape)}"
    )
    labels = labels.reshape(-1)
    frozen = weight.detach() if isinstance(weight, Tensor) else weight
    x, tensors, packing, bias = frozen_operands(hidden.reshape(-1, hidden.shape[-1]), frozen, bias)
    if isinstance(weight, Tensor) and weight.requires_grad:  # linear_cross_entropy_weight computes its gradient
        tensors = [weight.to(tensors[0].dtype)]
    dtype = wide_dtype(x)
    if class_weight is not None:
        class_weight = class_weight.to(dtype)
        check_labels(labels, x.shape[0], x, weight.shape[0], class_weight, op)
    has_label = labels != ignore_index
    total = divisor(labels, has_label, class_weight, dtype)
    if has_active_transform():
        dense = weight if isinstance(weight, Tensor) else dequantize_4bit(weight, x.dtype)
        z, _ = apply_soft_cap(F.linear(x, dense.to(x.dtype), bias).to(dtype), settings)
        lse = z.logsumexp(1)
        loss = F.cross_entropy(
            z,
            labels,
            class_weight,
            ignore_index=ignore_index,
            reduction="none",
            label_smoothing=settings.label_smoothing,
        )
        loss = loss + settings.z_loss * lse * lse * has_label
        return loss, torch.stack([lse, lse - (z.softmax(1) * z).sum(1)]), total
    # Scaling inside the operator means that the gradient of a mean is rounded once. In fp16 it would underflow.
    scale = 1 / total if mean and x.dtype is not torch.float16 else None
    numbers = settings, ignore_index, packing
    loss, statistics = _Rows.apply(x, bias, labels, class_weight, scale, numbers, *tensors)  # type: ignore[no-untyped-call]
    return loss, statistics.detach(), total


def check_reduction(reduction: str, op: str) -> None:
    require(reduction in ("mean", "sum", "none"), op, f"reduction must be mean, sum or none, found {reduction!r}")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | PackedWeight,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Return the cross-entropy of hidden Wᵀ + bias with labels, without materializing the logits.

    The result and its gradients match those of `F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)` within
    rounding, with an error that is at most as large. Beyond hidden and its gradient, it needs memory for 32 MiB of
    logits on CPU and 256 MiB on GPUs (or for 256 rows, if those take more), and 8 MiB where classes are processed in
    blocks. Rows without a label are skipped.

    Args:
        hidden: fp32, fp16, bf16 or float64 `[..., in]`; under autocast it is cast as for `F.linear`.
        weight: `[vocabulary, in]` in the dtype of hidden (or any dtype under autocast), or a `PackedWeight`, which gets
            no gradient.
        labels: int64 `[...]`.
        bias: `[vocabulary]`.
        ignore_index: label of rows that are skipped.
        label_smoothing, class_weight: as in `F.cross_entropy`.
        logit_scale: factor of the logits.
        soft_cap: scaled logits are replaced by cap · tanh(logits / cap).
        z_loss: coefficient of logsumexp(logits)², which is added to each row's loss.
        reduction: `mean` (over labels, weighted by their class weights), `sum` or `none`.

    Returns:
        fp32 (float64 for float64): a scalar, or `[...]` with `reduction="none"`. Gradients for hidden, weight and
        bias; they cannot be differentiated again.

    Raises:
        IndexError: a label is outside the vocabulary, on CPU (on GPUs the loss is NaN). TypeError, ValueError: an
        argument does not fit the others.
    """
    check_reduction(reduction, "linear_cross_entropy")
    require(soft_cap is None or soft_cap > 0, "linear_cross_entropy", f"soft_cap must be positive, found {soft_cap}")
    settings = Settings(float(label_smoothing), float(logit_scale), float(soft_cap or 0), float(z_loss))
    mean = reduction == "mean"
    loss, _, total = _rows(hidden, weight, bias, labels, class_weight, settings, ignore_index, mean)
    if reduction == "none":
        return loss.reshape(labels.shape)
    return loss.sum() / total if mean else loss.sum()


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor | PackedWeight,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of tokens and entropies of their distributions, without materializing the logits.

    Args:
        hidden, weight, bias, logit_scale, soft_cap: as in `linear_cross_entropy`; `logit_scale` is 1 / temperature.
        tokens: int64 token ids `[...]`, one for each row of hidden.
        ignore_index: token id of rows that are skipped, for which both results are 0.

    Returns:
        Both fp32 `[...]` (float64 for float64): log p(token), with gradients for hidden, weight and bias; and the
        entropy in nats, without a gradient.

    Raises:
        As `linear_cross_entropy`.
    """
    require(soft_cap is None or soft_cap > 0, "linear_log_probs", f"soft_cap must be positive, found {soft_cap}")
    settings = Settings(0.0, float(logit_scale), float(soft_cap or 0), 0.0)
    loss, statistics, _ = _rows(hidden, weight, bias, tokens, None, settings, ignore_index, False)
    return -loss.reshape(tokens.shape), statistics[1].reshape(tokens.shape)
