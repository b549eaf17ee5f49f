"""The 4-bit formats by name, and the settings with which a weight is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import PeftcoreError
from peftcore.ops.weight import PackedWeight
from peftcore.plugin.validation import shown
from peftcore.quantization.affine4_format import AFFINE4
from peftcore.quantization.bitsandbytes_format import FP4, NF4
from peftcore.quantization.four_bit_format import FourBitFormat, damaged_error
from peftcore.quantization.mxfp4_format import MXFP4
from peftcore.quantization.nvfp4_format import NVFP4

FORMATS: Mapping[str, FourBitFormat] = {form.name: form for form in (NF4, FP4, MXFP4, NVFP4, AFFINE4)}
QUANT_TYPES = tuple(FORMATS)
PARTS = tuple(dict.fromkeys(chain.from_iterable(form.parts for form in FORMATS.values())))


def check_quant_type(quant_type: Any) -> None:
    """Raise a PeftcoreError unless the type is one of `QUANT_TYPES`."""
    if quant_type not in QUANT_TYPES:
        raise PeftcoreError(f"unknown quant_type {shown(quant_type)}. Choose one of: {', '.join(QUANT_TYPES)}")


@dataclass(frozen=True)
class FourBitSettings:
    """Arguments of `peftcore.quantize`: how weights are quantized, and the dtype of products with them."""

    quant_type: str = "nf4"
    double_quant: bool = True
    blocksize: int = 64
    compute_dtype: torch.dtype | None = None

    def resolved(self) -> FourBitSettings:
        """Return the settings as the format applies them, with its fixed block size if it has one.

        Raises:
            PeftcoreError: the format does not support the block size.
        """
        double_quant, blocksize = FORMATS[self.quant_type].settings(self.double_quant, self.blocksize)
        return replace(self, double_quant=double_quant, blocksize=blocksize)


def quantize_weight(weight: Tensor, settings: FourBitSettings) -> PackedWeight:
    """Quantize a dense weight."""
    settings = settings.resolved()
    return FORMATS[settings.quant_type].quantize(weight, settings.blocksize, settings.double_quant)


def to_tensors(weight: PackedWeight) -> dict[str, Tensor]:
    """Return the tensors stored with `X.weight` on disk, by the part of the name after `X.weight.`."""
    return FORMATS[weight.quant_type].to_tensors(weight)


def from_tensors(codes: Tensor, tensors: Mapping[str, Tensor], name: str) -> PackedWeight:
    """Build the weight `name` from its codes and tensors, and check that they are consistent.

    Raises:
        CheckpointError: a tensor is missing or inconsistent, because the file is damaged or has another format.
    """
    formats = [form for form in FORMATS.values() if form.state in tensors]
    states = [key for key in tensors if key.startswith("quant_state.")]
    if len(formats) != 1 or len(states) != 1:
        states_of_formats = [f"'{name}.{form.state}'" for form in FORMATS.values()]
        raise damaged_error(name, f"must be one tensor {' or '.join(states_of_formats)}, found {states or 'none'}")
    return formats[0].from_tensors(codes, tensors, name)
