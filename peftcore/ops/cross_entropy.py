"""Cross-entropy of rows of logits, and its gradient in place of the logits.

    z = scale · x, or with a soft cap  z = cap · tanh(scale · x / cap)
    lse = log Σ exp(z),  p = exp(z - lse),  entropy = lse - Σ p z
    loss = (1 - ε) w_y (lse - z_y) + ε/V Σ_c w_c (lse - z_c) + ζ lse²

    dloss/dx_c = (p_c ((1 - ε) w_y + ε/V Σ w + 2 ζ lse) - (1 - ε) w_y [c = y] - ε/V w_c) · scale · (1 - (z_c / cap)²)

ε is the label smoothing, w the weights of the V classes, ζ the coefficient of the z-loss. Logits of any dtype are read
as fp32, the kernel keeps sums over the vocabulary in float64, and the gradient is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from peftcore.ops._library import define_by
from peftcore.ops.weight import check_dtype, value


class Settings(NamedTuple):
    """Numbers of the formula, in the order in which operators take them. A `soft_cap` of 0 means none."""

    label_smoothing: float = 0.0
    logit_scale: float = 1.0
    soft_cap: float = 0.0
    z_loss: float = 0.0


def check_labels(labels: Tensor, rows: int, logits: Tensor, classes: int, class_weight: Tensor | None, op: str) -> None:
    """Check labels `[rows]` and class weights `[classes]`; `logits` is any tensor on the device of the logits."""
    if labels.dtype != torch.int64:
        raise TypeError(f"{op}: labels must be torch.int64, found {labels.dtype}")
    value(labels.shape == (rows,), op, f"labels must be [{rows}], found {list(labels.shape)}")
    value(labels.device == logits.device, op, f"labels must be on {logits.device}, found {labels.device}")
    if class_weight is None:
        return
    if class_weight.dtype != wide(logits):
        raise TypeError(f"{op}: class_weight must be {wide(logits)}, found {class_weight.dtype}")
    found = f"found {list(class_weight.shape)}"
    value(class_weight.shape == (classes,), op, f"class_weight must be [{classes}], {found}")
    value(class_weight.device == logits.device, op, f"class_weight must be on {logits.device}")


def check_settings(settings: Sequence[float], op: str) -> Settings:
    value(len(settings) == 4, op, f"settings must be 4 numbers, found {len(settings)}")
    found = Settings(*settings)
    smoothing, _, cap, _ = found
    value(0 <= smoothing <= 1, op, f"label_smoothing must be from 0 to 1, found {smoothing}")
    value(cap >= 0, op, f"soft_cap must be positive, or 0 for none, found {cap}")
    return found


def wide(x: Tensor) -> torch.dtype:
    """Return the dtype in which logits are read: fp32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def capped(x: Tensor, settings: Settings) -> tuple[Tensor, Tensor | float]:
    """Return z for wide logits x, and dz/dx."""
    if settings.soft_cap == 0:
        return x * settings.logit_scale, settings.logit_scale
    t = torch.tanh(x * (settings.logit_scale / settings.soft_cap))
    return settings.soft_cap * t, settings.logit_scale * (1 - t * t)


def factors(
    lse: Tensor, target: Tensor, class_weight: Tensor | None, settings: Settings, classes: int
) -> tuple[Tensor, Tensor]:
    """Return the factors of p and of the label in the gradient of each row."""
    share = 1 - settings.label_smoothing
    if class_weight is None:
        of_label, total = torch.full_like(lse, share), torch.full_like(lse, settings.label_smoothing)
    else:
        of_label = share * class_weight[target]
        total = (settings.label_smoothing / classes * class_weight.sum()).expand_as(lse)
    return of_label + total + 2 * settings.z_loss * lse, of_label


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
        value(x.dim() == 2 and x.shape[1] > 0, op, f"logits must be [rows, classes], found {list(x.shape)}")
        value(x.is_contiguous(), op, f"logits must be contiguous, found strides {list(x.stride())}")
        check_labels(self.labels, x.shape[0], x, x.shape[1], self.class_weight, op)
        self.numbers = check_settings(self.settings, op)
        if self.grad_scale is not None:
            found = f"found {self.grad_scale.dtype} {list(self.grad_scale.shape)}"
            fits = self.grad_scale.dtype == wide(x) and self.grad_scale.numel() == 1
            value(fits, op, f"grad_scale must be one value of {wide(x)}, {found}")
            value(self.grad_scale.device == x.device, op, f"grad_scale must be on {x.device}")

    def compute(self) -> Tensor:
        classes, smoothing = self.logits.shape[1], self.numbers.label_smoothing
        z, slope = capped(self.logits.to(wide(self.logits)), self.numbers)
        counts = self.labels != self.ignore_index
        inside = (self.labels >= 0) & (self.labels < classes)
        target = self.labels.where(inside, 0)
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
        # On a GPU an invalid label cannot raise an error without waiting for it: its row becomes NaN.
        nan = torch.where(inside, 0.0, torch.nan).to(lse.dtype)
        rows = torch.stack([loss + nan, lse, entropy]).where(counts, 0)
        if self.gradient:
            grad = p * of_softmax[:, None] - uniform
            grad.scatter_add_(1, target[:, None], (nan - of_label)[:, None])
            grad *= slope if self.grad_scale is None else slope * self.grad_scale
            self.logits.copy_(grad.masked_fill_(~counts[:, None], 0))
        return rows

    def empty(self) -> Tensor:
        return self.logits.new_empty((3, self.logits.shape[0]), dtype=wide(self.logits))


define_by(
    "cross_entropy_rows_(Tensor(a!) logits, Tensor labels, Tensor? class_weight, Tensor? grad_scale, float[] settings, "
    "int ignore_index, bool gradient=True) -> Tensor",
    CrossEntropyRows,
)

cross_entropy_rows_ = torch.ops.peftcore.cross_entropy_rows_.default
