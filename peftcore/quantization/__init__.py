"""Linear layers whose weights are kept in 4 bits: one layer, whole models, files in bitsandbytes' format."""

from peftcore.quantization.convert import default_skip, dequantize, quantize, quantized_layers
from peftcore.quantization.format import QuantState, pack, unpack
from peftcore.quantization.linear import QuantizedLinear

__all__ = [
    "QuantState",
    "QuantizedLinear",
    "default_skip",
    "dequantize",
    "pack",
    "quantize",
    "quantized_layers",
    "unpack",
]
