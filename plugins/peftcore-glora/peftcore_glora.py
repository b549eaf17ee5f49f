"""GLoRA (Chavan et al. 2023, arXiv 2306.07967, section 3.2): scale and shift weight and bias.

    y = (W + W ⊙ A + B) x + b + b ⊙ D + E + W C         ⊙ elementwise

    A, B [out, in]     lora: Xd Xu, of rank r    vector: one number per output         constant: one    none
    C    [in]          lora: Xd Xu               vector: one number per input                           none
    D, E [out]                                   vector: one number per output         constant: one    none

The X are trained. All five parts are zero at the start. C, D and E change the bias, so only layers with one have them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.plugin import (
    Adapter,
    Architecture,
    Around,
    Base,
    Fields,
    Method,
    PeftRules,
    Placement,
    StateRules,
    Tensors,
    hookimpl,
    override,
    targets,
    validation,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class GloraConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `GloraConfig`; the other fields select layers.

    Args:
        r: rank of the parts with form "lora".
        config_A_B, config_C, config_D_E: form of A and B, of C, and of D and E.
        bias: biases to train as well: "none", "all", or "glora_only" (of adapted modules).
        init_weights: False: random parts; the adapter then changes the model from the start.
    """

    not_in_peft: ClassVar[frozenset[str]] = frozenset(
        {"exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"}
    )
    r: int = 8
    bias: Literal["none", "all", "glora_only"] = "none"
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"
    config_C: Literal["lora", "vector", "none"] = "lora"
    config_D_E: Literal["vector", "constant", "none"] = "constant"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(r=self.r)
        forms = {self.config_A_B, self.config_C, self.config_D_E}
        validation.require(
            forms != {"none"}, "config_A_B, config_C and config_D_E are all 'none': nothing would be trained"
        )


class Path(nn.Module):
    """One of the parts A to E, as `Xd` and `Xu` or `X`. It broadcasts to `shape`, [rows, columns] or [rows]."""

    def __init__(self, form: str, shape: tuple[int, ...], config: GloraConfig) -> None:
        super().__init__()
        self.form, identity_init = form, config.init_weights
        if form == "lora":
            self.Xd = nn.Parameter(torch.zeros(shape[0], config.r))
            self.Xu = nn.Parameter(torch.empty(config.r, shape[1]))
            nn.init.kaiming_uniform_(self.Xu, a=math.sqrt(5))
        elif form == "vector":
            self.X = nn.Parameter(torch.zeros(shape[0], *[1] * (len(shape) - 1)))
        elif form == "constant":
            self.X = nn.Parameter(torch.zeros(1))
        if not identity_init and form == "constant":
            nn.init.normal_(self.X, std=0.02)
        elif not identity_init and form != "none":
            # kaiming_uniform_ takes its bound from the number of columns, so a vector counts as one row.
            parameter = self.Xd if form == "lora" else self.X
            nn.init.kaiming_uniform_(parameter if parameter.dim() > 1 else parameter[None], a=math.sqrt(5))

    def forward(self) -> Any:
        if self.form == "lora":
            return self.Xd.float() @ self.Xu.float()
        return 0.0 if self.form == "none" else self.X.float()

    def neutral(self) -> dict[str, Tensor]:
        name = {"lora": "Xd", "none": ""}.get(self.form, "X")
        return {name: torch.zeros_like(getattr(self, name))} if name else {}


class Glora(Adapter):
    """Parts A to E of a linear layer."""

    def __init__(self, config: GloraConfig, width: int, out_width: int, has_bias: bool) -> None:
        super().__init__()
        form_of_c, form_of_d_e = (config.config_C, config.config_D_E) if has_bias else ("none", "none")
        self.glora_A = Path(config.config_A_B, (out_width, width), config)
        self.glora_B = Path(config.config_A_B, (out_width, width), config)
        self.glora_C = Path(form_of_c, (width, 1), config)
        self.glora_D = Path(form_of_d_e, (out_width,), config)
        self.glora_E = Path(form_of_d_e, (out_width,), config)

    def changes(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the changes of weight and bias, fp32."""
        # PyTorch multiplies 16 by 32 bits in fp32. An fp32 copy of W would be saved for the backward pass.
        change = weight * self.glora_A() + self.glora_B()
        if bias is None:
            return change, None
        shift = bias * self.glora_D() + self.glora_E()
        return change, shift if self.glora_C.form == "none" else shift + (weight.float() @ self.glora_C())[:, 0]

    def forward(self, base: Base, x: Tensor) -> Tensor:
        weight, bias = base.linear_operands(x) or (None, None)
        if isinstance(weight, Tensor) and weight.dtype == torch.float32:
            return F.linear(x, *self.merged(weight, bias))
        change, shift = self.changes(*base.weight_and_bias())
        return base(x) + F.linear(x, change.to(x.dtype), None if shift is None else shift.to(x.dtype))

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        change, shift = self.changes(weight, bias)
        return weight + change, bias if bias is None or shift is None else bias + shift

    @override
    def neutral(self) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for part, path in self.named_children():
            assert isinstance(path, Path)
            values.update({f"{part}.{name}": tensor for name, tensor in path.neutral().items()})
        return values


def place(model: nn.Module, config: GloraConfig, architecture: Architecture) -> list[Placement]:
    layers = config.selected(model, architecture)
    placements: list[Placement] = []
    for path, layer in layers.items():
        has_bias = getattr(layer, "bias", None) is not None
        trains = config.config_A_B != "none" or has_bias
        validation.require(
            trains,
            f"'{path}' has no bias, and config_A_B is 'none': nothing would be trained. "
            f"Leave it out: exclude_modules=['{path}']",
        )
        placements.append(Around(path, Glora(config, *targets.sizes(layer), has_bias)))
    return placements + targets.trained_biases(model, config.bias, layers)


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    """Drop the zeros that PEFT writes for parts of form "none"."""
    return {name: t for name, t in tensors.items() if not name.endswith(".zeros") or t.any()}, fields


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="GLORA",
        read=read,
        peft=PeftRules(own_fields=GloraConfig.not_in_peft, unreadable=targets.conv1d_paths),
    )
    return [Method("glora", GloraConfig, place, rules, learning_rate=1e-3)]
