"""Adapters of linear layers at experts, one each: the rows of an expert pass through its layer with its adapters.

    y_i = adapter_e(base_e, x_i)        base_e: x W_eᵀ + b_e, for the rows i of expert e

So a method that knows linear layers knows experts, in a list of which it would compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from peftcore.errors import PeftcoreError
from peftcore.model.experts.layout import expert_linear, experts_layout, operand
from peftcore.ops.calling import autocast_device
from peftcore.plugin.adapter import Adapter, implements, neutral_of_joined

# (an expert's layer, its changes, number of the expert) -> the layer with the changes
WithChanges = Callable[[nn.Linear, Sequence[Any], int], Callable[[Tensor], Tensor]]


class EachExpert(Adapter):
    """Adapter of one stacked weight, with an adapter for each expert.

    Args:
        adapters: adapters of linear layers, `adapter(base, x)`.
        link: class of the adapters' links, which says how they take part in calls of the layers.
        transposed: the weight is `[experts, in, out]`.
    """

    def __init__(self, adapters: Sequence[nn.Module], transposed: bool, link: Callable[..., Any]) -> None:
        super().__init__()
        self.transposed, self.link = transposed, link
        for expert, adapter in enumerate(adapters):
            self.add_module(str(expert), adapter)

    @property
    def multiplier(self) -> float | None:
        """The factor of all adapters inside, each of which is set separately; None if they have none."""
        first = self.of_expert(0)
        return first.multiplier if isinstance(first, Adapter) else None

    @multiplier.setter
    def multiplier(self, factor: float | None) -> None:
        pass

    def neutral(self) -> dict[str, Tensor]:
        return neutral_of_joined(self)

    def of_expert(self, expert: int) -> Any:
        """Return the adapter of one expert."""
        return self._modules[str(expert)]

    def is_mergeable(self) -> bool:
        return all(implements(adapter, Adapter.merged) for adapter in self._modules.values())

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the merged (weight, bias) of all experts in fp32; bias is `[experts, out]` or None."""
        weights, biases = [], []
        for expert in range(len(weight)):
            own = weight[expert].float()
            given = None if bias is None else bias[expert].float().clone()
            changed, its_bias = self.of_expert(expert).merged((own.mT if self.transposed else own).clone(), given)
            if bias is None and its_bias is not None:
                raise PeftcoreError(
                    f"'merged' of {type(self.of_expert(expert)).__name__} gives experts a bias, but the module has no "
                    "biases. Nothing was changed. Keep the adapter unmerged, or do not adapt the experts"
                )
            weights.append(changed.mT if self.transposed else changed)
            biases.append(its_bias)
        return torch.stack(weights), None if bias is None else torch.stack(biases)

    def forward(self, weight: Tensor) -> Tensor:
        """Raise a PeftcoreError: a forward that reads all changed weights at once is not supported."""
        raise PeftcoreError(
            f"{type(self.of_expert(0)).__name__} acts on experts one by one, which needs transformers' experts "
            "interface. Here another forward runs them, or another adapter changes the weights as a whole. Restore "
            "_experts_implementation, or leave that adapter out"
        )


def product_by_expert(
    module: nn.Module, x: Tensor, offsets: Tensor, name: str, changes: Sequence[Any], around: WithChanges
) -> Tensor:
    """Return the product of a module's weight `name` for rows sorted by expert, with the changes of each expert.

    Args:
        offsets: int32 `[experts]`, where the rows of each end. On the meta device all rows are the first one's.
        changes: `LowRank`s and `EachExpert`s, the first innermost.
        around: puts these around the layer of one expert.
    """
    layout: Any = experts_layout(module)
    weight = operand(module, name)
    if isinstance(weight, Tensor) and not torch.is_autocast_enabled(autocast_device(x)):
        x = x.to(weight.dtype)
    if is_dynamo_compiling():
        torch._dynamo.graph_break(
            msg="an adapter acts on experts one by one, and how many rows each has is data. Compile without "
            "fullgraph=True, or leave experts out of target_modules"
        )
    ends = [len(x)] * layout.count if offsets.is_meta else offsets.tolist()
    parts: list[Tensor] = []
    idle: list[Tensor] = []
    for expert, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if begin < end:
            parts.append(around(expert_linear(module, name, expert), changes, expert)(x[begin:end]))
        else:
            each = (change.of_expert(expert) for change in changes if isinstance(change, EachExpert))
            idle += [p for adapter in each for p in adapter.parameters() if p.requires_grad]
    begin = ends[-1] if ends else 0
    if begin < len(x) or not parts:  # rows of another process's experts
        width = expert_linear(module, name, 0).out_features
        parts.append(x.new_zeros(len(x) - begin, width, dtype=parts[0].dtype if parts else x.dtype))
    y = torch.cat(parts)
    return _Idle.apply(y, *idle) if idle and torch.is_grad_enabled() else y  # type: ignore[no-untyped-call]


class _Idle(torch.autograd.Function):
    """y, with zero gradients for experts that had no rows, since every rank needs gradients for all that trains."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *idle: Tensor) -> Tensor:
        ctx.save_for_backward(*idle)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)
