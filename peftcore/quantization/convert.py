"""A whole model to 4 bits and back, layer by layer: what a layer held is freed before the next one is converted."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

from peftcore.adaptation.adapted import base_modules, base_parameters
from peftcore.adaptation.class_swap import original_class
from peftcore.adaptation.enclosing import lock_of
from peftcore.engine import state_of
from peftcore.errors import PeftcoreError, nearest
from peftcore.method import Model
from peftcore.observation import asked_for_dtype, bypassed, detect, rewritten
from peftcore.observation.heads import mark_as_loaded
from peftcore.ops import PackedWeight, quantize_4bit
from peftcore.ops.weight import DTYPES
from peftcore.quantization.format import check_blocksize, check_quant_type, from_tensors
from peftcore.quantization.linear import QuantizedLinear, refuse_non_finite
from peftcore.targets import is_conv1d, is_linear, matches
from peftcore.targets.coverage import LITTLE, coverage

# Parents that read the weights of their linear layers themselves, past the layers' forward.
_BYPASSING = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
Layer = TypeVar("Layer", bound=nn.Module)


def quantize(
    model: Model,
    quant_type: str = "nf4",
    *,
    double_quant: bool = True,
    skip: Sequence[str] | None = None,
    compute_dtype: torch.dtype | None = None,
    blocksize: int = 64,
) -> Model:
    """Keep the weights of `model`'s linear layers (transformers' Conv1D too) in 4 bits (arXiv 2305.14314).

    The layers stay where they are and become `QuantizedLinear`, an `nn.Linear`. Left dense are embeddings, a weight
    that such a module shares (a tied output head), subclasses of `nn.Linear`, and layers whose weight, or its dtype,
    other code reads or changes (`observation.bypassed`, `rewritten`). Layers that are quantized already, by
    bitsandbytes too, keep their bits.

    Args:
        quant_type: `nf4`, or `fp4`.
        double_quant: keep the scales in 8 bits: 4.127 bits a weight instead of 4.5.
        skip: paths, or their ends after a dot, of modules to leave dense with all in them. None: the output head,
            a task's heads, and what the model class asks to keep in float32.
        compute_dtype: of the products; None: that of their input.
        blocksize: weights that share a scale, a power of two from 32 to 4096.

    Returns:
        The same model, changed in place. A transformers model's config says what bitsandbytes must know to load it.

    Raises:
        PeftcoreError: an argument is wrong, a weight is no floating one or holds NaN or infinity, or adapters are
            applied already. The model is then as it was.
    """
    check_quant_type(quant_type)
    check_blocksize(blocksize)
    if hasattr(model, "_orig_mod"):
        raise PeftcoreError("the model is compiled. Quantize the model itself, then torch.compile it")
    if any(map(lock_of, model.modules())):  # of a part of the model too, or of one that it is a part of
        state = state_of(model)
        applied = ", ".join(state.applied) if state is not None else "to a part of the model"
        raise PeftcoreError(f"quantize before adapters are applied (applied: {applied}), or after peftcore.remove")
    chosen = selected(model, skip)
    there = [path for path, module in base_modules(model) if isinstance(module, QuantizedLinear) or _is_bnb(module)]
    if not chosen and not there:
        raise PeftcoreError(f"found no linear layer to quantize in {type(model).__name__} (skip={skip!r})")
    for path, module in chosen.items():
        _check_layer(path, module)
    if skip is None:
        _tell_if_little(model, [*chosen, *there])
    for path in there:
        _adopt(model.get_submodule(path), path)
    for module, first in _with_first(chosen.values()):
        if first is module:
            convert_dense(module, quant_type, double_quant, blocksize, compute_dtype)
        else:
            convert(module, cast(QuantizedLinear, first).packed, compute_dtype)
    note_in_config(model)
    return model


def _tell_if_little(model: nn.Module, quantized: Sequence[str]) -> None:
    found = coverage(model, detect(model), quantized, lacking="that share their weight or are kept dense")
    if found.share < LITTLE:
        warnings.warn(f"quantize on {type(model).__name__} {found}", stacklevel=4)


def dequantize(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Make every quantized layer a plain `nn.Linear` again, with the values its 4 bits stand for.

    Args:
        dtype: of the weights; None: the one they had.
    """
    if any(map(lock_of, model.modules())):
        raise PeftcoreError("dequantize before adapters are applied, or after peftcore.remove")
    layers = [module for _, module in base_modules(model) if isinstance(module, QuantizedLinear)]
    for module, first in _with_first(layers):
        if first is module:
            dense = module.dequantized(dtype) if module.is_quantized else module.weight.detach()
            make_plain(module, nn.Parameter(dense, requires_grad=False))
        else:
            make_plain(module, cast(nn.Parameter, first.weight))
    note_in_config(model)
    return model


def default_skip(model: nn.Module) -> list[str]:
    """What `quantize` leaves dense unless told otherwise: paths of heads, and what the class keeps in float32."""
    architecture = detect(model)
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    paths = [path for path, _ in base_modules(model) if any(matches(name, path) for name in kept)]
    return [path for path in (architecture.output_head, *architecture.task_heads, *paths) if path]


def selected(model: nn.Module, skip: Sequence[str] | None) -> dict[str, nn.Module]:
    """The layers that `quantize` converts, by path: of layers that share a weight all or none."""
    modules = dict(base_modules(model))
    skipped = [*_skipped(model, modules, skip), *bypassed(model), *rewritten(model), *asked_for_dtype(model)]
    owners: dict[int, set[str]] = {}
    for name, parameter in base_parameters(model):
        owners.setdefault(id(parameter), set()).add(name.rpartition(".")[0])
    chosen = {}
    for path, module in modules.items():
        if not _is_dense_layer(module) or any(path == s or path.startswith(f"{s}.") for s in skipped):
            continue
        parent = modules.get(path.rpartition(".")[0]) if path else None
        alike = all(type(modules[owner]) is type(module) for owner in owners[id(module.weight)])
        if not isinstance(parent, _BYPASSING) and alike:
            chosen[path] = module
    return {path: module for path, module in chosen.items() if owners[id(module.weight)] <= chosen.keys()}


def convert_dense(
    module: Any, quant_type: str, double_quant: bool, blocksize: int, compute_dtype: torch.dtype | None
) -> QuantizedLinear:
    """Quantize one dense layer in place."""
    weight = module.weight.detach()
    weight = weight.T if is_conv1d(module) else weight
    packed = quantize_4bit(weight, quant_type, blocksize=blocksize, double_quant=double_quant)
    return convert(module, packed, compute_dtype)


def convert(module: Any, weight: PackedWeight, compute_dtype: torch.dtype | None) -> QuantizedLinear:
    """Make a linear layer or a Conv1D a `QuantizedLinear` in place, with this weight."""
    for attribute in ("nf", "nx"):  # of Conv1D
        module.__dict__.pop(attribute, None)
    module.out_features, module.in_features = weight.shape
    dense = module._parameters.get("weight")
    module.__class__ = QuantizedLinear
    module.compute_dtype = compute_dtype
    if isinstance(weight.codes, nn.Parameter):  # of a layer that shares its weight
        module.weight = weight.codes
    module.set_packed(weight._replace(codes=weight.codes.detach()))
    mark_as_loaded(module.weight, dense)
    module._is_hf_initialized = True  # transformers must not draw new values
    return module


def make_plain(module: Any, weight: nn.Parameter) -> None:
    """Turn a quantized layer into an `nn.Linear` with this weight, in place."""
    mark_as_loaded(weight, module.weight)
    module.weight = weight
    for name in list(module._buffers):
        del module._buffers[name]
    for name in ("quant_type", "blocksize", "weight_dtype", "nested_blocksize", "compute_dtype"):
        module.__dict__.pop(name, None)
    module.__class__ = nn.Linear


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """(path, layer) of every layer whose weight is in 4 bits."""
    for path, module in base_modules(model):
        if isinstance(module, QuantizedLinear) and module.is_quantized:
            yield path, module


def config_fields(model: nn.Module) -> dict[str, Any] | None:
    """The `quantization_config` by which transformers loads the model with bitsandbytes; None for a dense model."""
    layers = dict(quantized_layers(model))
    if not layers:
        return None
    first = next(iter(layers.values()))
    floating = next((p.dtype for _, p in base_parameters(model) if p.is_floating_point()), torch.float32)
    dense = [path for path, module in base_modules(model) if is_linear(module) and path not in layers]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": first.quant_type,
        "bnb_4bit_use_double_quant": first.nested_absmax is not None,
        "bnb_4bit_compute_dtype": str(first.compute_dtype or floating).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense,
    }


def note_in_config(model: nn.Module) -> None:
    """Keep a transformers model's `config.quantization_config` true to its layers."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "save_pretrained"):
        return
    fields = config_fields(model)
    if fields is not None:
        config.quantization_config = fields
    elif hasattr(config, "quantization_config"):
        del config.quantization_config


def _with_first(modules: Iterable[Layer]) -> list[tuple[Layer, Layer]]:
    """(module, the first module with the same weight), all looked up before any weight is freed."""
    modules = list(modules)
    first: dict[int, Layer] = {}
    for module in modules:
        first.setdefault(id(module.weight), module)
    return [(module, first[id(module.weight)]) for module in modules]


def _is_dense_layer(module: nn.Module) -> bool:
    plain = original_class(module) is nn.Linear or is_conv1d(module)
    return plain and module._parameters.get("weight") is not None


def _skipped(model: nn.Module, modules: dict[str, nn.Module], skip: Sequence[str] | None) -> list[str]:
    if isinstance(skip, str):
        raise PeftcoreError(f"skip is a list of module names, found the string {skip!r}. Try: skip=[{skip!r}]")
    if skip is None:
        return default_skip(model)
    found = []
    for pattern in skip:
        paths = [path for path in modules if matches(pattern, path)]
        if not paths:
            names = {part for path in modules for part in (path, path.rpartition(".")[2])}
            raise PeftcoreError(f"skip: '{pattern}' matches no module{nearest(pattern, names)}")
        found += paths
    return found


def _check_layer(path: str, module: Any) -> None:
    weight = module.weight
    name = f"{path}.weight" if path else "weight"
    if weight.dtype not in DTYPES:
        raise PeftcoreError(
            f"'{name}' is {weight.dtype}; 4-bit weights are made of float32, float16 or bfloat16. "
            f"Cast the model first, or leave the layer as it is: skip=['{path}']"
        )
    if "forward" in module.__dict__:
        raise PeftcoreError(
            f"'{path}' has a forward of its own (accelerate's hooks, say), which reads the dense weight. "
            "Quantize before the model is dispatched"
        )
    if not weight.is_meta:
        refuse_non_finite(weight.detach(), name)


def _is_bnb(module: nn.Module) -> bool:
    cls = type(module)
    return cls.__module__.startswith("bitsandbytes.") and any(c.__name__ == "Linear4bit" for c in cls.__mro__)


def _adopt(module: Any, path: str) -> None:
    """Make a layer of bitsandbytes one of ours, with the same bits."""
    if isinstance(module, QuantizedLinear):
        return
    parts = {name.removeprefix("weight."): t for name, t in module.state_dict().items() if name.startswith("weight.")}
    if not parts:
        raise PeftcoreError(
            f"'{path}' is a layer of bitsandbytes that is not quantized yet. Move it to its device first"
        )
    packed = from_tensors(module.weight.detach(), parts, f"{path}.weight")
    compute_dtype = module.compute_dtype
    for attribute in ("quant_state", "quant_storage", "compute_type_is_set", "support_avx512bf16_for_cpu"):
        module.__dict__.pop(attribute, None)
    del module._parameters["weight"]
    module._parameters = {"weight": None, **module._parameters}
    convert(module, packed._replace(codes=packed.codes.clone()), compute_dtype)
