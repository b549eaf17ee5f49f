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
from peftcore.quantization.packed_experts import forget_dense
from peftcore.quantization.parameters import BUFFERS, PackedParameters


@cache
def four_bits(quant_type: str, name: str = "weight") -> WeightFormat:
    """Return the format of parameters called `name` with these codes, of modules with `PackedParameters`."""

    def matches(module: nn.Module) -> bool:
        if not isinstance(module, PackedParameters):
            return False
        packing = module.packings.get(name)
        return packing is not None and packing.quant_type == quant_type and module.packed_parameter(name) is not None

    def names_of(module: PackedParameters) -> dict[str, str]:
        """Return the names of a packed weight's tensors, by part."""
        return {"codes": name, **dict(zip(BUFFERS, module.packings[name].buffers, strict=True))}

    def write(module: PackedParameters, weight: Tensor) -> dict[str, Tensor]:
        packed, names = module.quantized_parameter(name, weight), names_of(module)
        parts = ("codes", "absmax", "nested_absmax", "nested_quant_map", "nested_offset")
        return {names[part]: tensor for part in parts if (tensor := getattr(packed, part)) is not None}

    def decode(module: PackedParameters, tensors: dict[str, Tensor]) -> Tensor:
        packed, names = module.packed_parameter(name), names_of(module)
        assert packed is not None
        changed: dict[str, Any] = {part: tensors[named] for part, named in names.items() if named in tensors}
        return module.dense_values(packed._replace(**changed), torch.float32)

    return WeightFormat(
        name=quant_type,
        matches=matches,
        read=lambda module: module.dequantized_parameter(name, torch.float32),
        write=write,
        decode=decode,
        plain=_plain,
        update_config=sync_config,
        quantize=partial(convert_dense, settings=FourBitSettings(quant_type)),
        for_parameter=partial(four_bits, quant_type),
    )


def _plain(module: PackedParameters) -> None:
    if isinstance(module, QuantizedLinear):
        make_plain(module, cast(nn.Parameter, module.weight))
    else:
        forget_dense(module)


@hookimpl(trylast=True)  # a dense layer, the most frequent, asks none of them
def peftcore_weight_formats() -> list[WeightFormat]:
    return [four_bits(quant_type) for quant_type in QUANT_TYPES]


builtin(sys.modules[__name__])
