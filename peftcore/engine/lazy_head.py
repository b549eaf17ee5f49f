"""The switch of lazy logits: a head's call gives logits that are computed when they are read (`lazy_tensor.py`).

A hook of the head marks its input; the product with the head's weight, `F.linear` or a product with a weight in 4 bits,
recognizes the mark and is left out. The head's forward, the model and the loss are as they were.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore import ops, ranks
from peftcore.adaptation.adapted import has_forward_of_instance, is_active
from peftcore.adaptation.class_swap import original_class
from peftcore.engine.lazy_tensor import Head, LazyLogits, Recipe, lazy
from peftcore.engine.state import check_model
from peftcore.errors import PeftcoreError
from peftcore.observation import detect
from peftcore.ops import PackedWeight

M = TypeVar("M", bound=nn.Module)
_HANDLE = "_peftcore_lazy_logits"
_PRODUCTS = (F.linear, ops.linear_4bit, ops.dense_linear)


def lazy_logits(model: M, *, enabled: bool = True) -> M:
    """Let the model's head give logits in training that are computed only if they are read.

    Cross-entropy of such logits (`F.cross_entropy`, and thereby transformers' losses of language models) and
    log-probabilities of tokens are computed by `ops.linear_cross_entropy` from hidden states: the logits, their fp32
    copy and their gradient never exist. Everything else that is done with them computes them first, once, with the
    same values as before. They are an ordinary tensor in evaluation and without gradients; under `torch.compile`; while
    an adapter of the head itself is active; and where the head's weight is sharded.

    Losses agree with those of the logits within the rounding of fp32, gradients within that of the model's dtype.

    Args:
        model: a transformers model, or one with `get_output_embeddings()`.
        enabled: False restores the head.

    Returns:
        The model.

    Raises:
        PeftcoreError: the model has no head of token logits that is a linear layer, or its head has its own `forward`.
    """
    check_model(model)
    path = detect(model).output_head
    if path is None:
        raise PeftcoreError(
            f"{original_class(model).__name__} has no linear head for logits of tokens, which lazy_logits needs. Call "
            "it on a language model, or leave the call out"
        )
    head = model.get_submodule(path)
    handle = head.__dict__.pop(_HANDLE, None)
    if handle is not None:
        handle.remove()
    if not enabled:
        return model
    why = why_not(model, head)
    if why is not None:
        raise PeftcoreError(f"logits of '{path}' cannot be lazy: {why}")
    head.__dict__[_HANDLE] = head.register_forward_pre_hook(partial(mark, model))
    return model


def has_lazy_logits(model: nn.Module) -> bool:
    """Return whether the logits of the model's head are lazy in training."""
    return any(_HANDLE in module.__dict__ for module in model.modules())


def why_not(model: nn.Module, head: nn.Module) -> str | None:
    """Return why the head's logits cannot be lazy, or None if they can."""
    cls = original_class(head)
    if cls.forward is not nn.Linear.forward and not hasattr(head, "linear_operands"):
        return f"its forward is that of {cls.__name__}, not that of nn.Linear"
    if has_forward_of_instance(head):
        return "it has its own forward on the instance"
    if ranks.is_sharded(model):
        return "the model is sharded, and the weight of its head is not whole after the forward pass"
    return None


def mark(model: nn.Module, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Mark the input of the head, as a forward pre-hook, if its logits may be lazy in this call."""
    if torch.compiler.is_compiling() or not (head.training and torch.is_grad_enabled()) or len(args) != 1:
        return None
    (x,) = args
    if type(x) is not Tensor or not x.requires_grad or x.device.type not in ("cpu", "cuda") or is_active(head):
        return None
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or torch._C._is_tracing():
        return None
    if torch._C._are_functorch_transforms_active() or head._backward_hooks or head._backward_pre_hooks:
        return None
    # Sharded since it was switched on: FSDP2 has made parameters whole for the forward pass, and frees them after it.
    if hasattr(model, "unshard") or hasattr(head, "unshard") or ranks.is_sharded(model):
        return None
    marked: Any = x.as_subclass(Hidden)
    marked.original = x
    return (marked,)


class Hidden(Tensor):
    """Hidden states as a head's input, whose product with its weight is left out."""

    original: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _PRODUCTS and not kwargs and isinstance(args[0], cls):
            found = _lazy(func, args[0].original, *args[1:])
            if found is not None:
                return found
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _lazy(product: Any, x: Tensor, weight: Any, bias: Tensor | None = None) -> LazyLogits | None:
    """Return the product as lazy logits, or None if it must be computed now."""
    parts = [
        *(weight.operands()[0] if isinstance(weight, PackedWeight) else [weight]),
        *([] if bias is None else [bias]),
    ]
    for part in parts:
        if (
            type(part) not in (nn.Parameter, Tensor)
            or ranks.is_part(part)
            or part.is_inference()
            or part.device != x.device
        ):
            return None
        if part.untyped_storage().nbytes() == 0:
            return None
    if not isinstance(weight, PackedWeight) and type(weight) is not nn.Parameter:
        return None  # made for this call: of a replica, or gathered from ranks
    device = x.device.type
    if torch.is_autocast_enabled(device):  # as the product would
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
        weight = weight if isinstance(weight, PackedWeight) else weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    elif not isinstance(weight, PackedWeight) and weight.dtype is not x.dtype:
        return None  # PyTorch's own error
    return lazy(Recipe(Head(product, x, weight, bias), x, x.dtype))
