"""Choice of the adapter for each layer. Subclasses of known layers are run once to see what they compute."""

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
from peftcore_lora.blocks import block_adapter
from peftcore_lora.config import LoraConfig, select_layers
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
    shared_dropout,
)
from peftcore_lora.parameters import LoraParameter, place_parameters
from peftcore_lora.replication import check_replicated
from peftcore_lora.tokens import place_tokens
from peftcore_lora.training import LoraFrozenA


def wrap_adapters(placements: list[Placement], wrap: Callable[[Any], nn.Module | None], method: str) -> list[Placement]:
    """Replace each LoRA adapter by `wrap(lora)`, for a method with a LoRA inside.

    Raises:
        PeftcoreError: `wrap` returns None, because `method` does not support that type of layer.
    """
    for i, placement in enumerate(placements):
        if not isinstance(placement, (Around, OnWeight)):
            continue
        path, lora = placement.path, placement.adapter
        outer = wrap(lora)
        if outer is None:
            raise PeftcoreError(
                f"{method} cannot adapt '{path}' ({type(lora).__name__}), and neither can PEFT. Exclude it: "
                f"exclude_modules=['{path}']; or choose LoRA"
            )
        placements[i] = replace(placement, adapter=outer)
    return placements


def place(model: nn.Module, config: LoraConfig, architecture: Architecture) -> list[Placement]:
    if config.layer_replication:
        check_replicated(model, config.layer_replication)
    layers = select_layers(model, config, architecture)
    with shared_dropout(config.lora_dropout):
        placements: list[Any] = [Around(path, adapter_for(path, module, config)) for path, module in layers.items()]
    parameters = list(place_parameters(model, config)) if config.target_parameters else []
    has_conflict = bool(config.use_bdlora and parameters)
    validation.require(not has_conflict, "use_bdlora is not supported with target_parameters. Leave one of them out")
    lora_placements = [*placements, *parameters]
    without_dropout = [p.path for p in lora_placements if not _has_dropout(p.adapter)]
    if config.lora_dropout and without_dropout:
        warn(
            f"lora_dropout={config.lora_dropout} has no effect at {len(without_dropout)} of {len(lora_placements)} "
            f"modules, where B A is added to the weight, such as '{without_dropout[0]}'",
        )
    nonlinear = next((p.path for p in lora_placements if not isinstance(p.adapter, LoraFrozenA)), None)
    validation.require(
        not config.lora_fa or nonlinear is None,
        f"lora_fa=True is only for linear layers, and '{nonlinear}' is not one. Remove it from the targets",
    )
    tokens = place_tokens(model, config, architecture) if config.trainable_token_indices else []
    selected_twice = next((p.path for p in (*parameters, *tokens) if p.path in layers), None)
    validation.require(
        selected_twice is None,
        f"'{selected_twice}' is selected by target_modules and also by target_parameters or trainable_token_indices. "
        f"Exclude it from target_modules: exclude_modules=['{selected_twice}']",
    )
    placements = [*placements, *parameters, *tokens]
    if config.bias == "none":
        return placements
    attention = next((path for path, module in layers.items() if isinstance(module, nn.MultiheadAttention)), None)
    validation.require(
        attention is None,
        f"bias={config.bias!r} is not supported with '{attention}', an nn.MultiheadAttention, whose biases have other "
        "names. Choose bias='none'",
    )
    return [*placements, targets.biases(model, None if config.bias == "all" else layers)]


def _has_dropout(adapter: nn.Module) -> bool:
    """Return whether `lora_dropout` has an effect: not where the adapter changes the weight that the layer reads."""
    if isinstance(adapter, LoraParameter):
        return adapter.applies_dropout
    return not isinstance(adapter, LoraOnWeight)


def adapter_for(path: str, module: nn.Module, config: LoraConfig) -> Lora:
    """Create the LoRA adapter for one layer.

    Raises:
        PeftcoreError: LoRA, or one of the config's fields, does not support the layer.
    """
    layer_type = original_class(module).__name__
    validation.require(
        not (config.lora_bias and isinstance(module, (nn.MultiheadAttention, nn.Embedding))),
        f"lora_bias=True is not supported at '{path}' ({layer_type}). Leave the layer out, or drop lora_bias",
    )
    validation.require(
        not config.use_bdlora or (targets.is_linear(module) and adds_to_product(module)),
        f"use_bdlora needs plain linear layers, and '{path}' ({layer_type}) is not one. Leave it out of target_modules",
    )
    if isinstance(module, nn.MultiheadAttention):
        return attention_adapter(path, module, config)
    if isinstance(module, nn.Embedding):
        return embedding_adapter(path, module, config)
    if isinstance(module, Convolution):
        adapter = convolution_adapter(path, module, config)
    else:
        blocks = block_adapter(config, path, module) if config.use_bdlora else None
        if blocks is not None:
            return blocks
        width, out_width = targets.sizes(module)
        adapter = _linear_type(module, config)(config, path, [width], [out_width])
    validation.require(
        not (config.lora_bias and isinstance(adapter, LoraOnWeight) and getattr(module, "bias", None) is None),
        f"lora_bias=True is not possible at '{path}' ({layer_type}), which has no bias to add to. Leave it out of "
        "target_modules, or drop lora_bias",
    )
    return adapter


def _linear_type(module: nn.Module, config: LoraConfig) -> type[LoraLinear]:
    if not adds_to_product(module):
        return LoraLinearOnWeight
    if config.frozen_start:
        return LoraFromStart
    if config.lora_fa:
        return LoraFrozenA
    return LoraFrozenB if config.init_lora_weights == "mica" else LoraLinear


def attention_adapter(path: str, module: nn.MultiheadAttention, config: LoraConfig) -> Lora:
    validation.require(
        module.in_proj_weight is not None,
        f"LoRA cannot adapt '{path}', an attention whose keys or values have another width (kdim, vdim). Exclude its "
        f"projection: exclude_modules=['{path}.out_proj']",
    )
    return LoraAttention(config, path, module.embed_dim)


def embedding_adapter(path: str, module: nn.Embedding, config: LoraConfig) -> Lora:
    validation.require(
        looks_up(module),
        f"LoRA cannot adapt '{path}' ({original_class(module).__name__}), which does more than look up its input. "
        "Leave it out of target_modules",
    )
    adapter = LoraEmbedding(config, path, [module.num_embeddings], [module.embedding_dim])
    if config.init_lora_weights is not False:  # A is zero and B normal, as in the paper's code and in PEFT
        nn.init.zeros_(adapter.lora_A)
        nn.init.normal_(adapter.lora_B)
    return adapter


def convolution_adapter(path: str, module: Convolution, config: LoraConfig) -> Lora:
    is_plain = any(has_forward_of(module, layer_type) for layer_type in (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    groups, kernel = module.groups, module.kernel_size
    pointwise = [1 for _ in kernel]
    validation.require(
        is_plain or (groups == 1 and is_linear_in_weight(module)),
        f"LoRA cannot adapt '{path}' ({original_class(module).__name__}), which does more than a convolution with its "
        "weight. Leave it out of target_modules",
    )
    if groups == 1:
        adapter_type: type[Lora] = LoraConv if is_plain else LoraConvOnWeight
        return adapter_type(config, path, [module.in_channels, *kernel], [module.out_channels, *pointwise])
    adapter = LoraGroupedConv(config, path, [module.in_channels, *kernel], [module.out_channels, *pointwise], groups)
    r = adapter.lora_A.shape[0]
    validation.require(
        r % groups == 0,
        f"'{path}' is a convolution with {groups} groups, so r must be a multiple of {groups}, found {r}. Set its "
        f"rank: rank_pattern={{'{path}': {groups}}}, or exclude it: exclude_modules=['{path}']",
    )
    validation.require(
        is_undilated(module),
        f"LoRA cannot adapt '{path}', a convolution with {groups} groups that is dilated or does not pad with zeros. "
        f"Exclude it: exclude_modules=['{path}']",
    )
    return adapter


Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def adds_to_product(module: nn.Module) -> bool:
    """Return whether a linear layer returns one tensor `[..., out]`, so that B A x can be added to it."""
    # Layers with packed weights do, and running one here would dequantize its weight.
    if not isinstance(module, nn.Linear) or has_forward_of(module, nn.Linear) or not is_dense(module.weight):
        return True
    output = own_output(module, module.weight.new_ones(2, module.in_features))
    return isinstance(output, Tensor) and output.shape == (2, module.out_features)


def is_linear_in_weight(module: Convolution) -> bool:
    """Return whether the output of a convolution's subclass is linear in its weight, so that B A can be added to it."""
    spatial = [2 * k * d for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    weight = module.weight
    channels_first = [1, module.in_channels, *spatial]
    channels_last = [1, *spatial, module.in_channels]  # some heads take this layout
    for shape in (channels_first, channels_last):
        x = torch.linspace(-1, 1, math.prod(shape), device=weight.device).view(shape).to(weight.dtype)
        # For an output y that is linear in the weight (with a bias), y(2 W) - y(0) = 2 (y(W) - y(0)).
        outputs = [own_output(module, x, weight=factor * weight.detach()) for factor in (0, 1, 2)]
        if all(output is not None for output in outputs):
            y_at_zero, y_at_weight, y_at_double = (
                output[0] if isinstance(output, tuple) else output for output in outputs
            )
            return module.weight.is_meta or torch.allclose(
                y_at_double - y_at_zero, 2 * (y_at_weight - y_at_zero), rtol=0.05, atol=1e-4
            )
    return False


def is_undilated(module: Convolution) -> bool:
    """Return whether PEFT's A, which has the convolution's stride and padding only, sees the same inputs as W."""
    is_padded = module.padding != "valid" and (isinstance(module.padding, str) or any(module.padding))
    is_dilated = any(d > 1 and k > 1 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return not is_dilated and (module.padding_mode == "zeros" or not is_padded)


def has_forward_of(module: nn.Module, kind: type[nn.Module]) -> bool:
    return original_class(module).forward is kind.forward


def is_dense(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.itemsize > 1
