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
from peftcore_lora.pipelines.layer_changes import Change, complete, from_peft, layers, number, ranks_and_alphas, to_peft
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
# Fields of the header that tensors determine, or that concern training and differ between releases of PEFT.
REPLACED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"} | {
    "layers_to_transform", "layers_pattern", "use_rslora", "use_dora", "lora_bias", "modules_to_save"
}  # fmt: skip


def matches(names: Collection[str]) -> bool:
    found = [PART.fullmatch(name) is not None for name in names if TENSOR.fullmatch(name)]
    others = any(name.startswith(("lora_", "diffusion_model.")) for name in names)  # of kohya, ComfyUI
    return bool(found) and all(found) == any(found) and not others


def split(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = PART.fullmatch(name)
        part, inside = (match[1], match[2]) if match else ("", name)
        found.setdefault(part, {})[inside] = tensor
    return found


def read(
    model: nn.Module, part: str, tensors: dict[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    there = layers(model)
    found: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    names: dict[str, str] = {}  # ours: in the file
    for name, tensor in tensors.items():
        match = TENSOR.fullmatch(name)
        path = match and _path(match["path"], there)
        if match is None or not path:
            unknown.append(name)
            continue
        kind = str(match.lastgroup)
        validation.require(kind not in found.setdefault(path, {}), f"it has {kind} for '{path}' twice")
        found[path][kind] = tensor
        names[path] = match["path"]
    if unknown or not found:
        what = ", ".join(f"'{name}'" for name in unknown[:5]) or "none"
        raise CheckpointError(
            f"{len(unknown)} of its tensors are not for a layer of {type(model).__name__}, or not LoRA: {what}"
        )
    fields = _header(metadata, part)
    changes = {path: _change(path, names[path], each, fields) for path, each in found.items()}
    for name, kind in (("use_dora", "magnitude"), ("lora_bias", "bias")):
        there_is = any(kind in each for each in found.values())
        validation.require(
            there_is or not (fields or {}).get(name), f"the header has {name}=true, but no tensor is a {kind}"
        )
    return to_peft(model, changes, {name: value for name, value in (fields or {}).items() if name not in REPLACED})


def _change(path: str, in_file: str, found: dict[str, Tensor], fields: dict[str, Any] | None) -> Change:
    alpha = number(f"{in_file}.alpha", found["alpha"]) if "alpha" in found else None
    if fields is None:
        return complete(path, found, alpha)
    validation.require(alpha is None, f"'{in_file}' has an alpha, and the header has another")
    values: dict[str, Any] = {}
    for name, pattern, usual in (("r", "rank_pattern", 8), ("lora_alpha", "alpha_pattern", 8)):
        values[name] = fields.get(name, usual)
        for each in (in_file, path):
            values[name] = targets.pattern_value(fields.get(pattern), each, values[name])
        is_number = isinstance(values[name], (int, float)) and not isinstance(values[name], bool)
        validation.require(is_number, f"the header has {name}={values[name]!r} for '{path}'")
    change = complete(path, found, float(values["lora_alpha"]), bool(fields.get("use_rslora")))
    validation.require(
        change.r == values["r"], f"'{path}' has A {list(change.a.shape)}, but the header has r={values['r']}"
    )
    return change


def _path(path: str, there: Collection[str]) -> str | None:
    """Return the layer for a path in a file."""
    path = path.replace(".processor.", ".")
    stem, _, last = path.rpartition(".")
    candidates = [path, f"{path}.0", f"{stem}.{OLD_NAMES.get(last, last)}"]
    candidates += [each.removeprefix("text_model.") for each in candidates]
    candidates += [f"text_model.{each}" for each in candidates]
    return next((each for each in candidates if each in there), None)


def _header(metadata: Mapping[str, str], part: str) -> dict[str, Any] | None:
    """Return the fields of a part's config, or None if the file has none."""
    if HEADER not in metadata:
        return None
    try:
        fields = json.loads(metadata[HEADER])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its {HEADER} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"its {HEADER} is not an object")
    prefix = f"{part}." if part else ""
    own = {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}
    return own or None


def write(
    contents: Mapping[str, tuple[nn.Module, dict[str, Tensor], dict[str, Any]]],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    found: dict[str, Tensor] = {}
    header: dict[str, Any] = {}
    for part, (model, tensors, fields) in contents.items():
        changes = from_peft(model, tensors, fields)
        of_text = part not in (UNET, TRANSFORMER)
        down, up = (".lora_linear_layer.down", ".lora_linear_layer.up") if of_text else (".lora_A", ".lora_B")
        magnitude = ".lora_magnitude_vector" + (".weight" if of_text else "")
        for path, change in changes.items():
            stem = f"{part}.{'text_model.' if has_flat_clip(model) else ''}{path}"
            found |= {f"{stem}{down}.weight": change.a, f"{stem}{up}.weight": change.b}
            found |= {} if change.bias is None else {f"{stem}{up}.bias": change.bias}
            found |= {} if change.magnitude is None else {f"{stem}{magnitude}": change.magnitude}
        first = next(iter(changes.values()))
        config = {
            **ranks_and_alphas(model, changes),
            "target_modules": targets.minimal_suffixes(model, changes),
            "lora_dropout": fields.get("lora_dropout", 0.0),
            **({"use_rslora": True} if first.rs else {}),
            **({"use_dora": True} if first.magnitude is not None else {}),
            **({"lora_bias": True} if first.bias is not None else {}),
        }
        header |= {f"{part}.{name}": value for name, value in config.items()}
    return found, {HEADER: json.dumps(header, indent=2, sort_keys=True)}


FORMAT = FileFormat("diffusers", FILE, matches, parts, split, read, write)
