"""Which LoRA stands at which layer."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

import peftcore
from peftcore import targets, validation
from peftcore.adaptation.class_swap import original_class
from peftcore_lora.config import LoraConfig, selected
from peftcore_lora.layer_facts import adds_to_product, has_forward_of, is_linear_in_weight, looks_up
from peftcore_lora.layers import (
    Lora,
    LoraAttention,
    LoraConv,
    LoraConvOnWeight,
    LoraEmbedding,
    LoraLinear,
    LoraLinearOnWeight,
    OnWeight,
)


def place(model: nn.Module, config: LoraConfig, architecture: peftcore.Architecture) -> list[Any]:
    chosen = selected(model, config, architecture)
    placements = [peftcore.Around(path, adapter_for(path, module, config)) for path, module in chosen.items()]
    on_weight = [placement.path for placement in placements if isinstance(placement.adapter, OnWeight)]
    if config.lora_dropout and on_weight:
        warnings.warn(
            f"lora_dropout={config.lora_dropout} does not act at {len(on_weight)} of {len(placements)} modules, where "
            f"the weight itself is changed, such as '{on_weight[0]}'",
            stacklevel=2,
        )
    if config.bias == "none":
        return placements
    whole = [path for path, module in chosen.items() if isinstance(module, nn.MultiheadAttention)]
    validation.require(
        not whole,
        f"bias={config.bias!r} is not known beside '{whole[0] if whole else None}', an nn.MultiheadAttention, "
        "whose biases have other names. Choose bias='none'",
    )
    return [*placements, targets.biases(model, None if config.bias == "all" else chosen)]


def adapter_for(path: str, module: nn.Module, config: LoraConfig) -> Lora:
    """The LoRA of one layer."""
    validation.require(
        not any(p is not None and p.is_complex() for p in module._parameters.values()),
        f"'{path}' ({original_class(module).__name__}) has complex weights, which LoRA cannot adapt",
    )
    if isinstance(module, nn.MultiheadAttention):
        one = module.in_proj_weight is not None
        validation.require(
            one,
            f"'{path}' is an attention whose keys or values have a width of their own (kdim, vdim), which LoRA "
            f"cannot adapt. Exclude its projection: exclude_modules=['{path}.out_proj']",
        )
        return LoraAttention(config, path, module.embed_dim)
    if isinstance(module, nn.Embedding):
        validation.require(
            looks_up(module),
            f"'{path}' ({original_class(module).__name__}) does more than look its input up, which LoRA cannot adapt. "
            "Take it out of target_modules",
        )
        adapter = LoraEmbedding(config, path, [module.num_embeddings], [module.embedding_dim])
        if config.init_lora_weights is not False:  # as in the paper's code and PEFT: here A is zero, B normal
            nn.init.zeros_(adapter.lora_A)
            nn.init.normal_(adapter.lora_B)
        return adapter
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        groups, kernel = module.groups, module.kernel_size
        validation.require(groups == 1, f"'{path}' is a convolution in {groups} groups, which LoRA cannot adapt")
        plain = has_forward_of(module, nn.Conv1d) or has_forward_of(module, nn.Conv2d)
        validation.require(
            plain or is_linear_in_weight(module),
            f"'{path}' ({original_class(module).__name__}) does more with its weight than convolve, which LoRA cannot "
            "adapt. Take it out of target_modules",
        )
        kind: type[Lora] = LoraConv if plain else LoraConvOnWeight
        return kind(config, path, [module.in_channels, *kernel], [module.out_channels, *(1 for _ in kernel)])
    width, out_width = targets.sizes(module)
    kind = LoraLinear if adds_to_product(module) else LoraLinearOnWeight
    return kind(config, path, [width], [out_width])
