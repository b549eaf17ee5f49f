"""Guard for PyTorch's fused paths of `nn.TransformerEncoder`, which would read quantized bytes as dense weights.

In evaluation mode without gradients, a layer or the whole encoder bypasses its linear layers. Both check a flag of the
module first, which is off while a layer inside is quantized.
"""

from __future__ import annotations

from torch import nn

from peftcore.adaptation.base_modules import base_modules
from peftcore.quantization.linear import QuantizedLinear
from peftcore.weight_formats import find_weight_format

_FLAGS: dict[type[nn.Module], tuple[str, int]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
_KEPT = "_peftcore_fused"  # the original flag


def guard_quantized(model: nn.Module) -> None:
    """Disable the fused paths around quantized layers; enable those that were disabled and need it no longer."""
    for _, module in base_modules(model):
        for kind, (name, off) in _FLAGS.items():
            if not isinstance(module, kind):
                continue
            is_off = any(map(_is_quantized, module.modules()))
            if is_off and _KEPT not in module.__dict__:
                module.__dict__[_KEPT] = module.__dict__.get(name, off)
                module.__dict__[name] = off
            elif not is_off and _KEPT in module.__dict__:
                module.__dict__[name] = module.__dict__.pop(_KEPT)


def _is_quantized(module: nn.Module) -> bool:
    if isinstance(module, QuantizedLinear):
        return True
    found = find_weight_format(module)
    return found is not None and found.decode is not None
