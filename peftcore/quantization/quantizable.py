"""Selection of the linear layers and experts that are quantized."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.errors import PeftcoreError, nearest, warn
from peftcore.model import bypassed_layers, detect, layers_read_for_dtype, observe, rewritten_layers
from peftcore.model.base_modules import base_modules, base_parameters, original_class
from peftcore.model.experts import experts_layout, stacked_weights
from peftcore.model.experts.in_model import routers
from peftcore.model.targets import matches
from peftcore.ops.weight import DTYPES, MIN_BLOCKSIZE
from peftcore.plugin.layers import is_conv1d, is_linear, is_wrapped
from peftcore.quantization.parameters import PackedParameters


def default_skip(model: nn.Module) -> list[str]:
    """Return the paths left dense by default: heads, routers, and modules that the model class keeps in float32."""
    architecture = detect(model)
    float32_modules = getattr(model, "_keep_in_fp32_modules", None) or ()
    paths = [architecture.output_head, *architecture.task_heads, *sorted(routers(model))]
    for path, _ in base_modules(model):
        if any(matches(name, path) for name in float32_modules):
            paths.append(path)
    return [path for path in paths if path]


def expert_parameters(model: nn.Module, path: str, module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's weights `[experts, .., ..]` if only its own forward reads them."""
    names = stacked_weights(module)
    is_packed = any(module._parameters[name].dtype is torch.uint8 for name in names)  # type: ignore[union-attr]
    if not names or is_packed or experts_layout(module) is not None:
        return names
    # In a model family that `experts_layout` does not know (DBRX), other modules may read the parameters and would get
    # packed bytes.
    observation, full_names = observe(model), {f"{path}.{name}" if path else name for name in names}
    if path in observation.called and not full_names <= observation.own_reads:
        return ()
    return () if full_names & observation.other_reads.keys() else names


def select_layers(model: nn.Module, skip: Sequence[str] | None) -> dict[str, nn.Module]:
    """Return the layers that `quantize` converts, by path.

    Either all or none of the layers that share a weight are selected.
    """
    modules, dense_paths = dict(base_modules(model)), _paths_left_dense(model, skip)
    owners = _owner_paths(model)
    layers = {}
    for path, module in modules.items():
        if not is_dense_linear(module) or _is_within(path, dense_paths):
            continue
        is_same_class = all(type(modules[owner]) is type(module) for owner in owners[id(module.weight)])
        if not _is_in_attention(modules, path) and is_same_class:
            layers[path] = module
    return {path: module for path, module in layers.items() if owners[id(module.weight)] <= layers.keys()}


def quantizable(model: nn.Module) -> list[str]:
    """Return the names of the weights that `quantize` can store in 4 bits with `skip=()`.

    Linear layers are named by their path, experts' parameters by their full name. The model may be on the meta device.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `quantize` warns about experts that stay dense
        experts = select_experts(model, (), 64)
    names = [f"{path}.{name}" for path, parameters in experts.items() for name in parameters]
    return [*select_layers(model, ()), *names]


def warn_of_dense(model: nn.Module, skip: Sequence[str] | None) -> None:
    """Warn about linear layers that are neither skipped nor quantized, with the reasons.

    The warning omits layers that share their weight with a module that stays dense, such as a tied head.
    """
    skipped_paths, modules = _skipped_paths(model, skip), dict(base_modules(model))
    reason_by_path = dict.fromkeys(layers_read_for_dtype(model), "other code reads the weight's dtype")
    reason_by_path |= {**rewritten_layers(model), **bypassed_layers(model)}
    dense: dict[str, list[str]] = {}
    for path, module in modules.items():
        if _is_within(path, skipped_paths) or _is_in_attention(modules, path):
            continue
        reason = _why_dense(path, module, reason_by_path)
        if reason is not None:
            dense.setdefault(reason, []).append(path)
    if dense:
        parts = [f"{_summarize_paths(paths)}, because {reason}" for reason, paths in dense.items()]
        warn(
            f"quantize leaves layers of {type(model).__name__} dense: {'; '.join(parts)}. To silence this warning, "
            "add them to skip",
        )


def _why_dense(path: str, module: nn.Module, reason_by_path: Mapping[str, str]) -> str | None:
    """Return the reason why a module's weight stays dense, or None if it will be quantized or is not dense."""
    if isinstance(module, nn.MultiheadAttention):
        reads_weights = _has_plain_weight(module.out_proj)
        return "nn.MultiheadAttention reads the weights of its layers itself" if reads_weights else None
    if not is_linear(module) or not _has_plain_weight(module):
        return None
    if not is_dense_linear(module):
        return f"{original_class(module).__name__} is not known to compute x Wᵀ + b"
    return next((reason for parent, reason in reason_by_path.items() if _is_within(path, [parent])), None)


def _summarize_paths(paths: Sequence[str]) -> str:
    return f"'{paths[0]}'" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def select_experts(model: nn.Module, skip: Sequence[str] | None, blocksize: int) -> dict[str, dict[str, int]]:
    """Return the block sizes of the experts' parameters that `quantize` converts, by module path and name.

    Blocks must not straddle experts. Where `blocksize` does not divide an expert, its parameter gets smaller blocks or
    stays dense, with a warning.
    """
    dense_paths, owners = _paths_left_dense(model, skip), _owner_paths(model)
    blocksizes: dict[str, dict[str, int]] = {}
    names_by_size: dict[int, list[str]] = {}  # parameters that get another block size; 0 for dense
    for path, module in base_modules(model):
        for name in expert_parameters(model, path, module):
            parameter, full_name = module._parameters[name], f"{path}.{name}" if path else name
            if parameter is None or not parameter.is_floating_point() or _is_within(full_name, dense_paths):
                continue
            if len(owners[id(parameter)]) > 1:
                continue
            size = _dividing_blocksize(parameter[0].numel(), blocksize)
            if size:
                blocksizes.setdefault(path, {})[name] = size
            if size != blocksize:
                names_by_size.setdefault(size, []).append(full_name)
    _warn_of_other_sizes(names_by_size, blocksize)
    return blocksizes


def _warn_of_other_sizes(names_by_size: Mapping[int, Sequence[str]], blocksize: int) -> None:
    """Warn about experts' weights that get a different block size than `blocksize`, or stay dense (0)."""
    for size, names in names_by_size.items():
        treatment = f"quantized in blocks of {size}" if size else "left dense"
        warn(
            f"{len(names)} weights of experts ('{names[0]}') are {treatment}, because the size of an expert is not a "
            f"multiple of {(blocksize if size else min(blocksize, MIN_BLOCKSIZE))} values",
        )


def _dividing_blocksize(count: int, blocksize: int) -> int:
    """Return the largest power of two up to `blocksize` that divides `count`, or 0 if it is below the minimum."""
    smallest = min(blocksize, MIN_BLOCKSIZE)
    while blocksize >= smallest:
        if count % blocksize == 0:
            return blocksize
        blocksize //= 2
    return 0


def _owner_paths(model: nn.Module) -> dict[int, set[str]]:
    """Return the paths of the modules that use each parameter, by the parameter's id."""
    owners: dict[int, set[str]] = {}
    for name, parameter in base_parameters(model):
        owners.setdefault(id(parameter), set()).add(name.rpartition(".")[0])
    return owners


def _is_in_attention(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Return whether the layer belongs to an `nn.MultiheadAttention`, which reads its weight without calling it."""
    return bool(path) and isinstance(modules.get(path.rpartition(".")[0]), nn.MultiheadAttention)


def _has_plain_weight(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    is_dense = weight is not None and weight.dtype in DTYPES and not is_wrapped(weight)
    return is_dense and not isinstance(module, PackedParameters)


def is_dense_linear(module: nn.Module) -> bool:
    """Return whether `module` is dense and computes x Wᵀ + b: an `nn.Linear`, a Conv1D, or an equivalent subclass.

    For example, Falcon's linear layer is a subclass with its own, equivalent forward.
    """
    if module._parameters.get("weight") is None:
        return False
    cls: Any = original_class(module)
    if cls is nn.Linear or is_conv1d(module):
        return True
    if not isinstance(module, nn.Linear) or not module._parameters.keys() <= {"weight", "bias"}:
        return False
    if module._buffers or module._modules or not _overrides_only_harmless(cls):
        return False
    if cls.forward is nn.Linear.forward:
        return True
    # `QuantizedLinear.forward` takes (self, x) only.
    takes_x_alone = len(inspect.signature(cls.forward).parameters) == 2
    return takes_x_alone and _computes_linear(module)


@cache
def _overrides_only_harmless(cls: Any) -> bool:
    """Return whether a subclass of `nn.Linear` overrides only methods in `_HARMLESS_OVERRIDES` and adds none."""
    for subclass in set(cls.__mro__).difference(nn.Linear.__mro__):
        for name, value in vars(subclass).items():
            if name not in _HARMLESS_OVERRIDES and (callable(value) or hasattr(value, "__get__")):
                return False
    return True


_HARMLESS_OVERRIDES = {"__init__", "forward", "extra_repr", "reset_parameters"}


def _computes_linear(module: nn.Module) -> bool:
    """Return whether the forward of `module` equals `nn.Linear`'s on random inputs.

    The inputs have one to three dimensions, are small and large, in fp32 and bf16, in training and in evaluation mode.
    """
    generator = torch.Generator().manual_seed(0)
    probe: Any = object.__new__(original_class(module))
    with torch.device("cpu"):
        weight, bias = torch.randn(6, 4, generator=generator), torch.randn(6, generator=generator)
        xs = [torch.randn(shape, generator=generator) for shape in ((4,), (3, 4), (2, 3, 4))]
        xs += [1e4 * x for x in xs]
    for dtype, is_training, x in product((torch.float32, torch.bfloat16), (False, True), xs):
        w, b = weight.to(dtype), None if module._parameters.get("bias") is None else bias.to(dtype)
        probe.__dict__ = {
            **vars(module), "_parameters": {"weight": w, "bias": b}, "in_features": 4, "out_features": 6,
            "training": is_training,
        }  # fmt: skip
        reference = nn.functional.linear(x.to(dtype), w, b)
        try:
            with torch.no_grad():
                output = original_class(module).forward(probe, x.to(dtype))
        except Exception:  # a forward that needs other attributes is not a plain linear layer
            return False
        if not isinstance(output, Tensor) or output.dtype != dtype or output.shape != reference.shape:
            return False
        if (output - reference).abs().max() > 4 * torch.finfo(dtype).eps * reference.abs().max():
            return False
    return True


def _is_within(path: str, paths: Sequence[str]) -> bool:
    return any(path == parent or path.startswith(f"{parent}.") for parent in paths)


def _paths_left_dense(model: nn.Module, skip: Sequence[str] | None) -> list[str]:
    return [
        *_skipped_paths(model, skip),
        *bypassed_layers(model),
        *rewritten_layers(model),
        *layers_read_for_dtype(model),
    ]


def _skipped_paths(model: nn.Module, skip: Sequence[str] | None) -> list[str]:
    if isinstance(skip, str):
        raise PeftcoreError(f"skip must be a list of module names, found the string {skip!r}. Use skip=[{skip!r}]")
    if skip is None:
        return default_skip(model)
    paths_in_model = _names(model)
    skipped_paths = []
    for pattern in skip:
        matching = [path for path in paths_in_model if matches(pattern, path)]
        if not matching:
            parts = {*paths_in_model, *(path.rpartition(".")[2] for path in paths_in_model)}
            raise PeftcoreError(f"skip: '{pattern}' matches no module{nearest(pattern, parts)}")
        skipped_paths += matching
    return skipped_paths


def _names(model: nn.Module) -> list[str]:
    """Return the paths that `skip` can select: modules and experts' parameters."""
    names = []
    for path, module in base_modules(model):
        names += [path, *(f"{path}.{name}" if path else name for name in expert_parameters(model, path, module))]
    return names


def extend_skip(model: nn.Module, skip: Sequence[str] | None, dense: Collection[str]) -> list[str]:
    """Return `skip` plus the paths in `dense`.

    A path is shortened to its last component if that matches nothing else.
    """
    names, patterns = _names(model), list(default_skip(model) if skip is None else skip)
    for path in dense:
        part = path.rpartition(".")[2]
        patterns.append(part if all(other_path in dense for other_path in names if matches(part, other_path)) else path)
    return list(dict.fromkeys(patterns))
