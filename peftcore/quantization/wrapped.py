"""Weights that another library has quantized and keeps in a tensor of its own class, such as torchao's and quanto's.

The layer stays that library's: its forward runs, adapters act around it, and what asks for the dense weight is given
one. The registry has this format once this is imported.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from peftcore.adaptation.adapted import base_modules
from peftcore.errors import PeftcoreError
from peftcore.layers import is_linear, is_wrapped
from peftcore.method import WeightFormat
from peftcore.registry import registry

_TOLD = (
    "_peftcore_told_of_wrapped"  # attribute: (quantization_config, hf_quantizer) that a transformers model came with
)


def _weight(module: nn.Module) -> Any:
    return module._parameters.get("weight")


def _refuse_to_write(module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
    kind = type(_weight(module))
    raise PeftcoreError(
        f"{kind.__module__}.{kind.__name__} holds a weight that its library made by options which it does not tell, so "
        "that nothing can be written there. Merge into dense weights, peftcore.merge(model, dtype=torch.bfloat16), and "
        "quantize the model again"
    )


def _note_in_config(model: Any) -> None:
    """Let a transformers model say which layers are dense, once adapters were merged: it reads its files by that."""
    config: Any = getattr(model, "config", None)
    told, quantizer = model.__dict__.get(_TOLD) or (
        getattr(config, "quantization_config", None),
        getattr(model, "hf_quantizer", None),
    )
    if not hasattr(told, "modules_to_not_convert"):
        return
    weights = {path: _weight(module) for path, module in base_modules(model) if is_linear(module)}
    wrapped = {path for path, weight in weights.items() if weight is not None and is_wrapped(weight)}
    model.__dict__[_TOLD] = told, quantizer
    if wrapped:
        config.quantization_config = copy.copy(told)
        config.quantization_config.modules_to_not_convert = sorted(weights.keys() - wrapped)
        model.hf_quantizer = quantizer
    else:
        del config.quantization_config
        model.hf_quantizer = None


WRAPPED = WeightFormat(
    name="wrapped",
    matches=lambda module: (weight := _weight(module)) is not None and is_wrapped(weight),
    read=lambda module: _weight(module).dequantize().float(),
    write=_refuse_to_write,
    decode=lambda _module, tensors: tensors["weight"].float(),
    update_config=_note_in_config,
)
registry.add_weight_format(WRAPPED)
