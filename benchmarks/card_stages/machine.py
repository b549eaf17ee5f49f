"""The machine: required packages, wheels brought to it, its GPU, and environments of subprocesses."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Packages that building and importing peftcore need.
REQUIREMENTS = ("torch", "setuptools", "ninja", "pybind11", "pluggy", "packaging", "safetensors")

# The report lists the versions of these packages.
VERSIONS = ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "setuptools")

SETUPTOOLS = 77  # earlier releases cannot read the license in pyproject.toml


def carried(folder: Path) -> list[str]:
    """Return wheels of pure Python in a folder, which Python imports without installing them."""
    return [str(path) for path in sorted(folder.glob("*-none-any.whl"))]


def environment(wheels: Path) -> dict[str, str]:
    """Return the environment of subprocesses, which can import the checkout, wheels, and unpacked packages."""
    paths = [ROOT / "tests", ROOT, ROOT / "benchmarks", *carried(wheels), wheels, os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(str(path) for path in paths if str(path))}


def use(wheels: Path) -> None:
    """Let this process import wheels and unpacked packages, in preference to installed ones, as subprocesses do."""
    sys.path[:0] = [path for path in (*carried(wheels), str(wheels)) if path not in sys.path]


def missing(wheels: Path) -> list[str]:
    """Return required packages that are missing or too old, in this Python and in the wheels."""
    use(wheels)
    packages = [package for package in REQUIREMENTS if importlib.util.find_spec(package) is None]
    if "setuptools" not in packages and int(metadata.version("setuptools").partition(".")[0]) < SETUPTOOLS:
        packages.append(f"setuptools>={SETUPTOOLS}")
    return packages


def headers_missing() -> str:
    """Return where Python.h should be, if it is not there, or an empty string."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.exists() else f"{header} not found. Install Python's headers, such as the package python3-dev"


def build_obstacle(wheels: Path, arch: str) -> str:
    """Return why the extension cannot be built here and what to do, or an empty string."""
    if packages := missing(wheels):
        return how_to_carry(packages, wheels)
    if reason := headers_missing():
        return reason
    if not arch:
        return "neither nvidia-smi nor PyTorch sees a GPU. Without one: --emulator"
    return ""


def how_to_carry(packages: list[str], wheels: Path) -> str:
    names = " ".join(f'"{name}"' if ">" in name else name for name in packages)
    return (
        f"{names} not found. On a machine with a network, run pip download --no-deps -d wheels {names}, and copy the "
        f"folder to {wheels}. Pure Python wheels are imported from there; install others with pip install --no-index "
        "--find-links"
    )


def lines(*command: str) -> list[str]:
    """Return the lines that a command prints; none if it fails or does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def facts(wheels: Path) -> dict[str, str]:
    """Return the report's facts about the machine, without importing PyTorch."""
    use(wheels)
    query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit,compute_cap"
    card = (lines("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader") or [""])[0].split(", ")
    gpu = dict(zip(query.split(","), card, strict=False)) if len(card) > 1 else {"name": "none"}
    return {
        "card": gpu.pop("name"),
        **gpu,
        "python": platform.python_version(),
        "processor": f"{os.cpu_count()} cores, {platform.machine()}",
        **{name: _version(name) for name in VERSIONS},
        "nvcc": next((line.strip() for line in lines("nvcc", "--version") if "release" in line), "not found"),
        "commit": (lines("git", "-C", str(ROOT), "describe", "--always", "--dirty") or ["unknown"])[0],
    }


def tool(name: str) -> str | None:
    """Return the path of one of NVIDIA's tools, which are not always on PATH."""
    folders = (f"usr/local/cuda*/bin/{name}", f"opt/nvidia/*/*/{name}")
    installed = (str(path) for pattern in folders for path in Path("/").glob(pattern))
    return shutil.which(name) or next(installed, None)


def architecture() -> str:
    """Return the first GPU's architecture in the form of PEFTCORE_CUDA_ARCHS, or an empty string without a GPU."""
    output = lines("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    if not output:  # containers may lack nvidia-smi
        output = lines(sys.executable, "-c", "import torch; print(*torch.cuda.get_device_capability(), sep='')")
    return output[0].strip().replace(".", "") if output else ""
