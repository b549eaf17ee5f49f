"""Quantize a whole model to 4 bits and back, layer by layer, freeing each dense weight before the next."""

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
from peftcore.engine.adaptation.enclosing import lock_of
from peftcore.engine.adaptation.folding import fold_frozen
from peftcore.engine.preflight import refuse_scripted
from peftcore.errors import PeftcoreError, warn
from peftcore.model import assumed_unchanged, detect
from peftcore.model.base_modules import base_modules, restored_after_error, walked_once
from peftcore.model.detecting import mark_as_loaded
from peftcore.model.targets import is_conv1d
from peftcore.model.targets.coverage import LITTLE, coverage
from peftcore.model.weight_formats import find_weight_format
from peftcore.ops import PackedWeight
from peftcore.ops.huge_pages import collapse, move_to_huge_pages
from peftcore.ops.weight import DTYPES
from peftcore.plugin import ranks
from peftcore.plugin.discovery import CORE
from peftcore.plugin.layers import is_bitsandbytes, is_wrapped, unknown_layers
from peftcore.plugin.method import Model
from peftcore.plugin.validation import shown
from peftcore.quantization import gptq
from peftcore.quantization.config_sync import packed_names, sync_config
from peftcore.quantization.divided_linear import (
    HeldPart,
    QuantizedPart,
    convert_part,
    divide_quantized,
    hold_part,
    is_divided_later,
    part_of,
    refuse_blocks,
    renew_plan,
)
from peftcore.quantization.formats import FourBitSettings, from_tensors, quantized
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
from peftcore.quantization.quantizable import selected, selected_experts, warn_of_dense

_WORTH = 16 << 20  # bytes of dense weights from which returning free memory to the system is worth the time
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

    Layers stay in place and become `QuantizedLinear`, a subclass of `nn.Linear`; modules with experts as parameters
    `[experts, .., ..]` get a subclass with `PackedParameters`. Embeddings, weights shared with them (a tied output
    head) and experts' biases stay dense. Also left dense, with a warning, are subclasses of `nn.Linear` that compute
    something else, `nn.MultiheadAttention`, and layers whose weight or its dtype is read or changed by other code
    (`peftcore.model.bypassed`, `rewritten`). Layers that are quantized already, also by bitsandbytes, keep their bits.

    Args:
        model: the model.
        quant_type: `nf4`, `fp4`, `mxfp4` (4.25 bits per weight), `nvfp4` (4.5), `affine4` (4.375), or the name of a
            plugin's weight format that can quantize.
        double_quant: store the scales in 8 bits: 4.127 bits per weight instead of 4.5. For nf4 and fp4.
        skip: paths, or their last parts, of modules to leave dense with their children, or of experts' parameters. None
            for the output head, task heads, routers, and modules the model class keeps in float32.
        compute_dtype: dtype of the products; None for the input's.
        blocksize: number of weights that share a scale, a power of two from 32 to 4096; for mxfp4 always 32, for
            nvfp4 16. Experts that do not divide into blocks get smaller ones or stay dense, with a warning.
        batches: for affine4: what to call the model with (mappings, tuples or tensors), to round linear layers by GPTQ
            (arXiv 2210.17323) with their inputs. 16 to 128 texts of a few hundred tokens are usual. Takes a forward
            pass up to each layer. None: round to nearest. Experts, and layers that no batch reaches, are rounded to
            nearest, with a warning.

    Returns:
        The model, changed in place. The config of a transformers model contains what bitsandbytes needs to load it.
        Experts and subclasses of `nn.Linear` (Falcon's) can be loaded by `peftcore.quantization.load` only.

    Raises:
        PeftcoreError: an argument is wrong, a weight is not floating point or contains NaN or Inf, or adapters are
            applied. The model is left unchanged. If GPTQ finds inputs that are not finite, or after any other
            exception, such as KeyboardInterrupt, some layers are quantized and the others dense, and the same call
            quantizes the rest.
    """
    plugin, weight_format = find_type(quant_type)
    if batches is not None and quant_type != "affine4":
        raise PeftcoreError(f"batches are for quant_type='affine4', found {shown(quant_type)}. Leave them out")
    settings = FourBitSettings(quant_type, double_quant, blocksize, compute_dtype)
    if plugin is CORE:
        settings = settings.resolved()
    else:
        refuse_options(settings)
    _refuse_compiled_or_adapted(model)
    chosen = _select(model, skip, settings, stores_experts=plugin is CORE)
    if plugin is CORE:
        _check_blocks(model, chosen, settings, skip)
    _warn_of_what_stays_dense(model, chosen, skip)
    before = _held_by(model)
    try:
        for path, module in base_modules(model):
            if isinstance(module, QuantizedLinear) and is_divided_later(module):
                divide_quantized(module, path)
        for path, packed in chosen.bitsandbytes.items():
            _adopt(model.get_submodule(path), packed)
        if plugin is not CORE:
            quantize_by_plugin(plugin, weight_format, chosen.layers)
        else:
            _convert_all(model, chosen, settings, None if batches is None else list(batches))
    finally:  # also if an error leaves some layers quantized
        (weight_format.update_config or sync_config)(model)
        fast_path.guard(model)
    quicken_few_rows(model)
    if before - _held_by(model) >= _WORTH:
        give_back_freed()
    return model


@dataclass(frozen=True)
class _Chosen:
    """What `quantize` converts.

    Args:
        layers: dense linear layers by path.
        experts: parameters of experts: block sizes by path of the module and name.
        bitsandbytes: weights of bitsandbytes' layers by path, which keep their bits.
    """

    layers: dict[str, nn.Module]
    experts: dict[str, dict[str, int]]
    bitsandbytes: dict[str, PackedWeight]

    @property
    def expert_names(self) -> list[str]:
        """Names of the experts' parameters."""
        names: list[str] = []
        for path, of_module in self.experts.items():
            names += [_joined(path, name) for name in of_module]
        return names


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _select(
    model: nn.Module, skip: Sequence[str] | None, settings: FourBitSettings, *, stores_experts: bool
) -> _Chosen:
    """Return what is quantized.

    Raises:
        PeftcoreError: there is nothing to quantize, or a weight cannot be.
    """
    with assumed_unchanged(model):
        layers, experts = selected(model, skip), selected_experts(model, skip, settings.blocksize)
    bitsandbytes = {path: _bits_of(module, path) for path, module in base_modules(model) if is_bitsandbytes(module)}
    chosen = _Chosen(layers, experts, bitsandbytes)
    if not stores_experts:
        warn_of_experts(chosen.expert_names, settings.quant_type)
        chosen = replace(chosen, experts={})
    if not layers and not chosen.experts and not bitsandbytes and not any(packed_names(model)):
        unreadable = unknown_layers(module for _, module in base_modules(model))
        raise PeftcoreError(f"{type(model).__name__} has no linear layer to quantize (skip={skip!r}){unreadable}")
    for path, module in layers.items():
        _check_parameter(path, module, "weight", part_of(module) if stores_experts else None)
    for path, names in chosen.experts.items():
        for name in names:
            _check_parameter(path, model.get_submodule(path), name)
    return chosen


def _check_blocks(model: nn.Module, chosen: _Chosen, settings: FourBitSettings, skip: Sequence[str] | None) -> None:
    """Raise a PeftcoreError for weights, or ranks' parts of them, that do not divide into the format's blocks."""
    for path, module in chosen.layers.items():
        part = part_of(module)
        if part is not None:
            refuse_blocks(f"{path}.weight", part, settings)
    check_rows(model, settings, chosen.layers, chosen.experts, skip)


def _warn_of_what_stays_dense(model: nn.Module, chosen: _Chosen, skip: Sequence[str] | None) -> None:
    with assumed_unchanged(model):
        if skip is None:
            packed_before = [_joined(path, name) for path, _, name in packed_names(model)]
            _warn_if_little(model, [*chosen.layers, *chosen.expert_names, *packed_before, *chosen.bitsandbytes])
        warn_of_dense(model, skip)


def _convert_all(model: nn.Module, chosen: _Chosen, settings: FourBitSettings, batches: list[Any] | None) -> None:
    """Convert layers and experts in place, by GPTQ those that `batches` reach."""
    layers = chosen.layers if batches is None else _round_by_gptq(model, chosen, batches, settings)
    for module, first in _with_first(layers.values()):
        if first is module:
            convert_dense(module, settings)
        elif isinstance(first, QuantizedPart):
            hold_part(module, first.packed, first.held_part, settings.compute_dtype)
        else:  # it shares the weight of a layer that has been converted
            convert(module, cast(QuantizedLinear, first).packed, settings.compute_dtype)
    for path, blocksizes in chosen.experts.items():
        pack_experts(model.get_submodule(path), blocksizes, settings)


def _refuse_compiled_or_adapted(model: nn.Module) -> None:
    refuse_scripted(model)
    if hasattr(model, "_orig_mod"):
        raise PeftcoreError("the model is compiled. Quantize the original model, then call torch.compile on it")
    if any(map(lock_of, model.modules())):  # also of a submodule, or of a model that contains this one
        state = state_of(model)
        applied = ", ".join(state.applied) if state is not None else "to a part of the model"
        raise PeftcoreError(
            f"quantize needs a model without adapters, found {applied}. Quantize first, or call peftcore.remove"
        )


def quicken_few_rows(model: nn.Module) -> None:
    """Make products of few rows of a quantized model fast: in huge pages, the dense output head by its own kernel."""
    with walked_once(model):
        head = detect(model).output_head
    fold_frozen(model, head)
    weight = None if head is None else model.get_submodule(head)._parameters.get("weight")
    if weight is not None and weight.dtype is not torch.uint8:
        collapse(weight)
    move_to_huge_pages(packed_codes(model))


def _round_by_gptq(
    model: nn.Module, chosen: _Chosen, batches: list[Any], settings: FourBitSettings
) -> dict[str, nn.Module]:
    """Convert layers by GPTQ, and return those that no batch reaches."""

    def convert_one(layer: nn.Module, weight: PackedWeight) -> None:
        convert(layer, weight, settings.compute_dtype)
        fast_path.guard(model)

    unreached = gptq.round_layers(model, chosen.layers, batches, settings.blocksize, convert_one)
    gptq.warn_of_nearest(unreached, chosen.expert_names)
    return {path: chosen.layers[path] for path in unreached}


def _held_by(model: nn.Module) -> int:
    """Return the bytes of a model's parameters, without those on the meta device."""
    return sum(parameter.nbytes for parameter in model.parameters() if not parameter.is_meta)


def give_back_freed() -> None:
    """Return free memory between remaining weights to the system, which glibc would keep."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries do not have malloc_trim
        if trim is not None:
            trim(0)


def _warn_if_little(model: nn.Module, quantized: Sequence[str]) -> None:
    covered = coverage(model, detect(model), quantized, lacking="that share their weight or are kept dense")
    if covered.share < LITTLE:
        warn(f"quantize on {type(model).__name__} {covered}")


def dequantize(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Turn quantized layers into plain `nn.Linear`s and experts into dense parameters, with the values of the 4 bits.

    Args:
        model: the model.
        dtype: dtype of the weights; None for the original dtype.

    Returns:
        The model.
    """
    if any(map(lock_of, model.modules())):
        raise PeftcoreError("dequantize needs a model without adapters. Dequantize first, or call peftcore.remove")
    try:
        for _, module in list(base_modules(model)):
            weight_format = find_weight_format(module)
            if weight_format is None or isinstance(module, PackedParameters):
                continue
            if weight_format.decode and weight_format.plain:  # a plugin's
                dequantize_by_plugin(module, weight_format, dtype)
                if weight_format.update_config is not None:
                    weight_format.update_config(model)
        for _, experts in list(quantized_experts(model)):
            unpack_experts(experts, dtype)
        layers = [module for _, module in base_modules(model) if isinstance(module, QuantizedLinear)]
        for module, first in _with_first(layers):
            if first is module:
                make_plain(module, module.dense_parameter(dtype))
            else:
                make_plain(module, cast(nn.Parameter, first.weight))
    finally:  # also if an error leaves some layers dense
        fast_path.guard(model)
        sync_config(model)
    return model


def convert_dense(module: Any, settings: FourBitSettings) -> QuantizedLinear:
    """Quantize one dense layer in place."""
    part = part_of(module)
    if part is not None:
        return convert_part(module, part, settings)
    weight = module.weight.detach()
    weight = weight.T if is_conv1d(module) else weight
    return convert(module, quantized(weight, settings), settings.compute_dtype)


def convert(module: Any, weight: PackedWeight, compute_dtype: torch.dtype | None) -> QuantizedLinear:
    """Turn a linear layer or Conv1D into a `QuantizedLinear` with this weight, in place."""
    with restored_after_error(module):
        for attribute in ("nf", "nx"):  # Conv1D's
            module.__dict__.pop(attribute, None)
        module.out_features, module.in_features = weight.shape
        dense = module._parameters.get("weight")
        module.__class__ = QuantizedLinear
        module.compute_dtype = compute_dtype
        if isinstance(weight.codes, nn.Parameter):  # for a layer that shares its weight
            module.weight = weight.codes
        module.set_packed_parameter("weight", weight._replace(codes=weight.codes.detach()))
        mark_as_loaded(module.weight, dense)
        module._is_hf_initialized = True  # transformers must not initialise it again
    return module


def make_plain(module: Any, weight: nn.Parameter) -> None:
    """Turn a quantized layer into an `nn.Linear` with this weight, in place."""
    with restored_after_error(module):
        mark_as_loaded(weight, module.weight)
        module.weight = weight
        for name in list(module._buffers):
            del module._buffers[name]
        for name in ("packings", "compute_dtype", "held_part"):
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


def _with_first(modules: Iterable[Layer]) -> list[tuple[Layer, Layer]]:
    """Return (module, first module with the same weight) pairs, computed before any weight is freed."""
    modules = list(modules)
    first: dict[int, Layer] = {}
    for module in modules:
        first.setdefault(id(module.weight), module)
    return [(module, first[id(module.weight)]) for module in modules]


def _check_parameter(path: str, module: nn.Module, parameter: str, part: HeldPart | None = None) -> None:
    """Raise a PeftcoreError if a parameter cannot be quantized. `part`: the part of it that this rank can quantize."""
    weight = module.get_parameter(parameter)
    name = _joined(path, parameter)
    if ranks.is_partitioned(weight):
        raise PeftcoreError(
            f"'{name}' is partitioned by DeepSpeed's ZeRO-3, and no rank has the whole weight. Load and quantize the "
            "model before HfDeepSpeedConfig or TrainingArguments(deepspeed=...) is created: deepspeed.initialize then "
            "partitions the 4-bit weights"
        )
    if ranks.is_part(weight) and part is None:
        raise PeftcoreError(
            f"'{name}' is sharded, and no rank has the whole weight. Quantize before sharding, or load in 4 "
            f"bits: peftcore.load_sharded(folder, 'nf4'), or leave it dense: skip=['{path}']"
        )
    if is_wrapped(weight):
        raise PeftcoreError(
            f"'{name}' is quantized already, by another library ({type(weight).__name__}). Quantize the original "
            f"model, or skip the layer: skip=['{path}']"
        )
    if weight.dtype not in DTYPES:
        raise PeftcoreError(
            f"'{name}' is {weight.dtype}; only float32, float16 and bfloat16 can be quantized. Cast the model "
            f"first, or skip the layer: skip=['{path}']"
        )
    if "forward" in module.__dict__ and part is None:
        raise PeftcoreError(
            f"'{path}' has its own `forward` (such as accelerate's hooks), which reads the dense weight. "
            "Quantize before the model is dispatched"
        )
    if weight.is_meta:
        return
    if part is None:
        refuse_non_finite(weight.detach(), name)
    elif ranks.any_of(not cast(Any, weight).to_local().isfinite().all()):
        refuse_non_finite(ranks.whole(weight), name)


def _bits_of(module: nn.Module, path: str) -> PackedWeight:
    """Return the weight of a layer of bitsandbytes, with the layer's own tensors."""
    parts = {name.removeprefix("weight."): t for name, t in module.state_dict().items() if name.startswith("weight.")}
    if not parts:
        raise PeftcoreError(
            f"'{path}' is a layer of bitsandbytes that is not quantized yet. Move it to its device first"
        )
    return from_tensors(module.get_parameter("weight").detach(), parts, f"{path}.weight")


def _adopt(module: Any, packed: PackedWeight) -> None:
    """Turn a layer of bitsandbytes into a `QuantizedLinear` with the same bits."""
    compute_dtype = module.compute_dtype
    with restored_after_error(module):
        for attribute in ("quant_state", "quant_storage", "compute_type_is_set", "support_avx512bf16_for_cpu"):
            module.__dict__.pop(attribute, None)
        del module._parameters["weight"]
        module._parameters = {"weight": None, **module._parameters}
        convert(module, packed._replace(codes=packed.codes.clone()), compute_dtype)
