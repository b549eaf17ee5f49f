"""Cross-entropy of rows of logits in Triton, and its gradient in their place, against float64."""

from __future__ import annotations

import torch

from card.checks import DTYPES, repeated
from card.table import Place, cases
from peftcore.ops.cross_entropy import CrossEntropyRows

# (weights of classes, a scale of the gradient, [label smoothing, scale, cap, z-loss])
SETTINGS = {
    "plain": (False, False, [0.0, 1.0, 0.0, 0.0]),
    "weighted": (True, True, [0.1, 0.5, 0.0, 0.01]),
    "capped": (False, False, [0.2, 2.0, 5.0, 0.0]),
}


@cases(
    rows=(1, 5, 65, 2048),
    classes=(1, 7, 256, 900, 32000, 128256),
    dtype=DTYPES,
    kind=SETTINGS,
    every=6,  # Triton compiles a kernel for most of them
)
def cross_entropy(place: Place, rows: int, classes: int, dtype: torch.dtype, kind: str) -> None:
    """Compute losses, lse and entropy of the rows, and the gradient."""
    weighted, scaled, settings = SETTINGS[kind]
    logits = (3 * place.normal(rows, classes, seed=1)).to(dtype)
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(2)).to(place.device)
    labels[rows // 2] = -100
    weights = place.normal(classes, seed=3).abs() + 0.1 if weighted else None
    scale = torch.tensor(0.25, device=place.device) if scaled else None

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        own = logits.clone()
        return torch.ops.peftcore.cross_entropy_rows_(own, labels, weights, scale, settings, -100, True), own

    found, gradient = repeated(place, run, "call")
    reference = logits.double()
    wide = [None if t is None else t.double() for t in (weights, scale)]
    wanted = CrossEntropyRows(reference, labels, *wide, settings, -100, True).compute()
    torch.testing.assert_close(found, wanted.float(), rtol=2e-5, atol=4e-5)
    step = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(gradient.float(), reference.float(), rtol=2 * step + 1e-5, atol=1e-5)
    unread = logits.clone()
    again = torch.ops.peftcore.cross_entropy_rows_(unread, labels, weights, scale, settings, -100, False)
    assert torch.equal(again, found) and torch.equal(unread, logits), "a call without gradients differs"
