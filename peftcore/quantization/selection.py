"""What of a model is kept in 4 bits: its linear layers, and the parameters of its experts."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence

from torch import nn

from peftcore.adaptation.adapted import base_modules, base_parameters
from peftcore.adaptation.class_swap import original_class
from peftcore.errors import PeftcoreError, nearest
from peftcore.experts import experts_layout, stacked_weights
from peftcore.layers import is_conv1d
from peftcore.observation import asked_for_dtype, bypassed, detect, rewritten
from peftcore.ops.weight import MIN_BLOCKSIZE
from peftcore.targets import matches
from peftcore.targets.experts import routers

# Parents that read the weights of their linear layers themselves, past the layers' forward.
_BYPASSING = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def default_skip(model: nn.Module) -> list[str]:
    """What `quantize` leaves dense unless told otherwise, by path: heads, routers, what the class keeps in float32."""
    architecture = detect(model)
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    paths = [path for path, _ in base_modules(model) if any(matches(name, path) for name in kept)]
    return [
        path for path in (architecture.output_head, *architecture.task_heads, *sorted(routers(model)), *paths) if path
    ]


def expert_parameters(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's own weights `[experts, .., ..]`, if its forward reads them."""
    names = stacked_weights(module)
    if not names or experts_layout(module) is not None:
        return names
    # Written by hand. What its own forward does not name may be read by others.
    code = getattr(inspect.unwrap(original_class(module).forward), "__code__", None)
    return names if code is not None and {*names} <= {*code.co_names} else ()


def selected(model: nn.Module, skip: Sequence[str] | None) -> dict[str, nn.Module]:
    """The layers that `quantize` converts, by path: of layers that share a weight all or none."""
    modules, skipped = dict(base_modules(model)), _left_dense(model, skip)
    owners = _owners(model)
    chosen = {}
    for path, module in modules.items():
        if not _is_dense_layer(module) or _within(path, skipped):
            continue
        parent = modules.get(path.rpartition(".")[0]) if path else None
        alike = all(type(modules[owner]) is type(module) for owner in owners[id(module.weight)])
        if not isinstance(parent, _BYPASSING) and alike:
            chosen[path] = module
    return {path: module for path, module in chosen.items() if owners[id(module.weight)] <= chosen.keys()}


def selected_experts(model: nn.Module, skip: Sequence[str] | None, blocksize: int) -> dict[str, dict[str, int]]:
    """The experts' parameters that `quantize` converts, and their blocksizes, by path and name.

    Of whole blocks for each expert: with smaller blocks than `blocksize`, or not at all, where that does not divide
    them. A warning says which.
    """
    skipped, owners = _left_dense(model, skip), _owners(model)
    chosen: dict[str, dict[str, int]] = {}
    other: dict[int, list[str]] = {}  # names by the blocksize that they take in place of that; 0: none
    for path, module in base_modules(model):
        for name in expert_parameters(module):
            parameter, full = module._parameters[name], f"{path}.{name}" if path else name
            if parameter is None or not parameter.is_floating_point() or _within(full, skipped):
                continue
            if len(owners[id(parameter)]) > 1:
                continue
            found = _dividing(parameter[0].numel(), blocksize)
            if found != blocksize:
                other.setdefault(found, []).append(full)
            if found:
                chosen.setdefault(path, {})[name] = found
    for found, names in other.items():
        how = f"quantized in blocks of {found}" if found else "left dense"
        warnings.warn(
            f"{len(names)} weights of experts ('{names[0]}') are {how}: an expert of theirs is no whole number of "
            f"blocks of {blocksize if found else MIN_BLOCKSIZE}",
            stacklevel=4,
        )
    return chosen


def _dividing(count: int, blocksize: int) -> int:
    """The largest power of two up to `blocksize` that divides `count`; 0 where that would be too small a block."""
    while blocksize >= MIN_BLOCKSIZE:
        if count % blocksize == 0:
            return blocksize
        blocksize //= 2
    return 0


def _owners(model: nn.Module) -> dict[int, set[str]]:
    """The paths of the modules that hold a parameter, by its identity."""
    owners: dict[int, set[str]] = {}
    for name, parameter in base_parameters(model):
        owners.setdefault(id(parameter), set()).add(name.rpartition(".")[0])
    return owners


def _is_dense_layer(module: nn.Module) -> bool:
    plain = original_class(module) is nn.Linear or is_conv1d(module)
    return plain and module._parameters.get("weight") is not None


def _within(path: str, paths: Sequence[str]) -> bool:
    return any(path == other or path.startswith(f"{other}.") for other in paths)


def _left_dense(model: nn.Module, skip: Sequence[str] | None) -> list[str]:
    return [*_skipped(model, skip), *bypassed(model), *rewritten(model), *asked_for_dtype(model)]


def _skipped(model: nn.Module, skip: Sequence[str] | None) -> list[str]:
    if isinstance(skip, str):
        raise PeftcoreError(f"skip is a list of module names, found the string {skip!r}. Try: skip=[{skip!r}]")
    if skip is None:
        return default_skip(model)
    names = []
    for path, module in base_modules(model):
        names += [path, *(f"{path}.{name}" if path else name for name in expert_parameters(module))]
    found = []
    for pattern in skip:
        paths = [path for path in names if matches(pattern, path)]
        if not paths:
            parts = {part for path in names for part in (path, path.rpartition(".")[2])}
            raise PeftcoreError(f"skip: '{pattern}' matches no module{nearest(pattern, parts)}")
        found += paths
    return found
