"""Placement of bottlenecks."""

from __future__ import annotations

from typing import Any

from torch import nn

from peftcore.plugin import After, Architecture, Around, Placement, targets, validation
from peftcore_adapter import invertible
from peftcore_adapter.bottleneck import BehindNorm, Parallel, ParallelToResidual, Series
from peftcore_adapter.config import AdapterConfig
from peftcore_adapter.phm import Shared

SUBLAYERS = {
    "houlsby": {"attention", "feed_forward"},
    "pfeiffer": {"feed_forward"},
    "attention": {"attention"},
}


def at_module(model: nn.Module, path: str, config: AdapterConfig, widths: tuple[int, int], shared: Shared) -> Any:
    """Return the placement parallel to or after a module of these widths."""
    if config.is_parallel:
        return Around(path, Parallel(config, path, model.get_submodule(path), widths, shared))
    return After(path, Series(config, path, widths[1], shared=shared))


def of_sublayer(model: nn.Module, sublayer: Any, config: AdapterConfig, shared: Shared) -> Any:
    """Return the placement at one sublayer."""
    width = sublayer.width
    validation.require(
        not config.is_parallel or sublayer.whole is not None,
        f"is_parallel: no single module of {type(model).__name__} covers the sublayer that ends in "
        f"'{sublayer.output}'. Use is_parallel=False, or name a module: target_modules=[...]",
    )
    if config.is_parallel and sublayer.adds_residual:
        return Around(sublayer.whole, ParallelToResidual(config, sublayer.whole, width, shared=shared))
    if not config.original_ln_before:
        path = sublayer.whole if config.is_parallel else sublayer.output
        return at_module(model, path, config, (width, width), shared)
    if sublayer.norm is not None and config.original_ln_after:
        return Around(sublayer.norm, BehindNorm(config, sublayer.norm, width, shared=shared))
    behind = sublayer.norm or sublayer.stream
    validation.require(
        behind is not None,
        f"original_ln_before: no module of {type(model).__name__} returns the sum with the residual after "
        f"'{sublayer.output}'. Use placement='pfeiffer', or original_ln_before=False",
    )
    return After(behind, Series(config, behind, width, shared=shared))


def place(model: nn.Module, config: AdapterConfig, architecture: Architecture) -> list[Placement]:
    shared = Shared(config)
    around = invertible.placements(model, config, architecture) if config.inv_adapter else []
    if config.target_modules is None:
        kinds = SUBLAYERS[config.placement] | ({"cross_attention"} if config.cross_adapter else set())
        found = targets.sublayers(model, architecture, kinds, config.layers_to_transform)
        return around + [of_sublayer(model, sublayer, config, shared) for sublayer in found]
    chosen = targets.select_by(
        config, model, architecture, supported=lambda module: not isinstance(module, nn.ModuleList)
    )
    widths = {path: targets.widths(model, path, architecture) for path in chosen}
    return around + [at_module(model, path, config, widths[path], shared) for path in chosen]
