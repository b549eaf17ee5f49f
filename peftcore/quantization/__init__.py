"""4-bit weights: quantized linear layers, experts and models, and their files.

`peftcore` exports `quantize`, `dequantize` and `FourBitConfig`. This package exports `load`, `QuantizedLinear`,
`quantized_layers`, `quantized_experts` and `speed_up_decoding` (`quantize` and `load` call it; it is for models whose
layers were quantized one by one); and for plugins `PackedParameters`, `default_skip` and `find_type`.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import nn

from peftcore.errors import PeftcoreError
from peftcore.quantization import weight_formats  # noqa: F401  # the import registers the 4-bit formats
from peftcore.quantization.checkpoint_layouts import build_empty as build_empty, is_packed as is_packed
from peftcore.quantization.convert import (
    dequantize as dequantize,
    quantize as quantize,
    quantized_experts as quantized_experts,
    quantized_layers as quantized_layers,
    release_free_memory as release_free_memory,
    speed_up_decoding as speed_up_decoding,
)
from peftcore.quantization.formats import QUANT_TYPES as QUANT_TYPES
from peftcore.quantization.linear import QuantizedLinear as QuantizedLinear
from peftcore.quantization.parameters import PackedParameters as PackedParameters
from peftcore.quantization.quant_types import find_type as find_type
from peftcore.quantization.quantizable import default_skip as default_skip, quantizable as quantizable


def load(path: str | os.PathLike[str], quant_type: str = "nf4", **options: Any) -> nn.Module:
    """Load a transformers model from a folder or hub id, quantizing each weight as it is read.

    At any time, memory holds the quantized part of the model and one dense weight. Quantized checkpoints keep their
    bits: bitsandbytes' 4-bit format and MXFP4, and with the package peftcore-checkpoints also int4 by GPTQ, AutoAWQ and
    compressed-tensors (the layers become `affine4`) and NVFP4 by ModelOpt and compressed-tensors.

    Args:
        path: folder or hub id.
        quant_type: as for `quantize`. For a plugin's format, the whole dense model is loaded first.
        options: `double_quant`, `skip`, `compute_dtype` and `blocksize` as for `quantize`; `dtype` of the weights that
            stay dense (default: the checkpoint's); `model_class` (default: the class that the checkpoint's config
            names). All other options are passed to `from_pretrained`.

    Returns:
        The model.

    Raises:
        PeftcoreError: the checkpoint is quantized in an unsupported format, or an argument is wrong.
        CheckpointError: 4-bit tensors in the checkpoint are damaged.
    """
    if importlib.util.find_spec("transformers") is None:
        raise PeftcoreError("loading a model needs transformers. Install it: pip install transformers")
    if torch.get_default_device().type == "meta":
        raise PeftcoreError(
            "cannot load a model under torch.device('meta'), where tensors have no values. Load the model outside "
            "that block"
        )
    from peftcore.quantization import huggingface

    find_type(quant_type)
    if quant_type not in QUANT_TYPES:
        return huggingface.load_then_quantize(path, quant_type, **options)
    return huggingface.load(path, quant_type, **options)
