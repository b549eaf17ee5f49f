"""Compiles Triton's kernels for a GPU that this machine may lack, and prints their PTX by name as JSON.

Launches do everything but start the kernel: the tensors are on the CPU, and no driver is asked.
"""

import json
import sys
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from peftcore.ops.cross_entropy import CrossEntropyRows
from peftcore.ops.gated import Gated, GatedBackward
from peftcore.ops.rms_norm import RmsNorm, RmsNormBackward
from peftcore.ops.swiglu import Swiglu, SwigluBackward
from peftcore.ops.triton import cross_entropy, gates, norms

PTX: dict[str, str] = {}


def compile_for(capability: int) -> None:
    """Let launches compile their kernels, for GPUs of a compute capability such as 90."""
    target = GPUTarget("cuda", capability, 32)
    driver = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
    )
    triton.runtime.driver.set_active(driver)
    launch = JITFunction.run

    def run(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        PTX[f"{self.fn.__name__} {len(PTX)}"] = kernel.asm["ptx"]
        return kernel

    JITFunction.run = run


def call_all(dtype: torch.dtype) -> None:
    x, weight, scale = torch.ones(4, 1024, dtype=dtype), torch.ones(1024), torch.ones(4)
    half = torch.ones(4, 512, dtype=dtype)
    norms.rms_norm(RmsNorm(x, weight, 1e-6, 0.0, True))
    norms.rms_norm_backward(RmsNormBackward(x, x, weight, scale, 0.0, True, [True, True]))
    gates.gated(Gated(x, x, 1.0, 0.0))
    gates.gated_backward(GatedBackward(x, x, x, 1.0, 0.0))
    gates.swiglu(Swiglu(x))
    gates.swiglu_backward(SwigluBackward(half, x))
    labels, settings = torch.zeros(4, dtype=torch.int64), [0.1, 1.0, 30.0, 0.0]
    cross_entropy.cross_entropy_rows_(CrossEntropyRows(x, labels, weight, scale[0], settings, -100))
    cross_entropy.cross_entropy_rows_(CrossEntropyRows(x, labels, None, None, [0.0, 1.0, 0.0, 0.0], -100))
    # A single row, and more values than 32 bits can count: Triton compiles other kernels for these integers.
    norms.rms_norm(RmsNorm(x[:1], weight, 1e-6, 0.0, True))
    cross_entropy.cross_entropy_rows_(CrossEntropyRows(x[:1], labels[:1], None, None, [0.0, 1.0, 0.0, 0.0], -100))
    gates._launch(gates._gated_kernel, (x, x, x), 1, 2**32, 0, 1.0, 0.0, True)


if __name__ == "__main__":
    compile_for(int(sys.argv[1]))
    call_all(getattr(torch, sys.argv[2]))
    json.dump(PTX, sys.stdout)
