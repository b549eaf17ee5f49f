"""A digest of the extension's sources, by which a binary that was built from others is known."""

from __future__ import annotations

import hashlib
from pathlib import Path

SUFFIXES = {".cpp", ".h", ".cu", ".cuh"}


def digest(csrc: Path) -> str:
    """Return a hash of the names and contents of all sources in `csrc`; empty if there are none, as in a wheel."""
    files = sorted(path for path in csrc.rglob("*") if path.suffix in SUFFIXES)
    found = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        found.update(f"{path.relative_to(csrc).as_posix()} {len(content)}\n".encode() + content)
    return found.hexdigest()[:16] if files else ""
