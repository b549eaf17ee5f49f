"""Weights quantized by another library and stored in its own tensor class, such as torchao's and quanto's.

The layer's forward is unchanged and runs inside the adapters; code that asks for the dense weight gets a dequantized
copy.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch import Tensor, nn

from peftcore.errors import PeftcoreError
from peftcore.model.base_modules import base_modules
from peftcore.plugin.hooks import hookimpl
from peftcore.plugin.layers import is_linear, is_wrapped
from peftcore.plugin.method import WeightFormat
from peftcore.plugin.registry import builtin

_ORIGINAL = "_peftcore_original_quantization"  # attribute: (quantization_config, hf_quantizer) at loading


def _weight(module: nn.Module) -> Any:
    return module._parameters.get("weight")


def _matches(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and type(weight) not in (nn.Parameter, Tensor) and is_wrapped(weight)


def _refuse_to_write(module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
    kind = type(_weight(module))
    raise PeftcoreError(
        f"cannot requantize a merged weight: the options of its {kind.__module__}.{kind.__name__} are unknown. Merge "
        "into dense weights with peftcore.merge(model, dtype=torch.bfloat16), then quantize the model again"
    )


def _sync_config(model: Any) -> None:
    """Record in a transformers config which layers are dense after merging, since loading reads it."""
    config: Any = getattr(model, "config", None)
    original, quantizer = model.__dict__.get(_ORIGINAL) or (
        getattr(config, "quantization_config", None),
        getattr(model, "hf_quantizer", None),
    )
    if not hasattr(original, "modules_to_not_convert"):
        return
    weights = {path: _weight(module) for path, module in base_modules(model) if is_linear(module)}
    wrapped = {path for path, weight in weights.items() if weight is not None and is_wrapped(weight)}
    model.__dict__[_ORIGINAL] = original, quantizer
    if wrapped:
        config.quantization_config = copy.copy(original)
        config.quantization_config.modules_to_not_convert = sorted(weights.keys() - wrapped)
        model.hf_quantizer = quantizer
    else:
        del config.quantization_config
        model.hf_quantizer = None


WRAPPED = WeightFormat(
    name="wrapped",
    matches=_matches,
    read=lambda module: _weight(module).dequantize().float(),
    write=_refuse_to_write,
    decode=lambda _module, tensors: tensors["weight"].float(),
    update_config=_sync_config,
)


@hookimpl
def peftcore_weight_formats() -> list[WeightFormat]:
    return [WRAPPED]


builtin(sys.modules[__name__])
