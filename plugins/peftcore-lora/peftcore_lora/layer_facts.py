"""Facts about layers, found by running them: whether B A may be added to the output, as PEFT does."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from peftcore.plugin import original_class, own_output

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def adds_to_product(module: nn.Module) -> bool:
    """Return whether a linear layer returns one tensor `[..., out]`, as all with packed weights do."""
    if not isinstance(module, nn.Linear) or has_forward_of(module, nn.Linear) or not is_dense(module.weight):
        return True
    found = own_output(module, module.weight.new_ones(2, module.in_features))
    return isinstance(found, Tensor) and found.shape == (2, module.out_features)


def is_linear_in_weight(module: Convolution) -> bool:
    """Return whether the output of a convolution's subclass is linear in the weight, as PEFT's factors assume."""
    spatial = [2 * k * d for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    weight, shape = module.weight, [1, module.in_channels, *spatial]
    for axes in (shape, [shape[0], *shape[2:], shape[1]]):  # also channels last, as some heads are
        x = torch.linspace(-1, 1, math.prod(axes), device=weight.device).view(axes).to(weight.dtype)
        outputs = [own_output(module, x, weight=factor * weight.detach()) for factor in (0, 1, 2)]
        if all(output is not None for output in outputs):
            zero, one, two = (output[0] if isinstance(output, tuple) else output for output in outputs)
            return module.weight.is_meta or torch.allclose(two - zero, 2 * (one - zero), rtol=0.05, atol=1e-4)
    return False


def is_undilated(module: Convolution) -> bool:
    """Return whether A of PEFT, with only a convolution's stride and padding, reads the same inputs as its weight."""
    padded = module.padding != "valid" and (isinstance(module.padding, str) or any(module.padding))
    dilated = any(d > 1 and k > 1 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return not dilated and (module.padding_mode == "zeros" or not padded)


def has_forward_of(module: nn.Module, kind: type[nn.Module]) -> bool:
    return original_class(module).forward is kind.forward


def is_dense(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.itemsize > 1
