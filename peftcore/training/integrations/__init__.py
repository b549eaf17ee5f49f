"""Integrations with other libraries: patches, applied when adapters meet the library.

The core's own are in `core_integrations`; packages add theirs through the hook `peftcore_integrations`. Importing
peftcore patches nothing: the first `apply` does.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from peftcore.plugin.discovery import Plugin
from peftcore.plugin.events import adapter_applied
from peftcore.plugin.registry import builtin, registry
from peftcore.training.integrations import core_integrations
from peftcore.training.integrations.late_import import when_imported

if TYPE_CHECKING:
    from collections.abc import Callable

_awaited: set[str] = set()  # names of the integrations whose `on_import` has run or waits for its library


def _after_apply(model: Any) -> None:
    """Run the integrations that the adapter on `model` concerns."""
    packages = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    for name, (plugin, integration) in registry.integrations().items():
        if integration.on_import is not None and name not in _awaited:
            when_imported(integration.library, partial(_run, plugin, f"{name}.on_import", integration.on_import))
            _awaited.add(name)
        if integration.on_apply is not None and integration.library.partition(".")[0] in packages:
            _run(plugin, f"{name}.on_apply", partial(integration.on_apply, model))


def _run(plugin: Plugin, what: str, function: Callable[[], object]) -> None:
    with registry.naming(plugin, what):
        function()


builtin(core_integrations)
adapter_applied.subscribe(_after_apply)
