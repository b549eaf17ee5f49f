"""Versions of the libraries and the extension, and facts about the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("peftcore", "torch", "transformers")


def versions() -> list[tuple[str, str]]:
    """Return (name, version) of the libraries, and of the extension including its SIMD level."""
    from peftcore.ops.build_info import build_info

    build = build_info()
    extension = (
        f"{build.version}, SIMD level {build.cpu_level}" if build.available else f"missing: {build.missing_because}"
    )
    if build.cuda_architectures:
        extension += f", CUDA {' '.join(build.cuda_architectures)}"
    return [*((name, _version(name)) for name in LIBRARIES), ("extension", extension)]


def machine() -> list[tuple[str, str]]:
    """Return (name, value) for Python and the operating system, the processor and the CUDA devices."""
    import torch

    counts = ((os.cpu_count(), "CPU"), (torch.get_num_threads(), "thread"))
    processor = ", ".join([_processor(), *(f"{n} {name}{'s' * (n != 1)}" for n, name in counts)])
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("processor", processor),
        *([("CUDA", f"{torch.version.cuda}: {', '.join(cards)}")] if cards else []),
    ]


def _version(name: str) -> str:
    if name == "torch":
        import torch

        return str(torch.__version__)  # with its build, such as 2.13.0+cpu
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """Return the processor's name from the system, because `platform.processor()` is often empty."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    model_name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return model_name or platform.processor() or platform.machine()
