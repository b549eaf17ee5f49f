"""Loads peftcore._C, the compiled kernels. Without the extension, every operator runs its PyTorch reference."""

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
    """Return the folder `csrc` of a source checkout.

    In site-packages return None, since a `csrc` there may belong to another package.
    """
    return root / "csrc" if (root / "setup.py").exists() else None


def build_command(csrc: Path | None) -> str:
    """Return the command that builds the extension for the installed PyTorch, with or without a checkout."""
    pip = "pip install --no-build-isolation --no-deps --force-reinstall"
    if csrc is None:
        return f"{pip} --no-binary peftcore peftcore=={version('peftcore')}, with g++, ninja and pybind11"
    return f"in the folder of its source: {pip} . (or -e .)"


CSRC = sources_of_checkout(ROOT)
REBUILD = build_command(CSRC)


def read_record(path: Path) -> dict[str, Any]:
    """Return the record of the build, or an empty dict if it is missing or unreadable."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def minor_version(version: str) -> str:
    """Return the major and minor version of PyTorch; the C++ ABI is stable across patch releases."""
    match = re.match(r"\d+\.\d+", version)
    return match.group() if match else version


def reason_not_to_load(
    record: dict[str, Any], torch_version: str = torch.__version__, csrc: Path | None = CSRC
) -> tuple[str, bool]:
    """Return why not to load the recorded build and whether to warn about it, or ("", False) if it can be loaded.

    Args:
        record: contents of _build.json.
        torch_version: version of PyTorch that is running.
        csrc: the checkout's sources, from which the binary must have been built; None without a checkout.
    """
    if os.environ.get("PEFTCORE_EXT") == "0":
        return "switched off by PEFTCORE_EXT=0", False
    if not record:
        return f"it has not been built here. Build it: {REBUILD}", False
    if not record.get("built"):
        return f"it was not built: {record.get('reason', 'no reason recorded')}", False
    built_with = str(record.get("torch", "unknown"))
    if minor_version(built_with) != minor_version(torch_version):
        return (
            f"it was built with PyTorch {built_with}, but this is PyTorch {torch_version}. Rebuild it: {REBUILD}"
        ), True
    sources = "" if csrc is None else digest(csrc)
    if sources and record.get("sources") != sources:
        return f"it was not built from the current sources in {csrc}. Rebuild it: {REBUILD}", True
    return "", False


def load(record: dict[str, Any]) -> tuple[ModuleType | None, str]:
    """Return the extension, or None and the reason why it is not loaded."""
    reason, warn = reason_not_to_load(record)
    module = None
    if not reason:
        try:
            module = importlib.import_module("peftcore._C")
        except ImportError as error:
            reason, warn = f"it failed to load: {error}. Rebuild it: {REBUILD}", True
        else:
            try:
                module.cpu_level()  # reads PEFTCORE_CPU_LEVEL now, so that a wrong value fails at import
            except ValueError as error:
                raise ValueError(
                    f"invalid PEFTCORE_CPU_LEVEL: {error}. Set it to one of these levels, or unset it"
                ) from None
    if warn:
        warnings.warn(f"peftcore runs without its compiled extension: {reason}", RuntimeWarning, stacklevel=2)
    return module, reason


record = read_record(ROOT / "peftcore" / "_build.json")
extension: Any  # the module, or None
extension, missing_because = load(record)

# Device types on which functions call the operator. On others they use plain formulas, since the operator's reference
# would make fp32 copies. Meta tensors count as CPU tensors.
KERNEL_DEVICES: tuple[str, ...] = ("cpu", "meta")
if extension is not None and extension.build_facts()["cuda_architectures"]:
    KERNEL_DEVICES += ("cuda",)
