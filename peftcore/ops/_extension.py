"""Loading of peftcore._C, the compiled kernels; without it every operator runs on its PyTorch reference."""

from __future__ import annotations

import importlib
import json
import os
import re
import warnings
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from peftcore.ops._sources import digest

ROOT = Path(__file__).resolve().parents[2]


def sources_of_checkout(root: Path) -> Path | None:
    """Return the folder `csrc` of a checkout; None in site-packages, where it may belong to another package."""
    return root / "csrc" if (root / "setup.py").exists() else None


def how_to_build(csrc: Path | None) -> str:
    """Return the command that builds the extension for the installed PyTorch, with or without a checkout."""
    pip = "pip install --no-build-isolation --no-deps --force-reinstall"
    if csrc is None:
        return f"{pip} --no-binary peftcore peftcore=={version('peftcore')}, with g++, ninja and pybind11"
    return f"in the folder of its source: {pip} . (or -e .)"


CSRC = sources_of_checkout(ROOT)
REBUILD = how_to_build(CSRC)


def read_record(path: Path) -> dict[str, Any]:
    """Return the record of the build; empty if there is none or it cannot be read."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def release(version: str) -> str:
    """Return major and minor of a PyTorch version, within which the C++ interface is stable."""
    match = re.match(r"\d+\.\d+", version)
    return match.group() if match else version


def why_not(
    record: dict[str, Any], torch_version: str = torch.__version__, csrc: Path | None = CSRC
) -> tuple[str, bool]:
    """Return why the recorded build must not be loaded, and whether to warn; ("", False) if it may be loaded.

    In a checkout with sources (`csrc`) the binary must have been built from them.
    """
    if os.environ.get("PEFTCORE_EXT") == "0":
        return "switched off by PEFTCORE_EXT=0", False
    if not record:
        return f"it was never built here. Build it: {REBUILD}", False
    if not record.get("built"):
        return f"it was not built: {record.get('reason', 'no reason recorded')}", False
    built_with = str(record.get("torch", "unknown"))
    if release(built_with) != release(torch_version):
        return f"it was built with PyTorch {built_with}, this is {torch_version}. Rebuild it: {REBUILD}", True
    sources = "" if csrc is None else digest(csrc)
    if sources and record.get("sources") != sources:
        return f"it was built from other sources than those in {csrc}. Rebuild it: {REBUILD}", True
    return "", False


def load(record: dict[str, Any]) -> tuple[ModuleType | None, str]:
    """Return (module or None, reason)."""
    reason, warn = why_not(record)
    module = None
    if not reason:
        try:
            module = importlib.import_module("peftcore._C")
        except ImportError as error:
            reason, warn = f"it does not load: {error}. Rebuild it: {REBUILD}", True
        else:
            try:
                module.cpu_level()  # reads PEFTCORE_CPU_LEVEL: here, not in the first operator
            except ValueError as error:
                raise ValueError(f"PEFTCORE_CPU_LEVEL: {error}. Set one of these, or unset it") from None
    if warn:
        warnings.warn(f"peftcore runs without its compiled extension: {reason}", RuntimeWarning, stacklevel=2)
    return module, reason


record = read_record(ROOT / "peftcore" / "_build.json")
extension: Any  # the module, or None
extension, missing_because = load(record)

# Types of devices on which an operator is called even where its reference would take fp32 copies: those that this build
# has kernels for, and meta tensors, which are treated as on a CPU.
KERNEL_DEVICES: tuple[str, ...] = ("cpu", "meta")
if extension is not None and extension.build_facts()["cuda_architectures"]:
    KERNEL_DEVICES += ("cuda",)
