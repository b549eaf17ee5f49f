"""Low-rank products B A nearest to a matrix or to another product (Eckart, Young 1936).

kept = |B A| / |M|      (Frobenius), so |M - B A| / |M| = sqrt(1 - kept²)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftcore.plugin.adapter import LowRank

ENOUGH = 0.99  # fraction of a change to keep if no rank is given


class Approximation(NamedTuple):
    """A low-rank product, B `[out, r]` and A `[r, in]`, and the fraction of the original matrix that it keeps."""

    product: LowRank
    kept: float


def dense(product: LowRank) -> Tensor:
    """Return the product times its scale, `[out, in]`, fp32."""
    return (product.scale * product.b.detach().flatten(1).float()) @ product.a.detach().flatten(1).float()


def of_matrix(matrix: Tensor, r: int | None) -> Approximation:
    """Return the product of rank `r` nearest to an fp32 matrix `[out, in]`.

    If `r` is None, the rank is the smallest that keeps `ENOUGH`.
    """
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return _cut(u, s, v, r)


def of_product(b: Tensor, a: Tensor, r: int | None) -> Approximation:
    """Like `of_matrix`, for the product b `[out, R]` · a `[R, in]`, fp32, without computing the matrix."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return _cut(q_b @ u, s, v @ q_a.T, r)


def kept_of(found: Sequence[Approximation]) -> float:
    """Return the fraction that several products together keep of the matrices they approximate."""
    pairs = [(each.product.a, each.product.b) for each in found]
    norms = [((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt().item() for a, b in pairs]
    asked = math.hypot(*(norm / each.kept for norm, each in zip(norms, found, strict=True)))
    return math.hypot(*norms) / asked if asked else 1.0


def _cut(u: Tensor, s: Tensor, v: Tensor, r: int | None) -> Approximation:
    energy = s.double().square().cumsum(0)
    if r is None:
        r = int(torch.searchsorted(energy, ENOUGH**2 * energy[-1]).item()) + 1
    r = min(r, len(s))
    root = s[:r].sqrt()
    kept = (energy[r - 1] / energy[-1]).sqrt().item() if energy[-1] else 1.0
    return Approximation(LowRank(root[:, None] * v[:r], u[:, :r] * root), kept)
