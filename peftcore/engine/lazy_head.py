"""The switch of lazy logits: a head's call gives logits that are computed when they are read (`lazy_tensor.py`).

A hook of the head marks its input; the product with the head's weight, `F.linear` or a product with a weight in 4 bits,
recognizes the mark and is left out. A head with active adapters is called with no rows, and a second hook replaces its
output. The head's forward, the model and the loss are as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import chain as chaining, zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore import ops, ranks
from peftcore.adaptation.adapted import active_names, adapter_at, has_forward_of_instance, inside, is_active
from peftcore.adaptation.base_modules import base_modules, original_class, restored_after_error
from peftcore.adapter import Adapter, implements
from peftcore.engine import lazy_handlers as lazy_handlers
from peftcore.engine.lazy_tensor import Head, LazyLogits, Recipe, lazy
from peftcore.engine.state import check_model
from peftcore.errors import PeftcoreError
from peftcore.observation import detect
from peftcore.ops import PackedWeight

M = TypeVar("M", bound=nn.Module)
_HANDLE = "_peftcore_lazy_logits"
_PRODUCTS = (F.linear, ops.linear_4bit, ops.dense_linear)
_IN_EVALUATION = ContextVar("_IN_EVALUATION", default=False)


def lazy_logits(model: M, *, enabled: bool = True) -> M:
    """Let the model's head give logits in training that are computed only if they are read.

    Cross-entropy of such logits (`F.cross_entropy`, and thereby transformers' losses of language models),
    log-probabilities of tokens, `argmax`, and TRL's `selective_log_softmax` and, without gradients,
    `entropy_from_logits` are computed from hidden states in pieces of rows: the logits, their fp32 copy and their
    gradient never exist. Everything else that is done with them computes them first, once, with the same values as
    before, and from then on they are ordinary. They are an ordinary tensor in evaluation and without gradients; under
    `torch.compile`; while an adapter of the head itself is active that is not a low-rank product, has dropout, or runs
    under autocast; while other hooks watch the head; and where the head's weight is sharded.

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
    with restored_after_error(head):
        for handle in head.__dict__.pop(_HANDLE, ()):
            handle.remove()
        if not enabled:
            return model
        why = why_not(model, head)
        if why is not None:
            raise PeftcoreError(f"logits of '{path}' cannot be lazy: {why}")
        head.__dict__[_HANDLE] = (
            head.register_forward_pre_hook(partial(mark, model)),
            head.register_forward_hook(replace),
        )
    return model


def has_lazy_logits(model: nn.Module) -> bool:
    """Return whether the logits of the model's head are lazy in training."""
    return any(_HANDLE in module.__dict__ for _, module in base_modules(model))


@contextmanager
def lazily_evaluated(model: nn.Module) -> Iterator[None]:
    """Let logits be lazy without gradients, too, if the model's head can have lazy logits: a loss takes less memory."""
    was_on = has_lazy_logits(model)
    try:
        if not was_on:
            lazy_logits(model)
    except PeftcoreError:  # the logits are computed in full
        yield
        return
    token = _IN_EVALUATION.set(True)
    try:
        yield
    finally:
        _IN_EVALUATION.reset(token)
        if not was_on:
            lazy_logits(model, enabled=False)


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
    if torch.compiler.is_compiling() or len(args) != 1:
        return None
    (x,) = args
    if type(x) is not Tensor or x.is_inference() or x.device.type not in ("cpu", "cuda"):
        return None
    trains = head.training and torch.is_grad_enabled() and x.requires_grad
    if not trains and not (_IN_EVALUATION.get() and not torch.is_grad_enabled()):
        return None
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or torch._C._is_tracing():
        return None
    if torch._C._are_functorch_transforms_active() or has_other_hooks(head):
        return None
    # Sharded since it was switched on: FSDP2 has made parameters whole for the forward pass, and frees them after it.
    if hasattr(model, "unshard") or hasattr(head, "unshard") or ranks.is_sharded(model):
        return None
    if is_active(head):
        return _deferred(head, x)
    marked: Any = x.as_subclass(Hidden)
    marked.original = x
    return (marked,)


def _deferred(head: nn.Module, x: Tensor) -> tuple[Any, ...] | None:
    """Return no rows of the input, with which the adapted head is called in place of `x`; `replace` reads `x`."""
    read, device = [*head.parameters(), *head.buffers()], x.device
    chain = row_by_row(head, read)
    if chain is None or x.dim() < 2 or torch.is_autocast_enabled(device.type):
        return None
    if not all(_is_whole(each, device) for each in read):
        return None
    rest: Any = x[:0]
    rest.deferred = chain, x, read
    return (rest,)


def replace(head: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Return lazy logits for those of no rows, as a forward hook of the head."""
    found = getattr(args[0], "deferred", None) if args else None
    if found is None:
        return None
    chain, x, read = found
    classes = int(output.shape[-1])
    layout = torch.empty((*x.shape[:-1], classes), device="meta")
    return lazy(Recipe(Head(chain, x, read, classes, None), x, output.dtype, layout))


def row_by_row(head: nn.Module, read: list[Tensor]) -> Callable[[Tensor], Tensor] | None:
    """Return the forward of an adapted head with its active adapters, or None if it may depend on more than the row.

    Low-rank products without dropout do not. `read`: all parameters and buffers of the head in this call.
    """
    names = active_names(head)
    if names is None or getattr(head, "_is_replica", False):
        return None
    adapters: list[Any] = [adapter_at(head, name) for name in names]
    for each in adapters:
        if not implements(each, Adapter.low_rank) or each.needs_call or each.whole_batch:
            return None
        if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p for m in each.modules()):
            return None
    chain, multipliers = inside(head), [each.multiplier for each in adapters]

    def forward(rows: Tensor) -> Tensor:
        # `torch.func.functional_call` has other parameters only within its call.
        same = all(a is b for a, b in zip_longest(chaining(head.parameters(), head.buffers()), read))
        if not same or [each.multiplier for each in adapters] != multipliers:
            raise PeftcoreError(
                "the adapters of the head, their scale or parameters were replaced between a forward pass and the "
                "reading of its logits or its backward pass. Replace them after backward(), or call "
                "peftcore.lazy_logits(model, enabled=False)"
            )
        found: Tensor = chain(rows)
        return found

    return forward


def _is_whole(tensor: Any, device: torch.device) -> bool:
    """Return whether a tensor that the head reads can be read later, too."""
    return (
        type(tensor) in (nn.Parameter, Tensor)
        and not ranks.is_part(tensor)
        and not tensor.is_inference()
        and tensor.device == device
        and (tensor.numel() == 0 or tensor.untyped_storage().nbytes() > 0)
    )


def has_other_hooks(head: nn.Module) -> bool:
    """Return whether hooks, besides the one of lazy logits, see the head's input, output or their gradients."""
    everywhere = nn.modules.module
    return bool(
        head._backward_hooks
        or head._backward_pre_hooks
        or len(head._forward_hooks) > 1
        or len(head._forward_pre_hooks) > 1
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
        or everywhere._global_forward_hooks
    )


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
    packed = isinstance(weight, PackedWeight)
    read = [*(weight.operands()[0] if packed else [weight]), *([] if bias is None else [bias])]
    if not all(_is_whole(each, x.device) for each in read):
        return None
    if not packed and type(weight) is not nn.Parameter:
        return None  # made for this call: of a replica, or gathered from ranks
    device = x.device.type
    if torch.is_autocast_enabled(device):  # as the product would
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
        weight = weight if packed else weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    elif not packed and weight.dtype is not x.dtype:
        return None  # PyTorch's own error
    read = [*(weight.operands()[0] if packed else [weight]), *([] if bias is None else [bias])]

    def function(rows: Tensor) -> Tensor:
        found: Tensor = product(rows, weight, bias)
        return found

    classes = int(weight.shape[0])
    head = Head(function, x, read, classes, (weight, bias))
    layout = torch.empty((*x.shape[:-1], classes), device="meta")
    return lazy(Recipe(head, x, x.dtype, layout))
