"""The update rules of optimizers. A rule is defined once, by its state planes, its scalars and its update function.

    adamw       m += (1 - beta1) (g - m), v = beta2 v + (1 - beta2) g²
                p = p decay + step m / (sqrt(v) / root + eps)
    adamw_8bit  the same on decoded state, which is encoded again with the largest magnitude of every block of 256;
                p = p decay + step m / (sqrt(v) + eps)
    lion        p = p decay + step sign(m + (1 - beta1) (g - m)), m += (1 - beta2) (g - m)
    momentum    g += weight_decay p, b = momentum b + weight g, p += step b; Nesterov: p += step (g + momentum b)

The operators, the optimizers, their pages and their checkpoints all read `RULES`, and `describe` passes the table to
the compiled kernels. A rule computes in fp32, on gradients times `factor`, which is 1 / loss scale, and negative to
maximize.

A new rule needs an entry here and a kernel in csrc/optim/rules.h.

Sources: Loshchilov and Hutter, arXiv 1711.05101 (AdamW); Dettmers et al., arXiv 2110.02861, section 2 (8 bits); Chen et
al., arXiv 2302.06675 (Lion).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftcore.ops.dynamic8 import BLOCK, SIGNED_MAP, UNSIGNED_MAP, block_count, decode, encode


@dataclass(frozen=True, eq=False)
class Plane:
    """One plane of a parameter's state, with a value per element or per block of 256.

    Args:
        name: key of the plane in `state_dict`.
        dtype: float32, or uint8 for codes.
        elements: number of elements that share a value, 1 or `BLOCK`.
        map: values of the codes of an 8-bit plane; the plane `<name>_absmax` has their scales.
    """

    name: str
    dtype: torch.dtype = torch.float32
    elements: int = 1
    map: Tensor = SIGNED_MAP

    @property
    def is_coded(self) -> bool:
        """Whether the plane stores 8-bit codes."""
        return self.dtype == torch.uint8

    @property
    def initial(self) -> int:
        """Value of this plane, or its code, before the first update."""
        return 127 if self.is_coded and self.map is SIGNED_MAP else 0

    def numel(self, count: int) -> int:
        """Return the number of values for a parameter of `count` elements."""
        return count if self.elements == 1 else block_count(count)

    def reshape(self, values: Tensor, param: Tensor) -> Tensor:
        """Return the plane's values in their shape in `state_dict`: the parameter's shape, or one value per block."""
        return values.view(param.shape) if self.elements == 1 else values

    def new(self, param: Tensor) -> Tensor:
        """Create the plane of a parameter before its first update."""
        values = torch.full((self.numel(param.numel()),), self.initial, dtype=self.dtype, device=param.device)
        return self.reshape(values, param)


Update = Callable[[Tensor, Tensor, Sequence[Tensor], Any], None]


@dataclass(frozen=True, eq=False)
class Rule:
    """Update rule of an optimizer.

    Args:
        name: the `rule` of operators.
        planes: state of a parameter.
        scalars: named tuple type of the numbers that all elements of an update share. The first field is `factor`.
        update: function of `(p, g, state, scalars)` that changes the flat fp32 values p and the planes of state in
        place.
    """

    name: str
    planes: tuple[Plane, ...]
    scalars: type[Any]
    update: Update

    @functools.cached_property
    def plane_names(self) -> tuple[str, ...]:
        return tuple(plane.name for plane in self.planes)

    def new_state(self, param: Tensor) -> list[Tensor]:
        """Return the state of a parameter before its first update, plane by plane."""
        return [plane.new(param) for plane in self.planes]


def with_8bit_state(name: str, planes: Sequence[Plane], scalars: type[Any], update_values: Update) -> Rule:
    """Return a rule whose planes are 8-bit codes followed by their scales. `update_values` receives decoded state."""
    code_planes = [dataclasses.replace(plane, dtype=torch.uint8) for plane in planes]
    scale_planes = [Plane(f"{plane.name}_absmax", elements=BLOCK) for plane in planes]

    def update(p: Tensor, g: Tensor, state: Sequence[Tensor], c: Any) -> None:
        code_tensors = list(zip(planes, state[: len(planes)], state[len(planes) :], strict=True))
        values = [decode(codes, absmax, plane.map) for plane, codes, absmax in code_tensors]
        update_values(p, g, values, c)
        finite = torch.stack([value.isfinite() for value in values]).all(0)
        for (plane, codes, absmax), value in zip(code_tensors, values, strict=True):
            # A non-finite element would become the scale of 256 elements, so its state is reset.
            new_codes, new_absmax = encode(value.where(finite, 0), plane.map)
            codes.copy_(new_codes)
            absmax.copy_(new_absmax)

    return Rule(name, (*code_planes, *scale_planes), scalars, update)


# --- AdamW -----------------------------------------------------------------------------------------------------------


class AdamWScalars(NamedTuple):
    factor: float
    decay: float
    weight1: float
    beta2: float
    weight2: float
    step: float
    root: float
    eps: float

    @classmethod
    def from_options(
        cls, step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, factor: float = 1.0
    ) -> AdamWScalars:
        """Return the scalars of the `step`-th update, counted from 1."""
        beta1, beta2 = betas
        size, root = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
        return cls(factor, 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, -size, root, eps)


class AdamW8bitScalars(NamedTuple):
    factor: float
    decay: float
    weight1: float
    beta2: float
    weight2: float
    step: float
    eps: float

    @classmethod
    def from_options(
        cls, step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, factor: float = 1.0
    ) -> AdamW8bitScalars:
        """Return the scalars of the `step`-th update, counted from 1. `root` is folded into the step size and eps."""
        beta1, beta2 = betas
        size, root = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
        return cls(factor, 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, -size * root, eps * root)


def _update_moments(g: Tensor, m: Tensor, v: Tensor, c: AdamWScalars | AdamW8bitScalars) -> None:
    m.lerp_(g, c.weight1)
    # In fp64 the product of two fp32 values is exact.
    v.copy_((c.weight2 * g).double() * g + v * c.beta2)


def _root(v: Tensor) -> Tensor:
    return v.double().sqrt().float()  # correctly rounded, while PyTorch's fp32 root may be off by one bit


def _adamw(p: Tensor, g: Tensor, state: Sequence[Tensor], c: AdamWScalars) -> None:
    m, v = state
    _update_moments(g, m, v, c)
    p.mul_(c.decay).add_(c.step * m / (_root(v) / c.root).add_(c.eps))


def _adamw_8bit(p: Tensor, g: Tensor, state: Sequence[Tensor], c: AdamW8bitScalars) -> None:
    m, v = state
    _update_moments(g, m, v, c)
    p.mul_(c.decay).add_(c.step * m / _root(v).add_(c.eps))


# --- Lion ------------------------------------------------------------------------------------------------------------


class LionScalars(NamedTuple):
    factor: float
    decay: float
    weight1: float
    weight2: float
    step: float

    @classmethod
    def from_options(
        cls, lr: float, betas: tuple[float, float], weight_decay: float, factor: float = 1.0
    ) -> LionScalars:
        """Return the scalars of an update, which are the same for every step."""
        return cls(factor, 1 - lr * weight_decay, 1 - betas[0], 1 - betas[1], -lr)


def _lion(p: Tensor, g: Tensor, state: Sequence[Tensor], c: LionScalars) -> None:
    (m,) = state
    mean = torch.lerp(m, g, c.weight1)
    p.mul_(c.decay).add_(c.step * mean.sign().where(~mean.isnan(), mean))  # sign(NaN) is 0
    m.lerp_(g, c.weight2)


# --- SGD with momentum -----------------------------------------------------------------------------------------------


class MomentumScalars(NamedTuple):
    factor: float
    weight_decay: float
    momentum: float
    weight: float
    step: float
    nesterov: float

    @classmethod
    def from_options(
        cls,
        step: int,
        lr: float,
        momentum: float,
        dampening: float,
        weight_decay: float,
        nesterov: bool,
        factor: float = 1.0,
    ) -> MomentumScalars:
        """Return the scalars of the `step`-th update, counted from 1. The first update has no dampening."""
        weight = 1.0 if step == 1 else 1 - dampening
        return cls(factor, weight_decay, momentum, weight, -lr, float(nesterov))


def _momentum(p: Tensor, g: Tensor, state: Sequence[Tensor], c: MomentumScalars) -> None:
    (buffer,) = state
    g = g + c.weight_decay * p
    buffer.mul_(c.momentum).add_(c.weight * g)
    p.add_(c.step * (g + c.momentum * buffer if c.nesterov else buffer))


# --- the table -------------------------------------------------------------------------------------------------------

_MOMENTS = (Plane("exp_avg"), Plane("exp_avg_sq", map=UNSIGNED_MAP))

RULES = {
    rule.name: rule
    for rule in (
        Rule("adamw", _MOMENTS, AdamWScalars, _adamw),
        with_8bit_state("adamw_8bit", _MOMENTS, AdamW8bitScalars, _adamw_8bit),
        Rule("lion", (Plane("exp_avg"),), LionScalars, _lion),
        Rule("momentum", (Plane("momentum_buffer"),), MomentumScalars, _momentum),
    )
}


def describe(define_rule: Callable[[str, list[tuple[str, int]], str], None]) -> None:
    """Pass the table to the compiled kernels.

    Raises:
        ValueError: a rule has no kernel, or its kernel expects other planes or scalars.
    """
    for rule in RULES.values():
        planes = [(str(plane.dtype).removeprefix("torch."), plane.elements) for plane in rule.planes]
        define_rule(rule.name, planes, ", ".join(rule.scalars._fields))
