"""Format sizes, shares and counts for output."""

from __future__ import annotations

from collections.abc import Mapping


def megabytes(size: float) -> str:
    """Format bytes like `12.3 MB` (decimal), or in kB below 1 MB."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def gigabytes(count: float) -> str:
    """Format bytes like `1.23 GB` (decimal)."""
    return f"{count / 1e9:.2f} GB"


def share(count: int, total: int) -> str:
    """Return a percentage such as `1.23 %`."""
    return f"{100 * count / total:.2f} %" if total else "-"


def format_counts(kinds: Mapping[str, int]) -> str:
    """Format counts by kind, such as `2 x norm, 1 x MLP`."""
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
