"""Modules whose `forward` is computed by one operator: norms, MLPs with a gated activation, activations, dropout.

Attention, of which one call is, is in fused_attention.py; outputs that are computed again for the gradient of the
layers behind are in recomputed.py.

    LlamaMLP                                  LlamaMLP (fused)
      down(act(gate(x)) * up(x))        =>      down(ops.gated(gate(x), up(x)))

The class is swapped below all of peftcore's other classes. Children are called as before, so their hooks and adapters
work. A call that the operator is not known to compute as the module does, or would compute slower, goes to the
module's own `forward`: other dtypes, devices and subclasses of tensors, compiled and transformed calls, changed
settings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from peftcore import ops
from peftcore.adaptation.base_modules import restored_after_error
from peftcore.adaptation.class_swap import one_for_each_class, subclass
from peftcore.adaptation.recomputed import inputs_instead, with_source
from peftcore.ops.activated import Activation
from peftcore.ops.calling import transformed
from peftcore.ops.gated import Activation as GateActivation
from peftcore.ops.weight import DTYPES

FORMULA = "_peftcore_formula"
_MARKER = "_peftcore_fused"
_DEVICES = ("cpu", "meta")  # with kernels; meta tensors stand for CPU ones
_PLAIN = (Tensor, nn.Parameter, FakeTensor)
_own = False  # whether fused modules compute their own forward
Settings = tuple[tuple[str, Any], ...]  # attributes and their values


@dataclass(frozen=True)
class Formula:
    """What a fused module computes.

    Args:
        recompute: layers that the output is given to keep the module's input instead, where that is cheap.
    """

    recompute: bool = field(default=True, kw_only=True)

    def forward(self, module: nn.Module, x: Any) -> Any:
        """Return the module's output, or None if its own forward must compute it."""

    def call(self, own: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the module's output. `own` is its own forward."""
        if len(args) == 1 and not kwargs:
            output = self.forward(module, args[0])
            if output is not None:
                return output
        return own(module, *args, **kwargs)


@dataclass(frozen=True)
class NormFormula(Formula):
    """RMSNorm as `ops.rms_norm` computes it.

    Args:
        weight, eps: names of the attributes.
        offset, rounded: as in `ops.rms_norm`.
        dtypes: pairs of dtypes of x and weight for which the results agree.
        settings: the module's other plain attributes, which its forward may read.
    """

    weight: str
    eps: str
    offset: float
    rounded: bool
    dtypes: frozenset[tuple[torch.dtype, torch.dtype]]
    settings: Settings

    def forward(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """Return the module's output, or None if its own forward must compute it."""
        weight = getattr(module, self.weight)
        if not plain(x, weight) or (x.dtype, weight.dtype) not in self.dtypes or not unchanged(module, self.settings):
            return None
        if x.dim() == 0 or weight.shape != x.shape[-1:]:
            return None
        compute = functools.partial(
            ops.rms_norm, eps=getattr(module, self.eps), offset=self.offset, rounded=self.rounded
        )
        y = compute(x, weight)
        return with_source(y, compute, (x,), (weight,)) if self.recompute else y


@dataclass(frozen=True)
class LayerNormFormula(Formula):
    """LayerNorm as PyTorch computes it, whose output is computed again."""

    def call(self, own: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the module's output."""
        y = own(module, *args, **kwargs)
        if not (torch.is_grad_enabled() and len(args) == 1 and plain(y, args[0])) or torch.is_autocast_enabled("cpu"):
            return y
        norm: Any = module
        compute = functools.partial(_layer_norm, norm.normalized_shape, norm.eps)
        return with_source(y, compute, args, (norm.weight, norm.bias))


def _layer_norm(shape: list[int], eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


@dataclass(frozen=True)
class GateFormula(Formula):
    """down(act(gate(x)) * up(x)). What `down` is given is computed again for its gradient.

    Args:
        calls: names of the children `gate` and `up` in the order in which they are called.
        gate, up, act, down: names of the children.
        activation: as in `ops.gated`.
        act_class: class of `act`.
        dtypes: dtypes for which the results agree.
        settings, act_settings: plain attributes of the module and of `act`.
    """

    calls: tuple[str, str]
    gate: str
    up: str
    act: str
    down: str
    activation: GateActivation
    act_class: type[nn.Module]
    dtypes: frozenset[torch.dtype]
    settings: Settings
    act_settings: Settings

    def forward(self, module: nn.Module, x: Any) -> Any:
        """Return the module's output, or None if its own forward must compute it."""
        children: dict[str, Any] = module._modules
        act = children.get(self.act)
        if not untransformed() or not unchanged(module, self.settings) or not self.is_plain(act):
            return None
        if any(children.get(name) is None for name in (self.gate, self.up, self.down)):
            return None
        outputs = {name: children[name](x) for name in self.calls}
        gate, up = outputs[self.gate], outputs[self.up]
        if plain(gate, up) and gate.dtype is up.dtype and gate.dtype in self.dtypes and gate.shape == up.shape:
            compute = functools.partial(ops.gated, activation=self.activation)
            product = compute(gate, up)
            if self.recompute:
                with_source(product, compute, (gate, up))
            with inputs_instead(product):
                return children[self.down](product)
        return children[self.down](act(gate) * up)  # type: ignore[misc]

    def is_plain(self, act: nn.Module | None) -> bool:
        """Return whether a call of `act` does nothing but its forward."""
        return (
            type(act) is self.act_class
            and not (act._forward_hooks or act._forward_pre_hooks or act._backward_hooks or act._backward_pre_hooks)
            and "forward" not in act.__dict__
            and unchanged(act, self.act_settings)
        )


@dataclass(frozen=True)
class ActivationFormula(Formula):
    """An activation as `ops.activated` computes it.

    Args:
        activation: as in `ops.activated`.
        dtypes: dtypes for which the results agree.
        settings: the module's plain attributes.
    """

    activation: Activation
    dtypes: frozenset[torch.dtype]
    settings: Settings

    def forward(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """Return the module's output, or None if its own forward must compute it."""
        if not plain(x, x) or x.dtype not in self.dtypes or not unchanged(module, self.settings):
            return None
        compute = functools.partial(ops.activated, activation=self.activation)
        y = compute(x)
        return with_source(y, compute, (x,)) if self.recompute else y


@dataclass(frozen=True)
class DropoutFormula(Formula):
    """Dropout as `ops.dropout` computes it, whose mask is made again for the gradient."""

    def forward(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """Return the module's output, or None if its own forward must compute it."""
        p = module.__dict__.get("p")
        if not module.training or module.__dict__.get("inplace") or type(p) is not float or not 0 < p < 1:
            return None
        if not plain(x, x) or x.dtype not in DTYPES or x.dim() == 0:
            return None
        return ops.dropout(x, p)


def untransformed() -> bool:
    """Return whether calls are neither compiled, traced nor transformed, so that an operator of ours serves."""
    return not (torch.compiler.is_compiling() or torch._C._is_tracing() or transformed())


def plain(x: Any, other: Any) -> bool:
    """Return whether an operator of ours takes both tensors and has a kernel for them."""
    return (
        type(x) in _PLAIN
        and type(other) in _PLAIN
        and x.device.type in _DEVICES
        and x.device == other.device
        and x.layout is torch.strided is other.layout
        and untransformed()
    )


def unchanged(module: nn.Module, settings: Settings) -> bool:
    """Return whether plain attributes of `module` have these values still."""
    attributes = module.__dict__
    return all(setting(attributes.get(name)) == value for name, value in settings)


def setting(value: Any) -> Any:
    """Return an attribute's value as it is compared: two partial functions of the same arguments are equal."""
    return (value.func, value.args, value.keywords) if type(value) is functools.partial else value


def computes_itself() -> bool:
    """Return whether fused modules compute their own forward now (`own_forwards`)."""
    return _own


@contextmanager
def own_forwards() -> Iterator[None]:
    """Make fused modules compute their own forward within the block, in all threads."""
    global _own
    before, _own = _own, True
    try:
        yield
    finally:
        _own = before


def fuse_module(module: nn.Module, formula: Formula) -> None:
    """Swap the class of `module`, below the other classes of peftcore."""
    classes = _swapped(module)
    with restored_after_error(module):
        module.__dict__[FORMULA] = formula
        module.__class__ = _rebuilt(_fused_class(classes[-1].__bases__[-1] if classes else type(module)), classes)


def separate(module: nn.Module) -> None:
    """Restore the class of a fused module."""
    classes = _swapped(module)
    inner = [cls for cls in classes if _MARKER in cls.__dict__]
    with restored_after_error(module):
        del module.__dict__[FORMULA]
        module.__class__ = _rebuilt(inner[0].__dict__[_MARKER], [cls for cls in classes if cls not in inner])


def is_fused(module: nn.Module) -> bool:
    """Return whether the class of `module` is a fused one."""
    return hasattr(type(module), _MARKER)


def is_outermost(module: nn.Module) -> bool:
    """Return whether no other library has swapped the class of `module` over peftcore's classes."""
    classes = _swapped(module)
    return not classes or classes[0] is type(module)


def _swapped(module: nn.Module) -> list[Any]:
    """Return peftcore's classes of `module`, the innermost last."""
    return [cls for cls in type(module).__mro__ if "_peftcore_maker" in cls.__dict__]


def _rebuilt(cls: Any, swapped: list[Any]) -> Any:
    for each in reversed(swapped):
        cls = each.__dict__["_peftcore_maker"](cls)
    return cls


@one_for_each_class
def _fused_class(cls: type[nn.Module]) -> type[nn.Module]:
    own: Any = cls.forward

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _own:
            return own(self, *args, **kwargs)
        return self.__dict__[FORMULA].call(own, self, args, kwargs)

    return subclass(cls, _fused_class, {"forward": forward, _MARKER: cls})
