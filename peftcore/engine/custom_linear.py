"""Adapters at linear layers that return something else than x Wᵀ + b: products in groups, choices of a router.

    y = forward(x; adapter.merged(W, b))

Most adapters add to the layer's output as if it were `[..., out]`. At such a layer, its own forward runs on the weight
into which the adapter would be merged, if that computes the same in training, too. Otherwise `apply` refuses the layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
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
    """Link of an adapter that is not called: the module's own forward runs on the weight and bias of `merged`."""

    __slots__ = ()
    calls_adapter = False
    follows_division = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.on_weights({})(*args, **kwargs)

    def on_weights(self, changes: Mapping[str, Change]) -> Any:
        """Return the module's own forward with the merged weight, which `changes` of an adapter outside change."""
        weight, bias = self.weight_and_bias()
        own = self._base
        while not isinstance(own, OwnForward):
            own = own.inside if own.adapter is not None else own.own
        merged: dict[str, Change] = {"weight": lambda _: weight}
        if bias is not None:
            merged["bias"] = lambda _: bias
        return own.on_weights(changes).on_weights(merged)  # the last one is the first to be applied


def fitted(model: nn.Module, method: str, attached: Sequence[Attachment]) -> list[Attachment]:
    """Return what is attached, by a `MergedLink` where an adapter does not fit the output of a linear layer.

    Raises:
        PeftcoreError: an adapter cannot run at such a layer.
    """
    found = list(attached)
    for i, each in enumerate(found):
        module: Any = submodule(model, each.path)
        if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
            continue
        if (each.link is not Link and not each.link.follows) or each.branches:
            continue
        output = _odd_output(module)
        if output is None or (each.link is Link and _leaves_output(module, each.adapter)):
            continue
        follows = each.link.follows
        why = _refused_by(each.adapter, output) if follows else _unlike_merged(module, each.adapter)
        if why is not None:
            raise PeftcoreError(
                f"{method} cannot adapt '{each.path}': a {original_class(module).__name__} is a linear layer that does "
                f"not return [..., {module.out_features}], and the adapter {why}. Exclude it: exclude_modules="
                f"['{each.path}'], or leave it out of target_modules"
            )
        if not follows:
            found[i] = dataclasses.replace(each, link=MergedLink)
    return found


def _odd_output(module: nn.Linear) -> Any:
    """Return an output of a layer that does not return `[..., out]`; None if it does, or if it runs on no input."""
    weight, forward = module.weight, original_forward(module)
    if forward is nn.Linear.forward or not weight.is_floating_point() or weight.itemsize < 2:
        return None
    plain: nn.Module = object.__new__(original_class(module))
    plain.__dict__.update(module.__dict__, training=False)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for rows in _rows(module.out_features):
            try:
                y = forward(plain, weight.new_ones(*rows, module.in_features))
            except Exception:  # it takes inputs of another shape
                continue
            return None if isinstance(y, Tensor) and y.shape == (*rows, module.out_features) else y
    return None


def _rows(out_features: int) -> Iterator[tuple[int, ...]]:
    """Yield leading sizes of inputs: rows, and then each number of groups that the outputs may have."""
    yield (2,)
    yield from ((1, groups) for groups in range(1, _MOST_GROUPS + 1) if out_features % groups == 0)


def _leaves_output(module: nn.Linear, adapter: nn.Module) -> bool:
    """Return whether an adapter returns what the layer returns, as changes of the weight or of the input do."""
    output = object()
    try:
        return _called(module, adapter, lambda _: output) is output
    except Exception:  # it computes with the output
        return False


def _refused_by(adapter: nn.Module, output: Any) -> str | None:
    """Return why an adapter cannot follow a layer with this output, or None."""
    shape = getattr(first_of(output), "shape", None)
    if shape is None:
        return "changes outputs that are tensors"
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            found = adapter(torch.zeros(shape, device=_device(adapter))).shape
    except Exception as error:
        return f"does not run on its output {list(shape)} ({error})"
    return None if found == shape else f"makes {list(found)} of its output {list(shape)}"


def _unlike_merged(module: nn.Linear, adapter: nn.Module) -> str | None:
    """Return why the module's own forward on the merged weight would compute something else, or None."""
    if not implements(adapter, Adapter.merged):
        return "changes outputs, not the weight"
    if arguments_read([adapter]) is not None or any(getattr(part, "whole_batch", False) for part in adapter.modules()):
        return "depends on the inputs of the model's call, so it does not only change the weight"
    shape, device = (module.out_features, module.in_features), _device(adapter)
    try:
        with torch.no_grad():
            given: Any = module.bias  # None where there is none, whatever the type says
            given = None if given is None else torch.zeros(shape[0], device=device)
            _, bias = adapter.merged(torch.zeros(shape, device=device), given)
    except PeftcoreError as error:
        return f"does not only change the weight ({error})"
    if bias is not None and given is None:
        return "adds a bias, which the layer does not have"
    try:
        with _Draws() as draws:
            _called(module, adapter, lambda x: x.new_zeros(*x.shape[:-1], shape[0]))
    except Exception as error:
        return f"does not run on inputs of shape [2, {shape[1]}] ({error})"
    return "draws random numbers in training (dropout, noise), which a weight cannot" if draws.found else None


def _called(module: nn.Linear, adapter: nn.Module, forward: Callable[[Tensor], Any]) -> Any:
    """Return the output of an adapter around a layer of these sizes whose forward is `forward`."""
    device = _device(adapter)
    layer: Any = object.__new__(original_class(module))
    layer.__dict__.update(module.__dict__, _parameters=dict(module._parameters))
    for name, parameter in module._parameters.items():  # the adapter may be on another device, such as meta
        layer._parameters[name] = None if parameter is None else torch.ones(parameter.shape, device=device)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        x = torch.ones(2, module.in_features, device=device)
        return adapter(_StandIn(layer, lambda _, x: forward(x)), x)


def _device(adapter: nn.Module) -> torch.device | None:
    tensor = next(adapter.parameters(), None)
    return None if tensor is None else tensor.device


class _StandIn(OwnForward):
    """Base of an adapter that is tried: calls a function, also with changed weights."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self.module, *args, **kwargs)

    def on_weights(self, changes: Mapping[str, Change]) -> _StandIn:
        return self

    def linear_operands(self, x: Tensor) -> None:
        return None


class _Draws(TorchDispatchMode):
    """Watch for operators that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))
