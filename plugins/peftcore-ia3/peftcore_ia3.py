"""(IA)³ (Liu et al. 2022, arXiv 2205.05638): y = l ⊙ (W x + b), and in a feed-forward's last layer y = W (l ⊙ x) + b.

            y [out]                              y [out]
          ( ⊙ )--- l [out]                 .-----+-----.
      .-----+-----.                        |   W, b    |
      |   W, b    |                        '-----+-----'
      '-----+-----'                            ( ⊙ )--- l [in]
          x [in]                               x [in]     (feedforward_modules)

Trained: one factor per output (or input) of a layer, 1 at the start. It merges by scaling rows (or columns) of W.
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
        target_modules, exclude_modules: see `peftcore.model.targets.select`. The paper scales keys, values and the
            inner activations: `["k_proj", "v_proj", "down_proj"]` of a Llama.
        feedforward_modules: suffixes, or a regular expression for whole paths, of selected layers whose input is
            scaled. None: the last layers of feed-forward blocks, where they are known.
        modules_to_save: modules to train in full as well. None: a classifier's head.
        init_ia3_weights: factors are 1; False: random, so the adapter changes the model from the start.
        fan_in_fan_out: written for PEFT, which needs True for GPT-2; peftcore reads the layout from the layer.
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
        """Return the config with the choices that depend on the model made explicit."""
        chosen = selected(model, self, architecture)
        config = replace(self, fan_in_fan_out=any(map(targets.is_conv1d, chosen.values())))
        if self.feedforward_modules is not None and self.target_modules != targets.ALL_LINEAR:
            return config
        back = [path for path, module in chosen.items() if leads_back(model, path, module, architecture)]
        if self.feedforward_modules is not None:
            back = [path for path in chosen if scales_input(self, targets.weight_named(model, path))]
        parts = [[path for path in chosen if path not in back], back]
        others, last = (targets.minimal_suffixes(model, part) if part else [] for part in parts)
        given = self.target_modules
        named = given if isinstance(given, str) and given != targets.ALL_LINEAR else [*others, *last]
        # PEFT needs feedforward_modules among target_modules
        return replace(config, target_modules=named, feedforward_modules=last)


class IA3(Adapter):
    """Factors `ia3_l`: `[out, 1]`, or `[1, in]` for the input; `[1, channels, 1, ..]` for a convolution."""

    def __init__(self, shape: Sequence[int], scales_input: bool, start: bool) -> None:
        super().__init__()
        self.ia3_l = nn.Parameter(torch.ones(*shape) if start else torch.randn(*shape))
        self.scales_input = scales_input

    def forward(self, base: Base, x: Tensor) -> Tensor:
        factor, behind = self.ia3_l.flatten(), max(0, self.ia3_l.dim() - 2)
        return base(ops.scaled(x, factor, behind)) if self.scales_input else ops.scaled(base(x), factor, behind)

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
        groups = factor.view(-1, weight.shape[1]).repeat_interleave(weight.shape[0] * weight.shape[1] // len(factor), 0)
        return weight * groups.view(*weight.shape[:2], *(1 for _ in weight.shape[2:])), bias


def selected(model: nn.Module, config: IA3Config, architecture: Architecture) -> dict[str, nn.Module]:
    """Return the layers that the config selects, by path, among the supported ones."""
    fields = {name: getattr(config, name) for name in ("target_modules", "exclude_modules", "modules_to_save")}
    kinds = (nn.Conv2d, nn.Conv3d)
    supported = lambda module: targets.is_linear(module) or isinstance(module, kinds)  # noqa: E731
    return targets.select(model, architecture, supported=supported, **fields)


def scales_input(config: IA3Config, path: str) -> bool:
    """Return whether the layer at `path` is one of `feedforward_modules`."""
    named = config.feedforward_modules or []
    if isinstance(named, str):
        return targets.compiled(named, "feedforward_modules")(path)
    return path.endswith(tuple(named))


def leads_back(model: nn.Module, path: str, module: nn.Module, architecture: Architecture) -> bool:
    """Return whether a linear layer maps a feed-forward's inner size to the hidden size."""
    if targets.weight_named(model, path) != path:
        return path.endswith(".down_proj")  # of an expert
    for sublayer in architecture.sublayers:
        inner = [other for other in sublayer.inner if other.rpartition(".")[0] == path.rpartition(".")[0]]
        is_last = path == sublayer.output or path.startswith(f"{sublayer.output}.") or bool(inner)
        if sublayer.kind == "feed_forward" and is_last and path not in sublayer.inner and targets.is_linear(module):
            return targets.sizes(module)[1] == sublayer.width
    return False


def place(model: nn.Module, config: IA3Config, architecture: Architecture) -> list[Placement]:
    placements: list[Placement] = []
    for path, module in selected(model, config, architecture).items():
        layer: Any = module
        of_input = scales_input(config, targets.weight_named(model, path))
        if targets.is_linear(module):
            width, out_width = targets.sizes(module)
            shape = [1, width] if of_input else [out_width, 1]
        else:
            shape = [1, layer.in_channels if of_input else layer.out_channels, *(1 for _ in layer.kernel_size)]
        placements.append(Around(path, IA3(shape, of_input, config.init_ia3_weights)))
    return placements


@hookimpl
def peftcore_methods() -> list[Method]:
    return [Method("ia3", IA3Config, place, StateRules(peft_type="IA3"), learning_rate=1e-2)]
