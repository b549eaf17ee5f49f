"""RMSNorm, gated activations and their gradients in Triton, against float64.

Triton compiles a kernel for each dtype and width of a block in about a second, so few combinations are cases.
"""

from __future__ import annotations

import torch
from torch import Tensor

import peftcore.ops.swiglu  # noqa: F401  it defines the operator
from card.checks import DTYPES, EPS, repeated
from card.table import Place, cases
from peftcore.ops.gated import ACTIVATIONS

_OPS = torch.ops.peftcore
# Several rows for a program, one, and rows that its registers do not hold; with vectors of 16 bytes and without.
COLUMNS = (1, 75, 128, 2048, 4096, 9000, 16384)


def close(found: Tensor, wanted: Tensor, terms: Tensor, what: str, tiny: Tensor | float = 1.0) -> str:
    """Check values that were rounded up to twice and are sums of `terms`; return the error over its limit.

    `tiny`: factor of a value that was rounded among the smallest ones of fp16, which are 2^-24 apart.
    """
    limit = 2.1 * EPS[found.dtype] * wanted.abs() + 2.0**-20 * terms + 2.0**-24 * (tiny + 1.0)
    of_limit = ((found.double() - wanted).abs() / limit).nan_to_num(nan=torch.inf)
    worst = float(of_limit.max()) if of_limit.numel() else 0.0
    assert worst <= 1, f"{what} is off by up to {worst:.3g} times the limit"
    return f"{what} {worst:.2f}"


@cases(
    rows=(1, 5, 70, 4097),
    columns=COLUMNS,
    dtype=DTYPES,
    weights=DTYPES,
    kind=("llama", "gemma"),
    every=10,
)
def rms_norm(place: Place, rows: int, columns: int, dtype: torch.dtype, weights: torch.dtype, kind: str) -> str:
    """Compute y, r and the gradients of x and the weight."""
    offset, rounded = (0.0, True) if kind == "llama" else (1.0, False)
    x, grad = (place.normal(rows, columns, seed=seed, dtype=dtype) for seed in (1, 2))
    weight = place.normal(columns, seed=3, dtype=weights)
    y, scale = repeated(place, lambda: _OPS.rms_norm(x, weight, 1e-5, offset, rounded), "forward pass")
    needs = [True, True]
    dx, dweight = repeated(
        place, lambda: _OPS.rms_norm_backward(grad, x, weight, scale, offset, rounded, needs), "backward pass"
    )
    wide, dy, g = x.double(), grad.double(), offset + weight.double()
    r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(scale.double(), r.flatten(), rtol=1e-6, atol=0)
    # The kernels' own r, so that rounding to 16 bits agrees.
    normed = x.float() * scale[:, None]
    kept = normed.to(dtype).double() if rounded else normed.double()
    mean = (dy * g * wide * r).mean(-1, keepdim=True)
    terms = r * (dy * g).abs() + r * (wide * r).abs() * (dy * g * wide * r).abs().mean(-1, keepdim=True)
    return ", ".join(
        (
            close(y, kept * g, (kept * g).abs(), "y"),
            close(dx, r * (dy * g - wide * r * mean), terms, "dx"),
            close(dweight, (dy * kept).sum(0), (dy * kept).abs().sum(0), "dweight"),
        )
    )


def slopes(gate: Tensor, linear: float, cubic: float) -> tuple[Tensor, Tensor]:
    """Return act(g) and its slope."""
    s = torch.sigmoid(linear * gate + cubic * gate.pow(3))
    return gate * s, s * (1 + gate * (1 - s) * (linear + 3 * cubic * gate.pow(2)))


@cases(
    shape=((1,), (3, 75), (5, 1024), (17, 4099), (2048, 14336)),
    dtype=DTYPES,
    name=ACTIVATIONS,
)
def gated(place: Place, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> str:
    """Compute act(g) ∘ u and the gradients of g and u."""
    powers = ACTIVATIONS[name]
    gate, up, grad = (place.normal(*shape, seed=seed, dtype=dtype) for seed in (1, 2, 3))
    gate = gate * 8
    (y,) = repeated(place, lambda: (_OPS.gated(gate, up, *powers),), "forward pass")
    dgate, dup = repeated(place, lambda: _OPS.gated_backward(grad, gate, up, *powers), "backward pass")
    activated, slope = slopes(gate.double(), *powers)
    u, dy = up.double(), grad.double()
    return ", ".join(
        (
            close(y, activated * u, (activated * u).abs(), "y", u.abs()),
            close(dgate, dy * u * slope, (dy * u).abs(), "dg"),
            close(dup, dy * activated, (dy * activated).abs(), "du"),
        )
    )


@cases(
    rows=(1, 6, 1000),
    columns=(1, 75, 96, 1536),
    dtype=DTYPES,
)
def swiglu(place: Place, rows: int, columns: int, dtype: torch.dtype) -> str:
    """Compute silu(g) ∘ u of rows [g, u], and the gradient."""
    x, grad = place.normal(rows, 2 * columns, seed=1, dtype=dtype), place.normal(rows, columns, seed=2, dtype=dtype)
    (y,) = repeated(place, lambda: (_OPS.swiglu(x),), "forward pass")
    (dx,) = repeated(place, lambda: (_OPS.swiglu_backward(grad, x),), "backward pass")
    gate, u = x.double().chunk(2, -1)
    activated, slope = slopes(gate, 1.0, 0.0)
    dy = grad.double()
    wanted = torch.cat([dy * u * slope, dy * activated], -1)
    terms = torch.cat([(dy * u).abs(), (dy * activated).abs()], -1)
    return f"{close(y, activated * u, (activated * u).abs(), 'y')}, {close(dx, wanted, terms, 'dx')}"
