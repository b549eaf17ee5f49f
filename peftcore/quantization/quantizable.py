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
from peftcore.model import asked_for_dtype, bypassed, detect, observe, rewritten
from peftcore.model.base_modules import base_modules, base_parameters, original_class
from peftcore.model.experts import experts_layout, stacked_weights
from peftcore.model.experts.in_model import routers
from peftcore.model.targets import matches
from peftcore.ops.weight import DTYPES, MIN_BLOCKSIZE
from peftcore.plugin.layers import is_conv1d, is_linear, is_wrapped
from peftcore.quantization.parameters import PackedParameters


def default_skip(model: nn.Module) -> list[str]:
    """Return the paths left dense by default: heads, routers, modules that the class keeps in float32."""
    architecture = detect(model)
    float32_modules = getattr(model, "_keep_in_fp32_modules", None) or ()
    paths = [path for path, _ in base_modules(model) if any(matches(name, path) for name in float32_modules)]
    return [
        path for path in (architecture.output_head, *architecture.task_heads, *sorted(routers(model)), *paths) if path
    ]


def expert_parameters(model: nn.Module, path: str, module: nn.Module) -> tuple[str, ...]:
    """Return the names of the weights `[experts, .., ..]` of the module at `path`, if its own forward reads them."""
    names = stacked_weights(module)
    is_packed = any(module._parameters[name].dtype is torch.uint8 for name in names)  # type: ignore[union-attr]
    if not names or is_packed or experts_layout(module) is not None:
        return names
    # The forward is written by hand, and other code, which reads parameters, would find packed bytes (DBRX).
    seen, full = observe(model), {f"{path}.{name}" if path else name for name in names}
    if path in seen.called and not full <= seen.own_reads:
        return ()
    return () if full & seen.other_reads.keys() else names


def selected(model: nn.Module, skip: Sequence[str] | None) -> dict[str, nn.Module]:
    """Return the layers that `quantize` converts, by path; of layers that share a weight, all or none."""
    modules, skipped = dict(base_modules(model)), _left_dense(model, skip)
    owners = _owners(model)
    chosen = {}
    for path, module in modules.items():
        if not is_dense_linear(module) or _within(path, skipped):
            continue
        alike = all(type(modules[owner]) is type(module) for owner in owners[id(module.weight)])
        if not _is_in_attention(modules, path) and alike:
            chosen[path] = module
    return {path: module for path, module in chosen.items() if owners[id(module.weight)] <= chosen.keys()}


def quantizable(model: nn.Module) -> list[str]:
    """Return the names of the weights that `quantize` can store in 4 bits, if none is skipped.

    A linear layer is named by its path, a parameter of experts by its full name. The model is not changed, and may be
    on the meta device.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of experts that stay dense, which `quantize` warns of
        experts = selected_experts(model, (), 64)
    names = [f"{path}.{name}" for path, parameters in experts.items() for name in parameters]
    return [*selected(model, ()), *names]


def warn_of_dense(model: nn.Module, skip: Sequence[str] | None) -> None:
    """Warn of linear layers that are neither skipped nor quantized, with the reasons.

    Layers that share their weight with a layer that stays dense, such as a tied head, are not mentioned.
    """
    skipped, modules = _skipped(model, skip), dict(base_modules(model))
    reason_by_path = dict.fromkeys(asked_for_dtype(model), "other code reads the dtype of the weight")
    reason_by_path |= {**rewritten(model), **bypassed(model)}
    dense: dict[str, list[str]] = {}
    for path, module in modules.items():
        if _within(path, skipped) or _is_in_attention(modules, path):
            continue
        reason = _why_dense(path, module, reason_by_path)
        if reason is not None:
            dense.setdefault(reason, []).append(path)
    if dense:
        parts = [f"{_listed(paths)}, because {reason}" for reason, paths in dense.items()]
        warn(
            f"quantize leaves layers of {type(model).__name__} dense: {'; '.join(parts)}. To leave them dense "
            "without this warning, name them in skip",
        )


def _why_dense(path: str, module: nn.Module, reason_by_path: Mapping[str, str]) -> str | None:
    """Return why a module's weight stays dense, or None if it is quantized or has no dense weight."""
    if isinstance(module, nn.MultiheadAttention):
        reads_weights = _has_plain_weight(module.out_proj)
        return "nn.MultiheadAttention reads the weights of its layers itself" if reads_weights else None
    if not is_linear(module) or not _has_plain_weight(module):
        return None
    if not is_dense_linear(module):
        return f"{original_class(module).__name__} is not known to compute x Wᵀ + b"
    return next((reason for other, reason in reason_by_path.items() if _within(path, [other])), None)


def _listed(paths: Sequence[str]) -> str:
    return f"'{paths[0]}'" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def selected_experts(model: nn.Module, skip: Sequence[str] | None, blocksize: int) -> dict[str, dict[str, int]]:
    """Return the experts' parameters that `quantize` converts and their block sizes, by path and name.

    Blocks must not straddle experts: if `blocksize` does not divide an expert, a smaller block is used or the parameter
    stays dense, with a warning.
    """
    skipped, owners = _left_dense(model, skip), _owners(model)
    chosen: dict[str, dict[str, int]] = {}
    other: dict[int, list[str]] = {}  # names by the block size used instead; 0 for dense
    for path, module in base_modules(model):
        for name in expert_parameters(model, path, module):
            parameter, full = module._parameters[name], f"{path}.{name}" if path else name
            if parameter is None or not parameter.is_floating_point() or _within(full, skipped):
                continue
            if len(owners[id(parameter)]) > 1:
                continue
            size = _dividing(parameter[0].numel(), blocksize)
            if size:
                chosen.setdefault(path, {})[name] = size
            if size != blocksize:
                other.setdefault(size, []).append(full)
    _warn_of_other_sizes(other, blocksize)
    return chosen


def _warn_of_other_sizes(names_by_size: Mapping[int, Sequence[str]], blocksize: int) -> None:
    """Warn of experts' weights that get another block size than `blocksize`; 0: that stay dense."""
    for size, names in names_by_size.items():
        treatment = f"quantized in blocks of {size}" if size else "left dense"
        warn(
            f"{len(names)} weights of experts ('{names[0]}') are {treatment}, because an expert is not a multiple of "
            f"{blocksize if size else min(blocksize, MIN_BLOCKSIZE)} values",
        )


def _dividing(count: int, blocksize: int) -> int:
    """Return the largest power of two up to `blocksize` that divides `count`, or 0 if that is too small."""
    smallest = min(blocksize, MIN_BLOCKSIZE)
    while blocksize >= smallest:
        if count % blocksize == 0:
            return blocksize
        blocksize //= 2
    return 0


def _owners(model: nn.Module) -> dict[int, set[str]]:
    """Return the paths of the modules that hold a parameter, by its id."""
    owners: dict[int, set[str]] = {}
    for name, parameter in base_parameters(model):
        owners.setdefault(id(parameter), set()).add(name.rpartition(".")[0])
    return owners


def _is_in_attention(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Return whether the layer belongs to an `nn.MultiheadAttention`, which reads its weight and never calls it."""
    return bool(path) and isinstance(modules.get(path.rpartition(".")[0]), nn.MultiheadAttention)


def _has_plain_weight(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    is_dense = weight is not None and weight.dtype in DTYPES and not is_wrapped(weight)
    return is_dense and not isinstance(module, PackedParameters)


def is_dense_linear(module: nn.Module) -> bool:
    """Return whether `module` is dense and computes x Wᵀ + b: an `nn.Linear`, a Conv1D, or a class that does no more.

    Falcon's is such a class, with a forward of its own.
    """
    if module._parameters.get("weight") is None:
        return False
    cls: Any = original_class(module)
    if cls is nn.Linear or is_conv1d(module):
        return True
    if not isinstance(module, nn.Linear) or not module._parameters.keys() <= {"weight", "bias"}:
        return False
    if module._buffers or module._modules or not _adds_nothing(cls):
        return False
    if cls.forward is nn.Linear.forward:
        return True
    takes_x_alone = len(inspect.signature(cls.forward).parameters) == 2  # with self: a packed layer passes no more on
    return takes_x_alone and _computes_linear(module)


@cache
def _adds_nothing(cls: Any) -> bool:
    """Return whether a subclass of `nn.Linear` overrides at most what is allowed here, and has no further methods."""
    for subclass in set(cls.__mro__).difference(nn.Linear.__mro__):
        for name, value in vars(subclass).items():
            if name not in _HARMLESS and (callable(value) or hasattr(value, "__get__")):
                return False
    return True


_HARMLESS = {"__init__", "forward", "extra_repr", "reset_parameters"}


def _computes_linear(module: nn.Module) -> bool:
    """Return whether the forward of `module` computes what `nn.Linear`'s does, on small random values.

    In training and evaluation, of inputs of one to three dimensions, small and large ones, in fp32 and bf16.
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
        expected = nn.functional.linear(x.to(dtype), w, b)
        try:
            with torch.no_grad():
                output = original_class(module).forward(probe, x.to(dtype))
        except Exception:  # it needs more than one input
            return False
        if not isinstance(output, Tensor) or output.dtype != dtype or output.shape != expected.shape:
            return False
        if (output - expected).abs().max() > 4 * torch.finfo(dtype).eps * expected.abs().max():
            return False
    return True


def _within(path: str, paths: Sequence[str]) -> bool:
    return any(path == other or path.startswith(f"{other}.") for other in paths)


def _left_dense(model: nn.Module, skip: Sequence[str] | None) -> list[str]:
    return [*_skipped(model, skip), *bypassed(model), *rewritten(model), *asked_for_dtype(model)]


def _skipped(model: nn.Module, skip: Sequence[str] | None) -> list[str]:
    if isinstance(skip, str):
        raise PeftcoreError(f"skip must be a list of module names, found the string {skip!r}. Use skip=[{skip!r}]")
    if skip is None:
        return default_skip(model)
    names = _names(model)
    skipped = []
    for pattern in skip:
        paths = [path for path in names if matches(pattern, path)]
        if not paths:
            parts = {*names, *(path.rpartition(".")[2] for path in names)}
            raise PeftcoreError(f"skip: '{pattern}' matches no module{nearest(pattern, parts)}")
        skipped += paths
    return skipped


def _names(model: nn.Module) -> list[str]:
    """Return the paths of modules and of experts' parameters, which `skip` selects from."""
    names = []
    for path, module in base_modules(model):
        names += [path, *(f"{path}.{name}" if path else name for name in expert_parameters(model, path, module))]
    return names


def with_skipped(model: nn.Module, skip: Sequence[str] | None, dense: Collection[str]) -> list[str]:
    """Return a `skip` that leaves `more` paths dense, too, by their last parts where these select nothing else."""
    names, skipped = _names(model), list(default_skip(model) if skip is None else skip)
    for path in dense:
        part = path.rpartition(".")[2]
        skipped.append(part if all(other in dense for other in names if matches(part, other)) else path)
    return list(dict.fromkeys(skipped))
