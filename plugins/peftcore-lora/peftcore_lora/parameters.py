"""`target_parameters`: LoRA of parameters by name, in any module, in PEFT's format.

    W [out, in]                A [r, in], B [out, r]
    W [experts, out, in]       W_e + scale · B_e A_e, A [experts, r, in], B [experts, out, r]
    W [experts, in, out]       in a module with `is_transposed`: the transposed product

Where transformers' experts interface runs the module, no copy of W is built: the products of A_e and B_e are added to
those of W_e (`expert_low_rank`), for experts that have tokens. Otherwise the module's forward reads W + scale · B A.

In the file A is [experts · r, in], read as (experts, r, in), and B [out, r · experts], read as (out, r, experts).

PEFT's file nests several parameters of one module, the module's first innermost, without their names:
`experts.base_layer.lora_A.weight`, `experts.lora_A.weight`. PEFT up to 0.18 read every W as [experts, in, out], so A
and B are exchanged in its files.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.plugin import (
    LowRank,
    OnWeight,
    PeftcoreError,
    base_modules,
    experts_layout,
    has_forward_of_instance,
    nearest,
    override,
    quantized_format,
    shape_of,
    targets,
    validation,
)
from peftcore_lora.config import LoraConfig
from peftcore_lora.layers import Lora

BY_EXPERT = "by_expert"  # end of a name that `write_experts` has yet to convert


class LoraParameter(Lora):
    """LoRA of one parameter; see the module's docstring. Dropout applies where `expert_low_rank` is used.

    Args:
        inside: depth of nesting in the file, in other parameters of its module.
        drops: the module uses low-rank products, so dropout applies.
    """

    def __init__(
        self, config: LoraConfig, path: str, shape: Sequence[int], transposed: bool, inside: int, drops: bool
    ) -> None:
        self.experts, self.transposed = shape[0] if len(shape) == 3 else None, transposed and len(shape) == 3
        width, out = shape[-2:] if self.transposed else (shape[-1], shape[-2])
        super().__init__(config, path, [width], [out], experts=self.experts or 1)
        if self.experts is not None:
            a, b = self.lora_A.detach(), self.lora_B.detach()
            self.lora_A, self.lora_B = (
                nn.Parameter(a.view(self.experts, -1, width)),
                nn.Parameter(by_expert(b, self.experts)),
            )
        self.inside, self.drops = inside, drops

    def extra_repr(self) -> str:
        return f"r={self.lora_A.shape[-2]}, scale={self.scale:g}"

    @override
    def expert_low_rank(self) -> LowRank | None:
        p = self.dropout.p if self.training else 0.0
        return None if self.experts is None else LowRank(self.lora_A, self.lora_B, self.scale, dropout_p=p)

    @override
    def low_rank(self) -> list[LowRank]:
        if self.experts is None:
            return super().low_rank()
        pairs = zip(self.lora_A, self.lora_B, strict=True)
        return [LowRank(a, b, self.scale, self.transposed) for a, b in pairs]

    def forward(self, weight: Tensor) -> Tensor:
        if self.training and self.dropout.p and self.drops and torch.is_grad_enabled():
            warnings.warn(
                f"lora_dropout={self.dropout.p} has no effect where changed weights of experts are read", stacklevel=2
            )
        a, b = self.lora_A.to(weight.dtype), self.lora_B.to(weight.dtype)
        if self.experts is None:
            return torch.addmm(weight, b, a, alpha=self.scale)
        if self.transposed:
            return torch.baddbmm(weight, a.mT, b.mT, alpha=self.scale)
        return torch.baddbmm(weight, b, a, alpha=self.scale)


def by_expert(b: Tensor, experts: int) -> Tensor:
    """Return B `[experts, out, r]` from the file's `[out, r · experts]`."""
    return b.view(len(b), -1, experts).permute(2, 0, 1).contiguous()


def place_parameters(model: nn.Module, config: LoraConfig) -> Iterator[OnWeight]:
    """Yield a LoRA for each parameter that the config names."""
    validation.require(
        not config.lora_bias,
        "lora_bias=True is not possible with target_parameters, since a parameter has no bias. Leave one of them out",
    )
    for path, names in named(model, config.target_parameters or ()).items():
        module = model.get_submodule(path)
        validation.require(
            not has_forward_of_instance(module)
            and ("forward" in vars(module) or not getattr(module, "_is_expert_parallel", False)),
            f"the experts at '{path}' are spread over processes (tensor or expert parallelism), or have their own "
            "forward on the instance, which reads their original weights. Load the model without such a plan "
            f"(distributed_config), or leave them out: exclude_modules=['{path.rpartition('.')[2]}']",
        )
        for place, name in enumerate(names):
            parameter: Any = module._parameters[name]
            shape, whole = shape_of(module, name), f"{path}.{name}"
            validation.require(
                not targets.read_elsewhere(model, path, [name]),
                f"'{whole}' is read by other modules, not by its own module's forward, so LoRA would have no effect. "
                "Leave it out of target_parameters",
            )
            is_packed = quantized_format(module, name) is not None
            validation.require(
                len(shape) in (2, 3) and (parameter.itemsize > 1 or name == "weight" or is_packed),
                f"'{whole}' has shape {list(shape)} and dtype {parameter.dtype}: LoRA adapts parameters of "
                "two or three dimensions in 16 or 32 bits. Leave it out of target_parameters, or its module out of "
                "quantization",
            )
            layout, transposed = experts_layout(module), getattr(module, "is_transposed", False)
            drops = layout is not None and name in layout.names
            adapter = LoraParameter(config, whole, shape, transposed, len(names) - 1 - place, drops)
            yield OnWeight(path, name, adapter)


def named(model: nn.Module, patterns: Sequence[str]) -> dict[str, list[str]]:
    """Return the parameters selected by suffixes, by module, in the module's order."""
    found: dict[str, list[str]] = {}
    if not patterns:
        return found
    there = [(path, name) for path, module in base_modules(model) for name in module._parameters if path]
    for pattern in patterns:
        if not any(targets.matches(pattern, f"{path}.{name}") for path, name in there):
            known = {end for path, name in there for end in (f"{path}.{name}", f"{path.rpartition('.')[2]}.{name}")}
            raise PeftcoreError(f"target_parameters: '{pattern}' matches no parameter{nearest(pattern, sorted(known))}")
    for path, name in there:
        is_there = model.get_submodule(path)._parameters[name] is not None
        if is_there and any(targets.matches(pattern, f"{path}.{name}") for pattern in patterns):
            found.setdefault(path, []).append(name)
    return found


def name_on_disk(placement: OnWeight, name: str) -> str:
    """Return PEFT's name; for experts, whose factors change shape, a name that `write_experts` converts."""
    adapter: Any = placement.adapter
    end = "weight" if adapter.experts is None else BY_EXPERT
    return f"{stem_on_disk(placement.path, adapter.inside)}.{name}.{end}"


def stem_on_disk(path: str, inside: int) -> str:
    """Return the prefix of the names of a parameter's factors, nested in `inside` others of its module."""
    return f"base_model.model.{path}{'.base_layer' * inside}"


def write_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write factors of experts under the names and in the shapes of PEFT's file."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, end = name.rpartition(".")
        if end == BY_EXPERT:
            is_a = stem.endswith("lora_A")
            tensor = tensor.flatten(0, 1) if is_a else tensor.permute(1, 2, 0).reshape(tensor.shape[1], -1)
            name, tensor = f"{stem}.weight", tensor.contiguous()
        found[name] = tensor
    return found


def read_experts(model: nn.Module, tensors: dict[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read factors of experts from a file of any release of PEFT, the reverse of `write_experts`."""
    tensors = upgraded(model, tensors, fields)
    for path, names in named(model, fields.get("target_parameters") or ()).items():
        for inside, name in enumerate(reversed(names)):
            shape = shape_of(model.get_submodule(path), name)
            stem = stem_on_disk(path, inside)
            for which in "AB" if len(shape) == 3 else ():
                tensor = tensors.pop(f"{stem}.lora_{which}.weight", None)
                if tensor is None or tensor.shape[0 if which == "A" else 1] % shape[0]:
                    continue  # reported as missing later
                by = tensor.view(shape[0], -1, tensor.shape[1]) if which == "A" else by_expert(tensor, shape[0])
                tensors[f"{stem}.lora_{which}.{BY_EXPERT}"] = by
    return tensors


def upgraded(model: nn.Module, tensors: dict[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors with A and B of files before PEFT 0.19 in the current layout."""
    version = re.match(r"(\d+)\.(\d+)", str(fields.get("peft_version") or "0.0"))
    is_old = version is not None and tuple(map(int, version.groups())) < (0, 19)
    tensors = dict(tensors)
    for path, names in named(model, fields.get("target_parameters") or ()).items():
        module = model.get_submodule(path)
        for inside, name in enumerate(reversed(names)):
            shape, prefix = shape_of(module, name), stem_on_disk(path, inside)
            a, b = (tensors.get(f"{prefix}.lora_{which}.weight") for which in "AB")
            if a is None or b is None or len(shape) != 3 or getattr(module, "is_transposed", False):
                continue
            experts, out, width = shape
            if (a.shape[1], b.shape[0]) == (out, width) and (out != width or is_old):
                r = len(a) // experts
                b_of_today = a.view(experts, r, out).permute(2, 1, 0).reshape(out, -1)
                tensors[f"{prefix}.lora_A.weight"] = b.view(width, r, experts).permute(2, 1, 0).reshape(-1, width)
                tensors[f"{prefix}.lora_B.weight"] = b_of_today
    return tensors
