"""Where bottlenecks are placed in a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from peftcore.plugin import After, Architecture, Around, Placement, targets, validation
from peftcore_adapter import invertible
from peftcore_adapter.bottleneck import AfterNorm, Parallel, ParallelToResidual, Series
from peftcore_adapter.config import AdapterConfig
from peftcore_adapter.phm import Shared

SUBLAYERS = {
    "houlsby": {"attention", "feed_forward"},
    "pfeiffer": {"feed_forward"},
    "attention": {"attention"},
}


def place_at_module(model: nn.Module, path: str, config: AdapterConfig, widths: tuple[int, int], shared: Shared) -> Any:
    """Return the placement parallel to or after a module with these input and output widths."""
    if config.is_parallel:
        return Around(path, Parallel(config, path, model.get_submodule(path), widths, shared))
    return After(path, Series(config, path, widths[1], shared=shared))


def place_at_sublayer(model: nn.Module, sublayer: Any, config: AdapterConfig, shared: Shared) -> Any:
    """Return the placement of a sublayer's bottleneck."""
    width = sublayer.width
    validation.require(
        not config.is_parallel or sublayer.whole is not None,
        f"is_parallel=True needs a module around the whole sublayer that ends in '{sublayer.output}', but "
        f"{type(model).__name__} has none. Use is_parallel=False, or name a module: target_modules=[...]",
    )
    if config.is_parallel and sublayer.adds_residual:
        return Around(sublayer.whole, ParallelToResidual(config, sublayer.whole, width, shared=shared))
    if not config.original_ln_before:
        path = sublayer.whole if config.is_parallel else sublayer.output
        return place_at_module(model, path, config, (width, width), shared)
    if sublayer.norm is not None and config.original_ln_after:
        return Around(sublayer.norm, AfterNorm(config, sublayer.norm, width, shared=shared))
    module_path = sublayer.norm or sublayer.stream
    validation.require(
        module_path is not None,
        f"original_ln_before=True: no module of {type(model).__name__} returns the sum with the residual after "
        f"'{sublayer.output}'. Use placement='pfeiffer', or original_ln_before=False",
    )
    return After(module_path, Series(config, module_path, width, shared=shared))


def place(model: nn.Module, config: AdapterConfig, architecture: Architecture) -> list[Placement]:
    shared = Shared(config)
    invertible_placements = invertible.placements(model, config, architecture) if config.inv_adapter else []
    if config.target_modules is None:
        kinds = SUBLAYERS[config.placement] | ({"cross_attention"} if config.cross_adapter else set())
        sublayers = targets.sublayers(model, architecture, kinds, config.layers_to_transform)
        return invertible_placements + [place_at_sublayer(model, sublayer, config, shared) for sublayer in sublayers]
    paths = targets.select_by(
        config, model, architecture, supported=lambda module: not isinstance(module, nn.ModuleList)
    )
    widths = {path: targets.widths(model, path, architecture) for path in paths}
    return invertible_placements + [place_at_module(model, path, config, widths[path], shared) for path in paths]
