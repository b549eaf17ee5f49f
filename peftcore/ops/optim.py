"""One step of an optimizer over many tensors: parameters and state are updated in place, in one call.

    optim_step_(params, grads, state, rule, scalars, steps, rows, streams)

A rule computes in fp32 and rounds a parameter once, to the nearest or at random (`streams`). Its state is a list of
planes, in each one tensor a parameter:

    adamw       m, v: fp32
    adamw_8bit  m, v: uint8 codes of the dynamic map; then the largest magnitude of every block of 256: fp32
    lion        m: fp32
    momentum    b: fp32

What is the same for many parameters stands in `scalars`, eight numbers a row, and `rows` says which row each uses;
`adamw_scalars` and its like make them from hyperparameters. csrc/optim/optim.h has the formulas.

The fp32 rule gives the bits of `torch.optim.AdamW(fused=True)` on CPU. Sources: Loshchilov and Hutter, arXiv 1711.05101
(AdamW); Dettmers et al., arXiv 2110.02861, section 2 (8 bits); Chen et al., arXiv 2302.06675 (Lion).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peftcore.ops import _extension
from peftcore.ops._library import constants, define
from peftcore.ops._philox import LOW, philox
from peftcore.ops.nf4 import DTYPES, DYNAMIC8

BLOCK = 256  # elements that share a scale
SCALARS = 8  # a row
PLANES = {  # bytes an element, or 0: fp32 a block
    "adamw": (4, 4),
    "adamw_8bit": (1, 1, 0, 0),
    "lion": (4,),
    "momentum": (4,),
}


def _unsigned_map() -> Tensor:
    """The unsigned dynamic map: for every power of ten from 1e-6 to 1, the middles of 2, 4, ... 128 equal parts of
    [0.1, 1]; with 0 and 1 that is 256 values, sorted."""
    values = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + 1) + 1)
        values.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6))
    return torch.cat(values).sort().values


SIGNED_MAP = DYNAMIC8
with constants():
    UNSIGNED_MAP = _unsigned_map()


# --- rows of scalars -------------------------------------------------------------------------------------------------


def adamw_scalars(
    rule: str,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    factor: float = 1.0,
) -> list[float]:
    """The row of AdamW's `step`-th update (from 1): for gradients times `factor`, which is -1 to maximise."""
    beta1, beta2 = betas
    root = math.sqrt(1 - beta2**step)
    size = lr / (1 - beta1**step)
    common = [factor, 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2]
    if rule == "adamw_8bit":  # sqrt(v) / root + eps, times root
        return [*common, -size * root, 1.0, eps * root]
    return [*common, -size, root, eps]


def lion_scalars(lr: float, betas: tuple[float, float], weight_decay: float, factor: float = 1.0) -> list[float]:
    """Lion's row."""
    return [factor, 1 - lr * weight_decay, 1 - betas[0], 1 - betas[1], -lr, 0.0, 0.0, 0.0]


def momentum_scalars(
    step: int,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    factor: float = 1.0,
) -> list[float]:
    """The row of SGD's `step`-th update (from 1), whose first takes the whole gradient."""
    weight = 1.0 if step == 1 else 1 - dampening
    return [factor, weight_decay, momentum, weight, -lr, float(nesterov), 0.0, 0.0]


# --- reference -------------------------------------------------------------------------------------------------------


def blocks_of(count: int) -> int:
    return -(-count // BLOCK)


def decode(codes: Tensor, absmax: Tensor, table: Tensor) -> Tensor:
    """8-bit state as fp32: the entry of each code times its block's scale. `codes` and the result are flat."""
    scales = absmax.repeat_interleave(BLOCK)[: codes.numel()]
    return table.to(codes.device)[codes.long()] * scales


def encode(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, absmax) of flat fp32 values; nearest entries as csrc/optim/dynamic8.h decides them.

    What is not finite counts as 0, since it would else be the scale of 256 elements.
    """
    signed = table is SIGNED_MAP
    x = x.where(x.isfinite(), 0)
    blocks = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    inverse = torch.where(absmax > 0, 1 / absmax, 0)
    scaled = (blocks * inverse[:, None]).flatten()[: x.numel()]
    begin, slope, parts = (t.to(x.device) for t in _ENCODERS[signed])
    a = scaled.abs().clamp(min=2.0**-31).nan_to_num(2.0**-31)
    region = torch.bucketize(a, begin)
    n = ((a * slope[region] + 8 / 9).clamp(max=2 - 2.0**-23) * parts[region]).int()
    if signed:
        return torch.where(scaled < 0, 127 - n, 127 + n).clamp(min=0).to(torch.uint8), absmax
    return torch.where(scaled > 0, n - 1, 0).to(torch.uint8), absmax


def _encoder(table: Tensor, signed: bool) -> tuple[Tensor, ...]:
    """(where regions begin, slope, parts): see csrc/optim/dynamic8.h."""
    s, zero = (0, 127) if signed else (1, -1)
    parts = [2 ** (d + s) for d in range(7)]
    begin = [table[zero + 1] / 2 if signed else table[1]]
    begin += [(table[zero + n - 1] + table[zero + n]) / 2 for n in (*parts[1:], 2 ** (7 + s))]
    slope = [0.0, *(10.0 ** (6 - d) / 0.9 for d in range(7)), 2.0]
    ends = [0.0 if signed else 2.5, *parts, (2 ** (7 + s) + 0.5) / 2]
    return torch.stack(begin), torch.tensor(slope), torch.tensor(ends)


with constants():
    _ENCODERS = {True: _encoder(SIGNED_MAP, True), False: _encoder(UNSIGNED_MAP, False)}


def round_stochastic(x: Tensor, dtype: torch.dtype, stream: int, step: int) -> Tensor:
    """Flat fp32 values rounded to 16 bits, up with the probability of the fraction that is cut off."""
    group = torch.arange(-(-x.numel() // 8), device=x.device)  # 8 elements share one call of the generator
    counter = (group & LOW, group >> 32, torch.full_like(group, step & LOW), torch.full_like(group, step >> 32 & LOW))
    random = philox(counter, stream, rounds=10).flatten()[: x.numel()]
    bits = x.view(torch.int32).long() & LOW
    sign, magnitude = bits >> 16 & 0x8000, bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        rounded = (bits + random) >> 16
    else:
        tiny = (x.abs() * 2.0**40).nan_to_num(0, 0, 0).clamp(max=2.0**30).long()
        small = magnitude < 0x38800000
        rounded = torch.where(small, (tiny + random) >> 16, (magnitude - 0x38000000 + (random >> 3)) >> 13) | sign
        rounded = torch.where(magnitude >= 0x47800000, 0x7C00 | sign, rounded)
    drawn = torch.where(rounded >= 0x8000, rounded - 0x10000, rounded).to(torch.int16).view(dtype)
    return torch.where(x.isfinite(), drawn, x.to(dtype))


def _adamw(p: Tensor, g: Tensor, state: list[Tensor], row: list[float]) -> None:
    _, decay, weight1, beta2, weight2, size, root, eps = row
    m, v = state
    p.mul_(decay)
    m.lerp_(g, weight1)
    # In fp64 a product of two fp32 is exact, and a root rounds right (PyTorch's own may be off by one).
    v.copy_((weight2 * g).double() * g + v * beta2)
    p.add_(size * m / (v.double().sqrt().float() / root).add_(eps))


def _adamw_8bit(p: Tensor, g: Tensor, state: list[Tensor], row: list[float]) -> None:
    m, v = decode(state[0], state[2], SIGNED_MAP), decode(state[1], state[3], UNSIGNED_MAP)
    _adamw(p, g, [m, v], row)
    finite = m.isfinite() & v.isfinite()  # one element must not become the scale of 256: its state begins anew
    m, v = m.where(finite, 0), v.where(finite, 0)
    for place, moment, table in ((0, m, SIGNED_MAP), (1, v, UNSIGNED_MAP)):
        codes, absmax = encode(moment, table)
        state[place].copy_(codes)
        state[place + 2].copy_(absmax)


def _lion(p: Tensor, g: Tensor, state: list[Tensor], row: list[float]) -> None:
    _, decay, weight1, weight2, size = row[:5]
    mean = torch.lerp(state[0], g, weight1)
    p.mul_(decay).add_(size * mean.sign().where(~mean.isnan(), mean))  # sign makes 0 of NaN
    state[0].lerp_(g, weight2)


def _momentum(p: Tensor, g: Tensor, state: list[Tensor], row: list[float]) -> None:
    _, weight_decay, momentum, weight, size, nesterov = row[:6]
    g = g + weight_decay * p
    state[0].mul_(momentum).add_(weight * g)
    p.add_(size * (g + momentum * state[0] if nesterov else state[0]))


_RULES = {"adamw": _adamw, "adamw_8bit": _adamw_8bit, "lion": _lion, "momentum": _momentum}


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Sequence[Tensor],
    rule: str,
    scalars: Sequence[float],
    steps: Sequence[int],
    rows: Sequence[int],
    streams: Sequence[int],
) -> None:
    if rule not in _RULES:
        raise ValueError(f"optim_step_: no rule '{rule}' (there are: {', '.join(_RULES)})")
    planes = PLANES[rule]
    for name, found, wanted in (
        ("grads", len(grads), len(params)),
        ("rows", len(rows), len(params)),
        ("tensors of state", len(state), len(planes) * len(params)),
        ("scalars", len(scalars), SCALARS * len(steps)),
        ("streams", len(streams), len(params) if streams else 0),
    ):
        if found != wanted:
            raise ValueError(f"optim_step_: {len(params)} params and {len(steps)} rows need {wanted} {name}, "
                             f"found {found}")  # fmt: skip
    for name, tensors in (("params", params), ("grads", grads)):
        for t in tensors:
            if t.dtype not in DTYPES:
                raise TypeError(f"optim_step_: {name} must be float32, float16 or bfloat16, found {t.dtype}")
    for i, t in enumerate(state):
        size, count = planes[i // len(params)], params[i % len(params)].numel()
        wanted = torch.uint8 if size == 1 else torch.float32
        if t.dtype != wanted:
            raise TypeError(f"optim_step_: state must be {wanted}, found {t.dtype}")
        if t.numel() != (count if size else blocks_of(count)):
            raise ValueError(f"optim_step_: state of {t.numel()} elements for a parameter of {count}")


@torch.no_grad()
def optim_step_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Sequence[Tensor],
    rule: str,
    scalars: Sequence[float],
    steps: Sequence[int],
    rows: Sequence[int],
    streams: Sequence[int] = (),
) -> None:
    _check(params, grads, state, rule, scalars, steps, rows, streams)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        row = list(scalars[SCALARS * rows[i] : SCALARS * (rows[i] + 1)])
        own = [t.view(-1) for t in state[i :: len(params)]]
        p = param.detach().flatten().float()
        _RULES[rule](p, grad.flatten().float() * row[0], own, row)
        rounds = bool(streams) and streams[i] >= 0 and param.dtype != torch.float32
        result = round_stochastic(p, param.dtype, streams[i], steps[rows[i]]) if rounds else p
        param.detach().copy_(result.view(param.shape))


def _fake(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Sequence[Tensor],
    rule: str,
    scalars: Sequence[float],
    steps: Sequence[int],
    rows: Sequence[int],
    streams: Sequence[int] = (),
) -> None:
    _check(params, grads, state, rule, scalars, steps, rows, streams)


define(
    "optim_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state, str rule, float[] scalars, int[] steps, "
    "int[] rows, int[] streams=[]) -> ()",
    optim_step_reference,
    _fake,
)

optim_step_ = torch.ops.peftcore.optim_step_.default


def _needs_pool(*_: object) -> None:
    raise RuntimeError(f"paged optimizer state needs the compiled extension: {_extension.missing_because}")


# The same with state in a page pool of the extension: `slots` says in which block of 256 each parameter's begins. A
# sweep that is repeated with the same number, because a transfer failed, goes on where it stopped.
define(
    "optim_step_paged_(Tensor(a!)[] params, Tensor[] grads, int pool, int[] slots, str rule, float[] scalars, "
    "int[] steps, int[] rows, int[] streams, int sweep, bool backward) -> ()",
    _needs_pool,
    lambda *_: None,
)

optim_step_paged_ = torch.ops.peftcore.optim_step_paged_.default
