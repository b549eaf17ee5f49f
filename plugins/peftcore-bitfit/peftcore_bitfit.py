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

All biases are trained, or only those of the queries and of the feed-forward's inner layer, which change most
(section 4.3). A layer without a bias can be given one that starts at zero. Trained biases of the base merge; added
biases have no parameter in the base and do not.
"""

from __future__ import annotations

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
    """Choice of the biases that are trained.

    Args:
        target_modules: "all" modules with a bias (norms too); "query-intermediate", the paper's subset: the
            projection to queries and the feed-forward's layer to its inner size (b_q and b_m2); or a list of
            suffixes or a regular expression, see `peftcore.model.targets.select`.
        exclude_modules, layers_to_transform, layers_pattern: see `peftcore.model.targets.select`.
        add_missing: add a bias, zero at the start, to chosen linear layers without one ("all": every linear layer
            but the output head and the task's heads).
        modules_to_save: modules that are also trained, in full. None: a classifier's head.
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
        """Return the config with choices that depend on the model made explicit, so that it means the same anywhere."""
        if self.target_modules != QUERY_INTERMEDIATE:
            return self
        chosen = selected(model, self, architecture)
        return replace(self, target_modules=targets.minimal_suffixes(model, chosen))


class AddedBias(Adapter):
    """Bias b added to the output of a layer without one: `[..., out]`, or `[..., groups, out / groups]`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, y: Tensor) -> Tensor:
        bias = self.bias.to(y.dtype)
        return y + (bias if y.shape[-1] == len(bias) else bias.view(y.shape[-2:]))


def bias_names(module: nn.Module) -> list[str]:
    """Return the names of the module's biases: `bias`, `in_proj_bias`, `bias_ih_l0`, ..., and those of experts."""
    of_experts = expert_biases(module)
    return [
        name
        for name, parameter in module._parameters.items()
        if parameter is not None and "bias" in name.split("_") and (parameter.dim() == 1 or name in of_experts)
    ]


def selected(model: nn.Module, config: BitFitConfig, architecture: Architecture) -> dict[str, nn.Module]:
    """Return the modules that the config selects, by path; each has a bias or is to be given one."""
    pattern = wanted = config.target_modules
    if pattern == ALL:
        wanted = ".*"
    elif pattern == QUERY_INTERMEDIATE:
        wanted = query_and_intermediate(model, architecture)
    chosen = targets.select_by(
        config,
        model,
        architecture,
        target_modules=wanted,
        supported=lambda module: bool(bias_names(module)) or targets.is_linear(module),
        own_parameters=True,
    )
    missing = {path: module for path, module in chosen.items() if not bias_names(module)}
    if pattern == ALL:
        heads = {architecture.output_head, *architecture.task_heads}
        dropped = heads & missing.keys() if config.add_missing else missing.keys()
        chosen = {path: module for path, module in chosen.items() if path not in dropped}
    if not chosen or (missing and not config.add_missing and pattern != ALL):
        raise PeftcoreError(
            f"{type(model).__name__} lacks biases to train: target_modules={pattern!r} selects {len(missing)} linear "
            f"layers without one, such as '{next(iter(missing), None)}'. Use add_missing=True to add biases that start "
            "at zero"
        )
    return chosen


def query_and_intermediate(model: nn.Module, architecture: Architecture) -> list[str]:
    """Return the paths of the paper's subset."""
    attention = [sublayer for sublayer in architecture.sublayers if sublayer.kind == "attention"]
    queries = [sublayer.query for sublayer in attention if sublayer.query is not None]
    inner = [path for sublayer in architecture.sublayers for path in sublayer.inner]
    fused = len(queries) < len(attention)
    if not queries or not inner or fused:
        why = "queries share a layer with keys and values" if fused else "the layers' parts are not known"
        raise PeftcoreError(
            f"target_modules='{QUERY_INTERMEDIATE}' cannot be resolved for {type(model).__name__}: {why}. "
            "Name the modules, as in target_modules=['q_proj', 'fc1'] (GPT-2: ['c_attn', 'c_fc'])"
        )
    return [*queries, *inner]


def place(model: nn.Module, config: BitFitConfig, architecture: Architecture) -> list[Placement]:
    chosen = selected(model, config, architecture)
    trained = [f"{path}.{name}" if path else name for path, module in chosen.items() for name in bias_names(module)]
    placements: list[Any] = [
        After(path, AddedBias(targets.sizes(module)[1])) for path, module in chosen.items() if not bias_names(module)
    ]
    placements.append(Train(tuple(trained)))
    return placements


@hookimpl
def peftcore_methods() -> list[Method]:
    return [Method("bitfit", BitFitConfig, place, StateRules(peft_type="BITFIT"), learning_rate=3e-3)]
