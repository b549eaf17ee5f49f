"""PyTorch's fused paths of `nn.TransformerEncoder`, which read the weights of the modules inside without calling them.

In evaluation without gradients a layer, or all of them at once, would bypass the adapters inside. Both check a flag of
the module first, which is replaced by one that is off while an adapter inside is active.
"""

from __future__ import annotations

import gc
from typing import Any

from torch import nn

from peftcore.adaptation.adapted import is_active, is_adapted
from peftcore.adaptation.base_modules import base_modules

_FLAGS = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}


# Modules inside these that may be adapted alone.
_PARTS = (nn.Linear, nn.LayerNorm, nn.Dropout, nn.MultiheadAttention, nn.TransformerEncoderLayer)


class Flag(int):
    """Flag `value` of `module`, which counts as 0 while an adapter inside is active."""

    module: nn.Module

    def __new__(cls, value: int, module: nn.Module) -> Flag:
        flag = super().__new__(cls, value)
        flag.module = module
        return flag

    def __bool__(self) -> bool:
        return int(self) != 0 and not any(is_active(inside) for inside in self.module.modules())

    def __getnewargs__(self) -> tuple[Any, ...]:
        return int(self), self.module


def guard(model: nn.Module) -> None:
    """Disable fused paths around adapters in `model`; restore the flags where there is no adapter any more."""
    for module in [*[module for _, module in base_modules(model)], *_around(model)]:
        for kind, name in _FLAGS.items():
            value = module.__dict__.get(name)
            if not isinstance(module, kind) or value is None:
                continue
            inside = any(is_adapted(other) for other in module.modules())
            if inside and not isinstance(value, Flag):
                module.__dict__[name] = Flag(value, module)
            elif not inside and isinstance(value, Flag):
                module.__dict__[name] = bool(int(value)) if kind is nn.TransformerEncoder else int(value)


def _around(model: nn.Module) -> list[nn.Module]:
    """Return the modules with a fused path that contain `model`, found among all objects of the process."""
    if not isinstance(model, _PARTS):
        return []
    held = (module for module in gc.get_objects() if issubclass(type(module), tuple(_FLAGS)))
    return [module for module in held if module is not model and any(part is model for part in module.modules())]
