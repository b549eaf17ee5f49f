"""Logits as a tensor that is computed when it is read.

    head(hidden) -> LazyLogits, which knows hidden and the head
    .float(), .view(-1, V), [..., :-1, :], * s, / s, tanh, .contiguous()     another one
    F.cross_entropy(lazy, labels), F.log_softmax(lazy).gather(..)             computed in pieces of rows, without logits
    anything else                                                            the logits, computed once

`lazy_handlers.py` has what stays lazy. Once logits have been computed, everything is made of them.

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

from peftcore.errors import PeftcoreError

OFF = "call peftcore.lazy_logits(model, enabled=False)"
_ON = torch._C.DisableTorchFunctionSubclass
_SAMPLE = 1 << 20  # values of a frozen tensor that a fingerprint reads


class Head:
    """One call of a head: `function(hidden)`, computed once, in pieces of rows, or never.

    Args:
        function: gives logits of hidden states.
        hidden: hidden states `[.., in]`.
        tensors: all other tensors that the function reads.
        classes: size of the vocabulary.
        operands: weight and bias, if the function is their linear product.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        hidden: Tensor,
        tensors: Sequence[Tensor],
        classes: int,
        operands: tuple[Any, Tensor | None] | None,
    ) -> None:
        self.function, self.classes, self.operands = function, classes, operands
        self.tensors = tuple(t for t in tensors if t.is_floating_point())
        self.hidden = hidden
        self.bypassed = False  # whether a loss was computed without logits
        self._read = [hidden, *tensors]
        self._seen = self._state()

    def _state(self) -> tuple[list[Any], Tensor | None]:
        facts = [(t._version, t.dtype, t.device, t.data_ptr()) for t in self._read]
        if self._read[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return facts, None
        return facts, torch.stack([_fingerprint(t) for t in self._read])

    def check(self) -> None:
        """Raise a PeftcoreError if what the call read has been changed since, with or without a new version."""
        freed = any(t.numel() and not t.untyped_storage().nbytes() for t in self._read)
        if not freed:
            facts, values = self._state()
            before = self._seen[1]
            if facts == self._seen[0] and (values is None or before is None or torch.equal(values, before)):
                return
        raise PeftcoreError(
            "the logits of this forward pass were not computed, and its hidden states or the head's weight have "
            f"changed since. Read the logits before optimizer.step(), or {OFF}"
        )


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _fingerprint(t: Tensor) -> Tensor:
    """Return the sum of the bits of a tensor, of a sample of the rows of a large frozen one.

    Optimizers that write to `parameter.data` change no version. Bits are read eight bytes at a time where they are so
    aligned: a sum of smaller integers would first copy them all to int64.
    """
    with torch.no_grad(), _ON():
        values = t.detach()
        if not t.requires_grad and t.dim() and t.numel() > _SAMPLE:
            values = values[:: -(-t.numel() // _SAMPLE)]
        size, steps = t.element_size(), (*values.shape[-1:], *values.stride()[:-1], values.storage_offset())
        aligned = values.dim() and values.stride(-1) == 1 and all(step * size % 8 == 0 for step in steps)
        return values.view(torch.int64 if aligned else _INTEGERS[size]).sum(dtype=torch.int64)


def _itself(t: Tensor) -> Tensor:
    return t


@contextmanager
def plainly(gradients: bool = True) -> Iterator[None]:
    """Compute as in the forward pass: with gradients, without autocast, which has been applied.

    Nor is what is computed part of a checkpointed region in which it is first read.
    """
    kept = torch.autograd.graph.saved_tensors_hooks(_itself, _itself)
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), torch._C._DisableAutocast(), _ON(), kept:
        yield


class Recipe:
    """Lazy logits: rows of hidden states, and what was done to their logits.

    Args:
        rows: hidden states `[.., in]`.
        layout: tensor on the meta device with the shape and strides of the logits.
        parent, step: the logits that these were made from, and how.
        shares: whether the step gives a view of its argument.
        scale, cap: logits are cap · tanh(scale / cap · x), or scale · x without a cap.
        kind: what was made of the logits: `logits`, `logs` (log-probabilities), `probs`, or `products` p · log p.
        picked: one token of each row, whose logit has been read.
    """

    def __init__(
        self,
        head: Head,
        rows: Tensor,
        dtype: torch.dtype,
        layout: Tensor,
        parent: Recipe | None = None,
        step: Callable[[Tensor], Tensor] | None = None,
        *,
        shares: bool = False,
        scale: float = 1.0,
        cap: float | None = None,
        kind: str = "logits",
        picked: Tensor | None = None,
    ) -> None:
        self.head, self.rows, self.dtype, self.layout = head, rows, dtype, layout
        self.parent, self.step, self.shares = parent, step, shares
        self.scale, self.cap, self.kind, self.picked = scale, cap, kind, picked
        self.tracked: bool = torch.is_grad_enabled() and (parent is None or parent.tracked)
        self.observed = False  # whether somebody waits for the gradient of these logits
        self.result: Tensor | None = None  # the logits, once they are computed
        self._version = 0

    @property
    def classes(self) -> int:
        return self.head.classes

    @property
    def gradients(self) -> bool:
        """Whether what is made of these logits now has gradients."""
        return self.tracked and torch.is_grad_enabled()

    def unchanged(self) -> bool:
        """Return whether nobody has changed these logits, or those that they were made from, in place."""
        own = self.result is None or self.result._version == self._version
        return own and (self.parent is None or self.parent.unchanged())

    def stays_lazy(self) -> bool:
        """Return whether what is made of these logits may be made of hidden states.

        Not after they have been computed: not every change of their memory can be seen.
        """
        return not self.observed and self.result is None and (self.parent is None or self.parent.stays_lazy())

    def made(self) -> Tensor:
        """Return the logits, computed at the first call, with their gradient."""
        if self.result is None:
            with plainly(self.tracked):
                if self.parent is None or self.step is None:
                    made = self._computed()
                elif self.shares or self.parent.unchanged():
                    made = self.step(self.parent.made())
                else:  # a copy, taken before the change
                    made = self._computed()
            self._version = made._version
            self.result = made
        return self.result

    def _computed(self) -> Tensor:
        if self.parent is None or self.step is None:
            self.head.check()
            return self.head.function(self.rows)
        return self.step(self.parent._computed())

    def derived(
        self, step: Callable[[Tensor], Tensor], rows: Tensor | None = None, layout: Tensor | None = None, **changed: Any
    ) -> LazyLogits:
        """Return lazy logits that `step` makes of these."""
        kept = {"scale": self.scale, "cap": self.cap, "kind": self.kind, **changed}
        if rows is None:
            kept.setdefault("picked", self.picked)
        dtype = kept.pop("dtype", self.dtype)
        layout = torch.empty_like(self.layout) if layout is None else layout
        return lazy(Recipe(self.head, self.rows if rows is None else rows, dtype, layout, self, step, **kept))

    def apply_to(self, z: Tensor) -> Tensor:
        """Return what these logits, or log-probabilities, are of the head's output."""
        z = z if self.scale == 1 else z * self.scale
        z = z if self.cap is None else self.cap * torch.tanh(z / self.cap)
        return (F.log_softmax(z, -1) if self.kind == "logs" else z).to(self.dtype)

    def use(self) -> Tensor:
        """Return the rows for a result that is computed without logits."""
        self.head.check()
        self.head.bypassed = self.head.bypassed or self.gradients
        return self.rows


class _Link(torch.autograd.Function):
    """The node of lazy logits and of the hidden states that they, and whatever is made of them, are computed from.

    It keeps no recipe with tensors of this node, which would be a cycle of references.
    """

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, rows: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows)
        none = rows.detach()[..., :0]
        ctx.recipe = Recipe(
            recipe.head, none, recipe.dtype, recipe.layout, scale=recipe.scale, cap=recipe.cap, kind=recipe.kind
        )
        return LazyLogits(recipe), rows.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, rows_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        head = ctx.recipe.head
        if grad is None:
            return None, rows_grad, *(None for _ in head.tensors)
        if torch.is_grad_enabled():
            raise PeftcoreError(f"lazy logits cannot be differentiated twice (create_graph=True): {OFF}")
        (rows,) = ctx.saved_tensors
        head.check()
        with plainly():
            x = rows.detach().requires_grad_(ctx.needs_input_grad[1])
            z = ctx.recipe.apply_to(head.function(x))
        needed = [each for each, n in zip((x, *head.tensors), ctx.needs_input_grad[1:], strict=True) if n]
        found = iter(torch.autograd.grad(z, needed, grad, allow_unused=True))
        grads = [next(found) if n else None for n in ctx.needs_input_grad[1:]]
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
            cls, tuple(recipe.layout.shape), dtype=recipe.dtype, device=recipe.rows.device
        )
        made.recipe = recipe
        return made

    def __init__(self, recipe: Recipe) -> None: ...

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        lazily = bool(args) and isinstance(args[0], cls) and args[0].recipe.stays_lazy()
        if func in _FACTS and lazily:
            with _ON():
                return func(*args, **kwargs)
        handler = HANDLERS.get(func) if lazily else None
        if handler is not None:
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
                if argument.is_write and any(isinstance(each, cls) for each in _flat([given])):
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


def _node(recipe: Recipe, args: Any, kwargs: Any) -> Any:
    with _ON():
        return args[0].grad_fn


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
# What stays lazy: each takes the recipe and the arguments, and returns None where the logits are needed.
HANDLERS: dict[Any, Callable[[Recipe, Any, Any], Any]] = {getattr(Tensor, "grad_fn").__get__: _node}  # noqa: B009
