"""LoRA of single layers, by path: conversion between PEFT's layout and other files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peftcore.plugin import CheckpointError, PeftcoreError, targets
from peftcore_lora.blocks import without_blocks
from peftcore_lora.placing import Convolution

PEFT = re.compile(r"base_model\.model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector)")
# layers of fused projections, which other pipelines lack
FUSED = (".to_qkv", ".to_kv", ".to_added_qkv", ".to_added_kv")


@dataclass
class Change:
    """Change B A of one layer, times `alpha / r`, or `alpha / sqrt(r)` if `rs`.

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


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that these files can have LoRA for."""
    return {
        path: module
        for path, module in targets.base_modules(model)
        if path and (targets.is_linear(module) or isinstance(module, Convolution))
    }


def outputs(module: Any) -> int:
    return int(module.out_channels if isinstance(module, Convolution) else targets.sizes(module)[1])


def from_peft(model: nn.Module, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Change]:
    """Return changes by path, from PEFT's layout.

    Raises:
        PeftcoreError: a tensor is not LoRA of a linear layer or convolution.
    """
    there, found, modules = layers(model), dict[str, dict[str, Tensor]](), dict(targets.base_modules(model))
    for name, tensor in tensors.items():
        match = PEFT.fullmatch(name)
        path = match[1] if match else ""
        owner = modules.get(path.rpartition(".")[0])
        fused = getattr(owner, "fused_projections", False) is True and path.endswith(FUSED)
        if match is None or path not in there or fused:
            raise PeftcoreError(
                f"'{name.removeprefix('base_model.model.')}' cannot be in a file for pipelines, which contains LoRA of "
                "linear layers and convolutions. Leave its module out, or choose format='peft'"
            )
        found.setdefault(path, {})[match[2]] = tensor
    if fields.get("use_bdlora"):
        found = {path: without_blocks(fields["use_bdlora"], path, each) for path, each in found.items()}
    return {
        path: Change(
            each["lora_A.weight"],
            each["lora_B.weight"],
            float(targets.pattern_value(fields.get("alpha_pattern"), path, fields["lora_alpha"])),
            each.get("lora_B.bias"),
            each.get("lora_magnitude_vector"),
            bool(fields.get("use_rslora")),
        )
        for path, each in found.items()
    }


def to_peft(
    model: nn.Module, changes: Mapping[str, Change], others: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, fields) in PEFT's layout, with the additional fields `others`."""
    tensors: dict[str, Tensor] = {}
    for path, change in changes.items():
        stem = f"base_model.model.{path}"
        tensors |= {f"{stem}.lora_A.weight": change.a, f"{stem}.lora_B.weight": change.b}
        tensors |= {} if change.bias is None else {f"{stem}.lora_B.bias": change.bias}
        tensors |= {} if change.magnitude is None else {f"{stem}.lora_magnitude_vector": change.magnitude}
    for what, whose in (
        ("lora_B.bias", [path for path, change in changes.items() if change.bias is None]),
        ("the magnitude of DoRA", [path for path, change in changes.items() if change.magnitude is None]),
    ):
        if whose and len(whose) < len(changes):
            raise CheckpointError(f"some layers have {what}, and '{whose[0]}' has none: all or none must")
    first = next(iter(changes.values()))
    return tensors, {
        **others,
        **ranks_and_alphas(model, changes),
        "peft_type": "LORA",
        "target_modules": targets.minimal_suffixes(model, changes),
        "use_rslora": first.rs,
        "use_dora": first.magnitude is not None,
        "lora_bias": first.bias is not None,
    }


def ranks_and_alphas(model: nn.Module, changes: Mapping[str, Change]) -> dict[str, Any]:
    r, rank_pattern = _patterns(model, {path: change.r for path, change in changes.items()})
    alpha, alpha_pattern = _patterns(model, {path: change.alpha for path, change in changes.items()})
    return {"r": r, "lora_alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}


def _patterns(model: nn.Module, values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return (the most common value, {path: another value}); a path that is also a suffix of another is anchored."""
    usual, _ = Counter(values.values()).most_common(1)[0]
    ends = Counter(end for path, _ in targets.base_modules(model) for end in _ends(path))
    others = {path: value for path, value in values.items() if value != usual}
    return usual, {f"^{path}$" if ends[path] > 1 else path: value for path, value in others.items()}


def _ends(path: str) -> Iterable[str]:
    parts = path.split(".")
    return (".".join(parts[i:]) for i in range(len(parts)))


def complete(path: str, found: Mapping[str, Tensor], alpha: float | None, rs: bool = False) -> Change:
    """Return the change from a layer's tensors "a", "b", "bias" and "magnitude"; alpha None: r."""
    for name, other in (("a", "lora_A (down)"), ("b", "lora_B (up)")):
        if name not in found:
            raise CheckpointError(f"{other} of '{path}' is missing. The file is incomplete")
    a, b = found["a"], found["b"]
    if a.dim() < 2 or b.dim() < 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise CheckpointError(
            f"'{path}' has A {list(a.shape)} and B {list(b.shape)}, which are not [r, in, ...] and [out, r, ...]"
        )
    return Change(a, b, float(a.shape[0]) if alpha is None else alpha, found.get("bias"), found.get("magnitude"), rs)


def number(name: str, tensor: Tensor) -> float:
    """Return an alpha, one finite number other than 0 (0 means r in sd-scripts, and 0 in diffusers)."""
    if tensor.numel() != 1 or (not tensor.is_floating_point() and tensor.dtype.itemsize == 1):
        raise CheckpointError(f"'{name}' must be one number, found {tensor.dtype} {list(tensor.shape)}")
    value = float(tensor.item())
    if value == 0 or value != value or abs(value) == float("inf"):
        raise CheckpointError(f"'{name}' must be finite and not 0, found {value}")
    return value
