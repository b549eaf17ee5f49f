"""Checks of a plugin: its requirements, its range of plugin APIs, its hooks, and its methods."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pluggy

from peftcore.errors import PluginError, nearest
from peftcore.plugin import hooks as hookspecs

API = "3.10"  # version of the plugin API: an addition raises the minor number, an incompatible change the major number
ARGUMENTS_OF_APPLY = ("adapter", "dtype", "batches")  # keywords of `apply`, which cannot be names of config fields


def canonical(name: str) -> str:
    """Return a name normalised like package names: `My_Method` and `my.method` become `my-method`."""
    return re.sub("[-_.]+", "-", name).lower()


def list_of_methods(answer: Any) -> Sequence[Any]:
    """Return the result of a `peftcore_methods` hook, or raise a PluginError unless it is a list."""
    if not isinstance(answer, (list, tuple)):
        raise PluginError(
            f"peftcore_methods() must return a list of peftcore.plugin.Method objects, found {type(answer).__name__}"
        )
    return answer


def _is_frozen(config_class: Any) -> bool:
    return bool(config_class.__dataclass_params__.frozen)


def check_method(plugin: str, method: Any) -> None:
    """Raise a PluginError unless `method` is a usable `Method` of the plugin with this name."""
    from peftcore.plugin.method import Method

    if not isinstance(method, Method):
        raise PluginError(
            f"peftcore_methods() must return peftcore.plugin.Method objects, found {type(method).__name__}"
        )
    if canonical(method.name) != canonical(plugin):
        raise PluginError(
            f"the method is named '{method.name}', but its entry point is named '{plugin}'. Give both the same name"
        )
    config_class = method.config_class
    if not (dataclasses.is_dataclass(config_class) and _is_frozen(config_class)):
        raise PluginError(f"config_class {config_class!r} must be a frozen dataclass")
    names = [f.name for f in dataclasses.fields(config_class)]
    for name in ARGUMENTS_OF_APPLY:
        if name in names:
            raise PluginError(
                f"{config_class.__name__} has a field '{name}', which is an argument of peftcore.apply and would "
                "never reach the config. Rename the field"
            )
    peft_type = method.state.peft_type
    if not isinstance(peft_type, str) or not peft_type:
        raise PluginError(
            "StateRules.peft_type must be a non-empty string, because load recognizes the method's files by it, "
            f"found {peft_type!r}"
        )
    for name in method.state.peft.own_fields:
        if name not in names:
            raise PluginError(
                f"PeftRules.own_fields names '{name}', which is not a field of {config_class.__name__}"
                f"{nearest(name, names)}"
            )


def check_requirement(distribution: Any) -> None:
    """Raise a PluginError unless the distribution accepts this version of peftcore."""
    current = version("peftcore")
    unmet_range = unmet(getattr(distribution, "requires", None) or (), current)
    if unmet_range is not None:
        raise PluginError(
            f"it needs peftcore{unmet_range}, but peftcore {current} is installed. Upgrade the older of the two"
        )


def check_api(plugin: Any) -> None:
    """Raise a PluginError unless the plugin's `peftcore_api`, a range of plugin APIs, contains the current API."""
    api_range = getattr(plugin, "peftcore_api", f"=={API}")
    try:
        specifier = specifiers(api_range)
    except ValueError as error:
        raise PluginError(
            f"peftcore_api must be the range of plugin APIs that the plugin supports, such as {_range()!r}, found "
            f"{api_range!r}"
        ) from error
    if API not in specifier:
        raise PluginError(
            f"it supports the plugin APIs {api_range}, but this peftcore has {API}. Upgrade the older of the two"
        )


def check_api_declared(plugin: Any) -> None:
    """Raise a PluginError if an installed plugin does not declare `peftcore_api`."""
    if not hasattr(plugin, "peftcore_api"):
        raise PluginError(
            f'it does not declare which plugin APIs it supports. Add a line to its module: peftcore_api = "{_range()}"'
        )


def _range() -> str:
    """Return the range that a plugin written for this API declares."""
    major = int(API.partition(".")[0])
    return f">={API},<{major + 1}"


def check_hook_names(manager: pluggy.PluginManager, name: str, plugin: Any) -> None:
    """Raise a PluginError for a misspelt hook, naming the nearest hook."""
    hook_names = [attribute for attribute in dir(hookspecs) if attribute.startswith("peftcore_")]
    for attribute in dir(plugin):
        if manager.parse_hookimpl_opts(plugin, attribute) is not None and attribute not in hook_names:
            raise PluginError(
                f"'{attribute}' is not a hook of peftcore{nearest(attribute, hook_names)}. The hooks are: "
                f"{', '.join(hook_names)}"
            )


if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet


def unmet(requirements: Iterable[str], version: str) -> str | None:
    """Return the first specifier, such as `>=99`, that this version of peftcore does not meet, or None.

    A pre-release counts as the release that follows it.
    """
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    release = Version(version).base_version
    for text in requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:  # another package's requirement in a non-standard form
            continue
        is_meant = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if canonicalize_name(requirement.name) == "peftcore" and is_meant and release not in requirement.specifier:
            return str(requirement.specifier)
    return None


def specifiers(text: object) -> SpecifierSet:
    """Parse a range of versions such as `>=3.0,<4`.

    Raises:
        ValueError: the text is not a range, or has no limit.
    """
    from packaging.specifiers import SpecifierSet

    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"expected a range of versions such as '>=3.0,<4', found {text!r}")
    return SpecifierSet(text)
