"""The arithmetic as PyTorch operators (`torch.ops.peftcore.*`), each with a plain-PyTorch reference beside it.

A compiled kernel is used where the extension has one for the device; every other device runs the reference.
"""

from peftcore.ops._extension import extension
from peftcore.ops.linear_4bit import free_workspace, linear_4bit
from peftcore.ops.lora import PackedWeight, lora_linear, lora_linear_per_sample
from peftcore.ops.nf4 import (
    DYNAMIC8,
    FP4,
    NF4,
    NestedScales,
    codebook,
    dequantize_4bit,
    dequantize_absmax,
    quantize_4bit,
    quantize_absmax,
)
from peftcore.ops.optim import optim_step_

__all__ = [
    "DYNAMIC8",
    "FP4",
    "NF4",
    "NestedScales",
    "PackedWeight",
    "codebook",
    "dequantize_4bit",
    "dequantize_absmax",
    "extension",
    "free_workspace",
    "linear_4bit",
    "lora_linear",
    "lora_linear_per_sample",
    "optim_step_",
    "quantize_4bit",
    "quantize_absmax",
]
