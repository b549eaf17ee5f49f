"""Adapters on linear layers with a custom forward, whose output is not `[..., out]`: grouped layers, routers.

    y = forward(x; adapter.merged(W, b))

Most adapters add to an output `[..., out]`. For a layer with another output, the layer's original forward runs on the
merged weight instead, if that is also correct in training. Otherwise `apply` refuses the layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from peftcore.engine.adaptation.chain import OwnForward
from peftcore.engine.attachments import Attachment
from peftcore.engine.changed_modules import submodule
from peftcore.errors import PeftcoreError
from peftcore.model.base_modules import original_class, original_forward
from peftcore.plugin.adapter import Adapter, Change, implements
from peftcore.plugin.call import arguments_read
from peftcore.plugin.link import Link
from peftcore.plugin.outputs import first_of

_MOST_GROUPS = 256


class MergedLink(Link):
    """Link of an adapter that is not called: the module's original forward runs on the weight and bias of `merged`."""

    __slots__ = ()
    calls_adapter = False
    follows_division = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.on_weights({})(*args, **kwargs)

    def on_weights(self, changes: Mapping[str, Change]) -> Any:
        """Return the output of the original forward on the merged weight, after an outer adapter's `changes`."""
        weight, bias = self.weight_and_bias()
        forward = self._base
        while not isinstance(forward, OwnForward):
            forward = forward.inside if forward.adapter is not None else forward.own
        merged_changes: dict[str, Change] = {"weight": lambda _: weight}
        if bias is not None:
            merged_changes["bias"] = lambda _: bias
        # The last changes are the innermost, so they are applied first.
        return forward.on_weights(changes).on_weights(merged_changes)


def adapt_custom_linear(model: nn.Module, method: str, attachments: Sequence[Attachment]) -> list[Attachment]:
    """Return the attachments with a `MergedLink` for each adapter that does not fit a linear layer's output.

    Raises:
        PeftcoreError: an adapter cannot run at such a layer.
    """
    replaced = list(attachments)
    for i, attachment in enumerate(replaced):
        module: Any = submodule(model, attachment.path)
        if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
            continue
        if (attachment.link is not Link and not attachment.link.follows) or attachment.branches:
            continue
        output = _custom_output(module)
        if output is None or (attachment.link is Link and _leaves_output(module, attachment.adapter)):
            continue
        follows = attachment.link.follows
        reason = _why_not_after(attachment.adapter, output) if follows else _why_not_merged(module, attachment.adapter)
        if reason is not None:
            path, kind = attachment.path, original_class(module).__name__
            raise PeftcoreError(
                f"{method} cannot adapt '{path}': this {kind} does not return [..., {module.out_features}] as linear "
                f"layers do, and the adapter {reason}. Leave it out of target_modules, or exclude it: "
                f"exclude_modules=['{path}']"
            )
        if not follows:
            replaced[i] = dataclasses.replace(attachment, link=MergedLink)
    return replaced


def _custom_output(module: nn.Linear) -> Any:
    """Return an example output if a layer does not return `[..., out]`; None if it does, or fails on all inputs."""
    weight, forward = module.weight, original_forward(module)
    if forward is nn.Linear.forward or not weight.is_floating_point() or weight.itemsize < 2:
        return None
    plain: nn.Module = object.__new__(original_class(module))
    plain.__dict__.update(module.__dict__, training=False)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for leading_sizes in _leading_sizes(module.out_features):
            try:
                y = forward(plain, weight.new_ones(*leading_sizes, module.in_features))
            except Exception:  # the layer takes inputs of another shape
                continue
            return None if isinstance(y, Tensor) and y.shape == (*leading_sizes, module.out_features) else y
    return None


def _leading_sizes(out_features: int) -> Iterator[tuple[int, ...]]:
    """Yield leading dimensions of inputs to try: rows only, then rows and each possible number of groups."""
    yield (2,)
    yield from ((1, groups) for groups in range(1, _MOST_GROUPS + 1) if out_features % groups == 0)


def _leaves_output(module: nn.Linear, adapter: nn.Module) -> bool:
    """Return whether an adapter only changes the weight or the input, and returns the layer's output unchanged."""
    output = object()
    try:
        return _try_adapter(module, adapter, lambda _: output) is output
    except Exception:  # the adapter computes with the output
        return False


def _why_not_after(adapter: nn.Module, output: Any) -> str | None:
    """Return the reason why an adapter does not support a layer with this output, or None."""
    shape = getattr(first_of(output), "shape", None)
    if shape is None:
        return "only supports outputs that are tensors"
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            new_shape = adapter(torch.zeros(shape, device=_device(adapter))).shape
    except Exception as error:
        return f"fails on its output of shape {list(shape)} ({error})"
    return None if new_shape == shape else f"changes the shape of its output from {list(shape)} to {list(new_shape)}"


def _why_not_merged(module: nn.Linear, adapter: nn.Module) -> str | None:
    """Return the reason why the original forward on the merged weight would compute something else, or None."""
    if not implements(adapter, Adapter.merged):
        return "changes the output, not the weight"
    if arguments_read([adapter]) is not None or any(getattr(part, "whole_batch", False) for part in adapter.modules()):
        return "depends on the inputs of the model's call, so it does not only change the weight"
    shape, device = (module.out_features, module.in_features), _device(adapter)
    try:
        with torch.no_grad():
            zero_bias: Any = module.bias  # the bias may be None, although the type does not allow it
            zero_bias = None if zero_bias is None else torch.zeros(shape[0], device=device)
            _, bias = adapter.merged(torch.zeros(shape, device=device), zero_bias)
    except PeftcoreError as error:
        return f"does not only change the weight ({error})"
    if bias is not None and zero_bias is None:
        return "adds a bias, which the layer does not have"
    try:
        with _RandomOperators() as operators:
            _try_adapter(module, adapter, lambda x: x.new_zeros(*x.shape[:-1], shape[0]))
    except Exception as error:
        return f"fails on inputs of shape [2, {shape[1]}] ({error})"
    return (
        ("draws random numbers in training (dropout, noise), which a merged weight cannot do")
        if operators.ran
        else None
    )


def _try_adapter(module: nn.Linear, adapter: nn.Module, forward: Callable[[Tensor], object]) -> object:
    """Call an adapter around a copy of `module` with another forward, and return the adapter's output."""
    device = _device(adapter)
    layer: Any = object.__new__(original_class(module))
    layer.__dict__.update(module.__dict__, _parameters=dict(module._parameters))
    # The adapter may be on another device than the layer, such as meta.
    for name, parameter in module._parameters.items():
        layer._parameters[name] = None if parameter is None else torch.ones(parameter.shape, device=device)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        x = torch.ones(2, module.in_features, device=device)
        return adapter(_StandIn(layer, lambda _, x: forward(x)), x)


def _device(adapter: nn.Module) -> torch.device | None:
    tensor = next(adapter.parameters(), None)
    return None if tensor is None else tensor.device


class _StandIn(OwnForward):
    """`Base` for testing an adapter: it calls a given function, which also accepts changed weights."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self.module, *args, **kwargs)

    def on_weights(self, changes: Mapping[str, Change]) -> _StandIn:
        return self

    def linear_operands(self, x: Tensor) -> None:
        return None


class _RandomOperators(TorchDispatchMode):
    """Detect operators that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ran = False

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.ran |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))
