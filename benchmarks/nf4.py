"""NF4 quantize and dequantize beside bitsandbytes and a plain copy, in one run, on the same threads.

    python benchmarks/nf4.py [--size 4096] [--threads 2] [--seconds 3]

Rows are interleaved: every round times each of them once, in random order, so a
busy machine slows all alike. "fresh" allocates its
result on every call, as a model does that calls the peer; "mapped" writes to memory that is there already. The floor
is the bytes that must move over the copy bandwidth measured in the same run. Set MALLOC_MMAP_THRESHOLD_=4294967296
and MALLOC_TRIM_THRESHOLD_=4294967296 to take page faults out of every "fresh" row.
"""

import argparse
import logging
import os
import statistics

import measure
import torch

from peftcore import ops
from peftcore.ops.build_info import build_info

logging.disable(logging.WARNING)  # bitsandbytes reports optional packages


def table(title, rows, floor_ms, seconds, against):
    print(f"\n{title}\n{'':34}{'min':>9}{'median':>9}{'IQR':>8}  {'of floor':>8}  ratio to {against}")
    times = measure.interleaved(rows, seconds)
    base = statistics.median(times[against])
    print(f"{'floor':34}{floor_ms:9.2f}")
    for name, row in times.items():
        low, median, iqr = measure.spread(row)
        print(f"{name:34}{low:9.2f}{median:9.2f}{iqr:8.2f}  {floor_ms / median:8.0%}  {median / base:8.3f}")


def mapped_bitsandbytes(bnb, packed, state, out):
    """Its C function on our memory: what its operator does, without the allocation."""
    import ctypes

    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[out.dtype]
    function = getattr(bnb.lib, f"cdequantize_blockwise_cpu_nf4_{name}")
    rows, columns = out.shape

    def call():
        function(
            *(bnb.get_ptr(t) for t in (packed, state.absmax, out)),
            *(ctypes.c_longlong(n) for n in (state.blocksize, rows, columns)),
        )

    return call


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    import bitsandbytes.functional as bnb

    size = options.size
    info = build_info()
    print(f"PyTorch {torch.__version__}, {options.threads} threads, load {os.getloadavg()[0]:.1f}, ", end="")
    print(f"extension: {info.cpu_level} ({info.compiler or info.missing_because}), {size} x {size}")

    x = torch.randn(size, size)
    target = torch.empty_like(x)
    copy = measure.interleaved({"copy": lambda: target.copy_(x)}, 1)["copy"]
    bandwidth = 2 * x.nbytes / min(copy) / 1e6  # GB/s
    print(f"copy: {bandwidth:.1f} GB/s")

    def floor(*sizes):
        return sum(sizes) / bandwidth / 1e6

    levels = info.cpu_levels
    in_use = info.cpu_level

    def at(level, call):
        def run():
            ops.extension.set_cpu_level(level)
            call()
            ops.extension.set_cpu_level(in_use)

        return run

    for dtype in (torch.float32, torch.bfloat16):
        source = x.to(dtype)
        weight = ops.quantize_4bit(source)
        rows = {f"peftcore {level}": at(level, lambda s=source: ops.quantize_4bit(s)) for level in reversed(levels)}
        if not rows:
            rows["peftcore reference"] = lambda s=source: ops.quantize_4bit(s)
        rows["bitsandbytes"] = lambda s=source: bnb.quantize_4bit(s, quant_type="nf4")
        name = str(dtype).removeprefix("torch.")
        needs = floor(source.nbytes, weight.codes.nbytes, weight.absmax.nbytes)
        table(f"quantize {name} (ms)", rows, needs, options.seconds, "bitsandbytes")

    nested = ops.quantize_4bit(x, double_quant=True)
    theirs, state = bnb.quantize_4bit(x, quant_type="nf4")
    assert torch.equal(ops.quantize_4bit(x).codes, theirs)
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        state.dtype = dtype
        out, other = torch.empty(size, size, dtype=dtype), torch.empty(size, size, dtype=dtype)
        dense = x.to(dtype)
        weight = ops.quantize_4bit(x)
        wanted = bnb.dequantize_4bit(theirs, state)
        assert torch.equal(ops.dequantize_4bit(weight, out=out), wanted)
        needs = floor(weight.codes.nbytes, weight.absmax.nbytes, out.nbytes)

        def into(w=weight, o=out):
            ops.dequantize_4bit(w, out=o)

        rows = {f"peftcore {level}": at(level, into) for level in reversed(levels)} or {"peftcore reference": into}
        rows["peftcore, nested scales"] = lambda o=out: ops.dequantize_4bit(nested, out=o)
        rows["bitsandbytes' kernel"] = mapped_bitsandbytes(bnb, theirs, state, other)
        rows["torch fill_"] = lambda o=other: o.fill_(1)
        rows["torch copy_"] = lambda o=other, d=dense: o.copy_(d)
        table(f"dequantize to {name}, mapped (ms)", rows, needs, options.seconds, "bitsandbytes' kernel")
        rows = {
            "peftcore": lambda w=weight, d=dtype: ops.dequantize_4bit(w, d),
            "bitsandbytes": lambda s=state: bnb.dequantize_4bit(theirs, s),
            "torch clone": lambda d=dense: d.clone(),
        }
        table(f"dequantize to {name}, fresh (ms)", rows, needs, options.seconds, "bitsandbytes")


if __name__ == "__main__":
    main()
