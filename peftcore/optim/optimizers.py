"""AdamW with 32-bit and 8-bit state, Lion, and SGD with momentum, each in memory or paged.

Sources: Loshchilov and Hutter, arXiv 1711.05101 (AdamW); Dettmers et al., arXiv 2110.02861 (8-bit state);
Dettmers et al., arXiv 2305.14314, section 3 (paged optimizers); Chen et al., arXiv 2302.06675 (Lion).
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import ParamsT

from peftcore.ops.optim_rules import RULES
from peftcore.optim.base import FusedOptimizer
from peftcore.optim.paging import PagedOptimizer


def _check(lr: float, weight_decay: float, **shares: float) -> None:
    if not lr >= 0 or not weight_decay >= 0:
        raise ValueError(f"lr and weight_decay must not be negative, found {lr} and {weight_decay}")
    for name, value in shares.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, found {value}")


class AdamW(FusedOptimizer):
    """AdamW with 32-bit state. On CPU the results are bit-identical to `torch.optim.AdamW(fused=True)`.

    Args:
        params: parameters, or groups of them, in float32, float16 or bfloat16.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`. `amsgrad` is not supported.
        options: options of `FusedOptimizer`, and of `PagedOptimizer` for paged optimizers.
    """

    rule = RULES["adamw"]

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        _check(lr, weight_decay, beta1=betas[0], beta2=betas[1])
        if not eps >= 0:
            raise ValueError(f"eps must not be negative, found {eps}")
        if amsgrad:
            raise ValueError("amsgrad is not supported. Use torch.optim.AdamW(amsgrad=True)")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, **options)

    def _scalars(self, group: dict[str, Any], step: int, factor: float) -> tuple[float, ...]:
        lr, betas = float(group["lr"]), tuple(map(float, group["betas"]))
        return self.rule.scalars.from_options(step, lr, betas, group["eps"], group["weight_decay"], factor)


class AdamW8bit(AdamW):
    """`AdamW` with 8-bit state in the dynamic map, and one scale per 256 elements of a parameter.

    Parameters of any size have 8-bit state, while bitsandbytes uses 32 bits below 4,096 elements.
    """

    rule = RULES["adamw_8bit"]


class PagedAdamW(AdamW, PagedOptimizer):
    """`AdamW` with paged state: `budget` bytes stay resident (see `PagedOptimizer`)."""


class PagedAdamW8bit(AdamW8bit, PagedOptimizer):
    """`AdamW8bit` with paged state: `budget` bytes stay resident (see `PagedOptimizer`)."""


class Lion(FusedOptimizer):
    """Lion: updates by the sign of averaged gradients, with one 32-bit moment. Arguments are those of `AdamW`."""

    rule = RULES["lion"]

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        _check(lr, weight_decay, beta1=betas[0], beta2=betas[1])
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay}, **options)

    def _scalars(self, group: dict[str, Any], step: int, factor: float) -> tuple[float, ...]:
        return self.rule.scalars.from_options(float(group["lr"]), group["betas"], group["weight_decay"], factor)


class PagedLion(Lion, PagedOptimizer):
    """`Lion` with paged state."""


class SGD(FusedOptimizer):
    """SGD with or without momentum, with the defaults of `torch.optim.SGD`."""

    rule = RULES["momentum"]

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **options: Any,
    ) -> None:
        _check(lr, weight_decay, momentum=momentum)
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError("nesterov needs momentum > 0 and dampening = 0")
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "nesterov": nesterov}, **options)

    def _scalars(self, group: dict[str, Any], step: int, factor: float) -> tuple[float, ...]:
        names = ("momentum", "dampening", "weight_decay", "nesterov")
        return self.rule.scalars.from_options(step, float(group["lr"]), *(group[name] for name in names), factor)


class PagedSGD(SGD, PagedOptimizer):
    """`SGD` with paged state."""
