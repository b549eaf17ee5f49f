"""Disable PyTorch's fused paths of `nn.TransformerEncoder`, which read the weights of submodules without calling them.

In evaluation mode without gradients, the fused path of a layer or of the encoder would bypass adapters and read packed
bytes as dense weights. Both paths check an attribute of the module first, which is set to False while a submodule is
adapted or quantized.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from peftcore.engine.adaptation.adapted import is_adapted
from peftcore.model.base_modules import base_modules
from peftcore.model.weight_formats import find_weight_format

_FLAGS = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
_KEPT = "_peftcore_fast_path"  # attribute of a module with such a flag: the original value

# Submodules of a layer, which may be adapted or quantized when the layer itself is not part of the model.
_PARTS = (nn.Linear, nn.LayerNorm, nn.Dropout, nn.MultiheadAttention)


def guard(model: nn.Module) -> None:
    """Disable fused paths in modules that contain adapters or quantized layers, and restore the flags of all others."""
    for _, module in base_modules(model):
        for kind, flag in _FLAGS.items():
            if not isinstance(module, kind) or flag not in module.__dict__:
                continue
            if any(_is_changed(child) for child in module.modules()):
                module.__dict__.setdefault(_KEPT, module.__dict__[flag])
                module.__dict__[flag] = False
            elif _KEPT in module.__dict__:
                module.__dict__[flag] = module.__dict__.pop(_KEPT)
    if isinstance(model, _PARTS):
        _guard_part(model)


def _guard_part(model: nn.Module) -> None:
    """Add a hook to adapted or quantized submodules: a layer whose submodules have hooks calls all of them."""
    hooks = model._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is _keep_output]:
        del hooks[key]
    if _is_changed(model):
        model.register_forward_hook(_keep_output)


def _keep_output(_module: nn.Module, _inputs: Any, _output: Any) -> None:
    """Leave the output of a module as it is."""


def _is_changed(module: nn.Module) -> bool:
    if is_adapted(module) or hasattr(type(module), "packings"):  # `PackedParameters`, also dense after a merge
        return True
    stored_format = find_weight_format(module)
    return stored_format is not None and stored_format.decode is not None
