"""The output head of a frozen model, multiplied by all rows at once.

`F.linear` of hidden states of which some places are cut out, `[batch, kept, hidden]`, and a weight that asks for no
gradient is a product for each sample in PyTorch, for which it copies the weight (`should_fold` in ATen's
LinearAlgebra.cpp): the first token of `generate`, and the losses of TRL's trainers, wait for a copy of the whole head.
Of a weight that asks for gradients it is one product. So it is here, as before the model was frozen, bit for bit.

The few rows of a decoded token are multiplied by `ops.dense_linear`, in bf16 at twice PyTorch's rate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore import ops
from peftcore.adaptation.class_swap import one_for_each_class, original_forward, subclass, take_off

FEW_ROWS = 4
FOLDS = "_peftcore_folds"


def fold(head: nn.Module) -> None:
    """Let the linear layer `head` multiply so; one that does more than that is left alone."""
    if original_forward(head) is nn.Linear.forward and "forward" not in head.__dict__ and not _folds(head):
        head.__class__ = _folding_class(type(head))


def unfold(module: nn.Module) -> None:
    """Give a head that was folded its own class back; under the class of `fully_shard` it stays, which does no harm."""
    if _folds(module) and not hasattr(module, "unshard"):
        take_off(module, FOLDS)


def _folds(module: nn.Module) -> bool:
    return hasattr(type(module), FOLDS)


def _is_of_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Are these of the operator that is made for them, without gradients?"""
    plain = x.dtype is weight.dtype is torch.bfloat16 and type(weight) is nn.Parameter and x.device.type == "cpu"
    if not plain or x.numel() > FEW_ROWS * x.shape[-1] or torch.is_autocast_enabled("cpu"):
        return False
    if bias is not None and (bias.dtype is not x.dtype or (bias.requires_grad and torch.is_grad_enabled())):
        return False
    if torch.compiler.is_exporting():  # for programs that have no operators of ours
        return False
    return not (x.requires_grad and torch.is_grad_enabled())


@one_for_each_class
def _folding_class(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, input: Tensor) -> Tensor:  # as `nn.Linear` calls it
        if type(input) is not Tensor or input.dim() == 0 or input.is_nested or self.weight.requires_grad:
            return nn.Linear.forward(self, input)
        if _is_of_few_rows(input, self.weight, self.bias):
            return ops.dense_linear(input, self.weight, self.bias)
        if input.dim() < 3 or (self.bias is not None and input.is_contiguous()):  # which PyTorch folds, and rounds once
            return nn.Linear.forward(self, input)
        rows = F.linear(input.flatten(0, -2), self.weight)
        product = rows.view(*input.shape[:-1], rows.shape[-1])
        return product if self.bias is None else product + self.bias.to(product.dtype)

    forward.__wrapped__ = cls.forward  # type: ignore[attr-defined]  # as functools.wraps sets it
    forward.__doc__ = cls.forward.__doc__
    return subclass(cls, _folding_class, {"forward": forward, FOLDS: cls})
