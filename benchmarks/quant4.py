"""NF4 quantize and dequantize next to bitsandbytes and a plain copy, in one run, on the same threads.

    python benchmarks/quant4.py [--size 4096] [--threads 2] [--seconds 3]

Weights come from memory, as in a model: each row goes through as many layers as no cache holds, and is timed once more
with the layer that it has just used ("in cache"). Rows are timed in turn, in random order, so a busy machine slows all
alike. "fresh" allocates its result on every call, as a model does that calls the peer; "mapped" writes to buffers that
are there already, each time another one. The floor is the bytes that must move over the speed of a copy or of a plain
read in the same run, whichever is faster: it assumes that no cache holds the weight or the result, which is not so for
"in cache". Set MALLOC_MMAP_THRESHOLD_=4294967296 and MALLOC_TRIM_THRESHOLD_=4294967296 to take page faults out of every
"fresh" row.
"""

import argparse
import logging

import measure
import torch

from peftcore import ops
from peftcore.ops.build_info import build_info

logging.disable(logging.WARNING)  # bitsandbytes reports optional packages


def mapped_bitsandbytes(bnb, packed, state, out):
    """Return a call of bitsandbytes' C function on memory of ours: its operator without the allocation."""
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


def note(title, times, peer):
    """Keep the ratio of the first row, the highest level's, to the peer's."""
    measure.note_ratio(title.removesuffix(" (ms)"), min(next(iter(times.values()))) / min(times[peer]), peer)


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
    measure.print_surroundings(options.threads)

    x = torch.randn(size, size)
    bandwidth = measure.copy_rate()
    read = measure.read_rate()
    print(f"{size} x {size}, copy: {bandwidth:.1f} GB/s, read: {read:.1f} GB/s")
    bandwidth = max(bandwidth, read)

    levels = info.cpu_levels
    in_use = info.cpu_level

    def at(level, call):
        def run(*operands):
            ops.extension.set_cpu_level(level)
            call(*operands)
            ops.extension.set_cpu_level(in_use)

        return run

    def many(call, *operands):
        """Return a call for each layer, with the next operands of each list."""
        return [lambda each=each: call(*each) for each in zip(*operands, strict=True)]

    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        count = measure.beyond_caches(x.nbytes * dtype.itemsize // 4)
        sources = [torch.randn(size, size).to(dtype) for _ in range(count)]
        weight = ops.quantize_4bit(sources[0])
        moved = sources[0].nbytes + weight.codes.nbytes + weight.absmax.nbytes
        rows = {f"peftcore {level}": many(at(level, ops.quantize_4bit), sources) for level in reversed(levels)}
        if not rows:
            rows["peftcore reference"] = many(ops.quantize_4bit, sources)
        rows["bitsandbytes"] = many(lambda source: bnb.quantize_4bit(source, quant_type="nf4"), sources)
        found = measure.from_memory(rows, options.seconds)
        title = f"quantize {name} (ms)"
        measure.print_rates(title, found, "bitsandbytes", dict.fromkeys(rows, moved), floor=moved / bandwidth / 1e6)
        note(title, found[0], "bitsandbytes")
        del sources

    count = measure.beyond_caches(weight.codes.nbytes)
    dense = [torch.randn(size, size) for _ in range(count)]
    plain = [ops.quantize_4bit(layer) for layer in dense]
    nested = [ops.quantize_4bit(layer, double_quant=True) for layer in dense]
    theirs = [bnb.quantize_4bit(layer, quant_type="nf4") for layer in dense]
    assert torch.equal(plain[0].codes, theirs[0][0])
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for _, state in theirs:
            state.dtype = dtype
        dense = [layer.to(dtype) for layer in dense]
        out = torch.empty(size, size, dtype=dtype)
        outs = [torch.zeros_like(out) for _ in range(count)]  # more than caches hold, as of the weights
        assert torch.equal(ops.dequantize_4bit(plain[0], out=out), bnb.dequantize_4bit(*theirs[0]))
        moved = plain[0].codes.nbytes + plain[0].absmax.nbytes + out.nbytes

        def into(weight, out):
            ops.dequantize_4bit(weight, out=out)

        rows = {f"peftcore {level}": many(at(level, into), plain, outs) for level in reversed(levels)}
        rows = rows or {"peftcore reference": many(into, plain, outs)}
        rows["peftcore, nested scales"] = many(into, nested, outs)
        rows["bitsandbytes' kernel"] = [
            mapped_bitsandbytes(bnb, *layer, out) for layer, out in zip(theirs, outs, strict=True)
        ]
        rows["torch copy_"] = many(torch.Tensor.copy_, outs, dense)
        sizes = {row: 2 * out.nbytes if row.startswith("torch") else moved for row in rows}
        found = measure.from_memory(rows, options.seconds)
        title = f"dequantize to {name}, mapped (ms)"
        measure.print_rates(title, found, "bitsandbytes' kernel", sizes, floor=moved / bandwidth / 1e6)
        note(title, found[0], "bitsandbytes' kernel")
        rows = {
            "peftcore": many(lambda weight, dtype=dtype: ops.dequantize_4bit(weight, dtype), plain),
            "bitsandbytes": many(bnb.dequantize_4bit, *zip(*theirs, strict=True)),
            "torch clone": many(torch.clone, dense),
        }
        found = measure.from_memory(rows, options.seconds)
        title = f"dequantize to {name}, fresh (ms)"
        sizes["peftcore"] = sizes["bitsandbytes"] = moved
        sizes["torch clone"] = 2 * out.nbytes
        measure.print_rates(title, found, "bitsandbytes", sizes, floor=moved / bandwidth / 1e6)
        note(title, found[0], "bitsandbytes")


if __name__ == "__main__":
    main()
