"""Hooks of plugins. They run when a method is applied or a command starts, never in `forward`.

Packages of the core implement hooks as well (see `registry.builtin`). Hooks that return lists are also listed in
`registry.LISTS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import nn

    from peftcore.plugin.architecture import Architecture
    from peftcore.plugin.checkpoints import CheckpointFormat
    from peftcore.plugin.exporter import Exporter
    from peftcore.plugin.extensions import Command, Integration
    from peftcore.plugin.method import Method, WeightFormat

hookspec = pluggy.HookspecMarker("peftcore")
hookimpl = pluggy.HookimplMarker("peftcore")


@hookspec
def peftcore_methods() -> list[Method]:  # type: ignore[empty-body]  # a specification, never called
    """Return the fine-tuning methods of this plugin. Each method has the name of the plugin's entry point."""


@hookspec
def peftcore_weight_formats() -> list[WeightFormat]:  # type: ignore[empty-body]
    """Return formats of stored weights. Names must be unique. Plugins' formats are tried before the core's."""


@hookspec
def peftcore_checkpoint_formats() -> list[CheckpointFormat]:  # type: ignore[empty-body]
    """Return formats of 4-bit checkpoints. The name of each is the `quant_method` of its checkpoints."""


@hookspec
def peftcore_exporters() -> list[Exporter]:  # type: ignore[empty-body]
    """Return formats that `peftcore.export` and `peftcore export` write. Each has a name of its own."""


@hookspec
def peftcore_architecture(model: nn.Module) -> Architecture | None:
    """Return facts about a model of a family that the core cannot read; None for other models."""


@hookspec
def peftcore_commands() -> list[Command]:  # type: ignore[empty-body]
    """Return commands of the command line. Each has a name of its own."""


@hookspec
def peftcore_tasks() -> list[Any]:  # type: ignore[empty-body]
    """Return tasks of `peftcore train`, `eval` and `predict`: uniquely named `peftcore_cli.tasks.task.Task`s."""


@hookspec
def peftcore_integrations() -> list[Integration]:  # type: ignore[empty-body]
    """Return integrations with other libraries. Each has a name of its own."""
