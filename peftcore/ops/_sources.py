"""Hash of the extension's sources, to detect a stale binary."""

from __future__ import annotations

import hashlib
from pathlib import Path

SUFFIXES = {".cpp", ".h", ".cu", ".cuh"}


def digest(csrc: Path) -> str:
    """Return a hash of the names and contents of all sources in `csrc`; empty if there are none, as in a wheel."""
    files = sorted(path for path in csrc.rglob("*") if path.suffix in SUFFIXES)
    hasher = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        hasher.update(f"{path.relative_to(csrc).as_posix()} {len(content)}\n".encode() + content)
    return hasher.hexdigest()[:16] if files else ""
