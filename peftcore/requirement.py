"""Check of what a plugin's distribution requires of peftcore: pip warns of a conflict, and installs both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet


def unmet(requirements: Iterable[str], version: str) -> str | None:
    """Return the first specifier, such as `>=99`, that peftcore of this version does not meet, or None.

    A pre-release counts as the release that it precedes.
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
    """Return the range of versions that a text such as `>=3.0,<4` names.

    Raises:
        ValueError: it is not such a text, or names no limit.
    """
    from packaging.specifiers import SpecifierSet

    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"a range of versions is a text such as '>=3.0,<4', found {text!r}")
    return SpecifierSet(text)
