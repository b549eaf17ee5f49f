"""The whole contract of a plugin: four hooks, called when plugins are found or a method is applied, never later."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import nn

    from peftcore.architecture import Architecture
    from peftcore.method import Method, WeightFormat

hookspec = pluggy.HookspecMarker("peftcore")
hookimpl = pluggy.HookimplMarker("peftcore")


@hookspec
def peftcore_methods() -> list[Method]:  # type: ignore[empty-body]  # a specification, never called
    """Return the fine-tuning methods of this plugin. Each method has the name of the plugin's entry point."""


@hookspec
def peftcore_weight_formats() -> list[WeightFormat]:  # type: ignore[empty-body]
    """Return formats that read and write stored weights of modules whose weight is not a plain dense tensor."""


@hookspec(firstresult=True)
def peftcore_architecture(model: nn.Module) -> Architecture | None:
    """Return facts about a model family that `peftcore.observation.detect` cannot see; None for other models."""


@hookspec
def peftcore_commands(app: Any) -> None:
    """Add commands to the command line: `app` is the `typer.Typer` of `peftcore`."""
