"""diffusers' `pytorch_lora_weights.safetensors`, as written by `save_lora_weights` and read by `load_lora_weights`.

PART.PATH.lora_A.weight, .lora_B.weight, .lora_B.bias, .lora_magnitude_vector      unet, transformer
PART.PATH.lora_linear_layer.down.weight, .up.weight, ...                           text encoders
lora_adapter_metadata in the header: {"PART.r": 4, "PART.lora_alpha": 8, ...}      the config, since diffusers 0.34

Older names (`lora.down`, `processor.to_q_lora.down`), alphas as tensors, and files of one model without parts
(`save_lora_adapter`) are also read. Source: diffusers 0.42, loaders/lora_base.py, utils/state_dict_utils.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from peftcore.plugin import CheckpointError, FileFormat, targets, validation
from peftcore_lora.pipelines.layer_changes import (
    Change,
    adaptable_layers,
    build_change,
    from_peft,
    ranks_and_alphas,
    read_alpha,
    to_peft,
)
from peftcore_lora.pipelines.parts import TEXT_ENCODER, TRANSFORMER, UNET, has_flat_clip, parts

FILE = "pytorch_lora_weights.safetensors"
HEADER = "lora_adapter_metadata"
PART = re.compile(rf"({UNET}|{TRANSFORMER}|{TEXT_ENCODER}(?:_[23])?)\.(.+)")
TENSOR = re.compile(
    r"(?P<path>.+?)(?:"
    r"(?P<a>\.lora_A\.weight|[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight|\.lora_down\.weight)"
    r"|(?P<b>\.lora_B\.weight|[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight|\.lora_up\.weight)"
    r"|(?P<bias>\.lora_B\.bias|\.lora\.up\.bias|\.lora_linear_layer\.up\.bias)"
    r"|(?P<magnitude>\.lora_magnitude_vector(?:\.weight)?)"
    r"|(?P<alpha>\.alpha)"
    r")"
)
OLD_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # CLIP's projections
# Fields of the header that are not taken over: the tensors determine them, or they differ between releases of PEFT.
IGNORED_FIELDS = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"} | {
    "layers_to_transform", "layers_pattern", "use_rslora", "use_dora", "lora_bias", "modules_to_save"
}  # fmt: skip


def matches(names: Collection[str]) -> bool:
    have_part = [PART.fullmatch(name) is not None for name in names if TENSOR.fullmatch(name)]
    is_kohya = any(name.startswith(("lora_", "diffusion_model.")) for name in names)  # the latter is ComfyUI's prefix
    all_or_none = all(have_part) == any(have_part)
    return bool(have_part) and all_or_none and not is_kohya


def split(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts_tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = PART.fullmatch(name)
        part, name_in_part = (match[1], match[2]) if match else ("", name)
        parts_tensors.setdefault(part, {})[name_in_part] = tensor
    return parts_tensors


def read(
    model: nn.Module, part: str, tensors: dict[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    layers = adaptable_layers(model)
    layer_tensors: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    file_paths: dict[str, str] = {}  # {path in the model: path in the file}
    for name, tensor in tensors.items():
        match = TENSOR.fullmatch(name)
        path = match and _path(match["path"], layers)
        if match is None or not path:
            unknown.append(name)
            continue
        kind = str(match.lastgroup)
        validation.require(kind not in layer_tensors.setdefault(path, {}), f"the file has {kind} for '{path}' twice")
        layer_tensors[path][kind] = tensor
        file_paths[path] = match["path"]
    if unknown or not layer_tensors:
        examples = ", ".join(f"'{name}'" for name in unknown[:5]) or "none"
        raise CheckpointError(
            f"{len(unknown)} of the file's tensors are not for a layer of {type(model).__name__}, or not LoRA: "
            f"{examples}"
        )
    fields = _header_fields(metadata, part)
    changes = {path: _change(path, file_paths[path], ab, fields) for path, ab in layer_tensors.items()}
    for name, kind in (("use_dora", "magnitude"), ("lora_bias", "bias")):
        has_tensor = any(kind in ab for ab in layer_tensors.values())
        validation.require(
            has_tensor or not (fields or {}).get(name), f"the header has {name}=true, but no tensor is a {kind}"
        )
    other_fields = {name: value for name, value in (fields or {}).items() if name not in IGNORED_FIELDS}
    return to_peft(model, changes, other_fields)


def _change(path: str, file_path: str, layer_tensors: dict[str, Tensor], fields: dict[str, Any] | None) -> Change:
    alpha = read_alpha(f"{file_path}.alpha", layer_tensors["alpha"]) if "alpha" in layer_tensors else None
    if fields is None:
        return build_change(path, layer_tensors, alpha)
    validation.require(alpha is None, f"'{file_path}' has an alpha, and the header has another")
    values: dict[str, Any] = {}
    for name, pattern, default in (("r", "rank_pattern", 8), ("lora_alpha", "alpha_pattern", 8)):
        value = targets.pattern_value(fields.get(pattern), file_path, fields.get(name, default))
        value = targets.pattern_value(fields.get(pattern), path, value)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        validation.require(is_number, f"the header has {name}={value!r} for '{path}', which is not a number")
        values[name] = value
    change = build_change(path, layer_tensors, float(values["lora_alpha"]), bool(fields.get("use_rslora")))
    validation.require(
        change.r == values["r"], f"'{path}' has A {list(change.a.shape)}, but the header has r={values['r']}"
    )
    return change


def _path(path: str, layers: Collection[str]) -> str | None:
    """Return the model's layer for a path in a file, by current or older names; None if it has none."""
    path = path.replace(".processor.", ".")
    stem, _, leaf = path.rpartition(".")
    candidates = [path, f"{path}.0", f"{stem}.{OLD_NAMES.get(leaf, leaf)}"]
    # transformers 5 has no `text_model.` in CLIP, and releases before it do.
    candidates += [candidate.removeprefix("text_model.") for candidate in candidates]
    candidates += [f"text_model.{candidate}" for candidate in candidates]
    return next((candidate for candidate in candidates if candidate in layers), None)


def _header_fields(metadata: Mapping[str, str], part: str) -> dict[str, Any] | None:
    """Return the fields of a part's config, or None if the file has none."""
    if HEADER not in metadata:
        return None
    try:
        fields = json.loads(metadata[HEADER])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{HEADER} in the header is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{HEADER} in the header is not a JSON object")
    prefix = f"{part}." if part else ""
    part_fields = {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}
    return part_fields or None


def write(
    contents: Mapping[str, tuple[nn.Module, dict[str, Tensor], dict[str, Any]]],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors_on_disk: dict[str, Tensor] = {}
    header: dict[str, Any] = {}
    for part, (model, tensors, fields) in contents.items():
        changes = from_peft(model, tensors, fields)
        is_text_encoder = part not in (UNET, TRANSFORMER)
        down, up = (".lora_linear_layer.down", ".lora_linear_layer.up") if is_text_encoder else (".lora_A", ".lora_B")
        magnitude = ".lora_magnitude_vector" + (".weight" if is_text_encoder else "")
        for path, change in changes.items():
            stem = f"{part}.{'text_model.' if has_flat_clip(model) else ''}{path}"
            tensors_on_disk |= {f"{stem}{down}.weight": change.a, f"{stem}{up}.weight": change.b}
            if change.bias is not None:
                tensors_on_disk[f"{stem}{up}.bias"] = change.bias
            if change.magnitude is not None:
                tensors_on_disk[f"{stem}{magnitude}"] = change.magnitude
        config = {
            **ranks_and_alphas(model, changes),
            "target_modules": targets.minimal_suffixes(model, changes),
            "lora_dropout": fields.get("lora_dropout", 0.0),
        }
        any_change = next(iter(changes.values()))  # all layers agree on these flags
        flags = {
            "use_rslora": any_change.rs,
            "use_dora": any_change.magnitude is not None,
            "lora_bias": any_change.bias is not None,
        }
        config |= {name: True for name, value in flags.items() if value}
        header |= {f"{part}.{name}": value for name, value in config.items()}
    return tensors_on_disk, {HEADER: json.dumps(header, indent=2, sort_keys=True)}


FORMAT = FileFormat("diffusers", FILE, matches, parts, split, read, write)
