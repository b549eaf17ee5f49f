"""Steps of optimizers: equal bits to those of the reference on the CPU."""

from __future__ import annotations

from tempfile import TemporaryDirectory

import torch

from card.checks import DTYPES, same
from card.table import Place, cases
from peftcore import ops, optim
from peftcore.ops import optim_rules as rules
from peftcore.ops.optim import optim_step_reference

COUNTS = {"small": (1, 255, 256, 700), "large": (3, 1 << 20, 300_001)}


def scalars(rule: str, step: int) -> tuple[float, ...]:
    if rule == "lion":
        return rules.LionScalars.from_options(1e-2, (0.9, 0.99), 0.1)
    if rule == "momentum":
        return rules.MomentumScalars.from_options(step, 1e-2, 0.9, 0.1, 0.1, True)
    return rules.RULES[rule].scalars.from_options(step, 1e-2, (0.9, 0.999), 1e-8, 0.1)._replace(factor=0.3)


@cases(
    rule=rules.RULES,
    counts=COUNTS,
    dtype=DTYPES,
    gradients=DTYPES,
    stochastic=(False, True),
    emulated=lambda rule, counts, dtype, gradients, stochastic: (
        counts == "small" and gradients is dtype and (dtype is DTYPES[0]) != stochastic
    ),
)
def optim_step(
    place: Place, rule: str, counts: str, dtype: torch.dtype, gradients: torch.dtype, stochastic: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(n, generator=generator).to(dtype) for n in COUNTS[counts]]
    state = [plane.new(p) for plane in rules.RULES[rule].planes for p in params]
    ours, our_state = ([t.clone().to(place.device) for t in each] for each in (params, state))
    rows = [i % 2 for i in range(len(params))]
    streams = list(range(len(params))) if stochastic else []
    for step in (1, 2, 3):
        grads = [torch.randn(p.numel(), generator=generator).to(gradients) for p in params]
        updates = [*scalars(rule, step), *scalars(rule, step + 4)], [step, step + 4], rows, streams
        ops.optim_step_(ours, [g.to(place.device) for g in grads], our_state, rule, *updates)
        optim_step_reference(params, grads, state, rule, *updates)
    for index, (found, wanted) in enumerate(zip([*ours, *our_state], [*params, *state], strict=True)):
        same(found, wanted, f"tensor {index}")


@cases(name=("AdamW", "AdamW8bit", "Lion", "SGD"), dtype=(torch.float32, torch.bfloat16))
def paged_state(place: Place, name: str, dtype: torch.dtype) -> str:
    """Optimizers with a quarter of their state on the card have the bits of those with all of it there."""
    shapes = [(1024, 4096), (300, 77), (5,), (2048, 4096)]
    started = [torch.nn.Parameter(place.normal(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(shapes)]
    paged = [torch.nn.Parameter(p.detach().clone()) for p in started]
    options = {"lr": 1e-3} | ({"momentum": 0.9} if name == "SGD" else {})
    bytes_of_state = sum(p.numel() for p in started) * (2 if name == "AdamW8bit" else 8 if name == "AdamW" else 4)
    with TemporaryDirectory() as folder:
        plain = getattr(optim, name)(started, **options)
        other = getattr(optim, f"Paged{name}")(
            paged, budget=max(bytes_of_state // 4, 16 << 20), directory=folder, **options
        )
        for step in range(3):
            for index, (p, q) in enumerate(zip(started, paged, strict=True)):
                p.grad = place.normal(*p.shape, seed=100 * step + index, dtype=dtype)
                q.grad = p.grad.clone()
            plain.step()
            other.step()
        for index, (p, q) in enumerate(zip(started, paged, strict=True)):
            same(q.detach(), p.detach(), f"parameter {index}")
        text = str(other.paging())
    return text
