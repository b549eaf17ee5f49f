"""Errors in a plugin's code, reported with the plugin's name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from peftcore.errors import PeftcoreError, PluginError
from peftcore.plugin.discovery import CHOSEN, Plugin

if TYPE_CHECKING:  # imported on first use, because the command line looks up commands before PyTorch is loaded
    from peftcore.plugin.method import WeightFormat


def _advice(plugin: Plugin) -> str:
    return f"Upgrade or uninstall the plugin, or list the plugins to use without '{plugin.name}': {CHOSEN}=NAME,NAME"


def _with_plugin(hook: str, plugin: Plugin) -> str:
    return f"{hook} of {plugin}"


def failure(function: str, plugin: Plugin, error: BaseException) -> str:
    """Return the error message for a failed function or hook of a plugin."""
    return f"{_with_plugin(function, plugin)} failed: {type(error).__name__}: {error}"


def failure_with_advice(function: str, plugin: Plugin, error: BaseException) -> str:
    """Return the message of `failure`, with advice on how to continue without the plugin."""
    return f"{failure(function, plugin, error)}. {_advice(plugin)}"


def all_are(kind: type, plugin: Plugin, hook: str, answers: Any) -> list[Any]:
    """Return the result of a hook if it is a list of `kind`, else raise a PluginError."""
    for answer in answers if isinstance(answers, (list, tuple)) else [answers]:
        if not isinstance(answer, kind):
            module = "peftcore.plugin" if kind.__module__.startswith("peftcore.plugin.") else kind.__module__
            raise PluginError(
                f"{_with_plugin(hook, plugin)} must return a list of {module}.{kind.__name__}, found "
                f"{type(answer).__name__}. {_advice(plugin)}"
            )
    return list(answers)


def is_passed_on(error: BaseException) -> bool:
    """Return whether an error in a plugin's code is not wrapped: peftcore's errors, warnings, and out of memory."""
    # PyTorch's out-of-memory error has this name on every device.
    return isinstance(error, (PeftcoreError, Warning, MemoryError)) or type(error).__name__ == "OutOfMemoryError"


def failed_at(module: Any, name: str, weight_format: str, plugin: Plugin, error: Exception) -> PluginError:
    """Return the error for a failure of the function `name` of a plugin's weight format."""
    function = f"`{name}` of the weight format '{weight_format}'"
    return PluginError(
        f"{_with_plugin(function, plugin)} failed at {type(module).__name__}: {type(error).__name__}: {error}. "
        f"{_advice(plugin)}"
    )


def naming_plugin(plugin: Plugin, weight_format: WeightFormat) -> WeightFormat:
    """Wrap the functions of a plugin's weight format, so that their errors name the plugin.

    `matches` is not wrapped: it runs for every module and every format, and `find_weight_format` names the plugin.
    """

    def reporting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: Any, *arguments: Any) -> Any:
            try:
                return function(module, *arguments)
            except Exception as error:
                if is_passed_on(error):
                    raise
                raise failed_at(module, name, weight_format.name, plugin, error) from error

        return call

    functions = {name: getattr(weight_format, name) for name in _OF_FORMATS}
    changes: dict[str, Any] = {
        name: reporting(name, function) for name, function in functions.items() if function is not None
    }
    of_parameter = weight_format.for_parameter
    if of_parameter is not None:
        changes["for_parameter"] = lambda name: naming_plugin(plugin, of_parameter(name))
    return dataclasses.replace(weight_format, **changes)


_OF_FORMATS = ("read", "write", "read_bias", "write_bias", "decode", "plain", "update_config")
