"""`target_parameters`: LoRA of parameters by name, of whatever module, in PEFT's format.

    W [out, in]                A [r, in], B [out, r]
    W [experts, out, in]       W_e + scale · B_e A_e, A [experts, r, in], B [experts, out, r]
    W [experts, in, out]       of a module that says `is_transposed`: the product, transposed

Where transformers' experts interface runs the module, nothing as large as W is made: the products of A_e and B_e join
those of W_e (`thin`), for the experts that have tokens. Elsewhere its own forward reads W + scale · B A.

In the file A is [experts · r, in], read as (experts, r, in), and B [out, r · experts], read as (out, r, experts).

Several parameters of one module lie in PEFT's file one in the other, the first that the module has innermost, without
their names: `experts.base_layer.lora_A.weight`, `experts.lora_A.weight`. Up to 0.18 PEFT took every W for
[experts, in, out]: its A is the B of today, and the other way round.
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
    format_in_few_bits,
    has_forward_of_instance,
    nearest,
    override,
    shape_of,
    targets,
    validation,
)
from peftcore_lora.config import LoraConfig
from peftcore_lora.layers import Lora

BY_EXPERT = "by_expert"  # end of a name that is not yet that in the file


class LoraParameter(Lora):
    """Of one parameter; see above. Dropout acts where `thin` is read.

    Args:
        inside: in how many others of its module it lies in the file.
        drops: the module's weights are changed by their thin products, so that dropout acts.
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
                f"lora_dropout={self.dropout.p} does not act where experts' weights are read changed", stacklevel=2
            )
        a, b = self.lora_A.to(weight.dtype), self.lora_B.to(weight.dtype)
        if self.experts is None:
            return torch.addmm(weight, b, a, alpha=self.scale)
        if self.transposed:
            return torch.baddbmm(weight, a.mT, b.mT, alpha=self.scale)
        return torch.baddbmm(weight, b, a, alpha=self.scale)


def by_expert(b: Tensor, experts: int) -> Tensor:
    """B `[experts, out, r]` of that in the file, `[out, r · experts]`."""
    return b.view(len(b), -1, experts).permute(2, 0, 1).contiguous()


def place_parameters(model: nn.Module, config: LoraConfig) -> Iterator[OnWeight]:
    """A LoRA for each parameter that the config names."""
    validation.require(
        not config.lora_bias,
        "lora_bias=True is not possible beside target_parameters: a parameter has no bias of its own. Leave one out",
    )
    for path, names in named(model, config.target_parameters or ()).items():
        module = model.get_submodule(path)
        targets.refuse_bypassed(model, [path])
        validation.require(
            not getattr(module, "_is_expert_parallel", False) and not has_forward_of_instance(module),
            f"the experts at '{path}' are spread over processes (tensor or expert parallelism), or have a forward of "
            "their own, which reads their weights unchanged. Load the model without a plan of that kind "
            f"(distributed_config), or leave them out: exclude_modules=['{path.rpartition('.')[2]}']",
        )
        for place, name in enumerate(names):
            parameter: Any = module._parameters[name]
            shape, whole = shape_of(module, name), f"{path}.{name}"
            validation.require(
                targets.is_read_by_itself(module, name) or experts_layout(module) is not None,
                f"'{whole}' is read past the forward of its module, by others: LoRA of it would do nothing. Leave it "
                "out of target_parameters",
            )
            is_packed = format_in_few_bits(module, name) is not None
            validation.require(
                len(shape) in (2, 3) and (parameter.itemsize > 1 or name == "weight" or is_packed),
                f"'{whole}' is {list(shape)} of {parameter.dtype}: LoRA adapts parameters of two or three "
                "dimensions in 16 or 32 bits. Leave it out of target_parameters, or its module out of quantization",
            )
            layout, transposed = experts_layout(module), getattr(module, "is_transposed", False)
            drops = layout is not None and name in layout.names
            adapter = LoraParameter(config, whole, shape, transposed, len(names) - 1 - place, drops)
            yield OnWeight(path, name, adapter)


def named(model: nn.Module, patterns: Sequence[str]) -> dict[str, list[str]]:
    """The parameters that the ends of their names mean, by module, in its order."""
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
    """PEFT's name; of experts' factors, which have another shape there, one that `write_experts` turns into it."""
    adapter: Any = placement.adapter
    end = "weight" if adapter.experts is None else BY_EXPERT
    return f"{stem_on_disk(placement.path, adapter.inside)}.{name}.{end}"


def stem_on_disk(path: str, inside: int) -> str:
    """What the names of a parameter's factors begin with, one that lies in `inside` others of its module."""
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
    """The other way round, of files of any release of PEFT."""
    tensors = upgraded(model, tensors, fields)
    for path, names in named(model, fields.get("target_parameters") or ()).items():
        for inside, name in enumerate(reversed(names)):
            shape = shape_of(model.get_submodule(path), name)
            stem = stem_on_disk(path, inside)
            for which in "AB" if len(shape) == 3 else ():
                tensor = tensors.pop(f"{stem}.lora_{which}.weight", None)
                if tensor is None or tensor.shape[0 if which == "A" else 1] % shape[0]:
                    continue  # of which it is said that it lacks
                by = tensor.view(shape[0], -1, tensor.shape[1]) if which == "A" else by_expert(tensor, shape[0])
                tensors[f"{stem}.lora_{which}.{BY_EXPERT}"] = by
    return tensors


def upgraded(model: nn.Module, tensors: dict[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors with A and B of files before PEFT 0.19 as they are today."""
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
