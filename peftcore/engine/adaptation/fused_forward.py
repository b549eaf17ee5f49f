"""Run norms, gated MLPs, activations and dropout by one fused operator each.

    LlamaMLP                                  LlamaMLP (fused)
      down(act(gate(x)) * up(x))        =>      down(ops.gated(gate(x), up(x)))

The fused class is inserted below peftcore's other swapped classes, so hooks, adapters, copies and pickles work as
before. A fused MLP still calls its children. The original `forward` runs calls that the operator does not support or
would compute more slowly: other dtypes, devices and tensor subclasses, compiled and transformed calls.

Attention is fused in fused_attention.py, since it is a call inside a module. recomputation.py explains how layers avoid
saving the outputs of fused modules for the backward pass.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from peftcore import ops
from peftcore.engine.adaptation.adapted import is_adapted
from peftcore.engine.adaptation.class_swap import one_for_each_class, subclass
from peftcore.engine.adaptation.recomputation import inputs_instead, with_source
from peftcore.model.base_modules import base_modules
from peftcore.ops.activated import Activation
from peftcore.ops.calling import has_active_transform, has_triton_kernels
from peftcore.ops.gated import Activation as GateActivation
from peftcore.ops.weight import DTYPES

FUSED_FORWARD = "_peftcore_fused_forward"
FUSED_ATTENTION = "_peftcore_fused_attention"  # attribute of attention modules that fused_attention.py runs
_MARKER = "_peftcore_fused"
_DEVICES = ("cpu", "meta")  # devices with kernels of all operators; meta tensors stand for CPU tensors
_PLAIN = (Tensor, nn.Parameter, FakeTensor)


@dataclass(frozen=True)
class FusedForward:
    """Description of the computation of a fused module.

    Args:
        recompute: whether layers save the module's input instead of its output, and recompute the output.
    """

    kind: ClassVar[str]
    recompute: bool = field(default=True, kw_only=True)

    def __call__(self, module: Any, x: Any) -> Tensor | None:
        """Return the module's output, or None if the original forward must compute it."""
        raise NotImplementedError


@dataclass(frozen=True)
class FusedNorm(FusedForward):
    """RMSNorm as `ops.rms_norm` computes it.

    Args:
        weight, eps: names of the attributes.
        offset, rounded: as in `ops.rms_norm`.
        dtypes: (dtype of x, dtype of the weight) for which operator and module agree.
    """

    kind = "RMSNorm"
    weight: str
    eps: str
    offset: float
    rounded: bool
    dtypes: frozenset[tuple[torch.dtype, torch.dtype]]

    def __call__(self, module: Any, x: Any) -> Tensor | None:
        """Return the module's output, or None if the original forward must compute it."""
        weight = getattr(module, self.weight)
        if not plain(x, weight, in_triton=True) or (x.dtype, weight.dtype) not in self.dtypes:
            return None
        if x.dim() == 0 or weight.shape != x.shape[-1:]:
            return None
        compute = functools.partial(
            ops.rms_norm, eps=getattr(module, self.eps), offset=self.offset, rounded=self.rounded
        )
        y = compute(x, weight)
        return with_source(y, compute, (x,), (weight,)) if self.recompute else y


@dataclass(frozen=True)
class RecomputedLayerNorm(FusedForward):
    """PyTorch's LayerNorm, still computed by PyTorch; its output is recomputed in the backward pass."""

    kind = "LayerNorm"

    def __call__(self, module: Any, x: Any) -> Tensor | None:
        """Return the module's output, or None if the original forward must compute it."""
        # Autocast computes LayerNorm in fp32, but the backward pass runs outside autocast.
        if not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not plain(x, x):
            return None
        compute = functools.partial(_layer_norm, module.normalized_shape, module.eps)
        return with_source(compute(x, module.weight, module.bias), compute, (x,), (module.weight, module.bias))


def _layer_norm(shape: list[int], eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


@dataclass(frozen=True)
class FusedMLP(FusedForward):
    """A gated MLP, down(act(gate(x)) * up(x)); the input of `down` is recomputed for its gradient.

    Args:
        gate, up, down, act: names of the children.
        activation: as in `ops.gated`.
        act_class: class of `act`.
        dtypes: dtypes for which operator and module agree.
    """

    kind = "gated MLP"
    gate: str
    up: str
    down: str
    act: str
    activation: GateActivation
    act_class: type[nn.Module]
    dtypes: frozenset[torch.dtype]

    def __call__(self, module: Any, x: Any) -> Tensor | None:
        """Return the module's output, or None if the original forward must compute it."""
        children: dict[str, Any] = module._modules
        gate_proj, up_proj, down_proj = children.get(self.gate), children.get(self.up), children.get(self.down)
        act = children.get(self.act)
        if gate_proj is None or up_proj is None or down_proj is None or not self._is_plain(act) or not untransformed():
            return None
        gate, up = gate_proj(x), up_proj(x)
        has_kernel = plain(gate, up, in_triton=True) and gate.dtype in self.dtypes
        if not has_kernel or gate.dtype is not up.dtype or gate.shape != up.shape:
            output: Tensor = down_proj(act(gate) * up)  # type: ignore[misc]
            return output
        compute = functools.partial(ops.gated, activation=self.activation)
        product = compute(gate, up)
        if self.recompute:
            with_source(product, compute, (gate, up))
        with inputs_instead(product):
            output = down_proj(product)
        return output

    def _is_plain(self, act: nn.Module | None) -> bool:
        """Return whether `act` is still the activation that was checked, without hooks or adapters."""
        return (
            type(act) is self.act_class
            and not (act._forward_hooks or act._forward_pre_hooks or act._backward_hooks or act._backward_pre_hooks)
            and "forward" not in act.__dict__
        )


@dataclass(frozen=True)
class FusedActivation(FusedForward):
    """An activation that `ops.activated` computes.

    Args:
        activation: as in `ops.activated`.
        dtypes: dtypes for which operator and module agree.
    """

    kind = "activation"
    activation: Activation
    dtypes: frozenset[torch.dtype]

    def __call__(self, module: Any, x: Any) -> Tensor | None:
        """Return the module's output, or None if the original forward must compute it."""
        if not plain(x, x) or x.dtype not in self.dtypes:
            return None
        compute = functools.partial(ops.activated, activation=self.activation)
        y = compute(x)
        return with_source(y, compute, (x,)) if self.recompute else y


@dataclass(frozen=True)
class FusedDropout(FusedForward):
    """Dropout as `ops.dropout` computes it, which saves a seed instead of the mask."""

    kind = "dropout"

    def __call__(self, module: Any, x: Any) -> Tensor | None:
        """Return the module's output, or None if the original forward must compute it."""
        if not module.training or module.inplace or type(module.p) is not float or not 0 < module.p < 1:
            return None
        if not plain(x, x) or x.dtype not in DTYPES or x.dim() == 0:
            return None
        return ops.dropout(x, module.p)


def untransformed() -> bool:
    """Return whether the call is eager: neither compiled, traced nor transformed."""
    return not (torch.compiler.is_compiling() or torch._C._is_tracing() or has_active_transform())


def plain(x: Any, other: Any, *, in_triton: bool = False) -> bool:
    """Return whether a fused operator accepts both tensors and has a kernel for them, on GPUs one in Triton."""
    return (
        type(x) in _PLAIN
        and type(other) in _PLAIN
        and (x.device.type in _DEVICES or (in_triton and has_triton_kernels(x.device)))
        and x.device == other.device
        and x.layout is torch.strided is other.layout
        and untransformed()
    )


def fuse_module(module: nn.Module, fused_forward: FusedForward) -> None:
    """Swap the class of `module`, below peftcore's other swapped classes."""
    classes = _swapped(module)
    module.__dict__[FUSED_FORWARD] = fused_forward
    module.__class__ = _rebuilt(_fused_class(classes[-1].__bases__[-1] if classes else type(module)), classes)


def separate(module: nn.Module) -> None:
    """Restore the class of a fused module."""
    classes = _swapped(module)
    inner = [cls for cls in classes if _MARKER in cls.__dict__]
    del module.__dict__[FUSED_FORWARD]
    module.__class__ = _rebuilt(inner[0].__dict__[_MARKER], [cls for cls in classes if cls not in inner])


def is_fused(module: nn.Module) -> bool:
    """Return whether the class of `module` is a fused one."""
    return hasattr(type(module), _MARKER)


def is_outermost(module: nn.Module) -> bool:
    """Return whether peftcore's swapped classes are on top, with no other library's subclass over them."""
    classes = _swapped(module)
    return not classes or classes[0] is type(module)


def _swapped(module: nn.Module) -> list[Any]:
    """Return the classes that peftcore swapped in for `module`, the innermost last."""
    return [cls for cls in type(module).__mro__ if "_peftcore_maker" in cls.__dict__]


def _rebuilt(cls: Any, classes: list[Any]) -> Any:
    for swapped_class in reversed(classes):
        cls = swapped_class.__dict__["_peftcore_maker"](cls)
    return cls


@one_for_each_class
def _fused_class(cls: type[nn.Module]) -> type[nn.Module]:
    original: Any = cls.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Compiled graphs contain the original operators, which the compiler fuses itself.
        if len(args) == 1 and not kwargs and not torch.compiler.is_compiling():
            output = self.__dict__[FUSED_FORWARD](self, args[0])
            if output is not None:
                return output
        return original(self, *args, **kwargs)

    return subclass(cls, _fused_class, {"forward": forward, _MARKER: cls})


LOSS_HANDLES = (
    "_peftcore_loss_handles"  # attribute of a model whose loss is computed without logits; the value is its hooks
)


def fused_modules(model: nn.Module) -> dict[str, int]:
    """Return the number of fused modules by kind. Adapted norms, MLPs, activations and dropouts are not fused."""
    kinds = Counter[str]()
    for _, module in base_modules(model):
        if FUSED_ATTENTION in module.__dict__:
            kinds["attention"] += 1
        elif is_fused(module) and not is_adapted(module):
            kinds[module.__dict__[FUSED_FORWARD].kind] += 1
    return dict(sorted(kinds.items()))


def is_without_logits(model: nn.Module) -> bool:
    """Return whether the model computes the loss of its labels in training without logits."""
    return LOSS_HANDLES in model.__dict__
