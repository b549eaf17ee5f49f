"""Quantize a model to 4 bits and back, layer by layer, freeing each dense weight before the next."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import nn

from peftcore.engine import state_of
from peftcore.engine.adaptation import fast_path
from peftcore.engine.adaptation.ancestors import lock_of
from peftcore.engine.adaptation.frozen_linear import fold_frozen
from peftcore.engine.preflight import refuse_scripted
from peftcore.errors import PeftcoreError, warn
from peftcore.model import assuming_unchanged, detect
from peftcore.model.base_modules import base_modules, caching_base_modules, restoring_on_error
from peftcore.model.detecting import mark_as_loaded
from peftcore.model.targets import is_conv1d
from peftcore.model.targets.coverage import LOW_COVERAGE, coverage
from peftcore.model.weight_formats import find_weight_format
from peftcore.ops import PackedWeight
from peftcore.ops.huge_pages import collapse, move_to_huge_pages
from peftcore.ops.weight import DTYPES
from peftcore.plugin import ranks, sharded
from peftcore.plugin.discovery import CORE
from peftcore.plugin.layers import is_bitsandbytes, is_wrapped, unknown_layers
from peftcore.plugin.method import Model
from peftcore.plugin.validation import shown
from peftcore.quantization import gptq
from peftcore.quantization.config_sync import packed_names, sync_config
from peftcore.quantization.formats import FourBitSettings, from_tensors, quantize_weight
from peftcore.quantization.linear import QuantizedLinear
from peftcore.quantization.packed_experts import pack_experts, unpack_experts
from peftcore.quantization.parameters import PackedParameters, packed_codes, refuse_non_finite
from peftcore.quantization.quant_types import (
    check_rows,
    dequantize_by_plugin,
    find_type,
    quantize_by_plugin,
    refuse_options,
    warn_of_experts,
)
from peftcore.quantization.quantizable import select_experts, select_layers, warn_of_dense
from peftcore.quantization.sharded_linear import (
    QuantizedShard,
    WeightShard,
    check_shard_blocks,
    convert_shard,
    install_shard,
    is_sharded_after_quantization,
    renew_plan,
    shard_of,
    shard_quantized,
)

_RELEASE_THRESHOLD = 16 << 20  # bytes; returning less freed memory to the system is not worth the time
Layer = TypeVar("Layer", bound=nn.Module)


def quantize(
    model: Model,
    quant_type: str = "nf4",
    *,
    double_quant: bool = True,
    skip: Sequence[str] | None = None,
    compute_dtype: torch.dtype | None = None,
    blocksize: int = 64,
    batches: Iterable[Any] | None = None,
) -> Model:
    """Quantize the weights of linear layers (including transformers' Conv1D) and experts to 4 bits (arXiv 2305.14314).

    Layers become `QuantizedLinear`, a subclass of `nn.Linear`, in place; modules with experts as parameters `[experts,
    .., ..]` get a subclass with `PackedParameters`. Embeddings, weights shared with them (a tied output head) and
    experts' biases stay dense. The following also stay dense, with a warning: subclasses of `nn.Linear` that compute
    something else, `nn.MultiheadAttention`, and layers whose weight or dtype is read or changed by other code
    (`peftcore.model.bypassed_layers`, `rewritten_layers`). Layers that are already quantized, by peftcore or
    bitsandbytes, keep their bits.

    Args:
        model: the model.
        quant_type: `nf4`, `fp4`, `mxfp4` (4.25 bits per weight), `nvfp4` (4.5), `affine4` (4.375), or the name of a
            plugin's weight format that can quantize.
        double_quant: store the scales in 8 bits, for 4.127 bits per weight instead of 4.5 (nf4 and fp4 only).
        skip: paths, or last components of paths, of experts' parameters or of modules to leave dense with their
            children. None skips the output head, task heads, routers, and modules that the model class keeps in
            float32.
        compute_dtype: dtype of the products. None means the dtype of the input.
        blocksize: number of weights that share a scale, a power of two from 32 to 4096. mxfp4 always has 32, nvfp4 16.
            Experts that do not divide into such blocks get smaller blocks or stay dense, with a warning.
        batches: calibration batches (mappings, tuples or tensors) for rounding to affine4 by GPTQ (arXiv 2210.17323);
            16 to 128 texts of a few hundred tokens are usual. Each layer costs a forward pass through the layers before
            it. Experts and layers that no batch reaches are rounded to nearest, with a warning. None rounds all weights
            to nearest.

    Returns:
        The model, changed in place. The config of a transformers model gets the fields that bitsandbytes needs to load
        it. Only `peftcore.quantization.load` can load experts and subclasses of `nn.Linear` (Falcon's).

    Raises:
        PeftcoreError: an argument is wrong, a weight is not floating point or contains NaN or Inf, or adapters are
            applied. The model stays unchanged. If GPTQ gets non-finite inputs, or after any other exception
            (KeyboardInterrupt), some layers are quantized and others dense. The same call then quantizes the rest.

    Examples:
        >>> peftcore.quantize(model, "nf4")
        >>> peftcore.apply(model, "lora", r=8)          # QLoRA
    """
    plugin, weight_format = find_type(quant_type)
    if batches is not None and quant_type != "affine4":
        raise PeftcoreError(
            f"batches only work with quant_type='affine4', found quant_type={shown(quant_type)}. Remove the "
            "argument, or choose 'affine4'"
        )
    settings = FourBitSettings(quant_type, double_quant, blocksize, compute_dtype)
    if plugin is CORE:
        settings = settings.resolved()
    else:
        refuse_options(settings)
    _refuse_compiled_or_adapted(model)
    selection = _select(model, skip, settings, stores_experts=plugin is CORE)
    if plugin is CORE:
        _check_blocks(model, selection, settings, skip)
    _warn_of_dense_weights(model, selection, skip)
    bytes_before = _parameter_bytes(model)
    try:
        for path, module in base_modules(model):
            if isinstance(module, QuantizedLinear) and is_sharded_after_quantization(module):
                shard_quantized(module, path)
        for path, packed in selection.bitsandbytes.items():
            _convert_bitsandbytes_layer(model.get_submodule(path), packed)
        if plugin is not CORE:
            quantize_by_plugin(plugin, weight_format, selection.layers)
        else:
            _convert_all(model, selection, settings, None if batches is None else list(batches))
    finally:  # after an error some layers may be quantized, and the config must match
        (weight_format.update_config or sync_config)(model)
        fast_path.guard(model)
    speed_up_decoding(model)
    if bytes_before - _parameter_bytes(model) >= _RELEASE_THRESHOLD:
        release_free_memory()
    return model


@dataclass(frozen=True)
class _Selection:
    """The weights that `quantize` converts.

    Args:
        layers: dense linear layers by path.
        experts: block sizes of experts' parameters, by module path and parameter name.
        bitsandbytes: packed weights of bitsandbytes' layers by path; they keep their bits.
    """

    layers: dict[str, nn.Module]
    experts: dict[str, dict[str, int]]
    bitsandbytes: dict[str, PackedWeight]

    @property
    def expert_names(self) -> list[str]:
        """Full names of the experts' parameters."""
        names: list[str] = []
        for path, of_module in self.experts.items():
            names += [_full_name(path, name) for name in of_module]
        return names


def _full_name(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _select(
    model: nn.Module, skip: Sequence[str] | None, settings: FourBitSettings, *, stores_experts: bool
) -> _Selection:
    """Select the weights to quantize.

    Raises:
        PeftcoreError: there is nothing to quantize, or a weight cannot be quantized.
    """
    with assuming_unchanged(model):
        layers, experts = select_layers(model, skip), select_experts(model, skip, settings.blocksize)
    bitsandbytes = {
        path: _read_bitsandbytes_weight(module, path) for path, module in base_modules(model) if is_bitsandbytes(module)
    }
    selection = _Selection(layers, experts, bitsandbytes)
    if not stores_experts:
        warn_of_experts(selection.expert_names, settings.quant_type)
        selection = replace(selection, experts={})
    if not layers and not selection.experts and not bitsandbytes and not any(packed_names(model)):
        unreadable = unknown_layers(module for _, module in base_modules(model))
        raise PeftcoreError(f"{type(model).__name__} has no linear layer to quantize (skip={skip!r}){unreadable}")
    for path, module in layers.items():
        _check_parameter(path, module, "weight", shard_of(module) if stores_experts else None)
    for path, names in selection.experts.items():
        for name in names:
            _check_parameter(path, model.get_submodule(path), name)
    return selection


def _check_blocks(
    model: nn.Module, selection: _Selection, settings: FourBitSettings, skip: Sequence[str] | None
) -> None:
    """Raise a PeftcoreError if a weight or its shard does not divide into the format's blocks."""
    for path, module in selection.layers.items():
        shard = shard_of(module)
        if shard is not None:
            check_shard_blocks(f"{path}.weight", shard, settings)
    check_rows(model, settings, selection.layers, selection.experts, skip)


def _warn_of_dense_weights(model: nn.Module, selection: _Selection, skip: Sequence[str] | None) -> None:
    with assuming_unchanged(model):
        if skip is None:
            packed = [_full_name(path, name) for path, _, name in packed_names(model)]
            _warn_if_little(model, [*selection.layers, *selection.expert_names, *packed, *selection.bitsandbytes])
        warn_of_dense(model, skip)


def _convert_all(model: nn.Module, selection: _Selection, settings: FourBitSettings, batches: list[Any] | None) -> None:
    """Convert layers and experts in place. Layers that `batches` reach are rounded by GPTQ."""
    layers = selection.layers if batches is None else _round_by_gptq(model, selection, batches, settings)
    for module, source in _with_source(layers.values()):
        if source is module:
            convert_dense(module, settings)
        elif isinstance(source, QuantizedShard):
            install_shard(module, source.packed, source.weight_shard, settings.compute_dtype)
        else:  # an earlier layer has the same weight
            convert(module, cast(QuantizedLinear, source).packed, settings.compute_dtype)
    for path, blocksizes in selection.experts.items():
        pack_experts(model.get_submodule(path), blocksizes, settings)


def _refuse_compiled_or_adapted(model: nn.Module) -> None:
    refuse_scripted(model)
    if hasattr(model, "_orig_mod"):
        raise PeftcoreError("the model is compiled. Quantize the original model, then call torch.compile on it")
    # The lock is also set if adapters are applied to a submodule, or to a model that contains this one.
    if any(map(lock_of, model.modules())):
        state = state_of(model)
        adapters = ", ".join(state.applied) if state is not None else "to part of the model"
        raise PeftcoreError(
            f"cannot quantize a model with adapters, found {adapters}. Remove them with peftcore.remove, or quantize "
            "before apply"
        )


def speed_up_decoding(model: nn.Module) -> None:
    """Speed up products with few rows: move weights to huge pages, and give the dense output head its own kernel."""
    with caching_base_modules(model):
        head = detect(model).output_head
    fold_frozen(model, head)
    weight = None if head is None else model.get_submodule(head)._parameters.get("weight")
    if weight is not None and weight.dtype is not torch.uint8:
        collapse(weight)
    move_to_huge_pages(packed_codes(model))


def _round_by_gptq(
    model: nn.Module, selection: _Selection, batches: list[Any], settings: FourBitSettings
) -> dict[str, nn.Module]:
    """Convert layers by GPTQ, and return the layers that no batch reaches, by path."""

    def convert_one(layer: nn.Module, weight: PackedWeight) -> None:
        convert(layer, weight, settings.compute_dtype)
        fast_path.guard(model)

    unreached_paths = gptq.round_layers(model, selection.layers, batches, settings.blocksize, convert_one)
    gptq.warn_of_nearest(unreached_paths, selection.expert_names)
    return {path: selection.layers[path] for path in unreached_paths}


def _parameter_bytes(model: nn.Module) -> int:
    """Return the size in bytes of a model's parameters, excluding those on the meta device."""
    return sum(parameter.nbytes for parameter in model.parameters() if not parameter.is_meta)


def release_free_memory() -> None:
    """Return freed memory to the operating system. By default, glibc keeps free blocks that lie between weights."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl does not have malloc_trim
        if trim is not None:
            trim(0)


def _warn_if_little(model: nn.Module, quantized: Sequence[str]) -> None:
    result = coverage(model, detect(model), quantized, lacking="that share their weight or are kept dense")
    if result.share < LOW_COVERAGE:
        warn(f"quantize on {type(model).__name__} {result}")


def dequantize(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Turn quantized layers into plain `nn.Linear`s and experts into dense parameters, with the dequantized values.

    Args:
        model: the model.
        dtype: dtype of the weights; None for the original dtype.

    Returns:
        The model.

    Examples:
        >>> peftcore.quantize(model, "nf4")
        >>> peftcore.dequantize(model, torch.bfloat16)
    """
    if any(map(lock_of, model.modules())):
        raise PeftcoreError(
            "cannot dequantize a model with adapters. Remove them with peftcore.remove, or dequantize before apply"
        )
    try:
        for _, module in list(base_modules(model)):
            weight_format = find_weight_format(module)
            if weight_format is None or isinstance(module, PackedParameters):
                continue
            if weight_format.decode and weight_format.plain:  # a plugin's format that can dequantize
                dequantize_by_plugin(module, weight_format, dtype)
                if weight_format.update_config is not None:
                    weight_format.update_config(model)
        for _, experts in list(quantized_experts(model)):
            unpack_experts(experts, dtype)
        layers = [module for _, module in base_modules(model) if isinstance(module, QuantizedLinear)]
        for module, source in _with_source(layers):
            if source is module:
                make_plain(module, module.dense_parameter(dtype))
            else:
                make_plain(module, cast(nn.Parameter, source.weight))
    finally:  # after an error some layers may be dense, and the config must match
        fast_path.guard(model)
        sync_config(model)
    return model


def convert_dense(module: Any, settings: FourBitSettings) -> QuantizedLinear:
    """Quantize one dense layer in place."""
    shard = shard_of(module)
    if shard is not None:
        return convert_shard(module, shard, settings)
    weight = module.weight.detach()
    weight = weight.T if is_conv1d(module) else weight
    return convert(module, quantize_weight(weight, settings), settings.compute_dtype)


def convert(module: Any, weight: PackedWeight, compute_dtype: torch.dtype | None) -> QuantizedLinear:
    """Turn a linear layer or Conv1D into a `QuantizedLinear` with this weight, in place."""
    with restoring_on_error(module):
        for attribute in ("nf", "nx"):  # Conv1D's
            module.__dict__.pop(attribute, None)
        module.out_features, module.in_features = weight.shape
        dense = module._parameters.get("weight")
        module.__class__ = QuantizedLinear
        module.compute_dtype = compute_dtype
        if isinstance(weight.codes, nn.Parameter):  # layers that share a weight share this parameter
            module.weight = weight.codes
        module.set_packed_parameter("weight", weight._replace(codes=weight.codes.detach()))
        mark_as_loaded(module.weight, dense)
        module._is_hf_initialized = True  # transformers must not initialize it again
    return module


def make_plain(module: Any, weight: nn.Parameter) -> None:
    """Turn a quantized layer into an `nn.Linear` with this weight, in place."""
    with restoring_on_error(module):
        mark_as_loaded(weight, module.weight)
        module.weight = weight
        for name in list(module._buffers):
            del module._buffers[name]
        for name in ("packings", "compute_dtype", "weight_shard"):
            module.__dict__.pop(name, None)
        module.__class__ = nn.Linear
        renew_plan(module)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """Yield (path, layer) of every linear layer with a 4-bit weight."""
    for path, module in base_modules(model):
        if isinstance(module, QuantizedLinear) and module.is_quantized:
            yield path, module


def quantized_experts(model: nn.Module) -> Iterator[tuple[str, PackedParameters]]:
    """Yield (path, module) of every module of experts with 4-bit parameters."""
    for path, module in base_modules(model):
        if isinstance(module, QuantizedLinear) or not isinstance(module, PackedParameters):
            continue
        if any(module.packed_parameter(name) is not None for name in module.packings):
            yield path, module


def _with_source(modules: Iterable[Layer]) -> list[tuple[Layer, Layer]]:
    """Pair each module with the first module that has the same weight.

    The result is a list, because the ids of weights are only valid until the first weight is freed.
    """
    modules = list(modules)
    sources: dict[int, Layer] = {}
    for module in modules:
        sources.setdefault(id(module.weight), module)
    return [(module, sources[id(module.weight)]) for module in modules]


def _check_parameter(path: str, module: nn.Module, parameter: str, shard: WeightShard | None = None) -> None:
    """Raise a PeftcoreError if a parameter, or this rank's shard of it, cannot be quantized."""
    weight = module.get_parameter(parameter)
    name = _full_name(path, parameter)
    if sharded.is_zero3(weight):
        raise PeftcoreError(
            f"'{name}' is partitioned by DeepSpeed ZeRO-3, so no rank has the full weight. Load and quantize the model "
            "before creating HfDeepSpeedConfig or TrainingArguments(deepspeed=...); deepspeed.initialize then "
            "partitions the 4-bit weights"
        )
    if sharded.is_shard(weight) and shard is None:
        raise PeftcoreError(
            f"'{name}' is sharded, so no rank has the full weight. Quantize before sharding, load the model in 4 bits "
            f"(peftcore.load_sharded(folder, 'nf4')), or leave the weight dense: skip=['{path}']"
        )
    if is_wrapped(weight):
        raise PeftcoreError(
            f"'{name}' is already quantized by another library ({type(weight).__name__}). Quantize the original "
            f"model, or skip the layer: skip=['{path}']"
        )
    if weight.dtype not in DTYPES:
        raise PeftcoreError(
            f"'{name}' is {weight.dtype}; only float32, float16 and bfloat16 can be quantized. Cast the model "
            f"first, or skip the layer: skip=['{path}']"
        )
    if "forward" in module.__dict__ and shard is None:
        raise PeftcoreError(
            f"'{path}' has its own `forward` (as set by accelerate's hooks), which reads the dense weight. Quantize "
            "the model before it is dispatched"
        )
    if weight.is_meta:
        return
    if shard is None:
        refuse_non_finite(weight.detach(), name)
    elif ranks.any_of(not cast(Any, weight).to_local().isfinite().all()):
        refuse_non_finite(sharded.whole(weight), name)


def _read_bitsandbytes_weight(module: nn.Module, path: str) -> PackedWeight:
    """Return the packed weight of a bitsandbytes layer, without copying."""
    parts = {name.removeprefix("weight."): t for name, t in module.state_dict().items() if name.startswith("weight.")}
    if not parts:
        raise PeftcoreError(
            f"'{path}' is a bitsandbytes layer that has not been quantized yet. Move the model to its device first, "
            "which quantizes the layer"
        )
    return from_tensors(module.get_parameter("weight").detach(), parts, f"{path}.weight")


def _convert_bitsandbytes_layer(module: Any, packed: PackedWeight) -> None:
    """Turn a bitsandbytes layer into a `QuantizedLinear` with the same bits."""
    compute_dtype = module.compute_dtype
    with restoring_on_error(module):
        for attribute in ("quant_state", "quant_storage", "compute_type_is_set", "support_avx512bf16_for_cpu"):
            module.__dict__.pop(attribute, None)
        del module._parameters["weight"]
        module._parameters = {"weight": None, **module._parameters}
        convert(module, packed._replace(codes=packed.codes.clone()), compute_dtype)
