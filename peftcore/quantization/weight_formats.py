"""Weight formats of 4-bit parameters."""

from __future__ import annotations

import sys
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftcore.plugin.hooks import hookimpl
from peftcore.plugin.method import WeightFormat
from peftcore.plugin.registry import builtin
from peftcore.quantization.config_sync import sync_config
from peftcore.quantization.convert import convert_dense, make_plain
from peftcore.quantization.formats import QUANT_TYPES, FourBitSettings
from peftcore.quantization.linear import QuantizedLinear
from peftcore.quantization.packed_experts import drop_dense_packings
from peftcore.quantization.parameters import BUFFERS, PackedParameters


@cache
def weight_format_of(quant_type: str, name: str = "weight") -> WeightFormat:
    """Return the weight format of 4-bit parameters called `name` with this `quant_type`, on `PackedParameters`."""

    def matches(module: nn.Module) -> bool:
        if not isinstance(module, PackedParameters):
            return False
        packing = module.packings.get(name)
        return packing is not None and packing.quant_type == quant_type and module.packed_parameter(name) is not None

    def names_of(module: PackedParameters) -> dict[str, str]:
        """Return the names of a packed weight's parameter and buffers, by part."""
        return {"codes": name, **dict(zip(BUFFERS, module.packings[name].buffers, strict=True))}

    def write(module: PackedParameters, weight: Tensor) -> dict[str, Tensor]:
        packed, names = module.quantized_parameter(name, weight), names_of(module)
        parts = ("codes", "absmax", "nested_absmax", "nested_quant_map", "nested_offset")
        return {names[part]: tensor for part in parts if (tensor := getattr(packed, part)) is not None}

    def decode(module: PackedParameters, tensors: dict[str, Tensor]) -> Tensor:
        packed, names = module.packed_parameter(name), names_of(module)
        assert packed is not None
        parts: dict[str, Any] = {
            part: tensors[tensor_name] for part, tensor_name in names.items() if tensor_name in tensors
        }
        return module.dense_values(packed._replace(**parts), torch.float32)

    return WeightFormat(
        name=quant_type,
        matches=matches,
        read=lambda module: module.dequantized_parameter(name, torch.float32),
        write=write,
        decode=decode,
        plain=_plain,
        update_config=sync_config,
        quantize=partial(convert_dense, settings=FourBitSettings(quant_type)),
        for_parameter=partial(weight_format_of, quant_type),
    )


def _plain(module: PackedParameters) -> None:
    if isinstance(module, QuantizedLinear):
        make_plain(module, cast(nn.Parameter, module.weight))
    else:
        drop_dense_packings(module)


@hookimpl(trylast=True)  # most layers are dense, and the formats are tried in order
def peftcore_weight_formats() -> list[WeightFormat]:
    return [weight_format_of(quant_type) for quant_type in QUANT_TYPES]


builtin(sys.modules[__name__])
