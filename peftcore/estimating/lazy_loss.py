"""Loss of a step whose logits are lazy: pieces of rows go through the head, and no step has logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore import ops
from peftcore.adaptation.adapted import is_active
from peftcore.engine.lazy_head import why_not
from peftcore.estimating.following import NotFollowed
from peftcore.estimating.losses import Call, Own
from peftcore.observation import detect
from peftcore.ops import PackedWeight
from peftcore.ops.cross_entropy import BLOCK_CLASSES, BLOCK_ROWS, has_blocks
from peftcore.ops.dense_linear import FASTER


def _multiply_blocks(x: Tensor, weight: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Multiply as `linear_cross_entropy_rows` does on CPU, without label smoothing."""
    for rows in x.split(BLOCK_ROWS):
        sums = torch.zeros_like(rows, dtype=torch.float32)
        for block in weight.split(BLOCK_CLASSES):
            sums += multiply(multiply(rows, block).exp_(), block.t())


class _Pieces(torch.autograd.Function):
    """What `ops.linear_cross_entropy` does to memory: products of pieces, and the gradient of hidden states."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: nn.Module, device: torch.device, *dense: Tensor) -> Tensor:
        operands = getattr(head, "linear_operands", None)
        weight: Any = operands(x)[0] if operands is not None else head.weight
        size = ops.rows_in_piece(int(weight.shape[0]), x.dtype, device)
        rows, grad = x.new_empty((3, len(x)), dtype=torch.float32), torch.zeros_like(x)
        ours = x.dtype in FASTER and device.type == "cpu"
        multiply: Callable[[Tensor, Tensor], Tensor] = torch.ops.peftcore.dense_linear if ours else F.linear
        blocks = isinstance(weight, Tensor) and has_blocks(x.dtype, device)
        if blocks:
            _multiply_blocks(x, weight.to(x.dtype), multiply)
        for first in () if blocks else range(0, len(x), size):
            some = x[first : first + size]
            if isinstance(weight, PackedWeight):
                logits = ops.linear_4bit(some, weight).exp_()
                tensors, packing = weight.operands()
                grad[first : first + size] = torch.ops.peftcore.linear_4bit_backward(logits, tensors, packing)
            else:
                dense_weight = weight.to(x.dtype)
                logits = multiply(some, dense_weight).exp_()
                grad[first : first + size] = multiply(logits, dense_weight.t())
            del logits
        ctx.save_for_backward(x, grad, *dense)
        ctx.device = device
        return rows[0].sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden_grad, *dense = ctx.saved_tensors
        dx = (hidden_grad * upstream.float()).to(x.dtype)
        grads: list[Tensor | None] = [None for _ in dense]
        if dense and ctx.needs_input_grad[3]:
            (weight, *_), grad = dense, torch.empty_like(dense[0])
            limit = ops.rows_in_piece(len(x), torch.float32, ctx.device)
            for first in range(0, len(weight), limit):
                some = weight[first : first + limit].to(x.dtype)
                dz = F.linear(x, some).float().exp_()
                torch.mm(dz.to(weight.dtype).t(), x.to(weight.dtype), out=grad[first : first + limit])
                del dz
            grads[0] = grad
        for i, parameter in enumerate(dense[1:], 1):
            grads[i] = torch.empty_like(parameter) if ctx.needs_input_grad[3 + i] else None
        return dx, None, None, *grads


class WithoutLogits(Own):
    """Loss that `model` returns for its labels, with lazy logits on `device`."""

    def __init__(self, model: nn.Module, head: nn.Module, device: torch.device) -> None:
        super().__init__(model)
        self.head, self.device = head, device

    def __call__(self, call: Call, inputs: dict[str, Tensor]) -> Tensor:
        model, head = self.model, self.head
        own, called = model.loss_function, []

        def loss(logits: Tensor, *_: Any, **__: Any) -> Tensor:
            called.append(True)
            dense = [p for p in (head._parameters.get("weight"), head._parameters.get("bias")) if p is not None]
            dense = [p for p in dense if p.is_floating_point()]
            found: Tensor = _Pieces.apply(logits.reshape(-1, logits.shape[-1]), head, self.device, *dense)  # type: ignore[no-untyped-call]
            return found

        head.forward = lambda x: x
        model.loss_function = loss  # type: ignore[assignment]
        try:
            found = super().__call__(call, inputs)
        finally:
            del head.__dict__["forward"]
            model.loss_function = own
        if not called:
            raise NotFollowed(
                f"{type(model).__name__} computes its loss without its loss_function, so a step with lazy logits is "
                "not followed. Leave out lazy_logits"
            )
        return found


def lazily(model: nn.Module, on_card: bool) -> Own:
    """Return the loss with lazy logits, or the model's own if its logits would not be lazy, as `lazy_logits` decides.

    A head with adapters is counted with all logits.
    """
    path = detect(model).output_head
    head = None if path is None else model.get_submodule(path)
    if head is None or why_not(model, head) is not None or is_active(head) or not hasattr(model, "loss_function"):
        return Own(model)
    return WithoutLogits(model, head, torch.device("cuda" if on_card else "cpu"))
