"""`target_parameters`: LoRA of parameters by name, in any module, in PEFT's format.

    W [out, in]                A [r, in], B [out, r]
    W [experts, out, in]       W_e + scale · B_e A_e, A [experts, r, in], B [experts, out, r]
    W [experts, in, out]       in a module with `is_transposed`: the transposed product

In modules that run through transformers' experts interface, W is not copied: B_e A_e x is added to the output of each
expert that has tokens (`expert_low_rank`). In other modules the forward reads W + scale · B A.

The file stores A as [experts · r, in], viewed as (experts, r, in), and B as [out, r · experts], viewed as
(out, r, experts).

If several parameters of one module are adapted, PEFT's file nests them without their names, and the first in the module
is innermost: `experts.base_layer.lora_A.weight`, `experts.lora_A.weight`. PEFT up to 0.18 read every W as
[experts, in, out], so its files have A and B exchanged.
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

BY_EXPERT = "by_expert"  # last part of the name of a factor [experts, ...], which `write_experts` converts


class LoraParameter(Lora):
    """LoRA of one parameter; see the module's docstring.

    Args:
        depth: number of the module's other adapted parameters that this one is nested in, in the file.
        applies_dropout: whether the module calls `expert_low_rank`, where dropout can be applied to the input.
    """

    def __init__(
        self, config: LoraConfig, path: str, shape: Sequence[int], transposed: bool, depth: int, applies_dropout: bool
    ) -> None:
        self.experts, self.transposed = shape[0] if len(shape) == 3 else None, transposed and len(shape) == 3
        width, out = shape[-2:] if self.transposed else (shape[-1], shape[-2])
        super().__init__(config, path, [width], [out], experts=self.experts or 1)
        if self.experts is not None:
            self.lora_A = nn.Parameter(self.lora_A.detach().view(self.experts, -1, width))
            self.lora_B = nn.Parameter(split_experts(self.lora_B.detach(), self.experts))
        self.depth, self.applies_dropout = depth, applies_dropout

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
        if self.training and self.dropout.p and self.applies_dropout and torch.is_grad_enabled():
            warnings.warn(
                f"lora_dropout={self.dropout.p} has no effect in this call, which adds B A to the experts' weights",
                stacklevel=2,
            )
        a, b = self.lora_A.to(weight.dtype), self.lora_B.to(weight.dtype)
        if self.experts is None:
            return torch.addmm(weight, b, a, alpha=self.scale)
        if self.transposed:
            return torch.baddbmm(weight, a.mT, b.mT, alpha=self.scale)
        return torch.baddbmm(weight, b, a, alpha=self.scale)


def split_experts(b: Tensor, experts: int) -> Tensor:
    """Convert B from the file's `[out, r · experts]` to `[experts, out, r]`."""
    return b.view(len(b), -1, experts).permute(2, 0, 1).contiguous()


def place_parameters(model: nn.Module, config: LoraConfig) -> Iterator[OnWeight]:
    """Yield a LoRA for each parameter that target_parameters matches.

    Raises:
        PeftcoreError: LoRA cannot adapt a parameter, or would have no effect.
    """
    validation.require(
        not config.lora_bias,
        "lora_bias=True is not possible with target_parameters, since a parameter has no bias. Leave one of them out",
    )
    for path, names in select_parameters(model, config.target_parameters or ()).items():
        module = model.get_submodule(path)
        is_expert_parallel = "forward" not in vars(module) and getattr(module, "_is_expert_parallel", False)
        validation.require(
            not (has_forward_of_instance(module) or is_expert_parallel),
            f"the experts at '{path}' are spread over processes (tensor or expert parallelism), or have their own "
            "forward on the instance, which reads their original weights. Load the model without such a plan "
            f"(distributed_config), or leave them out: exclude_modules=['{path.rpartition('.')[2]}']",
        )
        for position, name in enumerate(names):
            parameter: Any = module._parameters[name]
            shape, full_name = shape_of(module, name), f"{path}.{name}"
            validation.require(
                not targets.is_read_elsewhere(model, path, [name]),
                f"'{full_name}' is read by other modules, not by its own module's forward, so LoRA would have no "
                "effect. Leave it out of target_parameters",
            )
            is_packed = quantized_format(module, name) is not None
            validation.require(
                len(shape) in (2, 3) and (parameter.itemsize > 1 or name == "weight" or is_packed),
                f"'{full_name}' has shape {list(shape)} and dtype {parameter.dtype}: LoRA adapts parameters of "
                "two or three dimensions in 16 or 32 bits. Leave it out of target_parameters, or its module out of "
                "quantization",
            )
            layout, transposed = experts_layout(module), getattr(module, "is_transposed", False)
            applies_dropout = layout is not None and name in layout.names
            adapter = LoraParameter(config, full_name, shape, transposed, len(names) - 1 - position, applies_dropout)
            yield OnWeight(path, name, adapter)


def select_parameters(model: nn.Module, patterns: Sequence[str]) -> dict[str, list[str]]:
    """Return {module: names of its parameters that match a suffix in `patterns`, in the module's order}.

    Raises:
        PeftcoreError: a pattern matches nothing.
    """
    selected: dict[str, list[str]] = {}
    if not patterns:
        return selected
    known_parameters = [(path, name) for path, module in base_modules(model) for name in module._parameters if path]
    for pattern in patterns:
        if not any(targets.matches(pattern, f"{path}.{name}") for path, name in known_parameters):
            suggestions = {f"{path}.{name}" for path, name in known_parameters}
            suggestions |= {f"{path.rpartition('.')[2]}.{name}" for path, name in known_parameters}
            raise PeftcoreError(
                f"target_parameters: '{pattern}' matches no parameter{nearest(pattern, sorted(suggestions))}"
            )
    for path, name in known_parameters:
        exists = model.get_submodule(path)._parameters[name] is not None  # a layer without a bias has None
        if exists and any(targets.matches(pattern, f"{path}.{name}") for pattern in patterns):
            selected.setdefault(path, []).append(name)
    return selected


def name_on_disk(placement: OnWeight, name: str) -> str:
    """Return PEFT's name of a factor; for experts, whose shape also changes, a name that `write_experts` converts."""
    adapter: Any = placement.adapter
    end = "weight" if adapter.experts is None else BY_EXPERT
    return f"{stem_on_disk(placement.path, adapter.depth)}.{name}.{end}"


def stem_on_disk(path: str, depth: int) -> str:
    """Return the prefix of the names of a parameter's factors, which is nested in `depth` others of its module."""
    return f"base_model.model.{path}{'.base_layer' * depth}"


def write_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the factors of experts to the names and shapes of PEFT's file."""
    disk_tensors: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, end = name.rpartition(".")
        if end == BY_EXPERT:
            is_a = stem.endswith("lora_A")
            tensor = tensor.flatten(0, 1) if is_a else tensor.permute(1, 2, 0).reshape(tensor.shape[1], -1)
            name, tensor = f"{stem}.weight", tensor.contiguous()
        disk_tensors[name] = tensor
    return disk_tensors


def read_experts(model: nn.Module, tensors: dict[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Tensor]:
    """Convert the factors of experts from a file of any PEFT release; the inverse of `write_experts`."""
    tensors = upgrade_tensors(model, tensors, fields)
    for path, names in select_parameters(model, fields.get("target_parameters") or ()).items():
        for depth, name in enumerate(reversed(names)):
            shape = shape_of(model.get_submodule(path), name)
            stem = stem_on_disk(path, depth)
            for letter in "AB" if len(shape) == 3 else ():
                tensor = tensors.pop(f"{stem}.lora_{letter}.weight", None)
                if tensor is None or tensor.shape[0 if letter == "A" else 1] % shape[0]:
                    continue  # the caller reports the missing tensor
                if letter == "A":
                    factor = tensor.view(shape[0], -1, tensor.shape[1])
                else:
                    factor = split_experts(tensor, shape[0])
                tensors[f"{stem}.lora_{letter}.{BY_EXPERT}"] = factor
    return tensors


def upgrade_tensors(model: nn.Module, tensors: dict[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors in the current layout, where files before PEFT 0.19 have A and B exchanged."""
    version = re.match(r"(\d+)\.(\d+)", str(fields.get("peft_version") or "0.0"))
    is_old = version is not None and tuple(map(int, version.groups())) < (0, 19)
    tensors = dict(tensors)
    for path, names in select_parameters(model, fields.get("target_parameters") or ()).items():
        module = model.get_submodule(path)
        for depth, name in enumerate(reversed(names)):
            shape, prefix = shape_of(module, name), stem_on_disk(path, depth)
            a, b = (tensors.get(f"{prefix}.lora_{letter}.weight") for letter in "AB")
            if a is None or b is None or len(shape) != 3 or getattr(module, "is_transposed", False):
                continue
            experts, out, width = shape
            # For a square W the shapes are the same in both layouts, so the version decides.
            if (a.shape[1], b.shape[0]) == (out, width) and (out != width or is_old):
                r = len(a) // experts
                new_b = a.view(experts, r, out).permute(2, 1, 0).reshape(out, -1)
                tensors[f"{prefix}.lora_A.weight"] = b.view(width, r, experts).permute(2, 1, 0).reshape(-1, width)
                tensors[f"{prefix}.lora_B.weight"] = new_b
    return tensors
