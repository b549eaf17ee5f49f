"""Quantize a whole model to 4 bits and back, layer by layer, freeing each dense weight before the next."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from peftcore.quantization.format import FORMATS, from_tensors, quantized
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
    (`observation.bypassed`, `rewritten`). Layers that are quantized already, also by bitsandbytes, keep their bits.

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
    plugin, chosen_format = find_type(quant_type)
    of_core = plugin is CORE
    if batches is not None and quant_type != "affine4":
        raise PeftcoreError(f"batches are for quant_type='affine4', found {shown(quant_type)}. Leave them out")
    if of_core:
        double_quant, blocksize = FORMATS[quant_type].settings(double_quant, blocksize)
    else:
        refuse_options(quant_type, double_quant, blocksize, compute_dtype)
    _refuse_compiled_or_adapted(model)
    with assumed_unchanged(model):
        chosen, experts = selected(model, skip), selected_experts(model, skip, blocksize)
    if not of_core:
        warn_of_experts([f"{path}.{name}" for path, names in experts.items() for name in names], quant_type)
        experts = {}
    bitsandbytes = {path: _bits_of(module, path) for path, module in base_modules(model) if is_bitsandbytes(module)}
    for path, module in base_modules(model):
        if isinstance(module, QuantizedLinear) and is_divided_later(module):
            divide_quantized(module, path)
    if not chosen and not experts and not bitsandbytes and not any(packed_names(model)):
        unreadable = unknown_layers(module for _, module in base_modules(model))
        raise PeftcoreError(f"{type(model).__name__} has no linear layer to quantize (skip={skip!r}){unreadable}")
    for path, module in chosen.items():
        part = part_of(module) if of_core else None
        _check_parameter(path, module, "weight", part)
        if part is not None:
            refuse_blocks(f"{path}.weight", part, quant_type, blocksize)
    for path, names in experts.items():
        for name in names:
            _check_parameter(path, model.get_submodule(path), name)
    if of_core:
        check_rows(model, quant_type, blocksize, chosen, experts, skip)
    with assumed_unchanged(model):
        if skip is None:
            parameters = [(path, name) for path, names in experts.items() for name in names]
            parameters += [(path, name) for path, _, name in packed_names(model)]
            full_names = [f"{path}.{name}" if path else name for path, name in parameters]
            _warn_if_little(model, [*chosen, *full_names, *bitsandbytes])
        warn_of_dense(model, skip)
    before = _held_by(model)
    update_config = chosen_format.update_config or sync_config
    try:
        if batches is not None:
            chosen = _round_by_gptq(model, chosen, experts, list(batches), blocksize, compute_dtype)
        for path, packed in bitsandbytes.items():
            _adopt(model.get_submodule(path), packed)
        if not of_core:
            quantize_by_plugin(plugin, chosen_format, chosen)
            chosen = {}
        for module, first in _with_first(chosen.values()):
            if first is module:
                convert_dense(module, quant_type, double_quant, blocksize, compute_dtype)
            elif isinstance(first, QuantizedPart):
                hold_part(module, first.packed, first.held_part, compute_dtype)
            else:
                convert(module, cast(QuantizedLinear, first).packed, compute_dtype)
        for path, blocksizes in experts.items():
            pack_experts(model.get_submodule(path), blocksizes, quant_type, double_quant, compute_dtype)
    finally:  # also if an error leaves some layers quantized
        update_config(model)
        fast_path.guard(model)
    quicken_few_rows(model)
    if before - _held_by(model) >= _WORTH:
        give_back_freed()
    return model


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
    model: nn.Module,
    layers: dict[str, nn.Module],
    experts: Mapping[str, Mapping[str, int]],
    batches: list[Any],
    blocksize: int,
    compute_dtype: torch.dtype | None,
) -> dict[str, nn.Module]:
    """Convert layers by GPTQ, and return those that no batch reaches."""

    def converted(layer: nn.Module, weight: PackedWeight) -> None:
        convert(layer, weight, compute_dtype)
        fast_path.guard(model)

    unreached = gptq.round_layers(model, layers, batches, blocksize, converted)
    gptq.warn_of_nearest(unreached, [f"{path}.{name}" for path, names in experts.items() for name in names])
    return {path: layers[path] for path in unreached}


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
    found = coverage(model, detect(model), quantized, lacking="that share their weight or are kept dense")
    if found.share < LITTLE:
        warn(f"quantize on {type(model).__name__} {found}")


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
            found = find_weight_format(module)
            if found is not None and found.decode and found.plain and not isinstance(module, PackedParameters):
                dequantize_by_plugin(module, found, dtype)
                if found.update_config is not None:
                    found.update_config(model)
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


def convert_dense(
    module: Any, quant_type: str, double_quant: bool, blocksize: int, compute_dtype: torch.dtype | None
) -> QuantizedLinear:
    """Quantize one dense layer in place."""
    part = part_of(module)
    if part is not None:
        return convert_part(module, part, quant_type, double_quant, blocksize, compute_dtype)
    weight = module.weight.detach()
    weight = weight.T if is_conv1d(module) else weight
    packed = quantized(weight, quant_type, double_quant, blocksize)
    return convert(module, packed, compute_dtype)


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
    weight = module.get_parameter(parameter)
    name = f"{path}.{parameter}" if path else parameter
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
