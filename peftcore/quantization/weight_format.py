"""How merging reads and writes a weight that is kept in 4 bits. The registry has it once this is imported."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from peftcore.method import WeightFormat
from peftcore.quantization.convert import make_plain, note_in_config
from peftcore.quantization.format import pack, unpack
from peftcore.quantization.linear import QuantizedLinear
from peftcore.registry import registry


def _matches(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLinear) and module.is_quantized


def _write(module: QuantizedLinear, weight: Tensor) -> dict[str, Tensor]:
    double_quant = module.nested_absmax is not None
    packed, state = pack(weight, module.quant_type, blocksize=module.blocksize, double_quant=double_quant)
    tensors = {"weight": packed, "absmax": state.absmax}
    if state.nested is not None:
        tensors |= {"nested_absmax": state.nested.absmax, "nested_offset": state.nested.offset}
    return tensors


def _decode(module: QuantizedLinear, tensors: dict[str, Tensor]) -> Tensor:
    state = replace(module.quant_state, absmax=tensors["absmax"])
    if state.nested is not None:
        scales = {"absmax": tensors["nested_absmax"], "offset": tensors["nested_offset"]}
        state = replace(state, nested=state.nested._replace(**scales))
    return unpack(tensors["weight"], state, torch.float32)


def _plain(module: QuantizedLinear) -> None:
    make_plain(module, module.weight)


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
