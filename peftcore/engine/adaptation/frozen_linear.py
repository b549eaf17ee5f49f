"""Run frozen dense linear layers without adapters by `ops.dense_linear` where it is faster than PyTorch.

Two kinds of layers gain. First the output head, on every machine. If the weight requires no gradient, PyTorch computes
`F.linear` of a slice of the hidden states, `[batch, kept, hidden]`, as one product per sample, and copies the weight
for it (`should_fold` in ATen's LinearAlgebra.cpp). So the first token of `generate` and the losses of TRL's trainers
wait for a copy of the whole head. `ops.dense_linear` computes one product, bit for bit as PyTorch does with a weight
that requires gradients. In bf16 it multiplies the few rows of a decoded token twice as fast as PyTorch.

Second every linear layer, on CPUs without bf16 or fp16 instructions (`ops.WIDENED`): it runs at the speed of fp32, and
PyTorch is 20 to 60 times slower.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore import ops
from peftcore.engine.adaptation.class_swap import one_for_each_class, restore_class, subclass
from peftcore.model.base_modules import original_forward
from peftcore.ops.calling import is_exporting
from peftcore.ops.weight import DTYPES

FEW_ROWS = 4
FOLDS = "_peftcore_folds"


def fold(layer: nn.Module) -> None:
    """Make a linear layer or Conv1D run by `ops.dense_linear`, unless its instance has a forward of its own."""
    conv1d = sys.modules.get("transformers.pytorch_utils")
    plain: Any = (nn.Linear.forward, *([] if conv1d is None else [conv1d.Conv1D.forward]))
    if original_forward(layer) in plain and "forward" not in layer.__dict__ and not _folds(layer):
        layer.__class__ = _folding_class(type(layer))


def fold_frozen(model: nn.Module, head: str | None) -> None:
    """Fold the output head at path `head`, and every linear layer whose dtype is slow in PyTorch on this CPU.

    Where bf16 is slow, fp32 layers are folded as well: autocast may use bf16 later.
    """
    if head is not None:
        fold(model.get_submodule(head))
    for module in model.modules() if ops.WIDENED else ():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and (weight.dtype in ops.WIDENED or torch.bfloat16 in ops.WIDENED):
            fold(module)


def unfold(module: nn.Module) -> None:
    """Restore the class of a folded layer.

    If `fully_shard` has subclassed the swapped class, leave it, which is harmless.
    """
    if _folds(module) and not hasattr(module, "unshard"):
        restore_class(module, FOLDS)


def _folds(module: nn.Module) -> bool:
    return hasattr(type(module), FOLDS)


def _for_operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether `ops.dense_linear` supports this product and is faster than PyTorch."""
    if x.device.type != "cpu" or type(weight) is not nn.Parameter or weight.device.type != "cpu":
        return False
    if is_exporting():  # other programs do not have the operators of peftcore
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") in ops.WIDENED and x.dtype in DTYPES and weight.dtype in DTYPES
    if x.dtype is not weight.dtype or (bias is not None and bias.dtype is not x.dtype):
        return False
    if x.dtype in ops.WIDENED:
        return True
    return x.dtype is torch.bfloat16 and x.numel() <= FEW_ROWS * x.shape[-1] and not _needs_gradient(x, bias)


def _needs_gradient(x: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def _product(layer: Any, x: Tensor, original: Any, transposed: bool) -> Tensor:
    """Return `layer`'s output. `transposed`: its weight is `[in, out]`, as Conv1D's."""
    weight, bias = layer.weight, layer.bias
    if type(x) is not Tensor or x.dim() == 0 or x.is_nested or (weight.requires_grad and torch.is_grad_enabled()):
        return original(layer, x)
    if _for_operator(x, weight, bias):
        return ops.dense_linear(x, weight.t() if transposed else weight, bias)
    # PyTorch already computes inputs of up to two dimensions, and contiguous inputs with a bias, in one product that is
    # rounded once.
    if transposed or weight.requires_grad or x.dim() < 3 or (bias is not None and x.is_contiguous()):
        return original(layer, x)
    rows = F.linear(x.flatten(0, -2), weight)
    product = rows.view(*x.shape[:-1], rows.shape[-1])
    return product if bias is None else product + bias.to(product.dtype)


@one_for_each_class
def _folding_class(cls: type[nn.Module]) -> type[nn.Module]:
    original: Any = cls.forward

    def forward_linear(self: Any, input: Tensor) -> Tensor:  # named as in `nn.Linear`
        return _product(self, input, original, transposed=False)

    def forward_conv1d(self: Any, x: Tensor) -> Tensor:
        return _product(self, x, original, transposed=True)

    forward: Any = forward_linear if issubclass(cls, nn.Linear) else forward_conv1d
    forward.__wrapped__ = original  # as functools.wraps sets it
    forward.__doc__, forward.__name__ = original.__doc__, "forward"
    return subclass(cls, _folding_class, {"forward": forward, FOLDS: cls})
