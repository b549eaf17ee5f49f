"""Adapters for single experts: each expert is treated as a linear layer with its own adapters.

    y_i = adapter_e(base_e, x_i)        base_e: x W_eᵀ + b_e, for the rows i of expert e

Every method for linear layers thus works for stacked experts, with the same results as for a list of experts.
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

# (an expert's layer, its changes, index of the expert) -> the layer with the changes
WithChanges = Callable[[nn.Linear, Sequence[Any], int], Callable[[Tensor], Tensor]]


class ExpertAdapters(Adapter):
    """Adapter of one stacked weight, made of one adapter per expert.

    Args:
        adapters: adapters for linear layers, `adapter(base, x)`, one per expert.
        transposed: the weight is `[experts, in, out]`.
        link: link class that runs the adapters in calls of the layers.
    """

    def __init__(self, adapters: Sequence[nn.Module], transposed: bool, link: Callable[..., Any]) -> None:
        super().__init__()
        self.transposed, self.link = transposed, link
        for expert, adapter in enumerate(adapters):
            self.add_module(str(expert), adapter)

    @property
    def multiplier(self) -> float | None:
        """The multiplier of the adapters, which is set on all of them; None if they have none."""
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
            expert_weight = weight[expert].float()
            expert_bias = None if bias is None else bias[expert].float().clone()
            if self.transposed:
                expert_weight = expert_weight.mT
            merged_weight, merged_bias = self.of_expert(expert).merged(expert_weight.clone(), expert_bias)
            if bias is None and merged_bias is not None:
                raise PeftcoreError(
                    f"'merged' of {type(self.of_expert(expert)).__name__} returned a bias for an expert, but the "
                    "experts have no biases. Nothing was changed. Keep the adapter unmerged, or train it without "
                    "experts"
                )
            weights.append(merged_weight.mT if self.transposed else merged_weight)
            biases.append(merged_bias)
        return torch.stack(weights), None if bias is None else torch.stack(biases)

    def forward(self, weight: Tensor) -> Tensor:
        """Raise a PeftcoreError, because these adapters cannot change the stacked weight as one tensor."""
        raise PeftcoreError(
            f"{type(self.of_expert(0)).__name__} adapts single experts, which needs transformers' experts interface, "
            "but another forward runs these experts, or another adapter changes their stacked weights. Restore "
            "_experts_implementation, or leave that adapter out"
        )


def product_by_expert(
    module: nn.Module, x: Tensor, offsets: Tensor, name: str, changes: Sequence[Any], around: WithChanges
) -> Tensor:
    """Multiply rows, sorted by expert, by a module's stacked weight, one expert at a time with its changes.

    Args:
        module: the module of experts.
        x: `[rows, in]`.
        offsets: int32 `[experts]`, the end index of each expert's rows. On the meta device, expert 0 gets all rows.
        name: name of the weight.
        changes: `LowRank` and `ExpertAdapters` changes, innermost first.
        around: wraps the layer of one expert in its changes.

    Returns:
        `[rows, out]`.
    """
    layout: Any = experts_layout(module)
    weight = operand(module, name)
    if isinstance(weight, Tensor) and not torch.is_autocast_enabled(autocast_device(x)):
        x = x.to(weight.dtype)
    if is_dynamo_compiling():
        torch._dynamo.graph_break(
            msg=(
                "cannot compile an adapter on single experts as one graph, because the number of rows per expert "
                "depends on data. Compile without fullgraph=True, or leave experts out of target_modules"
            )
        )
    ends = [len(x)] * layout.count if offsets.is_meta else offsets.tolist()
    parts: list[Tensor] = []
    idle: list[Tensor] = []
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if start < end:
            parts.append(around(expert_linear(module, name, expert), changes, expert)(x[start:end]))
        else:
            adapters = (change.of_expert(expert) for change in changes if isinstance(change, ExpertAdapters))
            idle += [p for adapter in adapters for p in adapter.parameters() if p.requires_grad]
    start = ends[-1] if ends else 0
    if start < len(x) or not parts:  # rows for experts on other ranks
        width = expert_linear(module, name, 0).out_features
        parts.append(x.new_zeros(len(x) - start, width, dtype=parts[0].dtype if parts else x.dtype))
    y = torch.cat(parts)
    return _ZeroGradients.apply(y, *idle) if idle and torch.is_grad_enabled() else y  # type: ignore[no-untyped-call]


class _ZeroGradients(torch.autograd.Function):
    """Identity that gives experts without rows a zero gradient, since all ranks need gradients for the same params."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *idle: Tensor) -> Tensor:
        ctx.save_for_backward(*idle)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)
