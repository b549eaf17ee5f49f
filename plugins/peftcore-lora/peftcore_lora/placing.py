"""Placement of LoRA at layers, and facts about layers that decide it, found by running them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.plugin import (
    Architecture,
    Around,
    OnWeight,
    PeftcoreError,
    Placement,
    looks_up,
    original_class,
    own_output,
    targets,
    validation,
    warn,
)
from peftcore_lora.blocks import in_blocks
from peftcore_lora.config import LoraConfig, selected
from peftcore_lora.layers import (
    Lora,
    LoraAttention,
    LoraConv,
    LoraConvOnWeight,
    LoraEmbedding,
    LoraFromStart,
    LoraFrozenB,
    LoraGroupedConv,
    LoraLinear,
    LoraLinearOnWeight,
    LoraOnWeight,
    one_dropout,
)
from peftcore_lora.parameters import LoraParameter, place_parameters
from peftcore_lora.replication import check_replicated
from peftcore_lora.tokens import place_tokens
from peftcore_lora.training import LoraFrozenA


def wrapped(placed: list[Placement], wrap: Callable[[Any], nn.Module | None], method: str) -> list[Placement]:
    """Wrap each of LoRA's adapters in `wrap(lora)`, which is None for a kind of layer that the method cannot adapt."""
    for i, placement in enumerate(placed):
        if not isinstance(placement, (Around, OnWeight)):
            continue
        path, lora = placement.path, placement.adapter
        outer = wrap(lora)
        if outer is None:
            raise PeftcoreError(
                f"'{path}' is a layer that {method} cannot adapt, and PEFT cannot either: {type(lora).__name__}. "
                f"Exclude it: exclude_modules=['{path}']; or choose LoRA"
            )
        placed[i] = replace(placement, adapter=outer)
    return placed


def place(model: nn.Module, config: LoraConfig, architecture: Architecture) -> list[Placement]:
    if config.layer_replication:
        check_replicated(model, config.layer_replication)
    chosen = selected(model, config, architecture)
    with one_dropout(config.lora_dropout):
        placements: list[Any] = [Around(path, adapter_for(path, module, config)) for path, module in chosen.items()]
    parameters = list(place_parameters(model, config)) if config.target_parameters else []
    both_named = bool(config.use_bdlora and parameters)
    validation.require(not both_named, "use_bdlora is not supported with target_parameters. Leave one of them out")
    all_of_them = [*placements, *parameters]
    on_weight = [
        p.path
        for p in all_of_them
        if isinstance(p.adapter, LoraOnWeight) or (isinstance(p.adapter, LoraParameter) and not p.adapter.drops)
    ]
    if config.lora_dropout and on_weight:
        warn(
            f"lora_dropout={config.lora_dropout} has no effect at {len(on_weight)} of {len(all_of_them)} modules, "
            f"where the weight itself is changed, such as '{on_weight[0]}'",
        )
    trains_a = next((p.path for p in all_of_them if not isinstance(p.adapter, LoraFrozenA)), None)
    validation.require(
        not config.lora_fa or trains_a is None,
        f"lora_fa=True is only for linear layers, and '{trains_a}' is not one. Remove it from the targets",
    )
    tokens = place_tokens(model, config, architecture) if config.trainable_token_indices else []
    both = next((each.path for each in (*parameters, *tokens) if each.path in chosen), None)
    validation.require(
        both is None,
        f"'{both}' is selected by target_modules, and also by target_parameters or trainable_token_indices. Leave it "
        f"out of one: exclude_modules=['{both}']",
    )
    placements = [*placements, *parameters, *tokens]
    if config.bias == "none":
        return placements
    whole = [path for path, module in chosen.items() if isinstance(module, nn.MultiheadAttention)]
    validation.require(
        not whole,
        f"bias={config.bias!r} is not supported with '{whole[0] if whole else None}', an nn.MultiheadAttention, "
        "whose biases have other names. Choose bias='none'",
    )
    return [*placements, targets.biases(model, None if config.bias == "all" else chosen)]


def adapter_for(path: str, module: nn.Module, config: LoraConfig) -> Lora:
    """Return the LoRA of one layer."""
    kind_of_layer = original_class(module).__name__
    validation.require(
        not (config.lora_bias and isinstance(module, (nn.MultiheadAttention, nn.Embedding))),
        f"lora_bias=True is not supported at '{path}' ({kind_of_layer}). Leave it out, or drop lora_bias",
    )
    validation.require(
        not config.use_bdlora or (targets.is_linear(module) and adds_to_product(module)),
        f"'{path}' ({kind_of_layer}) is not a plain linear layer, as use_bdlora needs. Leave it out of target_modules",
    )
    if isinstance(module, nn.MultiheadAttention):
        return of_attention(path, module, config)
    if isinstance(module, nn.Embedding):
        return of_embedding(path, module, config)
    if isinstance(module, Convolution):
        adapter = of_convolution(path, module, config)
    else:
        blocks = in_blocks(config, path, module) if config.use_bdlora else None
        if blocks is not None:
            return blocks
        width, out_width = targets.sizes(module)
        own: type[LoraLinear] = LoraFrozenB if config.init_lora_weights == "mica" else LoraLinear
        own = LoraFromStart if config.frozen_start else LoraFrozenA if config.lora_fa else own
        kind = own if adds_to_product(module) else LoraLinearOnWeight
        adapter = kind(config, path, [width], [out_width])
    validation.require(
        not (config.lora_bias and isinstance(adapter, LoraOnWeight) and getattr(module, "bias", None) is None),
        f"lora_bias=True is not possible at '{path}' ({kind_of_layer}), which has no bias and whose weight itself is "
        "changed. Leave it out of target_modules, or drop lora_bias",
    )
    return adapter


def of_attention(path: str, module: nn.MultiheadAttention, config: LoraConfig) -> Lora:
    validation.require(
        module.in_proj_weight is not None,
        f"'{path}' is an attention whose keys or values have another width (kdim, vdim), which LoRA "
        f"cannot adapt. Exclude its projection: exclude_modules=['{path}.out_proj']",
    )
    return LoraAttention(config, path, module.embed_dim)


def of_embedding(path: str, module: nn.Embedding, config: LoraConfig) -> Lora:
    validation.require(
        looks_up(module),
        f"'{path}' ({original_class(module).__name__}) does more than look its input up, which LoRA cannot adapt. "
        "Take it out of target_modules",
    )
    adapter = LoraEmbedding(config, path, [module.num_embeddings], [module.embedding_dim])
    if config.init_lora_weights is not False:  # as in the paper's code and PEFT: A is zero and B normal
        nn.init.zeros_(adapter.lora_A)
        nn.init.normal_(adapter.lora_B)
    return adapter


def of_convolution(path: str, module: Convolution, config: LoraConfig) -> Lora:
    plain = any(has_forward_of(module, kind) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    groups, kernel = module.groups, module.kernel_size
    ones = [1 for _ in kernel]
    validation.require(
        plain or (groups == 1 and is_linear_in_weight(module)),
        f"'{path}' ({original_class(module).__name__}) does more with its weight than convolve, which LoRA cannot "
        "adapt. Take it out of target_modules",
    )
    if groups == 1:
        kind: type[Lora] = LoraConv if plain else LoraConvOnWeight
        return kind(config, path, [module.in_channels, *kernel], [module.out_channels, *ones])
    adapter = LoraGroupedConv(config, path, [module.in_channels, *kernel], [module.out_channels, *ones], groups)
    r = adapter.lora_A.shape[0]
    validation.require(
        r % groups == 0,
        f"'{path}' is a convolution in {groups} groups, so r must be a multiple of {groups}, found {r}. Set another "
        f"rank: rank_pattern={{'{path}': {groups}}}, or exclude it: exclude_modules=['{path}']",
    )
    validation.require(
        is_undilated(module),
        f"'{path}' is a convolution in {groups} groups that is dilated, or pads with other values than zero, "
        f"which LoRA cannot adapt. Exclude it: exclude_modules=['{path}']",
    )
    return adapter


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
