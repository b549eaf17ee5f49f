"""Cross-entropy of rows of logits, whose gradient overwrites the logits.

    z = scale · x, or with a soft cap  z = cap · tanh(scale · x / cap)
    lse = log Σ exp(z),  p = exp(z - lse),  entropy = lse - Σ p z
    loss = (1 - ε) w_y (lse - z_y) + ε/V Σ_c w_c (lse - z_c) + ζ lse²

    dloss/dx_c = (p_c ((1 - ε) w_y + ε/V Σ w + 2 ζ lse) - (1 - ε) w_y [c = y] - ε/V w_c) · scale · (1 - (z_c / cap)²)

ε is the label smoothing, w the weights of the V classes, ζ the coefficient of the z-loss. Logits of any dtype are read
as fp32, the kernel keeps sums over the vocabulary in float64, and the gradient is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.ops._extension import extension
from peftcore.ops._library import define_by
from peftcore.ops.calling import has_active_transform
from peftcore.ops.weight import check_dtype, check_linear, require


class Settings(NamedTuple):
    """Coefficients of the formula, in the order that the operators expect. A `soft_cap` of 0 disables the cap."""

    label_smoothing: float = 0.0
    logit_scale: float = 1.0
    soft_cap: float = 0.0
    z_loss: float = 0.0


def check_labels(labels: Tensor, rows: int, logits: Tensor, classes: int, class_weight: Tensor | None, op: str) -> None:
    """Check labels `[rows]` and class weights `[classes]`. Only the device and dtype of `logits` are used."""
    if labels.dtype != torch.int64:
        raise TypeError(f"{op}: labels must be torch.int64, found {labels.dtype}")
    require(labels.shape == (rows,), op, f"labels must be [{rows}], found {list(labels.shape)}")
    require(labels.device == logits.device, op, f"labels must be on {logits.device}, found {labels.device}")
    if class_weight is None:
        return
    if class_weight.dtype != wide_dtype(logits):
        raise TypeError(f"{op}: class_weight must be {wide_dtype(logits)}, found {class_weight.dtype}")
    found = f"found {list(class_weight.shape)}"
    require(class_weight.shape == (classes,), op, f"class_weight must be [{classes}], {found}")
    require(class_weight.device == logits.device, op, f"class_weight must be on {logits.device}")


def check_settings(settings: Sequence[float], op: str) -> Settings:
    require(len(settings) == 4, op, f"settings must be 4 numbers, found {len(settings)}")
    parsed = Settings(*settings)
    smoothing, _, cap, _ = parsed
    require(0 <= smoothing <= 1, op, f"label_smoothing must be from 0 to 1, found {smoothing}")
    require(cap >= 0, op, f"soft_cap must be positive, or 0 for none, found {cap}")
    return parsed


def check_grad_scale(grad_scale: Tensor | None, x: Tensor, op: str) -> None:
    if grad_scale is None:
        return
    fits = grad_scale.dtype == wide_dtype(x) and grad_scale.numel() == 1
    found = f"found {grad_scale.dtype} {list(grad_scale.shape)}"
    require(fits, op, f"grad_scale must be one value of {wide_dtype(x)}, {found}")
    require(grad_scale.device == x.device, op, f"grad_scale must be on {x.device}")


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which logits are computed: fp32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def apply_soft_cap(x: Tensor, settings: Settings) -> tuple[Tensor, Tensor | float]:
    """Return the scaled and capped logits z, and dz/dx, for logits x in fp32 or float64."""
    if settings.soft_cap == 0:
        return x * settings.logit_scale, settings.logit_scale
    t = torch.tanh(x * (settings.logit_scale / settings.soft_cap))
    return settings.soft_cap * t, settings.logit_scale * (1 - t * t)


def factors(
    lse: Tensor, target: Tensor, class_weight: Tensor | None, settings: Settings, classes: int
) -> tuple[Tensor, Tensor]:
    """Return, for each row, the factors of p, (1 - ε) w_y + ε/V Σ w + 2 ζ lse, and of the label, (1 - ε) w_y."""
    smoothing = settings.label_smoothing
    if class_weight is None:
        of_label, uniform_term = torch.full_like(lse, 1 - smoothing), torch.full_like(lse, smoothing)
    else:
        of_label = (1 - smoothing) * class_weight[target]
        uniform_term = (smoothing / classes * class_weight.sum()).expand_as(lse)
    return of_label + uniform_term + 2 * settings.z_loss * lse, of_label


def capturing(x: Tensor) -> bool:
    """Return whether a CUDA graph is being captured, during which the host must not wait for values."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def labelled_pieces(
    labels: Tensor, ignore_index: int, classes: int, size: int, op: str = "linear_cross_entropy"
) -> Iterator[slice | Tensor]:
    """Yield the rows that have a label, `size` at a time: as slices if all rows are labelled, otherwise as indices.

    During a CUDA graph capture all rows are yielded, since the host cannot wait to find those with a label.

    Raises:
        IndexError: on the CPU, a label is out of range.
    """
    count, labelled = len(labels), None
    if not capturing(labels):
        labelled = (labels != ignore_index).nonzero()[:, 0]
        if labels.device.type == "cpu" and labelled.numel():
            smallest, largest = (int(limit) for limit in labels[labelled].aminmax())
            if smallest < 0 or largest >= classes:
                wrong = smallest if smallest < 0 else largest
                requirement = f"labels must be from 0 to {classes - 1}, or ignore_index {ignore_index}"
                raise IndexError(f"{op}: {requirement}, found {wrong}")
    if labelled is None or len(labelled) == count:
        yield from (slice(start, min(start + size, count)) for start in range(0, count, size))
    else:
        yield from (piece for piece in labelled.split(size) if len(piece))


@dataclass
class CrossEntropyRows:
    logits: Tensor
    labels: Tensor
    class_weight: Tensor | None
    grad_scale: Tensor | None
    settings: Sequence[float]
    ignore_index: int
    gradient: bool = True

    def __post_init__(self) -> None:
        op, x = "cross_entropy_rows_", self.logits
        if x.dtype is not torch.float64:
            check_dtype(x.dtype, op)
        require(x.dim() == 2 and x.shape[1] > 0, op, f"logits must be [rows, classes], found {list(x.shape)}")
        require(x.is_contiguous(), op, f"logits must be contiguous, found strides {list(x.stride())}")
        check_labels(self.labels, x.shape[0], x, x.shape[1], self.class_weight, op)
        self.numbers = check_settings(self.settings, op)
        check_grad_scale(self.grad_scale, x, op)

    def compute(self) -> Tensor:
        classes, smoothing = self.logits.shape[1], self.numbers.label_smoothing
        z, slope = apply_soft_cap(self.logits.to(wide_dtype(self.logits)), self.numbers)
        has_label = self.labels != self.ignore_index
        in_range = (self.labels >= 0) & (self.labels < classes)
        target = self.labels.where(in_range, 0)
        lse = z.logsumexp(1)
        p = (z - lse[:, None]).exp()
        entropy = lse - torch.where(p > 0, p * z, 0).sum(1)
        of_softmax, of_label = factors(lse, target, self.class_weight, self.numbers, classes)
        loss = of_label * (lse - z.gather(1, target[:, None])[:, 0]) + self.numbers.z_loss * lse * lse
        uniform: Tensor | float = smoothing / classes
        if smoothing:
            if self.class_weight is not None:
                uniform = uniform * self.class_weight
            loss = loss + (uniform * (lse[:, None] - z)).sum(1)
        # On a GPU, raising an error for an invalid label would need a synchronization, so its row becomes NaN.
        nan = torch.where(in_range, 0.0, torch.nan).to(lse.dtype)
        rows = torch.stack([loss + nan, lse, entropy]).where(has_label, 0)
        if self.gradient:
            grad = p * of_softmax[:, None] - uniform
            grad.scatter_add_(1, target[:, None], (nan - of_label)[:, None])
            grad *= slope if self.grad_scale is None else slope * self.grad_scale
            self.logits.copy_(grad.masked_fill_(~has_label[:, None], 0))
        return rows

    def empty(self) -> Tensor:
        return self.logits.new_empty((3, self.logits.shape[0]), dtype=wide_dtype(self.logits))


define_by(
    "cross_entropy_rows_(Tensor(a!) logits, Tensor labels, Tensor? class_weight, Tensor? grad_scale, float[] settings, "
    "int ignore_index, bool gradient=True) -> Tensor",
    CrossEntropyRows,
    triton="cross_entropy",
)


def cross_entropy_rows_(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    grad_scale: Tensor | None,
    settings: Sequence[float],
    ignore_index: int,
    gradient: bool = True,
) -> Tensor:
    """Return losses, lse and entropies `[3, rows]`, and replace the logits by their gradient.

    Args:
        logits: contiguous `[rows, classes]`. float64 is computed by the reference.
        labels: int64 `[rows]`.
        class_weight: fp32 `[classes]` (float64 for float64 logits).
        grad_scale: factor of the gradient, one value in the same dtype.
        settings: see `Settings`.
        ignore_index: label of rows whose results and gradients are 0.
        gradient: if False, the logits are left unchanged.
    """
    arguments = logits, labels, class_weight, grad_scale, settings, ignore_index, gradient
    if logits.dtype is torch.float64:
        return CrossEntropyRows(*arguments).compute()
    rows: Tensor = torch.ops.peftcore.cross_entropy_rows_.default(*arguments)
    return rows


BLOCK_CLASSES, BLOCK_ROWS = 2048, 1024  # the kernel's kMostClasses and kMostRows


@dataclass
class LinearCrossEntropyRows:
    """`cross_entropy_rows_` of logits x Wᵀ + bias, with the gradient of x.

    The CPU kernel computes `BLOCK_CLASSES` classes of `BLOCK_ROWS` rows at a time and rounds a row's gradient once. The
    logits are never all in memory, and a block of W is read from memory once for both products. With label smoothing,
    or fewer rows than its matrix products support (64 in fp32), it computes as the reference does.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    class_weight: Tensor | None
    grad_scale: Tensor | None
    settings: Sequence[float]
    gradient: bool = True
    ignore_index: int = -100

    def __post_init__(self) -> None:
        op, classes = "linear_cross_entropy_rows", len(self.weight)
        check_linear(self.x, self.weight, self.bias, op)
        require(self.x.dim() == 2, op, f"x must be [rows, in], found {list(self.x.shape)}")
        require(classes > 0, op, f"weight must have a row for each class, found {list(self.weight.shape)}")
        check_labels(self.labels, self.x.shape[0], self.x, classes, self.class_weight, op)
        check_settings(self.settings, op)
        check_grad_scale(self.grad_scale, self.x, op)

    def compute(self) -> tuple[Tensor, Tensor]:
        logits = F.linear(self.x, self.weight, self.bias).contiguous()
        options = self.class_weight, self.grad_scale, self.settings, self.ignore_index, self.gradient
        rows = CrossEntropyRows(logits, self.labels, *options).compute()
        if not self.gradient:
            return rows, self.x.new_empty(0)
        return rows, (logits @ self.weight).masked_fill_((self.labels == self.ignore_index)[:, None], 0)

    def empty(self) -> tuple[Tensor, Tensor]:
        rows = self.x.new_empty((3, self.x.shape[0]), dtype=wide_dtype(self.x))
        return rows, self.x.new_empty(self.x.shape if self.gradient else (0,))


define_by(
    "linear_cross_entropy_rows(Tensor x, Tensor weight, Tensor? bias, Tensor labels, Tensor? class_weight, "
    "Tensor? grad_scale, float[] settings, bool gradient=True, int ignore_index=-100) -> (Tensor rows, Tensor grad)",
    LinearCrossEntropyRows,
)


def has_blocks(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether `linear_cross_entropy_rows` has a kernel that works in blocks of classes (no label smoothing)."""
    return extension is not None and device.type == "cpu" and bool(extension.has_cross_entropy(str(dtype)))


# Number of logits processed at a time: on the CPU few enough for their fp32 copy to stay in cache, on GPUs 256 MiB.
_PIECE = {"cpu": 1 << 18, "cuda": 1 << 26}


class _Losses(torch.autograd.Function):
    """Losses `[rows]` of logits `[rows, classes]`. The backward pass recomputes the softmax."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        losses = logits.new_zeros(len(labels), dtype=wide_dtype(logits))
        for piece in _pieces(logits, labels, ignore_index):
            losses[piece] = _losses_and_gradient(logits[piece], labels[piece], ignore_index, False)[0]
        ctx.save_for_backward(logits, labels)
        ctx.ignore_index = ignore_index
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, labels = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True needs PyTorch's own formula, which can be differentiated again
            losses = _by_pytorch(logits, labels, ctx.ignore_index)
            return torch.autograd.grad(losses, logits, grad, create_graph=True)[0], None, None
        of_logits = torch.zeros_like(logits)
        for piece in _pieces(logits, labels, ctx.ignore_index):
            of_losses = _losses_and_gradient(logits[piece], labels[piece], ctx.ignore_index, True)[1]
            of_logits[piece] = of_losses.mul_(grad[piece][:, None]).to(logits.dtype)
        return of_logits, None, None


def _pieces(logits: Tensor, labels: Tensor, ignore_index: int) -> Iterator[slice | Tensor]:
    classes = logits.shape[1]
    size = _PIECE.get(logits.device.type, _PIECE["cuda"]) // classes
    return labelled_pieces(labels, ignore_index, classes, max(1, size), "cross_entropy")


def _losses_and_gradient(rows: Tensor, labels: Tensor, ignore_index: int, gradient: bool) -> tuple[Tensor, Tensor]:
    """Return the loss of each row of logits and its gradient with respect to the row, both in fp32 or float64."""
    rows = rows.to(wide_dtype(rows), copy=True)
    losses, _, _ = cross_entropy_rows_(rows, labels, None, None, Settings(), ignore_index, gradient)
    return losses, rows


def _by_pytorch(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    return F.cross_entropy(logits.to(wide_dtype(logits)), labels, ignore_index=ignore_index, reduction="none")


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Return the cross-entropy of each row, like `F.cross_entropy(logits.float(), labels, reduction="none")`.

    Neither the forward nor the backward pass makes an fp32 copy of all logits. Compiled code and tensor subclasses
    (DTensor) use PyTorch's function.

    Args:
        logits: fp32, fp16, bf16 or float64 `[..., classes]`.
        labels: int64 `[...]`, from 0 to classes - 1, or `ignore_index`.
        ignore_index: label of rows that are skipped; their loss is 0.

    Returns:
        fp32 (float64 for float64) `[...]`.

    Raises:
        ValueError: the shapes do not match.
        TypeError: a dtype is not supported.
        IndexError: a label is out of range (CPU only; on a GPU, the loss of its row is NaN).
    """
    op, shape = "cross_entropy", list(logits.shape)
    require(shape != [] and shape[-1] > 0, op, f"logits must be [..., classes], found {shape}")
    require(list(labels.shape) == shape[:-1], op, f"labels must be {shape[:-1]}, found {list(labels.shape)}")
    rows, flat = logits.reshape(-1, shape[-1]), labels.reshape(-1)
    if type(logits) is not Tensor or labels.is_meta or torch.compiler.is_compiling() or has_active_transform():
        losses = _by_pytorch(rows, flat, ignore_index)
    else:
        losses = _Losses.apply(rows, flat, ignore_index)  # type: ignore[no-untyped-call]
    return losses.reshape(labels.shape)
