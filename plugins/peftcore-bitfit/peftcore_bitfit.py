"""BitFit (Ben Zaken et al. 2022, arXiv 2106.10199): only b of y = W x + b is trained.

            y [out]
            |
           (+)---- b [out]      trained
            |
      .-----+-----.
      |     W     |  [out, in]  frozen
      '-----+-----'
            |
            x [in]

It trains all biases, or only those of the query projections and of the first feed-forward layers, which change most
(section 4.3). `add_missing` gives layers without a bias one that starts at zero. Biases that the base model has can
be merged; added ones cannot, since the base model has no parameter for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.plugin import (
    Adapter,
    After,
    Architecture,
    Method,
    PeftcoreError,
    Placement,
    StateRules,
    Train,
    expert_biases,
    hookimpl,
    targets,
    validation,
)

peftcore_api = ">=3.0,<4"

ALL = "all"
QUERY_INTERMEDIATE = "query-intermediate"


@dataclass(frozen=True)
class BitFitConfig:
    """Selects the biases to train.

    Args:
        target_modules: "all": all modules with a bias, norms included. "query-intermediate": the paper's subset, the
            query projection and the feed-forward layer from the hidden to the inner size (b_q and b_m2). Otherwise
            suffixes or a regular expression, see `peftcore.plugin.targets.select`.
        exclude_modules, layers_to_transform, layers_pattern: see `peftcore.plugin.targets.select`.
        add_missing: add a bias that starts at zero to selected linear layers without one (for "all": to every linear
            layer except the output head and task heads).
        modules_to_save: modules to train in full as well. None means a classifier's head.
    """

    target_modules: str | Sequence[str] = ALL
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    add_missing: bool = False
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        validation.check_types(self)

    def resolved(self, model: nn.Module, architecture: Architecture) -> BitFitConfig:
        """Return the config with module names in place of "query-intermediate"; a saved adapter then stands alone."""
        if self.target_modules != QUERY_INTERMEDIATE:
            return self
        modules = selected(model, self, architecture)
        return replace(self, target_modules=targets.minimal_suffixes(model, modules))


class AddedBias(Adapter):
    """Bias b added to a layer's output, `[..., out]`, or `[..., groups, out / groups]` for a grouped layer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, y: Tensor) -> Tensor:
        bias = self.bias.to(y.dtype)
        return y + (bias if y.shape[-1] == len(bias) else bias.view(y.shape[-2:]))


def bias_names(module: nn.Module) -> list[str]:
    """Return the names of a module's biases: `bias`, `in_proj_bias`, `bias_ih_l0`, ..., and the biases of experts."""
    of_experts = expert_biases(module)
    return [
        name
        for name, parameter in module._parameters.items()
        if parameter is not None and "bias" in name.split("_") and (parameter.dim() == 1 or name in of_experts)
    ]


def selected(model: nn.Module, config: BitFitConfig, architecture: Architecture) -> dict[str, nn.Module]:
    """Return the selected modules by path. Each has a bias or gets one."""
    pattern = target_modules = config.target_modules
    if pattern == ALL:
        target_modules = ".*"
    elif pattern == QUERY_INTERMEDIATE:
        target_modules = query_and_intermediate(model, architecture)
    modules = targets.select_by(
        config,
        model,
        architecture,
        target_modules=target_modules,
        supported=lambda module: bool(bias_names(module)) or targets.is_linear(module),
        own_parameters=True,
    )
    without_bias = {path: module for path, module in modules.items() if not bias_names(module)}
    if pattern == ALL:
        heads = {architecture.output_head, *architecture.task_heads}
        skipped = heads & without_bias.keys() if config.add_missing else without_bias.keys()
        modules = {path: module for path, module in modules.items() if path not in skipped}
    if not modules or (without_bias and not config.add_missing and pattern != ALL):
        raise PeftcoreError(
            f"{type(model).__name__} lacks biases to train: target_modules={pattern!r} selects {len(without_bias)} "
            f"linear layers without one, such as '{next(iter(without_bias), None)}'. Use add_missing=True to add "
            "biases that start at zero"
        )
    return modules


def query_and_intermediate(model: nn.Module, architecture: Architecture) -> list[str]:
    """Return the paths of the query projections and of the first feed-forward layers."""
    attention = [sublayer for sublayer in architecture.sublayers if sublayer.kind == "attention"]
    queries = [sublayer.query for sublayer in attention if sublayer.query is not None]
    inner = list(itertools.chain.from_iterable(sublayer.inner for sublayer in architecture.sublayers))
    fused = len(queries) < len(attention)
    if not queries or not inner or fused:
        reason = "queries share a layer with keys and values" if fused else "its attention layers are not known"
        raise PeftcoreError(
            f"target_modules='{QUERY_INTERMEDIATE}' cannot be resolved for {type(model).__name__}: {reason}. "
            "Name the modules, as in target_modules=['q_proj', 'fc1'] (GPT-2: ['c_attn', 'c_fc'])"
        )
    return [*queries, *inner]


def place(model: nn.Module, config: BitFitConfig, architecture: Architecture) -> list[Placement]:
    modules = selected(model, config, architecture)
    trained_names: list[str] = []
    placements: list[Any] = []
    for path, module in modules.items():
        names = bias_names(module)
        if names:
            trained_names += [f"{path}.{name}" if path else name for name in names]
        else:
            placements.append(After(path, AddedBias(targets.sizes(module)[1])))
    return [*placements, Train(tuple(trained_names))]


@hookimpl
def peftcore_methods() -> list[Method]:
    return [Method("bitfit", BitFitConfig, place, StateRules(peft_type="BITFIT"), learning_rate=3e-3)]
