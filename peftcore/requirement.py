"""Check of what a plugin's distribution requires of peftcore: pip warns of a conflict, and installs both."""

from __future__ import annotations

from collections.abc import Iterable


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
