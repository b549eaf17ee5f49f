"""PyTorch operators (`torch.ops.peftcore.*`), each with a plain-PyTorch reference.

An operator runs the extension's compiled kernel if there is one for the device, and the reference otherwise. This
package depends only on PyTorch.
"""

from peftcore.ops._extension import extension as extension
from peftcore.ops.activated import activated as activated
from peftcore.ops.affine4 import affine4_weight as affine4_weight, quantize_affine4 as quantize_affine4
from peftcore.ops.attention import attention as attention
from peftcore.ops.codebooks import DYNAMIC8 as DYNAMIC8, FP4 as FP4, NF4 as NF4, codebook as codebook
from peftcore.ops.cross_entropy import Settings as Settings, cross_entropy as cross_entropy
from peftcore.ops.dense_linear import WIDENED as WIDENED, dense_linear as dense_linear
from peftcore.ops.dropout import dropout as dropout, keep_mask as keep_mask
from peftcore.ops.gated import gated as gated
from peftcore.ops.grouped import grouped_linear as grouped_linear, grouped_lora_linear as grouped_lora_linear
from peftcore.ops.linear_4bit import free_workspace as free_workspace, linear_4bit as linear_4bit
from peftcore.ops.linear_cross_entropy import (
    linear_cross_entropy as linear_cross_entropy,
    linear_log_probs as linear_log_probs,
    rows_in_piece as rows_in_piece,
)
from peftcore.ops.linear_per_sample import lora_linear_per_sample as lora_linear_per_sample
from peftcore.ops.lora import lora_linear as lora_linear
from peftcore.ops.mxfp4 import quantize_mxfp4 as quantize_mxfp4
from peftcore.ops.nvfp4 import quantize_nvfp4 as quantize_nvfp4
from peftcore.ops.optim import optim_step_ as optim_step_
from peftcore.ops.quant4 import (
    dequantize_4bit as dequantize_4bit,
    quantize_4bit as quantize_4bit,
    with_nested_scales as with_nested_scales,
)
from peftcore.ops.rms_norm import rms_norm as rms_norm
from peftcore.ops.row_norms import row_norms as row_norms
from peftcore.ops.scaled import scaled as scaled
from peftcore.ops.weight import PackedWeight as PackedWeight
