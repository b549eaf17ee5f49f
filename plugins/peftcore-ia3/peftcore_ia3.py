"""(IA)³ (Liu et al. 2022, arXiv 2205.05638): y = l ⊙ (W x + b), or in a feed-forward's last layer y = W (l ⊙ x) + b.

            y [out]                              y [out]
          ( ⊙ )--- l [out]                 .-----+-----.
      .-----+-----.                        |   W, b    |
      |   W, b    |                        '-----+-----'
      '-----+-----'                            ( ⊙ )--- l [in]
          x [in]                               x [in]     (feedforward_modules)

One factor per output (or input) of a layer is trained and starts at 1. Merging scales the rows (or columns) of W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import ops
from peftcore.plugin import (
    Adapter,
    Architecture,
    Around,
    Base,
    Division,
    Method,
    Placement,
    StateRules,
    hookimpl,
    override,
    targets,
    validation,
)

peftcore_api = ">=3.4,<4"


@dataclass(frozen=True)
class IA3Config:
    """Config with the field names of Hugging Face PEFT's `IA3Config`.

    Args:
        target_modules, exclude_modules: see `peftcore.plugin.targets.select`. The paper scales keys, values and the
            inner activations: for Llama `["k_proj", "v_proj", "down_proj"]`.
        feedforward_modules: selected layers whose input is scaled, by suffixes or a regular expression for whole
            paths. None: the last layers of feed-forward blocks, where they are known.
        modules_to_save: modules to train in full as well. None means a classifier's head.
        init_ia3_weights: False: random factors; the adapter then changes the model from the start.
        fan_in_fan_out: only written, for PEFT, which needs True for GPT-2; peftcore reads the layout from the layer.
    """

    target_modules: str | Sequence[str] = targets.ALL_LINEAR
    exclude_modules: str | Sequence[str] | None = None
    feedforward_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    init_ia3_weights: bool = True
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        validation.check_types(self)

    def resolved(self, model: nn.Module, architecture: Architecture) -> IA3Config:
        """Return the config with the modules named, where they depend on the model."""
        layers = selected(model, self, architecture)
        config = replace(self, fan_in_fan_out=any(map(targets.is_conv1d, layers.values())))
        if self.feedforward_modules is not None and self.target_modules != targets.ALL_LINEAR:
            return config
        if self.feedforward_modules is None:
            input_scaled = [
                path for path, module in layers.items() if is_down_projection(model, path, module, architecture)
            ]
        else:
            input_scaled = [path for path in layers if scales_input(self, targets.stacked_weight_name(model, path))]
        output_scaled = [path for path in layers if path not in input_scaled]
        input_suffixes = targets.minimal_suffixes(model, input_scaled) if input_scaled else []
        output_suffixes = targets.minimal_suffixes(model, output_scaled) if output_scaled else []
        target_modules = self.target_modules
        if target_modules == targets.ALL_LINEAR or not isinstance(target_modules, str):
            # PEFT requires that target_modules contains feedforward_modules.
            target_modules = [*output_suffixes, *input_suffixes]
        return replace(config, target_modules=target_modules, feedforward_modules=input_suffixes)


class IA3(Adapter):
    """Factors `ia3_l`: `[out, 1]` for outputs, `[1, in]` for inputs, `[1, channels, 1, ..]` for a convolution."""

    def __init__(self, shape: Sequence[int], scales_input: bool, identity_init: bool) -> None:
        super().__init__()
        self.ia3_l = nn.Parameter(torch.ones(*shape) if identity_init else torch.randn(*shape))
        self.scales_input = scales_input

    def forward(self, base: Base, x: Tensor) -> Tensor:
        factor, trailing_dims = self.ia3_l.flatten(), max(0, self.ia3_l.dim() - 2)
        return (
            base(ops.scaled(x, factor, trailing_dims))
            if self.scales_input
            else ops.scaled(base(x), factor, trailing_dims)
        )

    @override
    def on_parts(self, base: Callable[[Tensor], Tensor], division: Division, x: Tensor) -> Tensor:
        factor = self.ia3_l.flatten()
        if self.scales_input:
            return base(ops.scaled(x, division.part(factor) if division.input_in_parts else factor))
        return ops.scaled(base(x), division.part(factor) if division.output_in_parts else factor)

    @override
    def neutral(self) -> dict[str, Tensor]:
        return {"ia3_l": torch.ones_like(self.ia3_l)}

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factor = self.ia3_l.float().flatten()
        if not self.scales_input:
            return weight * factor.view(-1, *(1 for _ in weight.shape[1:])), None if bias is None else bias * factor
        # A grouped convolution's weight is [out, in / groups, ...]: each output has the factors of its group's inputs.
        outputs_per_group = weight.shape[0] * weight.shape[1] // len(factor)
        factors = factor.view(-1, weight.shape[1]).repeat_interleave(outputs_per_group, 0)
        return weight * factors.view(*weight.shape[:2], *(1 for _ in weight.shape[2:])), bias


def selected(model: nn.Module, config: IA3Config, architecture: Architecture) -> dict[str, nn.Module]:
    """Return the selected layers by path: linear layers, and 2-D and 3-D convolutions."""
    fields = {name: getattr(config, name) for name in ("target_modules", "exclude_modules", "modules_to_save")}
    kinds = (nn.Conv2d, nn.Conv3d)
    supported = lambda module: targets.is_linear(module) or isinstance(module, kinds)  # noqa: E731
    return targets.select(model, architecture, supported=supported, **fields)


def scales_input(config: IA3Config, path: str) -> bool:
    """Return whether the layer at `path` is one of `feedforward_modules`."""
    patterns = config.feedforward_modules or []
    if isinstance(patterns, str):
        return targets.compile_pattern(patterns, "feedforward_modules")(path)
    return path.endswith(tuple(patterns))


def is_down_projection(model: nn.Module, path: str, module: nn.Module, architecture: Architecture) -> bool:
    """Return whether a linear layer maps a feed-forward's inner size to the hidden size."""
    if targets.stacked_weight_name(model, path) != path:  # a weight of experts
        return path.endswith(".down_proj")
    parent = path.rpartition(".")[0]
    for sublayer in architecture.sublayers:
        has_inner_sibling = any(inner.rpartition(".")[0] == parent for inner in sublayer.inner)
        is_last = path == sublayer.output or path.startswith(f"{sublayer.output}.") or has_inner_sibling
        if sublayer.kind == "feed_forward" and is_last and path not in sublayer.inner and targets.is_linear(module):
            return targets.sizes(module)[1] == sublayer.width
    return False


def place(model: nn.Module, config: IA3Config, architecture: Architecture) -> list[Placement]:
    placements: list[Placement] = []
    for path, module in selected(model, config, architecture).items():
        layer: Any = module
        on_input = scales_input(config, targets.stacked_weight_name(model, path))
        if targets.is_linear(module):
            width, out_width = targets.sizes(module)
            shape = [1, width] if on_input else [out_width, 1]
        else:
            shape = [1, layer.in_channels if on_input else layer.out_channels, *(1 for _ in layer.kernel_size)]
        placements.append(Around(path, IA3(shape, on_input, config.init_ia3_weights)))
    return placements


@hookimpl
def peftcore_methods() -> list[Method]:
    return [Method("ia3", IA3Config, place, StateRules(peft_type="IA3"), learning_rate=1e-2)]
