"""Linear layers and experts whose weights are kept in 4 bits: whole models, files in bitsandbytes' format."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import nn

from peftcore.errors import PeftcoreError
from peftcore.quantization.convert import dequantize, quantize, quantized_experts, quantized_layers
from peftcore.quantization.format import check_quant_type
from peftcore.quantization.linear import QuantizedLinear
from peftcore.quantization.parameters import PackedParameters
from peftcore.quantization.quantizable import default_skip
from peftcore.quantization.weight_format import QUANTIZED
from peftcore.quantization.wrapped import WRAPPED

__all__ = [
    "QUANTIZED",
    "WRAPPED",
    "PackedParameters",
    "QuantizedLinear",
    "check_quant_type",
    "default_skip",
    "dequantize",
    "load",
    "quantize",
    "quantized_experts",
    "quantized_layers",
]


def load(path: str | os.PathLike[str], quant_type: str = "nf4", **options: Any) -> nn.Module:
    """A transformers model from a folder or hub id, quantized weight by weight as it is read.

    In memory at once are the quantized model and one dense weight. A checkpoint that is in bitsandbytes' 4-bit
    format already keeps its bits.

    Args:
        quant_type: `nf4`, or `fp4`.
        options: `double_quant`, `skip`, `compute_dtype` and `blocksize` as for `quantize`; `dtype` of what stays dense
            (by default the checkpoint's); `model_class`, by default the class that the checkpoint names; the rest
            goes to its `from_pretrained`.

    Raises:
        PeftcoreError: the checkpoint is quantized in another way, or an argument is wrong.
        CheckpointError: 4-bit tensors in it are damaged.
    """
    if importlib.util.find_spec("transformers") is None:
        raise PeftcoreError("loading a model needs transformers. Try: pip install transformers")
    if torch.get_default_device().type == "meta":
        raise PeftcoreError("a model cannot be loaded under torch.device('meta'), where tensors have no values")
    from peftcore.quantization import huggingface

    return huggingface.load(path, quant_type, **options)
