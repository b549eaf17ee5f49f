"""Discovery of installed plugins through their entry points, without importing them."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from peftcore.plugin.checks import canonical

if TYPE_CHECKING:  # imported on first use, because the command line looks up commands before PyTorch is loaded
    from peftcore.plugin.method import Method

GROUP = "peftcore"
CHOSEN = "PEFTCORE_PLUGINS"  # `none`, or the names of the plugins that may be imported, separated by commas


@dataclass
class Plugin:
    """One installed plugin: its distribution, the methods and hooks it provides, or why it cannot be used."""

    name: str
    distribution: str = "-"
    version: str = "-"
    hooks: list[str] = field(default_factory=list)
    methods: list[Method] = field(default_factory=list)
    error: str | None = None

    def __str__(self) -> str:
        """Return the name and version of the plugin, for error messages."""
        return self.name if self is CORE else f"the plugin '{self.name}' ({self.distribution} {self.version})"


CORE = Plugin("peftcore")  # owner of the built-in hooks


def installed() -> dict[str, list[EntryPoint]]:
    """Return the entry points of all plugins by canonical name; of several with one name, the first is used."""
    by_name: dict[str, list[EntryPoint]] = defaultdict(list)
    for entry_point in entry_points(group=GROUP):
        entry_points_of_name = by_name[canonical(entry_point.name)]
        if _identity(entry_point) not in map(_identity, entry_points_of_name):
            entry_points_of_name.append(entry_point)
    for candidates in by_name.values():
        # Stable sort: for equal keys the first on sys.path wins, as for modules
        candidates.sort(key=_has_other_distribution)
    return by_name


def chosen() -> list[str] | None:
    """Return the names of the plugins that may be imported, or None for all."""
    value = os.environ.get(CHOSEN)
    if value is None or not value.strip():
        return None
    names = [name.strip() for name in value.split(",") if name.strip()]
    return [] if names == ["none"] else names


def _identity(entry_point: EntryPoint) -> tuple[str, str, str | None]:
    return entry_point.name, entry_point.value, entry_point.dist.name if entry_point.dist else None


def _has_other_distribution(entry_point: EntryPoint) -> bool:
    """Return whether the distribution does not have the documented name `peftcore-<name>`."""
    distribution = canonical(entry_point.dist.name) if entry_point.dist else ""
    return distribution != canonical(f"peftcore-{entry_point.name}")


def owner(entry_point: EntryPoint, name: str) -> str:
    """Return `DISTRIBUTION VERSION`, with the entry point's name if it is spelt differently."""
    owner = f"{entry_point.dist.name} {entry_point.dist.version}" if entry_point.dist else "an unknown distribution"
    return owner if entry_point.name == name else f"{owner} (as '{entry_point.name}')"


def method_names() -> list[str]:
    """Return the names of installed methods, sorted, without importing their packages."""
    # A method has the same name as its entry point.
    points = entry_points(group=GROUP)
    return sorted({point.name for point in points if mentions(point, "peftcore_methods")})


def mentions(entry_point: EntryPoint, hook: str) -> bool:
    """Return whether a plugin's source mentions the hook, without importing it; True if it cannot be read."""
    try:
        spec = find_spec(entry_point.module)
        return spec is None or spec.origin is None or hook in Path(spec.origin).read_text(encoding="utf-8")
    except Exception:  # a broken plugin may raise anything; its import reports it
        return True
