"""`peftcore doctor`: what this installation has, what it lacks, what that costs, and how to install it."""

from __future__ import annotations

import importlib
import platform
from dataclasses import asdict
from importlib.metadata import version

from peftcore_cli import options
from peftcore_cli.console import NO_METHOD, out, say, table, warn

EXAMPLES = ("peftcore doctor",)

# What each optional library is for, and its extra.
LIBRARIES = {
    "transformers": "train, eval, generate, merge, plan",
    "accelerate": "train",
    "matplotlib": "the loss curve of train's report",
    "psutil": "the memory figures of train",
    "gguf": ".gguf files as base models",
}


def doctor(as_json: options.Json = False) -> object:
    """Check the installation. Nothing is changed."""
    import torch

    from peftcore.ops.build_info import build_info

    build = build_info()
    cuda = f"{torch.version.cuda}, {torch.cuda.device_count()} devices" if torch.cuda.is_available() else "no device"
    rows = [
        ("peftcore", version("peftcore")),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("PyTorch", torch.__version__),
        ("CUDA", cuda),
        ("threads", torch.get_num_threads()),
        (
            "products in bf16",
            "by instructions of the processor" if _has_bf16() else "without instructions: --dtype auto uses fp32",
        ),
        ("extension", "works" if build.available else f"missing: {build.missing_because}"),
    ]
    if build.available:
        rows += [
            ("  built from", f"{build.version}, commit {build.commit}"),
            ("  compiler", build.compiler),
            ("  built with PyTorch", build.torch_built_with),
            ("  SIMD level", f"{build.cpu_level} (this CPU can: {', '.join(build.cpu_levels)})"),
            ("  CUDA", ", ".join(build.cuda_architectures) or f"none: {build.cuda_missing_because}"),
            (
                "  unavailable kernels",
                ", ".join(build.out_of_reach) or "none: this machine runs all kernels that were built",
            ),
            ("  caches", ", ".join(f"{size >> 10:,} KiB" for size in build.caches)),
        ]
    missing: list[str] = []
    libraries: dict[str, str | None] = {}
    for name, used_for in LIBRARIES.items():
        try:
            importlib.import_module(name)
            libraries[name] = version(name)
            rows.append((name, version(name)))
        except Exception as error:  # a library that fails to import counts as missing, whatever it raises
            libraries[name] = None
            rows.append((name, f"missing: {error}"))
            missing.append(f"'{name}' is missing; it is needed for {used_for}. Install it: pip install {name}")
    methods = _methods(missing)
    rows += [("experts", _experts(build.available, build.cpu_level)), ("methods", ", ".join(methods) or "none")]
    missing += [f"costs: {cost}" for cost in build.costs]
    if not build.available:
        missing.append(
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
            "missing": missing,
        }
    table(rows)
    out.print()
    for line in missing:
        warn(line)
    if not missing:
        say("nothing is missing", "green")
    return None


def _has_bf16() -> bool:
    """Return whether this processor has instructions for bf16, which `--dtype auto` asks."""
    from peftcore_cli.bases import device_choice

    return device_choice.without_instructions("bf16") is None


def _experts(has_kernels: bool, level: str | None) -> str:
    """Describe how mixtures of experts run here."""
    try:
        importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS  # noqa: B018
    except Exception:
        return "no interface to experts (needs transformers 5). Each model runs its own forward on changed weights"
    return (
        f"fused, {level} kernels" if has_kernels else "fused, but without the extension one expert at a time in PyTorch"
    )


def _methods(missing: list[str]) -> list[str]:
    """Return the names of the installed methods; add what is wrong with plugins to `missing`."""
    import peftcore

    found = peftcore.plugins()
    missing += [f"plugin '{p.name}' ({p.distribution}) is broken: {p.error}" for p in found if p.error]
    if not any(p.methods for p in found):
        missing.append(NO_METHOD)
    return [name for plugin in found for name in plugin.methods]
