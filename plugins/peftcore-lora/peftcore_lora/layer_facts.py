"""Whether B A may be added to what a layer gives, as PEFT does it, is seen on the layer: classes are many."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from peftcore.plugin import original_class, own_output

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def adds_to_product(module: nn.Module) -> bool:
    """Does a linear layer give one tensor `[..., out]`? Of packed weights every layer does."""
    if not isinstance(module, nn.Linear) or has_forward_of(module, nn.Linear) or not is_dense(module.weight):
        return True
    found = own_output(module, module.weight.new_ones(2, module.in_features))
    return isinstance(found, Tensor) and found.shape == (2, module.out_features)


def is_linear_in_weight(module: Convolution) -> bool:
    """Does the output of a convolution of a class of its own grow with the weight? PEFT's factors are of that class."""
    spatial = [2 * k * d for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    weight, shape = module.weight, [1, module.in_channels, *spatial]
    for axes in (shape, [shape[0], *shape[2:], shape[1]]):  # channels last, as some heads have it
        x = torch.linspace(-1, 1, math.prod(axes), device=weight.device).view(axes).to(weight.dtype)
        outputs = [own_output(module, x, weight=factor * weight.detach()) for factor in (0, 1, 2)]
        if all(output is not None for output in outputs):
            zero, one, two = (output[0] if isinstance(output, tuple) else output for output in outputs)
            return module.weight.is_meta or torch.allclose(two - zero, 2 * (one - zero), rtol=0.05, atol=1e-4)
    return False


def is_undilated(module: Convolution) -> bool:
    """Does A of PEFT, which has the stride and padding of a convolution and no more, see what its weight sees?"""
    padded = module.padding != "valid" and (isinstance(module.padding, str) or any(module.padding))
    dilated = any(d > 1 and k > 1 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return not dilated and (module.padding_mode == "zeros" or not padded)


def has_forward_of(module: nn.Module, kind: type[nn.Module]) -> bool:
    return original_class(module).forward is kind.forward


def is_dense(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.itemsize > 1
