"""`peftcore doctor`: what this installation has, what it lacks, what that costs, and how to install it."""

from __future__ import annotations

import importlib
import platform
from importlib.metadata import version

from peftcore.cli.console import NO_METHOD, out, say, table, warn

EXAMPLES = ("peftcore doctor",)

# What each optional library is for, and its extra.
LIBRARIES = {
    "transformers": ("train, eval, generate, merge, plan", "train"),
    "accelerate": ("train", "train"),
    "matplotlib": ("the loss curve of train's report", "train"),
    "psutil": ("the memory figures of train", "train"),
    "gguf": (".gguf files as base models", "gguf"),
}


def doctor() -> None:
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
        ("products in bf16", _products()),
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
    missing = []
    for name, (used_for, extra) in LIBRARIES.items():
        try:
            importlib.import_module(name)
            rows.append((name, version(name)))
        except Exception as error:  # a library that fails to import counts as missing, whatever it raises
            rows.append((name, f"missing: {error}"))
            missing.append(
                f"'{name}' is missing; it is needed for {used_for}. Install it: pip install peftcore[{extra}]"
            )
    rows += [("experts", _experts(build.available, build.cpu_level)), *_plugins(missing)]
    table(rows)
    out.print()
    missing += [f"costs: {cost}" for cost in build.costs]
    if not build.available:
        missing.append(
            "to build the extension: install a C++20 compiler and ninja, then from a source checkout "
            "pip install --no-build-isolation -e ."
        )
    for line in missing:
        warn(line)
    if not missing:
        say("nothing is missing", "green")


def _products() -> str:
    """Tell whether this processor has instructions for bf16, which `--dtype auto` asks."""
    from peftcore.cli.bases import device_choice

    slow = device_choice.without_instructions("bf16")
    return "by instructions of the processor" if slow is None else "without instructions: --dtype auto uses fp32"


def _experts(has_kernels: bool, level: str | None) -> str:
    """Describe how mixtures of experts run here."""
    try:
        importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS  # noqa: B018
    except Exception:
        return "no interface to experts (needs transformers 5). Each model runs its own forward on changed weights"
    return (
        f"fused, {level} kernels" if has_kernels else "fused, but without the extension one expert at a time in PyTorch"
    )


def _plugins(missing: list[str]) -> list[tuple[str, str]]:
    import peftcore

    found = peftcore.plugins()
    missing += [f"plugin '{p.name}' ({p.distribution}) is broken: {p.error}" for p in found if p.error]
    if not any(p.methods for p in found):
        missing.append(NO_METHOD)
    return [("methods", ", ".join(name for p in found for name in p.methods) or "none")]
