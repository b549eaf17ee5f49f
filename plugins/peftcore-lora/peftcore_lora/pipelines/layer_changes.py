"""LoRA of single layers, by path: conversion between PEFT's layout and other files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peftcore.plugin import CheckpointError, PeftcoreError, targets
from peftcore_lora.blocks import expand_blocks
from peftcore_lora.placing import Convolution

PEFT = re.compile(r"base_model\.model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector)")
# Layers that exist only after `fuse_qkv_projections()`, so a file with them would not load into other pipelines.
FUSED_PROJECTIONS = (".to_qkv", ".to_kv", ".to_added_qkv", ".to_added_kv")


@dataclass
class Change:
    """LoRA of one layer: B A, scaled by `alpha / r`, or by `alpha / sqrt(r)` if `rs`.

    Args:
        a: A `[r, in, ...]`.
        b: B `[out, r, ...]`.
        bias: bias of B, `[out]`.
        magnitude: DoRA's magnitude in PEFT's shape.
    """

    a: Tensor
    b: Tensor
    alpha: float
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    rs: bool = False

    @property
    def r(self) -> int:
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / (self.r**0.5 if self.rs else self.r)


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that pipeline files can contain LoRA for, by path."""
    return {
        path: module
        for path, module in targets.base_modules(model)
        if path and (targets.is_linear(module) or isinstance(module, Convolution))
    }


def output_width(module: Any) -> int:
    return int(module.out_channels if isinstance(module, Convolution) else targets.sizes(module)[1])


def from_peft(model: nn.Module, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Change]:
    """Convert tensors in PEFT's layout to changes by path.

    Raises:
        PeftcoreError: a tensor is not LoRA of a linear layer or convolution.
    """
    layers, modules = adaptable_layers(model), dict(targets.base_modules(model))
    layer_tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = PEFT.fullmatch(name)
        path = match[1] if match else ""
        owner = modules.get(path.rpartition(".")[0])
        is_fused = getattr(owner, "fused_projections", False) is True and path.endswith(FUSED_PROJECTIONS)
        if match is None or path not in layers or is_fused:
            raise PeftcoreError(
                f"'{name.removeprefix('base_model.model.')}' cannot be in a file for pipelines, which contains LoRA of "
                "linear layers and convolutions. Leave its module out, or choose format='peft'"
            )
        layer_tensors.setdefault(path, {})[match[2]] = tensor
    changes: dict[str, Change] = {}
    for path, factors in layer_tensors.items():
        if fields.get("use_bdlora"):
            factors = expand_blocks(fields["use_bdlora"], path, factors)
        changes[path] = Change(
            factors["lora_A.weight"],
            factors["lora_B.weight"],
            float(targets.pattern_value(fields.get("alpha_pattern"), path, fields["lora_alpha"])),
            factors.get("lora_B.bias"),
            factors.get("lora_magnitude_vector"),
            bool(fields.get("use_rslora")),
        )
    return changes


def to_peft(
    model: nn.Module, changes: Mapping[str, Change], other_fields: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Convert changes to (tensors, fields) in PEFT's layout, with `other_fields` among the fields.

    Raises:
        CheckpointError: only some of the changes have a bias or a magnitude.
    """
    tensors: dict[str, Tensor] = {}
    for path, change in changes.items():
        stem = f"base_model.model.{path}"
        tensors |= {f"{stem}.lora_A.weight": change.a, f"{stem}.lora_B.weight": change.b}
        if change.bias is not None:
            tensors[f"{stem}.lora_B.bias"] = change.bias
        if change.magnitude is not None:
            tensors[f"{stem}.lora_magnitude_vector"] = change.magnitude
    for label, paths_without in (
        ("a lora_B.bias", [path for path, change in changes.items() if change.bias is None]),
        ("a magnitude of DoRA", [path for path, change in changes.items() if change.magnitude is None]),
    ):
        if paths_without and len(paths_without) < len(changes):
            raise CheckpointError(f"some layers have {label}, but '{paths_without[0]}' has none. All layers need it")
    any_change = next(iter(changes.values()))
    return tensors, {
        **other_fields,
        **ranks_and_alphas(model, changes),
        "peft_type": "LORA",
        "target_modules": targets.minimal_suffixes(model, changes),
        "use_rslora": any_change.rs,
        "use_dora": any_change.magnitude is not None,
        "lora_bias": any_change.bias is not None,
    }


def ranks_and_alphas(model: nn.Module, changes: Mapping[str, Change]) -> dict[str, Any]:
    r, rank_pattern = _patterns(model, {path: change.r for path, change in changes.items()})
    alpha, alpha_pattern = _patterns(model, {path: change.alpha for path, change in changes.items()})
    return {"r": r, "lora_alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}


def _patterns(model: nn.Module, values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return (the most common value, {path: value} for the other values)."""
    most_common, _ = Counter(values.values()).most_common(1)[0]
    suffix_counts = Counter[str]()
    for path, _ in targets.base_modules(model):
        suffix_counts.update(_suffixes(path))
    patterns: dict[str, Any] = {}
    for path, value in values.items():
        if value != most_common:
            # Patterns match suffixes, so a path that is also the end of another one needs an anchor.
            patterns[f"^{path}$" if suffix_counts[path] > 1 else path] = value
    return most_common, patterns


def _suffixes(path: str) -> Iterable[str]:
    parts = path.split(".")
    return (".".join(parts[i:]) for i in range(len(parts)))


def build_change(path: str, tensors: Mapping[str, Tensor], alpha: float | None, rs: bool = False) -> Change:
    """Build a change from a layer's tensors "a", "b", "bias" and "magnitude"; alpha defaults to r.

    Raises:
        CheckpointError: A or B is missing, or their shapes do not fit together.
    """
    for name, description in (("a", "lora_A (down)"), ("b", "lora_B (up)")):
        if name not in tensors:
            raise CheckpointError(f"{description} of '{path}' is missing. The file is incomplete")
    a, b = tensors["a"], tensors["b"]
    if a.dim() < 2 or b.dim() < 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise CheckpointError(
            f"'{path}' has A {list(a.shape)} and B {list(b.shape)}, which are not [r, in, ...] and [out, r, ...]"
        )
    return Change(
        a, b, float(a.shape[0]) if alpha is None else alpha, tensors.get("bias"), tensors.get("magnitude"), rs
    )


def read_alpha(name: str, tensor: Tensor) -> float:
    """Return an alpha as a finite number other than 0, which means r in sd-scripts and 0 in diffusers.

    Raises:
        CheckpointError: the tensor is anything else.
    """
    if tensor.numel() != 1 or (not tensor.is_floating_point() and tensor.dtype.itemsize == 1):
        raise CheckpointError(f"'{name}' must be one number, found {tensor.dtype} {list(tensor.shape)}")
    value = float(tensor.item())
    if value == 0 or value != value or abs(value) == float("inf"):
        raise CheckpointError(f"'{name}' must be finite and not 0, found {value}")
    return value
