"""Experts with 4-bit weights: the module's class is replaced by a subclass with `PackedParameters`.

The forward of transformers' experts interface is replaced by `experts_forward`, which reads packed weights. Any other
forward runs on weights that are dequantized for each call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from peftcore.engine.adaptation.chain import keep_attributes
from peftcore.engine.adaptation.class_swap import one_for_each_class, restore_class, subclass
from peftcore.model.base_modules import restoring_on_error
from peftcore.model.detecting import mark_as_loaded
from peftcore.model.experts import experts_forward, experts_layout, has_interface_forward
from peftcore.ops import PackedWeight
from peftcore.quantization.formats import FORMATS, FourBitSettings
from peftcore.quantization.parameters import PackedParameters, quantize_by_expert

_ORIGINAL_CLASS = "_peftcore_unpacked"


def pack_parameter(module: Any, name: str, weight: PackedWeight, compute_dtype: torch.dtype | None) -> None:
    """Set the parameter `name` of a module of experts to a packed weight, in place."""
    with restoring_on_error(module):
        if not isinstance(module, PackedParameters):
            module.__class__ = packed_class(type(module))
            module.compute_dtype = compute_dtype
        dense = module._parameters.get(name)
        module.set_packed_parameter(name, weight)
        mark_as_loaded(module.get_parameter(name), dense)


def pack_experts(module: nn.Module, blocksizes: Mapping[str, int], settings: FourBitSettings) -> None:
    """Quantize a module's parameters in place, expert by expert. `blocksizes` maps parameter names to block sizes."""
    for name, blocksize in blocksizes.items():
        weight = module.get_parameter(name).detach()
        of_parameter = replace(settings, blocksize=blocksize)
        packed = quantize_by_expert(weight, of_parameter, packs_transpose(module, settings.quant_type))
        del weight
        pack_parameter(module, name, packed, settings.compute_dtype)


def packs_transpose(module: nn.Module, quant_type: str) -> bool:
    """Return whether the format packs the transpose of the module's experts, so that blocks run along the inputs."""
    layout = experts_layout(module)
    return FORMATS[quant_type].rows_are_blocks and layout is not None and layout.transposed


def unpack_experts(module: PackedParameters, dtype: torch.dtype | None = None) -> None:
    """Dequantize all parameters of a module."""
    try:
        for name in module.packings:
            parameter = nn.Parameter(module.dequantized_parameter(name, dtype), requires_grad=False)
            mark_as_loaded(parameter, module._parameters[name])
            module._parameters[name] = parameter
    finally:  # after an interruption, some parameters are dense already
        drop_dense_packings(module)


def drop_dense_packings(module: PackedParameters) -> None:
    """Remove the packings of parameters that are dense again; once none is left, restore the module's class."""
    for name in list(module.packings):
        if module.packed_parameter(name) is None:
            module.forget_packing(name)
    if not module.packings:
        for attribute in ("packings", "compute_dtype"):
            module.__dict__.pop(attribute, None)
        restore_class(module, _ORIGINAL_CLASS)


@one_for_each_class
def packed_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of `cls` with `PackedParameters`."""

    def forward(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if has_interface_forward(self, cls.forward):
            return experts_forward(self, hidden, *args, **kwargs)
        dtype = self.compute_dtype or hidden.dtype
        copy = _copy_with_dense_parameters(self, dtype)
        output = cls.forward(copy, hidden.to(dtype), *args, **kwargs)
        if not is_dynamo_compiling():
            keep_attributes(self, copy)
        return output.to(hidden.dtype) if isinstance(output, Tensor) else output

    forward.__wrapped__ = cls.forward  # type: ignore[attr-defined]  # inspect.signature reads it
    forward.over_dense = cls.forward  # type: ignore[attr-defined]  # see `has_interface_forward`
    forward.__doc__ = cls.forward.__doc__
    return subclass(cls, packed_class, {"forward": forward, _ORIGINAL_CLASS: cls}, (PackedParameters,))


def _copy_with_dense_parameters(module: PackedParameters, dtype: torch.dtype) -> nn.Module:
    """Return a shallow copy with dense parameters."""
    copy: nn.Module = object.__new__(type(module))
    parameters: dict[str, Any] = dict(module._parameters)
    for name in module.packings:
        # May be dense, because an adapter replaces it with a weight that requires gradients
        parameter = parameters[name]
        parameters[name] = (
            parameter.to(dtype) if parameter.is_floating_point() else module.dequantized_parameter(name, dtype)
        )
    copy.__dict__.update(module.__dict__, _parameters=parameters)
    return copy
