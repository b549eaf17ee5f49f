"""Errors in the code of a plugin, which name it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from peftcore.errors import PeftcoreError, PluginError
from peftcore.plugin.discovery import CHOSEN, Plugin

if TYPE_CHECKING:  # imported when first used: the command line asks for commands before PyTorch is loaded
    from peftcore.plugin.method import WeightFormat


def _advice(plugin: Plugin) -> str:
    return f"Upgrade or uninstall it, or list the plugins to use without '{plugin.name}': {CHOSEN}=NAME,NAME"


def _with_plugin(hook: str, plugin: Plugin) -> str:
    return f"{hook} of {plugin}"


def failure(function: str, plugin: Plugin, error: BaseException) -> str:
    """Return the message that a function or hook of a plugin failed."""
    return f"{_with_plugin(function, plugin)} failed: {type(error).__name__}: {error}"


def failure_with_advice(function: str, plugin: Plugin, error: BaseException) -> str:
    """Return the message of `failure`, and how to do without the plugin."""
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
    """Return whether an error in a plugin's code stays as it is: peftcore's own, a warning, or lack of memory."""
    # PyTorch's error of lack of memory has this name on every device.
    return isinstance(error, (PeftcoreError, Warning, MemoryError)) or type(error).__name__ == "OutOfMemoryError"


def failed_at(module: Any, name: str, weight_format: str, plugin: Plugin, error: Exception) -> PluginError:
    """Return the error that the function `name` of a plugin's weight format failed for a module."""
    function = f"`{name}` of the weight format '{weight_format}'"
    return PluginError(
        f"{_with_plugin(function, plugin)} failed at {type(module).__name__}: {type(error).__name__}: {error}. "
        f"{_advice(plugin)}"
    )


def naming_plugin(plugin: Plugin, weight_format: WeightFormat) -> WeightFormat:
    """Return a plugin's format with errors of its functions that name the plugin.

    `matches` stays as it is: it runs for every module and every format, and `find_weight_format` names the plugin.
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
