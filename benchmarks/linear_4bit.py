"""linear_4bit beside bitsandbytes and a dense F.linear, in one run, on the same threads.

    python benchmarks/linear_4bit.py [--size 4096] [--threads 2] [--seconds 3] [--dtype bfloat16] [--batches 1 16 256]

Forward for few rows of x; forward and gradient of x from 256 on. Rows of a table are timed in turn, so a busy machine
slows all alike; the ratio is of the minima, the spread the interquartile range. bitsandbytes runs as users run it: it
unpacks the whole weight into fresh memory (set MALLOC_MMAP_THRESHOLD_=4294967296 and MALLOC_TRIM_THRESHOLD_=4294967296
to take the page faults out). Rows for lower SIMD levels change peftcore's kernels alone: PyTorch's product of the
unpacked panels stays what it is.

The floor is the larger of what must be read (packed weight and scales) over the bandwidth of a copy, and the
operations over the rate of a large dense product in x's dtype, both measured in this run.
"""

import argparse
import logging
import os

import torch
from measure import interleaved, spread
from torch.nn import functional as F

from peftcore import ops
from peftcore.ops.build_info import build_info

logging.disable(logging.WARNING)  # bitsandbytes reports optional packages


def rates(size, dtype):
    """(GB/s of a copy, GFLOP/s of a dense product)."""
    x, weight = torch.randn(512, size).to(dtype), torch.randn(size, size).to(dtype)
    source = torch.randn(size, size)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source), "product": lambda: F.linear(x, weight)}, 2)
    return 2 * source.nbytes / min(times["copy"]) / 1e6, 2 * 512 * size**2 / min(times["product"]) / 1e6


def table(title, rows, floor, seconds):
    print(f"\n{title}\n{'':26}{'min':>9}{'median':>9}{'IQR':>8}   of dense\n{'floor':26}{floor:9.2f}")
    found = {name: spread(times) for name, times in interleaved(rows, seconds).items()}
    for name, (least, median, width) in found.items():
        print(f"{name:26}{least:9.2f}{median:9.2f}{width:8.2f}   {least / found['dense'][0]:8.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 32, 256, 1024])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    import bitsandbytes as bnb
    import bitsandbytes.functional as functional

    size, dtype, info = options.size, getattr(torch, options.dtype), build_info()
    print(f"PyTorch {torch.__version__}, {options.threads} threads, load {os.getloadavg()[0]:.1f}, ", end="")
    print(f"extension: {info.cpu_level} ({info.compiler or info.missing_because}), {size} x {size} {options.dtype}")
    bandwidth, flops = rates(size, dtype)
    print(f"copy {bandwidth:.1f} GB/s, dense product {flops:.0f} GFLOP/s")

    weight = torch.randn(size, size)
    plain, nested = (ops.quantize_4bit(weight, double_quant=double) for double in (False, True))
    theirs, state = functional.quantize_4bit(weight, quant_type="nf4")
    state.dtype = dtype
    dense = weight.to(dtype)

    def ours(weight):
        own = weight._replace(codes=weight.codes.clone())  # no row finds in a cache what another has read
        return lambda x: ops.linear_4bit(x, own)

    def peer(x):
        return bnb.matmul_4bit(x, theirs.t(), quant_state=state)

    def at(level, run):
        def at_level():
            ops.extension.set_cpu_level(level)
            run()
            ops.extension.set_cpu_level(info.cpu_level)

        return at_level

    lower_levels = [level for level in reversed(info.cpu_levels) if level != info.cpu_level]
    for batch in options.batches:
        back = batch >= 256
        x = torch.randn(batch, size).to(dtype).requires_grad_(back)
        grad = torch.randn(batch, size).to(dtype)

        def timed(call, x=x, grad=grad, back=back):
            def run():
                with torch.set_grad_enabled(back):
                    y = call(x)
                    if back:
                        torch.autograd.grad(y, x, grad)

            return run

        calls = {
            "dense": lambda x: F.linear(x, dense),
            "peftcore, double quant": ours(nested),
            "peftcore, plain scales": ours(plain),
            "bitsandbytes": peer,
        }
        needs = nested.codes.nbytes + nested.absmax.nbytes + 2 * batch * size * dtype.itemsize
        floor = (1 + back) * max(needs / bandwidth / 1e6, 2 * batch * size**2 / flops / 1e6)
        title = f"{batch} rows, forward{' and backward' if back else ''} (ms)"
        rows = {name: timed(call) for name, call in calls.items()}
        rows |= {f"peftcore, {level}": at(level, timed(ours(nested))) for level in lower_levels}
        table(title, rows, floor, options.seconds)


if __name__ == "__main__":
    main()
