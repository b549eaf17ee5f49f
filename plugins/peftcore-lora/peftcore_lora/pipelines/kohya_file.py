"""Files of kohya-ss/sd-scripts, which ComfyUI, A1111 and diffusers also read.

PREFIX_NAME.lora_down.weight [r, in, ...], .lora_up.weight [out, r, ...], .alpha []       scale = alpha / r
PREFIX: lora_unet (also for a transformer); lora_te, or lora_te1 if there may be a second; lora_te2

Names of several layers with concatenated outputs (Flux' qkv) are read as a LoRA of each layer: with one A, or with
separate A where B is block-diagonal, as they are written. Source: sd-scripts, networks/lora.py and
networks/convert_flux_lora.py; diffusers 0.42, loaders/lora_conversion_utils.py.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.plugin import CheckpointError, FileFormat, PeftcoreError, validation
from peftcore_lora.pipelines.diffusers_file import FILE
from peftcore_lora.pipelines.kohya_names import Name, is_flux, names_of, written_names
from peftcore_lora.pipelines.layer_changes import Change, complete, from_peft, layers, number, outputs, to_peft
from peftcore_lora.pipelines.parts import TEXT_ENCODER, TRANSFORMER, UNET, parts as parts_of_pipeline

PREFIX = re.compile(r"(lora_unet|lora_te[123]?)_(.+)")
COMFY = re.compile(r"diffusion_model\.(.+?)(\.(?:lora_down\.weight|lora_up\.weight|alpha|dora_scale))")
PART_OF_PREFIX = {"lora_unet": UNET, "lora_te": TEXT_ENCODER, "lora_te1": TEXT_ENCODER, "lora_te2": f"{TEXT_ENCODER}_2",
                  "lora_te3": f"{TEXT_ENCODER}_3"}  # fmt: skip
KINDS = {"lora_down.weight": "a", "lora_up.weight": "b", "alpha": "alpha", "dora_scale": "dora_scale"}


def _normal(name: str) -> str:
    match = COMFY.fullmatch(name)
    return f"lora_unet_{match[1].replace('.', '_')}{match[2]}" if match else name


def matches(names: Collection[str]) -> bool:
    return bool(names) and all(PREFIX.fullmatch(_normal(name)) for name in names)


def parts(model: nn.Module, called: str | None) -> list[str]:
    """Return the possible parts of a pipeline; a transformer is called a UNet in these files."""
    return [UNET if part == TRANSFORMER else part for part in parts_of_pipeline(model, called)]


def split(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = PREFIX.fullmatch(_normal(name))
        assert match is not None  # checked by `matches`
        own = found.setdefault(PART_OF_PREFIX[match[1]], {})
        validation.require(match[2] not in own, f"it has '{name}' twice")
        own[match[2]] = tensor
    return found


def read(
    model: nn.Module, part: str, tensors: dict[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    known, there = names_of(model), layers(model)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.partition(".")
        found.setdefault(stem, {})[KINDS.get(kind, kind)] = tensor
    strange = [f"{stem}.{kind}" for stem, each in found.items() for kind in each if kind not in KINDS.values()]
    if strange:
        raise CheckpointError(
            f"{len(strange)} of its tensors are not LoRA, such as '{strange[0]}' (LoCon, LoHa, LoKr, ...). Only "
            f"{', '.join(KINDS)} can be read"
        )
    unknown = [stem for stem in found if stem not in known]
    if unknown:
        what = ", ".join(f"'{stem}'" for stem in unknown[:5])
        raise CheckpointError(f"{len(unknown)} of its names are not layers of {type(model).__name__}: {what}")
    changes: dict[str, Change] = {}
    for stem, each in found.items():
        alpha = number(f"{stem}.alpha", each["alpha"]) if "alpha" in each else None
        for path, change in _apart(
            stem, known[stem], complete(stem, each, alpha), each.get("dora_scale"), there
        ).items():
            validation.require(path not in changes, f"it has LoRA for '{path}' twice")
            changes[path] = change
    return to_peft(model, changes, {})


def _apart(
    stem: str, name: Name, change: Change, dora_scale: Tensor | None, there: Mapping[str, Any]
) -> dict[str, Change]:
    """Return LoRA of each layer that a name covers."""
    rows = [outputs(there[path]) for path in name.paths]
    if sum(rows) != change.b.shape[0]:
        raise CheckpointError(f"'{stem}' has B {list(change.b.shape)}, but the model has {sum(rows)} outputs there")
    if name.swapped:
        change.b = torch.cat(change.b.chunk(2)[::-1])
    if dora_scale is not None:
        validation.require(
            len(rows) == 1, f"'{stem}' has a dora_scale for {len(rows)} layers together, which cannot be read"
        )
        change.magnitude = _magnitude(stem, dora_scale, change)
    if len(rows) == 1:
        return {name.paths[0]: change}
    n, bs = len(rows), change.b.split(rows)
    if change.r % n == 0:
        blocks = [b.chunk(n, dim=1) for b in bs]
        if not any(block.any() for i, row in enumerate(blocks) for j, block in enumerate(row) if i != j):
            own = zip(name.paths, change.a.chunk(n), (row[i] for i, row in enumerate(blocks)), strict=True)
            return {
                path: Change(a.clone(), b.clone(), change.alpha / n)
                for path, a, b in own
                if bool(a.any()) or bool(b.any())  # all zeros: the layer had none
            }
    return {path: Change(change.a.clone(), b.clone(), change.alpha) for path, b in zip(name.paths, bs, strict=True)}


def _magnitude(stem: str, scale: Tensor, change: Change) -> Tensor:
    """Return DoRA's magnitude in PEFT's shape; LyCORIS' older ones scale inputs, and are refused."""
    out, kernel = change.b.shape[0], [1] * (change.a.dim() - 2)
    if list(scale.shape) != [out, 1, *kernel]:
        raise CheckpointError(
            f"'{stem}.dora_scale' has shape {list(scale.shape)}, and DoRA needs a number per output, "
            f"{[out, 1, *kernel]}. Numbers per input (LyCORIS without wd_on_output) cannot be read"
        )
    return scale.reshape(1, out, *kernel) if kernel else scale.reshape(out)


def write(
    contents: Mapping[str, tuple[nn.Module, dict[str, Tensor], dict[str, Any]]],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    found: dict[str, Tensor] = {}
    for part, (model, tensors, fields) in contents.items():
        changes = from_peft(model, tensors, fields)
        for path, change in changes.items():
            validation.require(
                change.bias is None and change.magnitude is None,
                f"'{path}' has {'lora_bias' if change.magnitude is None else 'DoRA'}, which diffusers does not read "
                "from a kohya file. Choose format='diffusers'",
            )
        projections = {path.rpartition(".")[2] for path in changes if ".self_attn." in path}
        validation.require(
            part == UNET or not projections or "out_proj" in projections,
            "diffusers cannot read a kohya file with a text encoder's attention but without out_proj. Add out_proj to "
            "target_modules, or choose format='diffusers'",
        )
        prefix, named = _prefix(part, contents), dict[str, Change]()
        for stem, paths in written_names(model).items():
            if any(path in changes for path in paths):
                named[stem] = _together(model, [changes.pop(path, None) for path in paths], paths)
        alphas = {stem: each.scale * each.r for stem, each in named.items()}
        if alphas and not is_flux(model):  # diffusers misreads alphas that differ
            alphas = dict.fromkeys(alphas, Counter(alphas.values()).most_common(1)[0][0])
        for stem, each in named.items():
            found[f"{prefix}_{stem}.lora_down.weight"] = each.a
            found[f"{prefix}_{stem}.lora_up.weight"] = _times(each.b, each.scale * each.r / alphas[stem])
            found[f"{prefix}_{stem}.alpha"] = torch.tensor(alphas[stem])
        if changes:
            raise PeftcoreError(
                f"diffusers knows no kohya name for {len(changes)} layers of {type(model).__name__}, such as "
                f"'{next(iter(changes))}'. Choose format='diffusers', or leave them out: exclude_modules=[...]"
            )
    return found, {}


def _prefix(part: str, contents: Mapping[str, Any]) -> str:
    if part == UNET:
        return "lora_unet"
    if part != TEXT_ENCODER:
        return "lora_te2"
    first = getattr(getattr(contents.get(UNET, (None,))[0], "config", None), "addition_embed_type", None)
    other = UNET in contents and (first is not None or not hasattr(contents[UNET][0], "up_blocks"))
    return "lora_te1" if other or f"{TEXT_ENCODER}_2" in contents else "lora_te"


def _together(model: nn.Module, changes: list[Change | None], paths: tuple[str, ...]) -> Change:
    """Return one LoRA for layers with concatenated outputs: B is block-diagonal, with blocks of one size."""
    first = next(change for change in changes if change is not None)
    if len(changes) == 1:
        return first
    r = max(change.r for change in changes if change is not None)
    there = layers(model)
    rows = [outputs(there[path]) for path in paths]
    bs = [None if change is None else _times(change.b, change.scale / first.scale) for change in changes]
    a = first.a.new_zeros(len(changes) * r, first.a.shape[1])
    widest = max((b.dtype for b in bs if b is not None), key=lambda dtype: dtype.itemsize)
    all_of_b = first.b.new_zeros(sum(rows), len(changes) * r, dtype=widest)
    for i, (change, b) in enumerate(zip(changes, bs, strict=True)):
        if change is not None and b is not None:
            a[i * r : i * r + change.r] = change.a
            all_of_b[sum(rows[:i]) : sum(rows[: i + 1]), i * r : i * r + change.r] = b
    return Change(a, all_of_b, first.scale * a.shape[0])


def _times(b: Tensor, ratio: float) -> Tensor:
    """Return b times ratio, in float32 if the product would be rounded in 16 bits."""
    exact = math.frexp(ratio)[0] == 0.5
    return b if ratio == 1 else b * ratio if exact else b.float() * ratio


FORMAT = FileFormat("kohya", FILE, matches, parts, split, read, write)
