"""Logits as a tensor that is computed when it is read.

    head(hidden) -> LazyLogits, which knows hidden and the head's weight
    .float(), .view(-1, V), [..., :-1, :], * s, / s, tanh, .contiguous()     another one
    F.cross_entropy(lazy, labels), F.log_softmax(lazy).gather(..)             `ops.linear_cross_entropy`, without logits
    anything else                                                            the logits, computed once

Outside of Python, in PyTorch's own code, it behaves like a tensor too: an operator on it computes the logits
(`__torch_dispatch__`). It has a node in the graph of gradients (`_Link`), through which the gradient of everything made
of it passes, so that hooks of the node see every backward pass.

Views share the memory of what they are views of, in PyTorch; so here: what is computed for a view is a view of what is
computed for its parent, and a change in place of one is seen in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from peftcore import ops
from peftcore.errors import PeftcoreError
from peftcore.ops import PackedWeight

OFF = "call peftcore.lazy_logits(model, enabled=False)"
_ON = torch._C.DisableTorchFunctionSubclass


class Head:
    """One call of a head: `function(hidden, weight, bias)`, computed once, or never."""

    def __init__(self, function: Callable[..., Tensor], hidden: Tensor, weight: Any, bias: Tensor | None) -> None:
        self.function, self.weight, self.bias = function, weight, bias
        self.bypassed = False  # whether a loss was computed without logits
        self._read = [
            t for t in (hidden, weight[0] if isinstance(weight, PackedWeight) else weight, bias) if t is not None
        ]
        self._versions = [t._version for t in self._read]

    def check(self) -> None:
        """Raise a PeftcoreError if what the call read has been changed in place."""
        freed = any(t.numel() and not t.untyped_storage().nbytes() for t in self._read)
        if freed or [t._version for t in self._read] != self._versions:
            raise PeftcoreError(
                "the logits of this forward pass were not computed, and its hidden states or the head's weight have "
                f"changed since. Read the logits before optimizer.step(), or {OFF}"
            )

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor | None]:
        """Dense weight and bias, which may have gradients."""
        return None if isinstance(self.weight, PackedWeight) else self.weight, self.bias


def _itself(t: Tensor) -> Tensor:
    return t


@contextmanager
def _plainly() -> Iterator[None]:
    """Compute as in the forward pass: with gradients, without autocast, which has been applied.

    Nor is what is computed part of a checkpointed region in which it is first read.
    """
    kept = torch.autograd.graph.saved_tensors_hooks(_itself, _itself)
    with torch.inference_mode(False), torch.enable_grad(), torch._C._DisableAutocast(), _ON(), kept:
        yield


class Recipe:
    """Lazy logits: rows of hidden states, and what was done to their logits.

    Args:
        rows: hidden states `[.., in]`.
        parent, step: the logits that these were made from, and how.
        shares: whether the step gives a view of its argument.
        scale, cap: logits are cap · tanh(scale / cap · x), or scale · x without a cap.
        logs: whether they are log-probabilities.
    """

    def __init__(
        self,
        head: Head,
        rows: Tensor,
        dtype: torch.dtype,
        parent: Recipe | None = None,
        step: Callable[[Tensor], Tensor] | None = None,
        *,
        shares: bool = False,
        scale: float = 1.0,
        cap: float | None = None,
        logs: bool = False,
    ) -> None:
        self.head, self.rows, self.dtype = head, rows, dtype
        self.parent, self.step, self.shares = parent, step, shares
        self.scale, self.cap, self.logs = scale, cap, logs
        self.observed = False  # whether somebody waits for the gradient of these logits
        self._made: Tensor | None = None
        self._version = 0

    @property
    def classes(self) -> int:
        return int(self.head.weight.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.rows.shape[:-1], self.classes)

    def unchanged(self) -> bool:
        """Return whether nobody has changed these logits, or those that they were made from, in place."""
        own = self._made is None or self._made._version == self._version
        return own and (self.parent is None or self.parent.unchanged())

    def stays_lazy(self) -> bool:
        """Return whether what is made of these logits may be made of hidden states."""
        return not self.observed and self.unchanged() and (self.parent is None or self.parent.stays_lazy())

    def made(self) -> Tensor:
        """Return the logits, computed at the first call, with their gradient."""
        if self._made is None:
            with _plainly():
                if self.parent is None or self.step is None:
                    self._made = self._computed()
                elif self.shares or self.parent.unchanged():
                    self._made = self.step(self.parent.made())
                else:  # a copy, taken before the change
                    self._made = self._computed()
            self._version = self._made._version
        return self._made

    def _computed(self) -> Tensor:
        if self.parent is None or self.step is None:
            self.head.check()
            return self.head.function(self.rows, self.head.weight, self.head.bias)
        return self.step(self.parent._computed())

    def derived(self, step: Callable[[Tensor], Tensor], rows: Tensor | None = None, **changed: Any) -> LazyLogits:
        """Return lazy logits that `step` makes of these."""
        kept = {"scale": self.scale, "cap": self.cap, "logs": self.logs, **changed}
        dtype = kept.pop("dtype", self.dtype)
        return lazy(Recipe(self.head, self.rows if rows is None else rows, dtype, self, step, **kept))

    def operands(self) -> tuple[Tensor, Any, dict[str, Any]]:
        """Return hidden, weight and options of `ops.linear_cross_entropy`."""
        self.head.check()
        self.head.bypassed = True
        return self.rows, self.head.weight, {"bias": self.head.bias, "logit_scale": self.scale, "soft_cap": self.cap}


class _Link(torch.autograd.Function):
    """The node of lazy logits and of the hidden states that they, and whatever is made of them, are computed from.

    It keeps no recipe, which would be a cycle of references.
    """

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, rows: Tensor, *dense: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows)
        ctx.formula = recipe.head, recipe.scale, recipe.cap, recipe.logs, recipe.dtype
        return LazyLogits(recipe), rows.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, rows_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, rows_grad, None, None
        head, scale, cap, logs, dtype = ctx.formula
        (rows,) = ctx.saved_tensors
        with _plainly():
            needs = zip((rows, *head.tensors), ctx.needs_input_grad[1:], strict=True)
            inputs = [None if t is None else t.detach().requires_grad_(needed) for t, needed in needs]
            weight = head.weight if inputs[1] is None else inputs[1]
            z = head.function(inputs[0], weight, inputs[2]) * scale
            z = z if cap is None else cap * torch.tanh(z / cap)
            z = (F.log_softmax(z, -1) if logs else z).to(dtype)
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(z, wanted, grad))
        grads = [next(found) if t is not None and t.requires_grad else None for t in inputs]
        if rows_grad is not None and grads[0] is not None:
            grads[0] = grads[0] + rows_grad
        return None, *grads


def lazy(recipe: Recipe) -> LazyLogits:
    """Return the tensor of a recipe."""
    found: tuple[LazyLogits, Tensor] = _Link.apply(recipe, recipe.rows, *recipe.head.tensors)  # type: ignore[no-untyped-call]
    result, recipe.rows = found
    return result


class LazyLogits(Tensor):
    """Logits `[.., vocabulary]` that are computed when they are read."""

    recipe: Recipe

    @staticmethod
    def __new__(cls, recipe: Recipe) -> LazyLogits:
        made: LazyLogits = torch.Tensor._make_wrapper_subclass(
            cls, recipe.shape, dtype=recipe.dtype, device=recipe.rows.device
        )
        made.recipe = recipe
        return made

    def __init__(self, recipe: Recipe) -> None: ...

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTS:
            with _ON():
                return func(*args, **kwargs)
        handler = _HANDLERS.get(func)
        if handler is not None and args and isinstance(args[0], cls) and args[0].recipe.stays_lazy():
            found = handler(args[0].recipe, args, kwargs)
            if found is not None:
                return found
        if func in _OF_GRADIENTS:
            for each in _flat(args):
                if isinstance(each, cls):
                    if each.recipe.head.bypassed:
                        raise PeftcoreError(f"a loss was computed without its logits, which have no gradient. {OFF}")
                    each.recipe.observed = True
        made = tree_map(_made, (args, kwargs))
        return func(*made[0], **made[1])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable:
            for argument, given in zip(func._schema.arguments, args, strict=False):
                if argument.is_write and isinstance(given, cls):
                    raise PeftcoreError(f"{func} would change logits that have not been computed. {OFF}")
        args, kwargs = tree_map(lambda t: t.recipe.made().detach() if isinstance(t, cls) else t, (args, kwargs or {}))
        return func(*args, **kwargs)


def _made(value: Any) -> Any:
    return value.recipe.made() if isinstance(value, LazyLogits) else value


def _flat(values: Any) -> Iterator[Any]:
    for each in values:
        if isinstance(each, (list, tuple)):
            yield from _flat(each)
        else:
            yield each


# --- what stays lazy -------------------------------------------------------------------------------------------------

# Each takes the recipe and the arguments, and returns None where the logits are needed.


def _node(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    with _ON():
        return args[0].grad_fn


def _float(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    if recipe.dtype is torch.float32:
        return args[0]
    if recipe.logs or kwargs or len(args) > 1 or recipe.dtype not in (torch.float16, torch.bfloat16):
        return None
    return recipe.derived(Tensor.float, dtype=torch.float32)


def _to(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    _, *rest = args
    given = [*rest, *kwargs.values()]
    if set(kwargs) <= {"dtype", "device", "non_blocking"} and len(rest) <= 1 and given:
        device = [torch.device(g) for g in given if isinstance(g, (str, torch.device))]
        dtypes = [g for g in given if isinstance(g, torch.dtype)]
        if any(each != recipe.rows.device for each in device) or len(device) + len(dtypes) < len(rest):
            return None
        if all(each is recipe.dtype for each in dtypes):
            return args[0]
        if dtypes == [torch.float32]:
            return _float(recipe, args[:1], {})
    return None


def _contiguous(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    return None if kwargs or len(args) > 1 else args[0] if recipe.parent is None else recipe.derived(Tensor.contiguous)


def _reshape(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    if kwargs:
        return None
    shape = args[1] if len(args) == 2 and isinstance(args[1], Sequence) else args[1:]
    if not all(isinstance(size, int) for size in shape) or len(shape) == 0:
        return None
    if shape[-1] == -1 and recipe.rows[..., 0].numel() and -1 not in shape[:-1]:
        leading = 1
        for size in shape[:-1]:
            leading *= size
        shape = (*shape[:-1], recipe.classes if leading == recipe.rows[..., 0].numel() else 0)
    if shape[-1] != recipe.classes or len(shape) < 2:
        return None
    shape = tuple(shape)
    rows = recipe.rows.reshape(*shape[:-1], recipe.rows.shape[-1])
    return recipe.derived(lambda t: t.reshape(shape), rows, shares=True)


def _index(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    dimensions = len(recipe.shape)
    consumed, tensors = 0, False
    for each in index:
        if each is Ellipsis:
            continue
        if isinstance(each, Tensor):
            if isinstance(each, LazyLogits) or each.dtype not in (torch.bool, torch.int64):
                return None
            consumed += each.dim() if each.dtype is torch.bool else 1
            tensors = tensors or each.dim() > 0 or each.dtype is torch.bool  # a number gives a view
        elif isinstance(each, (int, slice)) and not isinstance(each, bool):
            consumed += 1
        else:
            return None
    if sum(each is Ellipsis for each in index) > 1 or consumed > dimensions:
        return None
    last = index[-1] if index else slice(None)
    touches_last = consumed == dimensions or (Ellipsis in [e for e in index if e is Ellipsis] and last is not Ellipsis)
    if touches_last and not (isinstance(last, slice) and last == slice(None)):
        return None
    rows = recipe.rows[index]
    if rows.shape[-1] != recipe.rows.shape[-1]:
        return None
    return recipe.derived(lambda t: t[index], rows, shares=not tensors)


def _scaled(inverse: bool) -> Callable[[Recipe, Any, Any], Any]:
    def scaled(recipe: Recipe, args: Any, kwargs: Any) -> Any:
        if kwargs or len(args) != 2 or type(args[1]) not in (int, float) or recipe.logs or not args[1]:
            return None
        by = args[1]
        factor = 1 / by if inverse else float(by)
        if factor <= 0 and recipe.cap is not None:
            return None
        cap = None if recipe.cap is None else recipe.cap * factor
        step = (lambda t: t / by) if inverse else (lambda t: t * by)
        return recipe.derived(step, scale=recipe.scale * factor, cap=cap)

    return scaled


def _tanh(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    if kwargs or len(args) > 1 or recipe.cap is not None or recipe.logs:
        return None
    return recipe.derived(torch.tanh, cap=1.0)


def _log_softmax(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    _, *rest = args
    known = set(kwargs) <= {"dim", "dtype", "_stacklevel"} and len(rest) <= 1
    dim, dtype = kwargs.get("dim", rest[0] if rest else None), kwargs.get("dtype")
    if not known or recipe.logs or dim not in (-1, len(recipe.shape) - 1) or dtype not in (None, torch.float32):
        return None
    if dtype is None and torch.is_autocast_enabled(recipe.rows.device.type):
        return None
    if dtype is None:
        return recipe.derived(lambda t: F.log_softmax(t, -1), logs=True)
    return recipe.derived(lambda t: F.log_softmax(t, -1, dtype=dtype), logs=True, dtype=dtype)


def _gather(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    _, *rest = args
    names = dict(zip(("dim", "index"), rest, strict=False)) | kwargs
    dim, index = names.get("dim"), names.get("index")
    if set(names) != {"dim", "index"} or not recipe.logs or dim not in (-1, len(recipe.shape) - 1):
        return None
    if type(index) is not Tensor or index.dtype is not torch.int64 or index.shape != (*recipe.rows.shape[:-1], 1):
        return None
    if index.device != recipe.rows.device or bool(((index < 0) | (index >= recipe.classes)).any()):
        return None  # PyTorch's own error
    rows, weight, options = recipe.operands()
    with _plainly():
        found, _ = ops.linear_log_probs(rows, weight, index[..., 0], **options)
    return found[..., None].to(recipe.dtype)


_CROSS_ENTROPY = ("target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")


def _cross_entropy(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    given = dict(zip(_CROSS_ENTROPY, args[1:], strict=False)) | kwargs
    target, class_weight = given.get("target"), given.get("weight")
    if given.get("size_average") is not None or given.get("reduce") is not None or recipe.logs:
        return None
    if not isinstance(target, Tensor) or target.dtype is not torch.int64 or len(recipe.shape) != 2:
        return None
    if target.shape != recipe.rows.shape[:-1] or target.device != recipe.rows.device:
        return None
    if class_weight is not None and (class_weight.requires_grad or class_weight.shape != (recipe.classes,)):
        return None
    if given.get("reduction", "mean") not in ("mean", "sum", "none"):
        return None
    rows, weight, options = recipe.operands()
    for name in ("ignore_index", "reduction", "label_smoothing"):
        if name in given:
            options[name] = given[name]
    autocast = torch.is_autocast_enabled(recipe.rows.device.type)  # under which PyTorch computes it in fp32
    with _plainly():
        loss = ops.linear_cross_entropy(rows, weight, target, class_weight=class_weight, **options)
    return loss if autocast else loss.to(recipe.dtype)


_FACTS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "is_cpu", "is_meta")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "is_leaf", "layout", "is_sparse", "is_quantized")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.ndimension, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device, Tensor.element_size),
}
_OF_GRADIENTS = {
    *(Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad, torch.autograd.grad),
    getattr(Tensor, "grad").__get__,  # noqa: B009  # of the class, which has no type
}
_HANDLERS: dict[Any, Callable[[Recipe, Any, Any], Any]] = {
    getattr(Tensor, "grad_fn").__get__: _node,  # noqa: B009
    Tensor.float: _float,
    Tensor.to: _to,
    Tensor.contiguous: _contiguous,
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _reshape),
    Tensor.__getitem__: _index,
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul), _scaled(False)),
    **dict.fromkeys((Tensor.div, Tensor.__truediv__, torch.div, torch.true_divide), _scaled(True)),
    **dict.fromkeys((Tensor.tanh, torch.tanh), _tanh),
    **dict.fromkeys((F.log_softmax, torch.log_softmax, Tensor.log_softmax), _log_softmax),
    **dict.fromkeys((Tensor.gather, torch.gather), _gather),
    F.cross_entropy: _cross_entropy,
}
