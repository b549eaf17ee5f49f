"""Integrations with other libraries: patches that are applied when a model with adapters uses the library.

Importing peftcore does not patch anything; the first `apply` does. Packages add integrations through the hook
`peftcore_integrations`, and the core uses the same hook:

transformers            `saving`: `save_pretrained` writes adapters
transformers.trainer    `trainer`: `Trainer.__init__` and `Trainer.train` give a trainer the mixin for adapters
accelerate              `accelerate`: keeps adapters in memory when it offloads a model, where they would not train
peft                    `peft`: refuses a model with adapters, whose tensors it would save as its own
diffusers               `diffusers`: refuses calls that would ignore adapters, and `save_pretrained`
sentence_transformers   `saving`: refuses to save what it could not load
"""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from peftcore.plugin.discovery import Plugin
from peftcore.plugin.events import adapter_applied
from peftcore.plugin.extensions import Integration
from peftcore.plugin.hooks import hookimpl
from peftcore.plugin.registry import builtin, registry
from peftcore.training.integrations.late_import import when_imported

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

_awaited: set[str] = set()  # names of the integrations whose `on_import` has run or waits for its library


def _after_apply(model: nn.Module) -> None:
    """Run all integrations for `model`, which has adapters."""
    packages = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    for name, (plugin, integration) in registry.integrations().items():
        if integration.on_import is not None and name not in _awaited:
            when_imported(integration.library, partial(_run, plugin, f"{name}.on_import", integration.on_import))
            _awaited.add(name)
        if integration.on_apply is not None and integration.library.partition(".")[0] in packages:
            _run(plugin, f"{name}.on_apply", partial(integration.on_apply, model))


def _run(plugin: Plugin, label: str, function: Callable[[], object]) -> None:
    with registry.naming(plugin, label):
        function()


def _import(module: str) -> None:
    import_module(f"peftcore.training.integrations.{module}")


def _call(module: str, function: str, *args: nn.Module) -> None:
    getattr(import_module(f"peftcore.training.integrations.{module}"), function)(*args)


@hookimpl
def peftcore_integrations() -> list[Integration]:
    """Return the integrations of the core."""
    return [
        Integration(
            name="transformers", library="transformers", on_apply=partial(_call, "saving", "patch_transformers")
        ),
        Integration(name="trainer", library="transformers.trainer", on_import=partial(_import, "trainer")),
        Integration(name="accelerate", library="accelerate.big_modeling", on_import=partial(_import, "accelerate")),
        Integration(name="peft", library="peft", on_import=partial(_import, "peft")),
        Integration(name="diffusers", library="diffusers", on_apply=partial(_call, "diffusers", "patch_model")),
        Integration(
            name="pipelines",
            library="diffusers.pipelines.pipeline_utils",
            on_import=partial(_call, "diffusers", "patch_pipelines"),
        ),
        Integration(
            name="sentence-transformers",
            library="sentence_transformers",
            on_apply=partial(_call, "saving", "patch_sentence_transformers"),
        ),
    ]


builtin(sys.modules[__name__])
adapter_applied.subscribe(_after_apply)
