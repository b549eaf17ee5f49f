"""PyTorch's fused paths of `nn.TransformerEncoder`, which read the weights of the modules inside without calling them.

In evaluation without gradients a layer, or all of them at once, would bypass adapters inside, and read the bytes of
quantized weights as dense ones. Both check a flag of the module first, which is replaced by one that is off while an
adapter inside is active or a layer inside is quantized.
"""

from __future__ import annotations

import gc
from typing import Any

from torch import nn

from peftcore.adaptation.adapted import is_active, is_adapted
from peftcore.adaptation.base_modules import base_modules
from peftcore.weight_formats import find_weight_format

_FLAGS = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}

# Modules inside these that may be adapted or quantized alone.
_PARTS = (nn.Linear, nn.LayerNorm, nn.Dropout, nn.MultiheadAttention, nn.TransformerEncoderLayer)


class Flag(int):
    """Flag `value` of `module`, which counts as 0 if `quantized`, and while an adapter inside is active."""

    module: nn.Module
    quantized: bool  # a layer inside is quantized

    def __new__(cls, value: int, module: nn.Module, quantized: bool) -> Flag:
        flag = super().__new__(cls, value)
        flag.module, flag.quantized = module, quantized
        return flag

    def __bool__(self) -> bool:
        is_off = self.quantized or int(self) == 0
        return not is_off and not any(is_active(inside) for inside in self.module.modules())

    def __getnewargs__(self) -> tuple[Any, ...]:
        return int(self), self.module, self.quantized


def guard(model: nn.Module) -> None:
    """Disable fused paths around adapters and quantized layers in `model`; restore the flags where none is left."""
    for module in [*[module for _, module in base_modules(model)], *_around(model)]:
        for kind, name in _FLAGS.items():
            value = module.__dict__.get(name)
            if not isinstance(module, kind) or value is None:
                continue
            inside = list(module.modules())
            quantized = any(map(_is_quantized, inside))
            if quantized or any(map(is_adapted, inside)):
                module.__dict__[name] = Flag(int(value), module, quantized)
            elif isinstance(value, Flag):
                module.__dict__[name] = bool(int(value)) if kind is nn.TransformerEncoder else int(value)


def _is_quantized(module: nn.Module) -> bool:
    if hasattr(type(module), "packings"):  # of `quantization.parameters.PackedParameters`, also dense after a merge
        return True
    found = find_weight_format(module)
    return found is not None and found.decode is not None


def _around(model: nn.Module) -> list[nn.Module]:
    """Return the modules with a fused path that contain `model`, found among all objects of the process."""
    if not isinstance(model, _PARTS):
        return []
    held = (module for module in gc.get_objects() if issubclass(type(module), tuple(_FLAGS)))
    return [module for module in held if module is not model and any(part is model for part in module.modules())]
