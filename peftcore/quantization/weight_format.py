"""How merging reads and writes a weight that is kept in 4 bits. The registry has it once this is imported."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from peftcore import ops
from peftcore.method import WeightFormat
from peftcore.quantization.convert import make_plain, note_in_config
from peftcore.quantization.linear import QuantizedLinear
from peftcore.registry import registry


def _matches(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLinear) and module.is_quantized


def _write(module: QuantizedLinear, weight: Tensor) -> dict[str, Tensor]:
    packed = module.quantized(weight)
    tensors = {"weight": packed.codes, "absmax": packed.absmax}
    if packed.nested_absmax is not None and packed.nested_offset is not None:
        tensors |= {"nested_absmax": packed.nested_absmax, "nested_offset": packed.nested_offset}
    return tensors


def _decode(module: QuantizedLinear, tensors: dict[str, Tensor]) -> Tensor:
    parts: dict[str, Any] = {"codes" if name == "weight" else name: tensor for name, tensor in tensors.items()}
    return ops.dequantize_4bit(module.packed._replace(**parts), torch.float32)


def _plain(module: QuantizedLinear) -> None:
    make_plain(module, cast(nn.Parameter, module.weight))


QUANTIZED = WeightFormat(
    name="4-bit",
    matches=_matches,
    read=lambda module: module.dequantized(torch.float32),
    write=_write,
    decode=_decode,
    plain=_plain,
    update_config=note_in_config,
)
registry.add_weight_format(QUANTIZED)
