"""Build information about the compiled extension, for `peftcore doctor` and bug reports."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peftcore.ops import _extension, _triton

# Ratios measured by benchmarks/quant4.py on two AVX-512 cores, 4096 x 4096.
COSTS = {
    "extension": (
        "4-bit operators and optimizers run their PyTorch references, which compute the same values 50 to 100 times "
        "slower and allocate temporaries several times the size of the tensor. Paged optimizers are unavailable"
    ),
    "cuda": (
        "4-bit operators on CUDA tensors run their PyTorch references, which compute the same values in several "
        "passes over memory instead of one"
    ),
    "openmp": "kernels run on a single thread",
    "triton": (
        "triton is not installed, so norms, gated activations and cross-entropy of CUDA tensors run in PyTorch, which "
        "computes the same values in several passes over memory"
    ),
}


@dataclass(frozen=True)
class BuildInfo:
    """Build information about `_C`, or the reason why it is missing."""

    available: bool
    missing_because: str = ""  # empty when available
    version: str = ""
    commit: str = ""
    compiler: str = ""
    torch_built_with: str = ""
    cpu_level: str = "reference"  # in use
    cpu_levels: tuple[str, ...] = ()  # levels in this build that this CPU can run
    compiled_cpu_levels: tuple[str, ...] = ()
    caches: tuple[int, ...] = ()  # sizes in bytes of the L1, L2 and L3 caches, as kernels read them
    cuda_architectures: tuple[str, ...] = ()  # empty: built without CUDA
    cuda_missing_because: str = ""
    costs: tuple[str, ...] = ()  # consequences of each missing feature, one sentence each

    @property
    def out_of_reach(self) -> tuple[str, ...]:
        """Instruction-set levels (and CUDA) in this build that this machine cannot run and therefore cannot test."""
        levels = tuple(level for level in self.compiled_cpu_levels if level not in self.cpu_levels)
        cuda = ("CUDA",) if self.cuda_architectures and not torch.cuda.is_available() else ()
        return levels + cuda


def build_info() -> BuildInfo:
    """Return the build information of the loaded extension.

    Missing CUDA kernels are listed as a cost only if PyTorch sees a GPU.
    """
    record, module = _extension.record, _extension.extension
    no_triton = (COSTS["triton"],) if torch.cuda.is_available() and not _triton.AVAILABLE else ()
    if module is None:
        return BuildInfo(False, _extension.missing_because, costs=(COSTS["extension"], *no_triton))
    facts = module.build_facts()
    architectures = tuple(facts["cuda_architectures"])
    note = "" if architectures else str(record.get("cuda_note") or "it was built without CUDA")
    openmp_note = str(record.get("openmp_note") or "")
    costs: tuple[str, ...] = no_triton
    if note and torch.cuda.is_available():
        costs += (COSTS["cuda"],)
    if openmp_note:
        costs += (f"{COSTS['openmp']}: {openmp_note}",)
    return BuildInfo(
        available=True,
        version=facts["version"],
        commit=facts["commit"],
        compiler=facts["compiler"],
        torch_built_with=facts["torch"],
        cpu_level=module.cpu_level(),
        cpu_levels=tuple(module.cpu_levels()),
        compiled_cpu_levels=tuple(facts["cpu_levels"]),
        caches=tuple(module.caches()),
        cuda_architectures=architectures,
        cuda_missing_because=note,
        costs=costs,
    )
