"""Files with one LoRA per expert and projection: vLLM and SGLang read them, PEFT wrote them for lists of experts.

P.experts.3.gate_proj.lora_A.weight [r, in], .lora_B.weight [out, r]     likewise up_proj, down_proj (w1, w3, w2)

save    gate and up both get A of the fused gate_up, and its B is split by rows
load    if gate and up have the same A, they become one fused pair again; otherwise the fused pair has the sum of their
        ranks, A = [A_gate; A_up] and B = diag(B_gate, B_up), which computes the same
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.plugin import CheckpointError, ExpertsLayout, experts_layout, targets, validation
from peftcore_lora.config import is_adaptable
from peftcore_lora.parameters import BY_EXPERT, read_experts, select_parameters, stem_on_disk

PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
NAME = re.compile(rf"base_model\.model\.(.+)\.(\d+)\.({'|'.join(PARTS)})\.lora_([AB])\.weight")
CURRENT_LAYOUT = {"peft_version": "0.19.0"}  # first release that does not exchange A and B of experts
Values = dict[tuple[str, str], Any]  # by the path of a module of experts in the file, and gate_proj, up_proj, ...


@dataclass
class ExpertsLora:
    """LoRA of gate, up or down of all experts: A `[experts, r, in]`, B `[experts, out, r]`, and its lora_alpha."""

    a: Tensor
    b: Tensor
    alpha: float
    rs: bool

    @property
    def r(self) -> int:
        return self.a.shape[1]

    @property
    def scale(self) -> float:
        return self.alpha / (self.r**0.5 if self.rs else self.r)


def read(
    model: nn.Module, tensors: dict[str, Tensor], fields: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Convert (tensors, fields) of a file with single experts to PEFT's layout for fused experts."""
    expert_tensors: dict[str, dict[tuple[str, int, str], Tensor]] = {}
    disk_tensors: dict[str, Tensor] = {}
    paths: dict[str, str | None] = {}
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if match and match[1] not in paths:
            paths[match[1]] = _fused_experts_path(model, match[1])
        path = paths[match[1]] if match else None
        if match is None or path is None:
            disk_tensors[name] = tensor
            continue
        expert_tensors.setdefault(path, {})[PARTS[match[3]], int(match[2]), match[4]] = tensor
        # `_part` needs the name that the file uses (gate_proj or w1) to find it in alpha_pattern.
        expert_tensors[path].setdefault(("names", 0, match[3]), tensor)
    if not expert_tensors:
        return tensors, dict(fields)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, module_tensors in expert_tensors.items():
        module = model.get_submodule(path)
        layout: Any = experts_layout(module)
        loras = {name: _fuse(fields, path, layout, name, module_tensors) for name in module._parameters}
        present = {name: lora for name, lora in loras.items() if lora is not None}
        for depth, (name, lora) in enumerate(reversed(present.items())):
            stem = stem_on_disk(path, depth)
            disk_tensors[f"{stem}.lora_A.weight"] = lora.a.flatten(0, 1)
            disk_tensors[f"{stem}.lora_B.weight"] = lora.b.permute(1, 2, 0).flatten(1)
            ranks[f"{path}.{name}"], alphas[f"{path}.{name}"] = lora.r, lora.alpha
    target_modules = fields.get("target_modules") or []
    if isinstance(target_modules, str) and not any(targets.match_counts(model, target_modules).values()):
        target_modules = []
    return disk_tensors, {
        **fields,
        "target_modules": target_modules,
        "target_parameters": [*(fields.get("target_parameters") or ()), *targets.parameter_suffixes(model, ranks)],
        "rank_pattern": {
            **_patterns(model, ranks, fields.get("r", 8)),
            **_matching_patterns(model, fields.get("rank_pattern")),
        },
        "alpha_pattern": {
            **_patterns(model, alphas, fields.get("lora_alpha", 8)),
            **_matching_patterns(model, fields.get("alpha_pattern")),
        },
        **CURRENT_LAYOUT,
    }


def write(
    model: nn.Module, tensors: dict[str, Tensor], fields: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Convert (tensors, fields) from PEFT's layout for fused experts to single experts.

    Raises:
        PeftcoreError: an adapted parameter is not a weight of experts.
    """
    disk_tensors, ranks, alphas = read_experts(model, tensors, {**fields, **CURRENT_LAYOUT}), Values(), Values()
    gate, up, down, block = names_in_checkpoints(model)
    leaves = {"gate": gate, "up": up, "down": down}
    parameters_by_path = select_parameters(model, fields.get("target_parameters") or ())
    for path, parameters in parameters_by_path.items():
        module = model.get_submodule(path)
        layout = experts_layout(module)
        for depth, name in enumerate(reversed(parameters)):
            validation.require(
                layout is not None and name in layout.names,
                f"'{path}.{name}' is not a weight of experts run by transformers' interface, so it cannot be saved per "
                "expert. Save it in PEFT's layout: format='peft'",
            )
            assert layout is not None
            stem = stem_on_disk(path, depth)
            a, b = (disk_tensors.pop(f"{stem}.lora_{letter}.{BY_EXPERT}") for letter in "AB")
            file_path = path if block is None else re.sub(rf"\.{block[1]}\.(\w+)$", rf".{block[0]}.\1", path)
            for part, rows in _rows(layout, name, b.shape[1]).items():
                for expert in range(layout.count):
                    expert_stem = f"base_model.model.{file_path}.{expert}.{leaves[part]}"
                    disk_tensors[f"{expert_stem}.lora_A.weight"] = a[expert].clone()
                    disk_tensors[f"{expert_stem}.lora_B.weight"] = b[expert][rows].contiguous()
                key, parameter = (file_path, leaves[part]), f"{path}.{name}"
                ranks[key] = targets.pattern_value(fields.get("rank_pattern"), parameter, fields["r"])
                alphas[key] = targets.pattern_value(fields.get("alpha_pattern"), parameter, fields["lora_alpha"])
    names, paths = list(fields["target_modules"]), [path for path, _ in targets.base_modules(model)]
    for file_path, leaf in ranks:
        same_name = [p for p in paths if p.endswith(f".{leaf}")]
        if all(f"base_model.model.{p}.lora_A.weight" in disk_tensors for p in same_name):
            names.append(leaf)
        else:  # the name alone would also select layers that have no LoRA, such as those of dense blocks
            a_names = (f"base_model.model.{file_path}.{i}.{leaf}.lora_A.weight" for i in range(len(disk_tensors)))
            count = sum(name in disk_tensors for name in a_names)
            names += [f"experts.{i}.{leaf}" for i in range(count)]
    return disk_tensors, {
        **fields,
        "rank_pattern": {
            **_matching_patterns(model, fields.get("rank_pattern"), layers=True),
            **_expert_patterns(ranks, fields["r"]),
        },
        "alpha_pattern": {
            **_matching_patterns(model, fields.get("alpha_pattern"), layers=True),
            **_expert_patterns(alphas, fields["lora_alpha"]),
        },
        "target_modules": list(dict.fromkeys(names)),
        "target_parameters": None,
    }


def names_in_checkpoints(model: nn.Module) -> tuple[str, str, str, tuple[str, str] | None]:
    """Return (gate, up, down, block) with the names in checkpoints, from transformers' conversion of lists of experts.

    `block` is (its name in checkpoints, its name in the model), or None if they are the same.
    """
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    block = None
    conversions = sys.modules.get("transformers.conversion_mapping")
    for conversion in conversions.get_model_conversion_mapping(model) if conversions is not None else ():
        sources, target = _as_list(conversion.source_patterns), str(_as_list(conversion.target_patterns)[0])
        matches = [re.search(r"experts\\?\.\*\\?\.(\w+)\\?\.weight", source) for source in sources]
        leaves = [match[1] for match in matches if match]
        if len(leaves) == 2 and "gate_up_proj" in target:
            names["gate"], names["up"] = leaves
        elif len(leaves) == 1 and "down_proj" in target:
            names["down"] = leaves[0]
        elif "block_sparse_moe" in sources[0] and re.search(r"\bmlp\b", target):
            block = "block_sparse_moe", "mlp"
    return names["gate"], names["up"], names["down"], block


def _as_list(patterns: Any) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _fused_experts_path(model: nn.Module, path: str) -> str | None:
    """Return the path in the model of the fused experts at `path` in a file, where the block may have another name."""
    expert_paths = [p for p, module in targets.base_modules(model) if experts_layout(module) is not None]
    if path in expert_paths:
        return path
    names = path.split(".")
    candidates = [p for p in expert_paths if p.split(".")[:-2] == names[:-2] and p.split(".")[-1] == names[-1]]
    return candidates[0] if len(candidates) == 1 else None


def _rows(layout: ExpertsLayout, name: str, out: int) -> dict[str, slice]:
    """Return which rows of the parameter `name`, with `out` outputs, belong to gate, up or down."""
    if name == layout.down:
        return {"down": slice(None)}
    if name == "up_proj":
        return {"up": slice(None)}
    if layout.interleaved:
        return {"gate": slice(0, None, 2), "up": slice(1, None, 2)}
    return {"gate": slice(0, out // 2), "up": slice(out // 2, None)}


def _fuse(
    fields: Mapping[str, Any],
    path: str,
    layout: ExpertsLayout,
    name: str,
    module_tensors: Mapping[tuple[str, int, str], Tensor],
) -> ExpertsLora | None:
    """Return the LoRA of the parameter `name` from those of its parts, or None if the file has none."""
    if name not in layout.names:
        return None
    rows = _rows(layout, name, 0)
    parts = {part: _part(fields, path, layout, part, module_tensors) for part in rows}
    loras = {part: lora for part, lora in parts.items() if lora is not None}
    if not loras:
        return None
    first = next(iter(loras.values()))
    # A part without a LoRA has as many outputs as the other one, and zeros in B.
    out = sum(lora.b.shape[1] for lora in loras.values()) * len(rows) // len(loras)
    rows = _rows(layout, name, out)
    share_a = all(torch.equal(lora.a, first.a) and lora.scale == first.scale for lora in loras.values())
    r = first.r if share_a else sum(lora.r for lora in loras.values())
    b, begin = first.b.new_zeros(layout.count, out, r), 0
    for part, lora in loras.items():
        end = r if share_a else begin + lora.r
        b[:, rows[part], begin:end] = lora.b if lora.scale == first.scale else lora.b * (lora.scale / first.scale)
        begin = begin if share_a else end
    # The fused LoRA keeps the scale of its first part, at another rank.
    ratio = r / first.r
    alpha = first.alpha * (ratio**0.5 if first.rs else ratio)
    a = first.a if share_a else torch.cat([lora.a for lora in loras.values()], 1)
    return ExpertsLora(a, b, alpha, first.rs)


def _part(
    fields: Mapping[str, Any],
    path: str,
    layout: ExpertsLayout,
    part: str,
    module_tensors: Mapping[tuple[str, int, str], Tensor],
) -> ExpertsLora | None:
    keys = [key for key in module_tensors if key[0] == part]
    if not keys:
        return None
    missing = [(e, letter) for e in range(layout.count) for letter in "AB" if (part, e, letter) not in module_tensors]
    extra = [key for key in keys if key[1] >= layout.count]
    if missing or extra:
        problem = f"has expert {extra[0][1]}" if extra else f"lacks lora_{missing[0][1]} of expert {missing[0][0]}"
        raise CheckpointError(
            f"the file {problem} for {part} of '{path}', which has {layout.count} experts. The file is incomplete, or "
            "for another model"
        )
    a, b = (torch.stack([module_tensors[part, e, letter] for e in range(layout.count)]) for letter in "AB")
    leaf = next(key[2] for key in module_tensors if key[0] == "names" and PARTS[key[2]] == part)
    alpha = targets.pattern_value(fields.get("alpha_pattern"), f"{path}.0.{leaf}", fields.get("lora_alpha", 8))
    return ExpertsLora(a, b, alpha, bool(fields.get("use_rslora")))


def _patterns(model: nn.Module, values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return {suffix of parameters: their common value} for all values but the default."""
    groups: dict[Any, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    groups.pop(default, None)
    return {key: value for value, names in groups.items() for key in targets.parameter_suffixes(model, names)}


def _expert_patterns(values: Values, default: Any) -> dict[str, Any]:
    """Return {regex for paths of single experts: their value} for all values but the default."""
    patterns: dict[str, Any] = {}
    for (path, leaf), value in values.items():
        if value == default:
            continue
        values_of_leaf = {other for (_, other_leaf), other in values.items() if other_leaf == leaf}
        stem = path.rpartition(".")[2] if len(values_of_leaf) == 1 else re.escape(path)
        patterns[rf"{stem}\.\d+\.{leaf}"] = value
    return patterns


def _matching_patterns(model: nn.Module, patterns: Mapping[str, Any] | None, layers: bool = False) -> dict[str, Any]:
    """Return the entries of `patterns` that match a module or parameter of the model; with `layers`, a layer."""
    names = [path for path, module in targets.base_modules(model) if is_adaptable(module) or not layers]
    names += [] if layers else [name for name, _ in targets.base_parameters(model)]
    matched = targets.matched_keys(patterns or {}, names)
    return {key: value for key, value in (patterns or {}).items() if key in matched and value is not None}
