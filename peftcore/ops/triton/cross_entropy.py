"""Cross-entropy of rows of logits, and its gradient in their place: a program reads its row twice and writes it once.

Formulas: `peftcore/ops/cross_entropy.py`. In the first pass each lane keeps a running maximum m of its logits z, and
Σ e^(z-m) and Σ (z-m) e^(z-m) relative to it (Milakov & Gimelshein 2018, Online normalizer calculation for softmax,
extended by the second sum), with one exponential for each logit. The lanes are then added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from peftcore.ops.triton.functions import exp, log, tanh

if TYPE_CHECKING:
    from peftcore.ops.cross_entropy import CrossEntropyRows

_BLOCK_BYTES = 8192  # of a row, read at once: 32 bytes for each of 256 threads
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32; with minus infinity, differences from it would be NaN


@triton.jit
def _capped(x, scale, cap, has_cap: tl.constexpr):
    z = x.to(tl.float32) * scale
    if has_cap:
        z = cap * tanh(x.to(tl.float32) * (scale / cap))
    return z


@triton.jit
def _difference(z, m):
    """Return z - m, clamped to where e^-|z - m| is 0: 0 times an infinite difference would be NaN."""
    bounded = tl.maximum(z - m, -1e4, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(bounded, 1e4, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _store_statistics(out, rows, loss, lse, entropy):
    tl.store(out, loss)
    tl.store(out + rows, lse)
    tl.store(out + rows + rows, entropy)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _cross_entropy_kernel(
    logits,
    labels,
    class_weight,
    total_weight,
    grad_scale,
    out,
    rows,
    classes,
    ignore_index,
    smoothing,
    scale,
    cap,
    z_loss,
    has_smoothing: tl.constexpr,
    has_cap: tl.constexpr,
    gradient: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block).to(tl.int64)
    x = logits + row * classes
    label = tl.load(labels + row)
    if label == ignore_index:
        _store_statistics(out + row, rows, 0.0, 0.0, 0.0)
        if gradient:
            for start in range(0, classes, block):
                tl.store(x + start + column, tl.zeros([block], logits.dtype.element_ty), start + column < classes)
        return
    valid = (label >= 0) & (label < classes)
    target = tl.where(valid, label, 0)
    z_target = _capped(tl.load(x + target), scale, cap, has_cap)

    maximum = tl.full([block], _LOWEST, tl.float32)
    exponentials = tl.zeros([block], tl.float32)
    products = tl.zeros([block], tl.float32)
    weighted = tl.zeros([block], tl.float32)
    for start in range(0, classes, block):
        mask = start + column < classes
        z = tl.where(mask, _capped(tl.load(x + start + column, mask, 0.0), scale, cap, has_cap), float("-inf"))
        if has_smoothing:
            weight = 1.0 if class_weight is None else tl.load(class_weight + start + column, mask, 1.0)
            weighted += tl.where(mask, weight * z, 0.0)
        difference = _difference(z, maximum)
        e = exp(-tl.abs(difference))
        rises = difference > 0
        products = tl.where(rises, e * (products - exponentials * difference), products + e * difference)
        exponentials = tl.where(rises, e * exponentials + 1, exponentials + e)
        maximum = tl.maximum(maximum, z, propagate_nan=tl.PropagateNan.ALL)
    highest = tl.max(maximum, 0)
    difference = _difference(maximum, highest)
    e = exp(difference)
    products_sum = tl.sum(e * (products + exponentials * difference), 0)
    exponentials_sum = tl.sum(e * exponentials, 0)

    of_label = 1 - smoothing
    if class_weight is not None:
        of_label *= tl.load(class_weight + target)
    uniform = smoothing / classes
    all_weights = classes if total_weight is None else tl.load(total_weight)
    log_sum = log(exponentials_sum)
    lse = highest + log_sum
    loss = of_label * ((highest - z_target) + log_sum) + z_loss * lse * lse
    if has_smoothing:
        loss += uniform * (all_weights * lse - tl.sum(weighted, 0))
    loss = tl.where(valid, loss, float("nan"))
    _store_statistics(out + row, rows, loss, lse, log_sum - products_sum / exponentials_sum)

    if gradient:
        of_softmax = (of_label + uniform * all_weights + 2 * z_loss * lse) / exponentials_sum
        of_target = tl.where(valid, of_label, float("nan"))
        factor = scale if grad_scale is None else scale * tl.load(grad_scale)
        for start in range(0, classes, block):
            mask = start + column < classes
            z = _capped(tl.load(x + start + column, mask, 0.0), scale, cap, has_cap)
            grad = of_softmax * exp(_difference(z, highest))
            if has_smoothing:
                grad -= uniform * (1.0 if class_weight is None else tl.load(class_weight + start + column, mask, 0.0))
            grad = factor * tl.where(start + column == target, grad - of_target, grad)
            if has_cap:
                grad *= 1 - (z / cap) * (z / cap)
            tl.store(x + start + column, grad.to(logits.dtype.element_ty), mask)


def cross_entropy_rows_(call: CrossEntropyRows) -> Tensor:
    """Return losses, lse and entropies in fp32 `[3, rows]`, and replace the logits by their gradient."""
    out = call.empty()
    rows, classes = call.logits.shape
    weight = None if call.class_weight is None else call.class_weight.contiguous()
    total_weight = None if weight is None else weight.sum()
    settings = call.numbers
    itemsize = call.logits.itemsize
    block = min(triton.next_power_of_2(classes), _BLOCK_BYTES // itemsize)
    _cross_entropy_kernel[(rows,)](
        call.logits,
        call.labels.contiguous(),
        weight,
        total_weight,
        call.grad_scale,
        out,
        rows,
        classes,
        call.ignore_index,
        *(float(number) for number in settings),
        settings.label_smoothing != 0,
        settings.soft_cap != 0,
        call.gradient,
        block,
        num_warps=max(1, block * itemsize // 1024),
        enable_fp_fusion=True,
    )
    return out
