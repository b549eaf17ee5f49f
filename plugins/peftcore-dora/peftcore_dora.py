"""DoRA (Liu et al. 2024, arXiv 2402.09353): y = g ∘ (W x + scale · B A x) + bias, with g = m / n.

    x ---+--- W ---------(+)--- · g --- + bias --- y       m [out], trained: initially the norms of W's rows
         '--- A --- B --- '                                n [out]: norms of the rows of W + scale · B A

The LoRA of `peftcore-lora` learns the direction of each row, and m its length. The gradient treats n as a constant
(section 4.3). For an embedding, m and n are norms of columns.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import peftcore_lora
from peftcore_lora.config import refuse_fields
from peftcore_lora.files import RULES, name_inside
from peftcore_lora.layers import (
    LoraConv,
    LoraConvOnWeight,
    LoraEmbedding,
    LoraGroupedConv,
    LoraLinear,
    LoraLinearOnWeight,
    LoraOnWeight,
)
from peftcore_lora.placing import place as place_lora, wrap_adapters
from torch import Tensor, nn

from peftcore import ops
from peftcore.plugin import (
    Adapter,
    Architecture,
    Around,
    Base,
    Fields,
    FileLayout,
    Method,
    Placement,
    Tensors,
    hookimpl,
    inside_at,
    override,
    validation,
)

peftcore_api = ">=3.0,<4"

SUPPORTED = LoraLinear, LoraConv, LoraEmbedding, LoraLinearOnWeight, LoraConvOnWeight


@dataclass(frozen=True)
class DoraConfig(peftcore_lora.LoraConfig):
    """Config with LoRA's fields, except lora_bias. As in PEFT, the file is a LoRA with `use_dora: true`."""

    reaches_experts = False
    adapts_attention = False

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_fields(self, "DoRA")


class Dora(Adapter):
    """LoRA of a layer, and the magnitude m of each output: `[out]`, or PEFT's `[1, out, 1...]` for a convolution."""

    def __init__(self, lora: Any) -> None:
        super().__init__()
        self.lora = lora
        self.on_weight = isinstance(lora, LoraOnWeight)
        self.is_transposed = isinstance(lora, LoraEmbedding)  # outputs are the weight's last dimension
        self.axes = [1] * (lora.lora_A.dim() - 2)  # shape of the dimensions after the channels
        m = lora.lora_B.new_ones(lora.lora_B.shape[0])
        self.lora_magnitude_vector = nn.Parameter(m.view(1, -1, *self.axes) if self.axes else m)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        if self.on_weight:
            return base.on_weights({"weight": lambda weight: self.merged(weight, None)[0]})(*args, **kwargs)
        operands = base.linear_operands(args[0]) if isinstance(self.lora, LoraLinear) else None
        weight, bias = operands or base.weight_and_bias()
        bias = None if bias is None else bias.view(-1, *self.axes)
        u = self.lora(WithoutBias(base.module, base, bias), *args, **kwargs)
        y = ops.scaled(u, self.lora_magnitude_vector.flatten() / self.norms(weight), len(self.axes))
        return y if bias is None else y + bias.to(y.dtype)

    def norms(self, weight: Any) -> Tensor:
        """Return n, fp32 `[out]`. `weight` is W in the layout of the layer's weight, or packed."""
        if isinstance(weight, Tensor):
            weight = weight.T if self.is_transposed else weight.flatten(1)
        a, b = self.lora.lora_A.flatten(1), self.lora.lora_B.flatten(1)
        return ops.row_norms(weight, a, b, self.lora.scale).clamp(min=1e-30)  # so that rows of zeros give 0, not NaN

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gain = self.lora_magnitude_vector.flatten() / self.norms(weight)
        gain = gain if self.is_transposed else gain.view(-1, 1, *self.axes)
        return (weight + self.lora.delta()) * gain, bias


@dataclass
class WithoutBias:
    """The wrapped layer without its bias, since the magnitude scales W x + scale · B A x alone."""

    module: nn.Module
    base: Base
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y if self.bias is None else y - self.bias.to(y.dtype)

    def linear_operands(self, x: Tensor) -> Any:
        operands = self.base.linear_operands(x)
        return operands and (operands[0], None)


def place(model: nn.Module, config: DoraConfig, architecture: Architecture) -> list[Placement]:
    placements = place_lora(model, config, architecture)
    grouped_path = next(
        (p.path for p in placements if isinstance(p, Around) and isinstance(p.adapter, LoraGroupedConv)), None
    )
    validation.require(
        grouped_path is None,
        f"DoRA cannot adapt '{grouped_path}', a grouped convolution: B A connects all groups, so it is not a change of "
        "the weight, and there are no norms to divide by. PEFT divides by the norms of a matrix that the layer does "
        f"not apply. Exclude it: exclude_modules=['{grouped_path}']; or choose LoRA",
    )
    return wrap_adapters(placements, lambda lora: Dora(lora) if type(lora) in SUPPORTED else None, "DoRA")


def initialize(model: nn.Module, adapters: Any, config: DoraConfig, batches: Any) -> None:
    """Set m to the norms of the wrapped weight plus B A. `batches` is not used."""
    for path, dora in adapters.items():
        m: Any = dora.lora_magnitude_vector
        m.copy_(dora.norms(inside_at(model, path).weight()).view_as(m))


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    return RULES.read(model, tensors, {name: value for name, value in fields.items() if name != "use_dora"})


def write(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    tensors_on_disk, fields_on_disk = RULES.write(model, tensors, fields)
    return tensors_on_disk, {**fields_on_disk, "use_dora": True}


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = dataclasses.replace(
        RULES,
        tensor_name=name_inside,
        read=read,
        write=write,
        # The file layout is for LoRA of experts, which have no magnitudes.
        formats=[file_format for file_format in RULES.formats if not isinstance(file_format, FileLayout)],
        peft=dataclasses.replace(RULES.peft, flag="use_dora", scaled=None),
    )
    return [Method("dora", DoraConfig, place, rules, initialize, learning_rate=1e-3)]
