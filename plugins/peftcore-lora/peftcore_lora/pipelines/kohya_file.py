"""Files of kohya-ss/sd-scripts, which ComfyUI, A1111 and diffusers also read.

PREFIX_NAME.lora_down.weight [r, in, ...], .lora_up.weight [out, r, ...], .alpha []       scale = alpha / r
PREFIX: lora_unet (also for a transformer); lora_te, or lora_te1 if there may be a second; lora_te2

A name may cover several layers with concatenated outputs (qkv in Flux). Loading splits it into a LoRA of each layer:
all get the same A, or each gets its own rows of A if B is block-diagonal, which is how peftcore saves them. Source:
sd-scripts, networks/lora.py and networks/convert_flux_lora.py; diffusers 0.42, loaders/lora_conversion_utils.py.
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
from peftcore_lora.pipelines.kohya_names import Name, is_flux, names_to_write, readable_names
from peftcore_lora.pipelines.layer_changes import (
    Change,
    adaptable_layers,
    build_change,
    from_peft,
    output_width,
    read_alpha,
    to_peft,
)
from peftcore_lora.pipelines.parts import TEXT_ENCODER, TRANSFORMER, UNET, parts as parts_of_pipeline

PREFIX = re.compile(r"(lora_unet|lora_te[123]?)_(.+)")
COMFY = re.compile(r"diffusion_model\.(.+?)(\.(?:lora_down\.weight|lora_up\.weight|alpha|dora_scale))")
PART_OF_PREFIX = {"lora_unet": UNET, "lora_te": TEXT_ENCODER, "lora_te1": TEXT_ENCODER, "lora_te2": f"{TEXT_ENCODER}_2",
                  "lora_te3": f"{TEXT_ENCODER}_3"}  # fmt: skip
KINDS = {"lora_down.weight": "a", "lora_up.weight": "b", "alpha": "alpha", "dora_scale": "dora_scale"}


def _without_comfy_prefix(name: str) -> str:
    match = COMFY.fullmatch(name)
    return f"lora_unet_{match[1].replace('.', '_')}{match[2]}" if match else name


def matches(names: Collection[str]) -> bool:
    return bool(names) and all(PREFIX.fullmatch(_without_comfy_prefix(name)) for name in names)


def parts(model: nn.Module, part_name: str | None) -> list[str]:
    """Return the parts of a pipeline that a model may be. These files call a transformer a UNet."""
    return [UNET if part == TRANSFORMER else part for part in parts_of_pipeline(model, part_name)]


def split(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    tensors_by_part: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = PREFIX.fullmatch(_without_comfy_prefix(name))
        assert match is not None  # checked by `matches`
        part_tensors = tensors_by_part.setdefault(PART_OF_PREFIX[match[1]], {})
        validation.require(match[2] not in part_tensors, f"the file has '{name}' twice")
        part_tensors[match[2]] = tensor
    return tensors_by_part


def read(
    model: nn.Module, part: str, tensors: dict[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    names, layers = readable_names(model), adaptable_layers(model)
    name_tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.partition(".")
        name_tensors.setdefault(stem, {})[KINDS.get(kind, kind)] = tensor
    other_tensors: list[str] = []
    for stem, stem_tensors in name_tensors.items():
        other_tensors += [f"{stem}.{kind}" for kind in stem_tensors if kind not in KINDS.values()]
    if other_tensors:
        raise CheckpointError(
            f"{len(other_tensors)} of the file's tensors are not LoRA, such as '{other_tensors[0]}' (LoCon, LoHa, "
            f"LoKr, ...). Only {', '.join(KINDS)} can be read"
        )
    unknown = [stem for stem in name_tensors if stem not in names]
    if unknown:
        examples = ", ".join(f"'{stem}'" for stem in unknown[:5])
        raise CheckpointError(
            f"{len(unknown)} of the file's names are not layers of {type(model).__name__}: {examples}"
        )
    changes: dict[str, Change] = {}
    for stem, stem_tensors in name_tensors.items():
        alpha = read_alpha(f"{stem}.alpha", stem_tensors["alpha"]) if "alpha" in stem_tensors else None
        fused = build_change(stem, stem_tensors, alpha)
        for path, change in _split_change(stem, names[stem], fused, stem_tensors.get("dora_scale"), layers).items():
            validation.require(path not in changes, f"the file has LoRA for '{path}' twice")
            changes[path] = change
    return to_peft(model, changes, {})


def _split_change(
    stem: str, name: Name, change: Change, dora_scale: Tensor | None, layers: Mapping[str, Any]
) -> dict[str, Change]:
    """Split the LoRA of a name into those of the layers that it covers."""
    widths = [output_width(layers[path]) for path in name.paths]
    if sum(widths) != change.b.shape[0]:
        raise CheckpointError(
            f"'{stem}' has B {list(change.b.shape)}, but in this model it has {sum(widths)} outputs. The file is for "
            "another model"
        )
    if name.swaps_halves:
        change.b = torch.cat(change.b.chunk(2)[::-1])
    if dora_scale is not None:
        validation.require(
            len(widths) == 1,
            f"'{stem}' has one dora_scale for {len(widths)} layers, which cannot be read. Merge it with the program "
            "that trained it",
        )
        change.magnitude = _magnitude(stem, dora_scale, change)
    if len(widths) == 1:
        return {name.paths[0]: change}
    n, layer_bs = len(widths), change.b.split(widths)
    if change.r % n == 0:
        blocks = [b.chunk(n, dim=1) for b in layer_bs]
        if _is_block_diagonal(blocks):
            changes: dict[str, Change] = {}
            for i, (path, a) in enumerate(zip(name.paths, change.a.chunk(n), strict=True)):
                b = blocks[i][i]
                if bool(a.any()) or bool(b.any()):  # `_concatenate` writes zeros for a layer without a LoRA
                    changes[path] = Change(a.clone(), b.clone(), change.alpha / n)
            return changes
    return {
        path: Change(change.a.clone(), b.clone(), change.alpha) for path, b in zip(name.paths, layer_bs, strict=True)
    }


def _is_block_diagonal(blocks: list[tuple[Tensor, ...]]) -> bool:
    off_diagonal: list[Tensor] = []
    for i, row in enumerate(blocks):
        off_diagonal += [*row[:i], *row[i + 1 :]]
    return not any(block.any() for block in off_diagonal)


def _magnitude(stem: str, scale: Tensor, change: Change) -> Tensor:
    """Return DoRA's magnitude in PEFT's shape.

    Raises:
        CheckpointError: the scale has a number per input, as LyCORIS files without `wd_on_output` do.
    """
    out, kernel = change.b.shape[0], [1] * (change.a.dim() - 2)
    if list(scale.shape) != [out, 1, *kernel]:
        raise CheckpointError(
            f"'{stem}.dora_scale' has shape {list(scale.shape)}, and DoRA needs one number per output, "
            f"{[out, 1, *kernel]}. Numbers per input (LyCORIS without wd_on_output) cannot be read"
        )
    return scale.reshape(1, out, *kernel) if kernel else scale.reshape(out)


def write(
    contents: Mapping[str, tuple[nn.Module, dict[str, Tensor], dict[str, Any]]],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    disk_tensors: dict[str, Tensor] = {}
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
        fused: dict[str, Change] = {}
        for stem, paths in names_to_write(model).items():
            if any(path in changes for path in paths):
                fused[stem] = _concatenate(model, [changes.pop(path, None) for path in paths], paths)
        alphas = {stem: change.scale * change.r for stem, change in fused.items()}
        if alphas and not is_flux(model):
            # diffusers misreads files whose layers have different alphas, so the difference goes into B.
            alphas = dict.fromkeys(alphas, Counter(alphas.values()).most_common(1)[0][0])
        prefix = _prefix(part, contents)
        for stem, change in fused.items():
            ratio = change.scale * change.r / alphas[stem]
            disk_tensors[f"{prefix}_{stem}.lora_down.weight"] = change.a
            disk_tensors[f"{prefix}_{stem}.lora_up.weight"] = _multiply(change.b, ratio)
            disk_tensors[f"{prefix}_{stem}.alpha"] = torch.tensor(alphas[stem])
        if changes:
            raise PeftcoreError(
                f"diffusers knows no kohya name for {len(changes)} layers of {type(model).__name__}, such as "
                f"'{next(iter(changes))}'. Choose format='diffusers', or leave them out: exclude_modules=[...]"
            )
    return disk_tensors, {}


def _prefix(part: str, contents: Mapping[str, Any]) -> str:
    if part == UNET:
        return "lora_unet"
    if part != TEXT_ENCODER:
        return "lora_te2"
    unet = contents.get(UNET, (None,))[0]
    embedding_type = getattr(getattr(unet, "config", None), "addition_embed_type", None)
    # SDXL's UNet has additional embeddings; a transformer (SD 3, Flux) has no up_blocks. Both have a second encoder.
    has_second_encoder = UNET in contents and (embedding_type is not None or not hasattr(unet, "up_blocks"))
    return "lora_te1" if has_second_encoder or f"{TEXT_ENCODER}_2" in contents else "lora_te"


def _concatenate(model: nn.Module, changes: list[Change | None], paths: tuple[str, ...]) -> Change:
    """Return one LoRA for layers with concatenated outputs. B is block-diagonal, with one block per layer.

    A layer without a LoRA has zeros. All blocks have the largest rank, since loading divides A and B evenly.
    """
    reference = next(change for change in changes if change is not None)
    if len(changes) == 1:
        return reference
    r = max(change.r for change in changes if change is not None)
    layers = adaptable_layers(model)
    widths = [output_width(layers[path]) for path in paths]
    layer_bs = [None if change is None else _multiply(change.b, change.scale / reference.scale) for change in changes]
    a = reference.a.new_zeros(len(changes) * r, reference.a.shape[1])
    dtype = max((b.dtype for b in layer_bs if b is not None), key=lambda dtype: dtype.itemsize)
    b = reference.b.new_zeros(sum(widths), len(changes) * r, dtype=dtype)
    for i, (change, layer_b) in enumerate(zip(changes, layer_bs, strict=True)):
        if change is not None and layer_b is not None:
            a[i * r : i * r + change.r] = change.a
            b[sum(widths[:i]) : sum(widths[: i + 1]), i * r : i * r + change.r] = layer_b
    return Change(a, b, reference.scale * a.shape[0])


def _multiply(b: Tensor, ratio: float) -> Tensor:
    """Return b · ratio, in float32 unless the ratio is a power of 2, which is exact in 16 bits."""
    if ratio == 1:
        return b
    is_power_of_two = math.frexp(ratio)[0] == 0.5
    return b * ratio if is_power_of_two else b.float() * ratio


FORMAT = FileFormat("kohya", FILE, matches, parts, split, read, write)
