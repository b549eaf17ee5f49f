"""PyTorch operators (`torch.ops.peftcore.*`), each with a plain-PyTorch reference.

A compiled kernel is used where the extension has one for the device; every other device runs the reference.
"""

from peftcore.ops._extension import extension
from peftcore.ops.activated import activated
from peftcore.ops.affine4 import affine4_weight, quantize_affine4
from peftcore.ops.attention import attention
from peftcore.ops.codebooks import DYNAMIC8, FP4, NF4, codebook
from peftcore.ops.cross_entropy import Settings
from peftcore.ops.dense_linear import WIDENED, dense_linear
from peftcore.ops.dropout import dropout, keep_mask
from peftcore.ops.gated import gated
from peftcore.ops.grouped import grouped_linear, grouped_lora_linear
from peftcore.ops.head_cross_entropy import HeadFunction, head_cross_entropy, head_log_probs
from peftcore.ops.linear_4bit import free_workspace, linear_4bit
from peftcore.ops.linear_cross_entropy import linear_cross_entropy, linear_log_probs, rows_in_piece
from peftcore.ops.linear_per_sample import lora_linear_per_sample
from peftcore.ops.lora import lora_linear
from peftcore.ops.mxfp4 import quantize_mxfp4
from peftcore.ops.nvfp4 import quantize_nvfp4
from peftcore.ops.optim import optim_step_
from peftcore.ops.quant4 import dequantize_4bit, quantize_4bit, with_nested_scales
from peftcore.ops.rms_norm import rms_norm
from peftcore.ops.row_norms import row_norms
from peftcore.ops.scaled import scaled
from peftcore.ops.weight import PackedWeight

__all__ = [
    "DYNAMIC8",
    "FP4",
    "NF4",
    "WIDENED",
    "HeadFunction",
    "PackedWeight",
    "Settings",
    "activated",
    "affine4_weight",
    "attention",
    "codebook",
    "dense_linear",
    "dequantize_4bit",
    "dropout",
    "extension",
    "free_workspace",
    "gated",
    "grouped_linear",
    "grouped_lora_linear",
    "head_cross_entropy",
    "head_log_probs",
    "keep_mask",
    "linear_4bit",
    "linear_cross_entropy",
    "linear_log_probs",
    "lora_linear",
    "lora_linear_per_sample",
    "optim_step_",
    "quantize_4bit",
    "quantize_affine4",
    "quantize_mxfp4",
    "quantize_nvfp4",
    "rms_norm",
    "row_norms",
    "rows_in_piece",
    "scaled",
    "with_nested_scales",
]
