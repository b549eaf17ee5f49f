"""Files with single experts, as vLLM and SGLang read them, and as PEFT wrote them for models with lists of experts.

P.experts.3.gate_proj.lora_A.weight [r, in], .lora_B.weight [out, r]     likewise up_proj, down_proj (w1, w3, w2)

written    gate and up both have A of gate_up, and its B is split by rows
read       if gate and up have equal A, they become that pair again; otherwise a pair of the sum of their ranks,
           A [A_gate; A_up] and B = diag(B_gate, B_up), which computes the same
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
from peftcore_lora.parameters import BY_EXPERT, named, read_experts, stem_on_disk

PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
NAME = re.compile(rf"base_model\.model\.(.+)\.(\d+)\.({'|'.join(PARTS)})\.lora_([AB])\.weight")


TODAY = {"peft_version": "0.19.0"}  # release that does not swap A and B of experts
Values = dict[tuple[str, str], Any]  # by the path of a module of experts in the file, and gate_proj, up_proj, ...


@dataclass
class Part:
    """LoRA of one of gate, up and down: A `[experts, r, in]`, B `[experts, out, r]`, and its lora_alpha."""

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
    """Return (tensors, fields) in PEFT's layout for fused experts, from a file with single experts."""
    found: dict[str, dict[tuple[str, int, str], Tensor]] = {}
    others: dict[str, Tensor] = {}
    paths: dict[str, str | None] = {}
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if match and match[1] not in paths:
            paths[match[1]] = _fused(model, match[1])
        path = paths[match[1]] if match else None
        if match is None or path is None:
            others[name] = tensor
            continue
        found.setdefault(path, {})[PARTS[match[3]], int(match[2]), match[4]] = tensor
        found[path].setdefault(("names", 0, match[3]), tensor)
    if not found:
        return tensors, dict(fields)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, given in found.items():
        layout: Any = experts_layout(model.get_submodule(path))
        pairs = {name: _pair(fields, path, layout, name, given) for name in model.get_submodule(path)._parameters}
        own = {name: pair for name, pair in pairs.items() if pair is not None}
        for inside, (name, pair) in enumerate(reversed(own.items())):
            stem = stem_on_disk(path, inside)
            others[f"{stem}.lora_A.weight"] = pair.a.flatten(0, 1)
            others[f"{stem}.lora_B.weight"] = pair.b.permute(1, 2, 0).flatten(1)
            ranks[f"{path}.{name}"], alphas[f"{path}.{name}"] = pair.r, pair.alpha
    chosen = fields.get("target_modules") or []
    if isinstance(chosen, str) and not any(targets.match_counts(model, chosen).values()):
        chosen = []
    return others, {
        **fields,
        "target_modules": chosen,
        "target_parameters": [*(fields.get("target_parameters") or ()), *targets.parameter_suffixes(model, ranks)],
        "rank_pattern": {**_patterns(model, ranks, fields.get("r", 8)), **_known(model, fields.get("rank_pattern"))},
        "alpha_pattern": {
            **_patterns(model, alphas, fields.get("lora_alpha", 8)),
            **_known(model, fields.get("alpha_pattern")),
        },
        **TODAY,
    }


def write(
    model: nn.Module, tensors: dict[str, Tensor], fields: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, fields) with single experts, from PEFT's layout."""
    found, ranks, alphas = read_experts(model, tensors, {**fields, **TODAY}), Values(), Values()
    gate, up, down, block = names_in_checkpoints(model)
    targeted = named(model, fields.get("target_parameters") or ())
    for path, parameters in targeted.items():
        module = model.get_submodule(path)
        layout = experts_layout(module)
        for inside, name in enumerate(reversed(parameters)):
            validation.require(
                layout is not None and name in layout.names,
                f"'{path}.{name}' is not a weight of experts run by transformers' interface, so it cannot be saved per "
                "expert. Save it in PEFT's layout: format='peft'",
            )
            assert layout is not None
            stem = stem_on_disk(path, inside)
            a, b = (found.pop(f"{stem}.lora_{which}.{BY_EXPERT}") for which in "AB")
            leaves = {"gate": gate, "up": up, "down": down}
            old = path if block is None else re.sub(rf"\.{block[1]}\.(\w+)$", rf".{block[0]}.\1", path)
            for part, rows in _rows(layout, name, b.shape[1]).items():
                for expert in range(layout.count):
                    to = f"base_model.model.{old}.{expert}.{leaves[part]}"
                    found[f"{to}.lora_A.weight"] = a[expert].clone()
                    found[f"{to}.lora_B.weight"] = b[expert][rows].contiguous()
                for values, kind, usual in ((ranks, "rank_pattern", "r"), (alphas, "alpha_pattern", "lora_alpha")):
                    value = targets.pattern_value(fields.get(kind), f"{path}.{name}", fields[usual])
                    values[old, leaves[part]] = value
    names, paths = list(fields["target_modules"]), [path for path, _ in targets.base_modules(model)]
    for old, leaf in ranks:
        alone = all(f"base_model.model.{p}.lora_A.weight" in found for p in paths if p.endswith(f".{leaf}"))
        count = sum(f"base_model.model.{old}.{i}.{leaf}.lora_A.weight" in found for i in range(len(found)))
        # layers with this name have no LoRA
        names += [leaf] if alone else [f"experts.{i}.{leaf}" for i in range(count)]
    patterns = {"rank_pattern": _expert_patterns(ranks, fields["r"])}
    patterns["alpha_pattern"] = _expert_patterns(alphas, fields["lora_alpha"])
    return found, {
        **fields,
        **{kind: {**_known(model, fields.get(kind), layers=True), **own} for kind, own in patterns.items()},
        "target_modules": list(dict.fromkeys(names)),
        "target_parameters": None,
    }


def names_in_checkpoints(model: nn.Module) -> tuple[str, str, str, tuple[str, str] | None]:
    """Return (gate, up, down, block's names in checkpoints and here), as transformers converts lists of experts."""
    found = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    block = None
    conversions = sys.modules.get("transformers.conversion_mapping")
    for each in conversions.get_model_conversion_mapping(model) if conversions is not None else ():
        sources, into = _listed(each.source_patterns), str(_listed(each.target_patterns)[0])
        leaves = [
            match[1] for source in sources if (match := re.search(r"experts\\?\.\*\\?\.(\w+)\\?\.weight", source))
        ]
        if len(leaves) == 2 and "gate_up_proj" in into:
            found["gate"], found["up"] = leaves
        elif len(leaves) == 1 and "down_proj" in into:
            found["down"] = leaves[0]
        elif "block_sparse_moe" in sources[0] and re.search(r"\bmlp\b", into):
            block = "block_sparse_moe", "mlp"
    return found["gate"], found["up"], found["down"], block


def _listed(patterns: Any) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _fused(model: nn.Module, path: str) -> str | None:
    """Return the module of fused experts for a path in a file, whose block may have another name there."""
    there = [p for p, module in targets.base_modules(model) if experts_layout(module) is not None]
    if path in there:
        return path
    ends = [p for p in there if p.split(".")[:-2] == path.split(".")[:-2] and p.split(".")[-1] == path.split(".")[-1]]
    return ends[0] if len(ends) == 1 else None


def _rows(layout: ExpertsLayout, name: str, out: int) -> dict[str, slice]:
    """Return the rows of a weight's outputs for each of gate, up and down."""
    if name == layout.down:
        return {"down": slice(None)}
    if name == "up_proj":
        return {"up": slice(None)}
    if layout.interleaved:
        return {"gate": slice(0, None, 2), "up": slice(1, None, 2)}
    return {"gate": slice(0, out // 2), "up": slice(out // 2, None)}


def _pair(
    fields: Mapping[str, Any],
    path: str,
    layout: ExpertsLayout,
    name: str,
    given: Mapping[tuple[str, int, str], Tensor],
) -> Part | None:
    """Return LoRA of the parameter `name` from the file's parts, or None if there are none."""
    if name not in layout.names:
        return None
    rows = _rows(layout, name, 0)
    parts = {part: _part(fields, path, layout, part, given) for part in rows}
    there = {part: each for part, each in parts.items() if each is not None}
    if not there:
        return None
    first, *others = there.values()
    out = sum(each.b.shape[1] for each in there.values()) * len(rows) // len(there)
    rows = _rows(layout, name, out)
    alike = all(torch.equal(each.a, first.a) and each.scale == first.scale for each in others)
    r = first.r if alike else sum(each.r for each in there.values())
    b, begin = first.b.new_zeros(layout.count, out, r), 0
    for part, each in there.items():
        end = r if alike else begin + each.r
        b[:, rows[part], begin:end] = each.b if each.scale == first.scale else each.b * (each.scale / first.scale)
        begin = begin if alike else end
    ratio = r / first.r
    alpha = first.alpha * (ratio**0.5 if first.rs else ratio)
    return Part(first.a if alike else torch.cat([each.a for each in there.values()], 1), b, alpha, first.rs)


def _part(
    fields: Mapping[str, Any],
    path: str,
    layout: ExpertsLayout,
    part: str,
    given: Mapping[tuple[str, int, str], Tensor],
) -> Part | None:
    has = [key for key in given if key[0] == part]
    if not has:
        return None
    lacking = [(e, which) for e in range(layout.count) for which in "AB" if (part, e, which) not in given]
    beyond = [key for key in has if key[1] >= layout.count]
    if lacking or beyond:
        what = f"has expert {beyond[0][1]}" if beyond else f"lacks lora_{lacking[0][1]} of expert {lacking[0][0]}"
        raise CheckpointError(
            f"the file {what} for {part} of '{path}', which has {layout.count} experts. It is incomplete, or for "
            "another model"
        )
    a, b = (torch.stack([given[part, e, which] for e in range(layout.count)]) for which in "AB")
    leaf = next(key[2] for key in given if key[0] == "names" and PARTS[key[2]] == part)
    alpha = targets.pattern_value(fields.get("alpha_pattern"), f"{path}.0.{leaf}", fields.get("lora_alpha", 8))
    return Part(a, b, alpha, bool(fields.get("use_rslora")))


def _patterns(model: nn.Module, values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """Return {suffix of parameters: their common value}, except for the usual value."""
    groups: dict[Any, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    groups.pop(usual, None)
    return {key: value for value, names in groups.items() for key in targets.parameter_suffixes(model, names)}


def _expert_patterns(values: Values, usual: Any) -> dict[str, Any]:
    """Return {regex of single experts: their value}, except for the usual value."""
    found: dict[str, Any] = {}
    for (path, leaf), value in values.items():
        same = len({each for (_, other), each in values.items() if other == leaf}) == 1
        if value != usual:
            found[rf"{path.rpartition('.')[2] if same else re.escape(path)}\.\d+\.{leaf}"] = value
    return found


def _known(model: nn.Module, patterns: Mapping[str, Any] | None, layers: bool = False) -> dict[str, Any]:
    """Return the entries of a pattern that match something in the model, or only layers."""
    names = [path for path, module in targets.base_modules(model) if is_adaptable(module) or not layers]
    names += [] if layers else [name for name, _ in targets.base_parameters(model)]
    known = targets.matched_keys(patterns or {}, names)
    return {key: value for key, value in (patterns or {}).items() if key in known and value is not None}
