"""`peftcore doctor`: check the installation, and print missing packages with the commands that install them."""

from __future__ import annotations

import importlib
import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING

from peftcore_cli import options
from peftcore_cli.console import NO_METHOD, out, say, table, warn

if TYPE_CHECKING:
    from peftcore.ops.build_info import BuildInfo

EXAMPLES = ("peftcore doctor",)

# Optional libraries, and the features that need them.
LIBRARIES = {
    "transformers": "train, eval, generate, merge and plan",
    "accelerate": "train",
    "matplotlib": "the loss curve in train's report",
    "psutil": "the memory figures of train",
    "gguf": ".gguf files as base models",
}


def doctor(as_json: options.Json = False) -> object:
    """Check the installation, without changing anything."""
    import torch

    from peftcore.ops.build_info import build_info

    build = build_info()
    problems: list[str] = []
    libraries, library_rows = _libraries(problems)
    methods = _methods(problems)
    problems += [f"costs: {cost}" for cost in build.costs]
    if not build.available:
        problems.append(
            "to build the extension: install a C++20 compiler and ninja, then from a source checkout "
            "pip install --no-build-isolation -e ."
        )
    if as_json:
        return {
            "peftcore": version("peftcore"),
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda if torch.cuda.is_available() else None,
            "cuda_devices": torch.cuda.device_count(),
            "threads": torch.get_num_threads(),
            "bf16": _has_bf16(),
            "extension": {**asdict(build), "out_of_reach": build.out_of_reach},
            "libraries": libraries,
            "methods": methods,
            "missing": problems,
        }
    cuda = f"{torch.version.cuda}, {torch.cuda.device_count()} devices" if torch.cuda.is_available() else "no device"
    table(
        [
            ("peftcore", version("peftcore")),
            ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
            ("PyTorch", torch.__version__),
            ("CUDA", cuda),
            ("threads", torch.get_num_threads()),
            ("bf16 instructions", "yes" if _has_bf16() else "no: --dtype auto uses fp32"),
            *_extension_rows(build),
            *library_rows,
            ("experts", _experts(build.available, build.cpu_level)),
            ("methods", ", ".join(methods) or "none"),
        ]
    )
    out.print()
    for line in problems:
        warn(line)
    if not problems:
        say("nothing is missing", "green")
    return None


def _extension_rows(build: BuildInfo) -> list[tuple[str, str]]:
    """Describe the compiled extension."""
    if not build.available:
        return [("extension", f"missing: {build.missing_because}")]
    unavailable_kernels = ", ".join(build.out_of_reach) or "none: this machine runs all kernels that were built"
    return [
        ("extension", "works"),
        ("  built from", f"{build.version}, commit {build.commit}"),
        ("  compiler", build.compiler),
        ("  built with PyTorch", build.torch_built_with),
        ("  SIMD level", f"{build.cpu_level} (this CPU can: {', '.join(build.cpu_levels)})"),
        ("  CUDA", ", ".join(build.cuda_architectures) or f"none: {build.cuda_missing_because}"),
        ("  unavailable kernels", unavailable_kernels),
        ("  caches", ", ".join(f"{size >> 10:,} KiB" for size in build.caches)),
    ]


def _libraries(problems: list[str]) -> tuple[dict[str, str | None], list[tuple[str, str]]]:
    """Return {library: version, or None if it is missing} and rows to show; add missing libraries to `problems`."""
    versions: dict[str, str | None] = {}
    rows = []
    for name, used_for in LIBRARIES.items():
        try:
            importlib.import_module(name)
            versions[name] = version(name)
            rows.append((name, version(name)))
        except Exception as error:  # any exception during import counts as a missing library
            versions[name] = None
            rows.append((name, f"missing: {error}"))
            problems.append(
                f"'{name}' is not installed, but is required for {used_for}. Install it: pip install {name}"
            )
    return versions, rows


def _has_bf16() -> bool:
    """Return whether this processor has bf16 instructions, by the rule of `--dtype auto`."""
    from peftcore_cli.bases import device_choice

    return device_choice.without_instructions("bf16") is None


def _experts(has_kernels: bool, level: str | None) -> str:
    """Describe how mixtures of experts are computed in this installation."""
    try:
        importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS  # noqa: B018
    except Exception:
        return "not fused (transformers 5 is required). Each model's own forward runs on the adapted weights"
    return f"fused, {level} kernels" if has_kernels else "one at a time in PyTorch, because the extension is missing"


def _methods(problems: list[str]) -> list[str]:
    """Return the names of the installed methods; add the errors of broken plugins to `problems`."""
    import peftcore

    plugins = peftcore.plugins()
    problems += [f"the plugin '{p.name}' ({p.distribution}) is broken: {p.error}" for p in plugins if p.error]
    if not any(p.methods for p in plugins):
        problems.append(NO_METHOD)
    return [name for plugin in plugins for name in plugin.methods]
