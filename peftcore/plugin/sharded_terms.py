"""Loss terms of sharded parameters, computed on whole ones; each shard gets its part of the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from peftcore.errors import PeftcoreError
from peftcore.plugin import ranks


def term_of_whole(modules: Sequence[nn.Module], compute: Callable[[], Tensor | None], what: str) -> Tensor | None:
    """Return `compute()`, run while the sharded parameters of `modules` are whole. Collective.

    The gradient is equal on every rank. At its end, after `fully_shard`'s work, the backward pass adds each shard's
    part; parameters partitioned by ZeRO-3 get the gradient like any other.

    Args:
        what: whose term it is, for messages.

    Raises:
        PeftcoreError: the result depends on tensors with gradients other than parameters of these modules.
    """
    parameters = [p for module in modules for _, p in module.named_parameters(remove_duplicate=False)]
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(ranks.whole_parameters(module))
        leaves = [p for module in modules for _, p in module.named_parameters(remove_duplicate=False)]
        value = compute()
    if value is None or not value.requires_grad:
        return value
    here = {id(leaf): (leaf, parameter) for leaf, parameter in zip(leaves, parameters, strict=True)}
    if any(id(leaf) not in here for leaf in _leaves(value)):
        raise PeftcoreError(
            f"the loss of {what} depends on a forward, not on its parameters alone, and they are sharded. Keep them "
            "whole: peftcore.shard(model, adapter_placement='replicate')"
        )
    trained = [pair for pair in here.values() if pair[0].requires_grad]
    gradients = torch.autograd.grad(value, [leaf for leaf, _ in trained], allow_unused=True)
    shares = [(parameter, g) for (_, parameter), g in zip(trained, gradients, strict=True) if g is not None]
    if any(ranks.is_partitioned(parameter) for parameter, _ in shares):
        with ranks.gathered(parameter for parameter, _ in shares):  # autograd notes the shapes of inputs
            return cast(Tensor, _Known.apply(value.detach(), [g for _, g in shares], *(p for p, _ in shares)))  # type: ignore[no-untyped-call]
    anchor = torch.zeros((), device=value.device, requires_grad=True)
    return cast(Tensor, _Shares.apply(anchor, value.detach(), shares))  # type: ignore[no-untyped-call]


class _Shares(torch.autograd.Function):
    """A value with known gradients, which `backward` adds to the parameters' gradients at the very end."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, shares: list[tuple[nn.Parameter, Tensor]]) -> Tensor:
        ctx.shares = shares
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        queue = Variable._execution_engine.queue_callback
        queue(lambda: queue(lambda: _Shares.add(ctx.shares, gradients[0])))  # after the callback of `fully_shard`
        return None, None, None

    @staticmethod
    @torch.no_grad()
    def add(shares: list[tuple[nn.Parameter, Tensor]], scale: Tensor) -> None:
        for parameter, gradient in shares:
            share = torch.zeros_like(parameter)
            ranks.fill(share, gradient * scale)
            parameter.grad = share if parameter.grad is None else parameter.grad.add_(share)


class _Known(torch.autograd.Function):
    """A value with known gradients, for ZeRO-3, which takes a parameter's gradient once autograd has summed it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None, *(each * gradients[0] for each in ctx.gradients)


def _leaves(value: Tensor) -> Iterator[Tensor]:
    """Yield the tensors with gradients that `value` was computed from."""
    nodes, seen = [value.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes += [next_node for next_node, _ in node.next_functions]
