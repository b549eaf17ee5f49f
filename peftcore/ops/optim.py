"""One optimizer step over many tensors: parameters and state are updated in place, in one call.

    optim_step_(params, grads, state, rule, scalars, steps, rows, streams)

`rule` names an entry of `optim_rules.RULES`, where the formulas are. State is passed plane by plane, with one tensor
per parameter in each plane. Numbers that many parameters share, such as the learning rate, are rows of `scalars`, and
`rows` has the row number of each parameter. A rule computes in fp32 and rounds a parameter once, to nearest or
stochastically (`streams`).

The fp32 rule of AdamW is bit-identical to `torch.optim.AdamW(fused=True)` on CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from peftcore.ops import _extension
from peftcore.ops._library import define
from peftcore.ops._philox import LOW, philox
from peftcore.ops.optim_rules import RULES, describe
from peftcore.ops.weight import DTYPES


class Updates(NamedTuple):
    """The non-tensor arguments of an operator.

    Args:
        scalars: the rows of the rule's scalars, concatenated.
        steps: step number for each row of scalars.
        rows: index of the row of scalars, for each parameter.
        streams: for each parameter, the generator's key for stochastic rounding of a 16-bit parameter, or a negative
            number to round to nearest. If empty, all parameters are rounded to nearest.
    """

    scalars: Sequence[float]
    steps: Sequence[int]
    rows: Sequence[int]
    streams: Sequence[int] = ()


def round_stochastic(x: Tensor, dtype: torch.dtype, stream: int, step: int) -> Tensor:
    """Round flat fp32 values to 16 bits: away from 0 with a probability equal to the fraction that is cut off."""
    group = torch.arange(-(-x.numel() // 8), device=x.device)  # one call of the generator serves 8 elements
    counter = (group & LOW, group >> 32, torch.full_like(group, step & LOW), torch.full_like(group, step >> 32 & LOW))
    random = philox(counter, stream, rounds=10).flatten()[: x.numel()]
    bits = x.view(torch.int32).long() & LOW
    sign, magnitude = bits >> 16 & 0x8000, bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        rounded = (bits + random) >> 16
    else:
        small = magnitude < 0x38800000  # below 2^-14, fp16's values are multiples of 2^-24
        tiny = (x.abs() * 2.0**40).nan_to_num(0, 0, 0).clamp(max=2.0**30).long()
        rounded = torch.where(small, (tiny + random) >> 16, (magnitude - 0x38000000 + (random >> 3)) >> 13) | sign
        rounded = torch.where(magnitude >= 0x47800000, 0x7C00 | sign, rounded)  # from 2^16: infinity
    signed = torch.where(rounded >= 0x8000, rounded - 0x10000, rounded).to(torch.int16)
    return torch.where(x.isfinite(), signed.view(dtype), x.to(dtype))


def check_step(
    params: Sequence[Tensor], grads: Sequence[Tensor], state: Sequence[Tensor], rule: str, updates: Updates
) -> None:
    """Check the arguments as csrc/optim/arguments.h does.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: the rule is unknown, or an argument does not match the parameters.
    """
    if rule not in RULES:
        raise ValueError(f"optim_step_: no rule '{rule}' (there are: {', '.join(RULES)})")
    scalars, steps, rows, streams = updates
    planes = RULES[rule].planes
    for name, count, expected in (
        ("grads", len(grads), len(params)),
        ("rows", len(rows), len(params)),
        ("tensors of state", len(state), len(planes) * len(params)),
        ("scalars", len(scalars), len(RULES[rule].scalars._fields) * len(steps)),
        ("streams", len(streams), len(params) if streams else 0),
    ):
        if count != expected:
            raise ValueError(
                f"optim_step_: {len(params)} params and {len(steps)} rows need {expected} {name}, found {count}"
            )
    for name, tensors in (("params", params), ("grads", grads)):
        for t in tensors:
            if t.device != params[0].device:
                raise ValueError(f"optim_step_: {name} must be on {params[0].device}, found {t.device}")
            if t.dtype not in DTYPES:
                raise TypeError(f"optim_step_: {name} must be float32, float16 or bfloat16, found {t.dtype}")
    for param, grad, row in zip(params, grads, rows, strict=True):
        if grad.numel() != param.numel():
            raise ValueError(
                f"optim_step_: a gradient of shape {list(grad.shape)} for a parameter of shape {list(param.shape)}"
            )
        if not 0 <= row < len(steps):
            raise ValueError(f"optim_step_: row {row} of {len(steps)}")
    for i, t in enumerate(state):
        plane, count = planes[i // len(params)], params[i % len(params)].numel()
        if t.device != params[0].device:
            raise ValueError(f"optim_step_: state must be on {params[0].device}, found {t.device}")
        if t.dtype != plane.dtype:
            raise TypeError(f"optim_step_: state must be {plane.dtype}, found {t.dtype}")
        if t.numel() != plane.numel(count):
            raise ValueError(f"optim_step_: state of {t.numel()} elements for a parameter of {count}")


@torch.no_grad()
def optim_step_reference(
    params: Sequence[Tensor], grads: Sequence[Tensor], state: Sequence[Tensor], rule: str, *fields: Any, **options: Any
) -> None:
    """Run `optim_step_` in PyTorch, on any device; the arguments after `rule` are the fields of `Updates`."""
    updates = Updates(*fields, **options)
    check_step(params, grads, state, rule, updates)
    scalars, steps, rows, streams = updates
    size = len(RULES[rule].scalars._fields)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        row = RULES[rule].scalars(*scalars[size * rows[i] : size * (rows[i] + 1)])
        planes_of_param = [t.view(-1) for t in state[i :: len(params)]]
        p = param.detach().flatten().float()
        RULES[rule].update(p, grad.flatten().float() * row.factor, planes_of_param, row)
        is_stochastic = bool(streams) and streams[i] >= 0 and param.dtype != torch.float32
        result = round_stochastic(p, param.dtype, streams[i], steps[rows[i]]) if is_stochastic else p
        param.detach().copy_(result.view(param.shape))


def _fake(
    params: Sequence[Tensor], grads: Sequence[Tensor], state: Sequence[Tensor], rule: str, *fields: Any, **options: Any
) -> None:
    check_step(params, grads, state, rule, Updates(*fields, **options))


define(
    "optim_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state, str rule, float[] scalars, int[] steps, "
    "int[] rows, int[] streams=[]) -> ()",
    optim_step_reference,
    _fake,
    reads_host=True,
)

optim_step_ = torch.ops.peftcore.optim_step_.default


# --- state in pages of the extension ---------------------------------------------------------------------------------


def why_no_pages() -> str | None:
    """Return the reason why paged state is not available, or None if it is available."""
    return _extension.missing_because if _extension.extension is None else None


def paged_state(rule: str, page_bytes: int, budget: int, directory: str, device: int) -> Any:
    """Create pages for the state of one rule (csrc/optim/paged_state.h).

    Args:
        rule: name of the rule.
        page_bytes: size of a page, a multiple of 4,096.
        budget: bytes that may be resident.
        directory: directory of the page file, for state of the CPU.
        device: index of the GPU, or -1 for the CPU.
    """
    if _extension.extension is None:
        return _needs_extension()
    return _extension.extension.PagedState(rule, page_bytes, budget, directory, device)


def _needs_extension(*_: object) -> NoReturn:
    raise RuntimeError(f"paged optimizer state needs the compiled extension, but {_extension.missing_because}")


# `state` is the number of a `paged_state`, and `slots` has the slot that its `allocate` returned for each parameter.
# Sweeps alternate between walking the pages forward and backward. Repeating a sweep with the same number, after a
# failed transfer, continues where it stopped.
define(
    "optim_step_paged_(Tensor(a!)[] params, Tensor[] grads, int state, int[] slots, int sweep, str rule, "
    "float[] scalars, int[] steps, int[] rows, int[] streams=[]) -> ()",
    _needs_extension,
    lambda *_: None,
    reads_host=True,
)

optim_step_paged_ = torch.ops.peftcore.optim_step_paged_.default

if _extension.extension is not None:
    describe(_extension.extension.define_optim_rule)
