"""Does this peftcore fit what a plugin's distribution requires of it? pip only warns, and installs both.

Comparisons of release numbers are read, which is what `Requires-Dist: peftcore>=2` needs; pre-releases and
markers other than extras are not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_REQUIREMENT = re.compile(r"\s*peftcore\s*(?:\[[^]]*\])?\s*\(?([^;)]*)\)?\s*(;.*)?$", re.IGNORECASE)
_COMPARISON = re.compile(r"\s*(>=|<=|==|!=|~=|>|<)\s*v?(\d+(?:\.\d+)*)(\.\*)?\s*")


def unmet(requirements: Iterable[str], version: str) -> str | None:
    """The first of a distribution's requirements that peftcore of this version does not meet, such as `>=99`."""
    for requirement in requirements:
        found = _REQUIREMENT.match(requirement)
        if found and "extra" not in (found[2] or ""):
            for comparison in found[1].split(","):
                if not _fits(version, comparison):
                    return comparison.strip()
    return None


def _fits(version: str, comparison: str) -> bool:
    read = _COMPARISON.fullmatch(comparison)
    release = re.match(r"\d+(?:\.\d+)*", version)
    if read is None or release is None:
        return True
    operator, wanted, any_below = read[1], _numbers(read[2]), read[3] is not None
    found = _numbers(release[0])
    length = len(wanted) if any_below else max(len(wanted), len(found))
    a, b = ((numbers + [0] * length)[:length] for numbers in (found, wanted))
    return {
        ">=": a >= b,
        "<=": a <= b,
        "==": a == b,
        "!=": a != b,
        "~=": a >= b and a[: len(wanted) - 1] == b[: len(wanted) - 1],
        ">": a > b,
        "<": a < b,
    }[operator]


def _numbers(release: str) -> list[int]:
    return [int(part) for part in release.split(".")]
