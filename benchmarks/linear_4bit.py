"""linear_4bit next to bitsandbytes and a dense F.linear, in one run, on the same threads.

    python benchmarks/linear_4bit.py [--size 4096] [--threads 2] [--seconds 3] [--dtype bfloat16] [--batches 1 4 16]
    python benchmarks/linear_4bit.py --formats [--shape 4096 11008] [--level avx2]

Forward for few rows of x; forward and gradient of x from 256 on. Weights come from memory, as in a model: each row goes
through as many layers as no cache holds, and is timed once more with the layer that it has just used ("in cache": 4
bits fit where a dense layer does not). Rows are timed in turn, so a busy machine slows all alike; the ratios are of the
shortest times and of medians, the spread is the interquartile range. bitsandbytes runs as users run it: it unpacks the
whole weight into fresh memory (set MALLOC_MMAP_THRESHOLD_=4294967296 and MALLOC_TRIM_THRESHOLD_=4294967296 to take the
page faults out). Rows for lower SIMD levels change peftcore's kernels alone: PyTorch's product of the unpacked panels
stays.

"LoRA" is `ops.lora_linear` of rank 16 over the same weight, with factors in fp32, as PEFT keeps them, and in x's dtype;
they come from memory as well. What such a row takes over the one without stands below the table.

"read" reads the codes and scales and computes nothing. The floor is the larger of what must be read (packed weight and
scales) at the median speed of that, and the operations at the rate of a large dense product, PyTorch's or peftcore's,
in x's dtype or in fp32.

`--formats` compares the 4-bit formats instead, by the processor time of one thread, so that other work on the machine
changes less: with NF4, and with NF4 whose scales take the nearest number of bits a weight. All codes are in huge pages,
as those of a quantized model: small pages add up to a fifth to the time of one row.
"""

import argparse
import logging
import statistics
import time

import measure
import torch
from torch.nn import functional as F

from peftcore import ops
from peftcore.ops.build_info import build_info
from peftcore.ops.huge_pages import in_huge_pages

RANK = 16
COPIES = 3  # weights of each format, for --formats
logging.disable(logging.WARNING)  # bitsandbytes reports optional packages


def words(weight):
    """Return the stored tensors of a packed weight as integers."""
    whole = [part for part in (weight.codes, weight.absmax) if part.nbytes % 8 == 0]
    return [part.view(-1).view(torch.uint8).view(torch.int64) for part in whole]


# By name: how to quantize, bits a weight, and the NF4 with as many bits.
FORMATS = {
    "NF4": (ops.quantize_4bit, 4.5, "NF4"),
    "NF4, nested scales": (lambda w: ops.quantize_4bit(w, double_quant=True), 4.127, "NF4, nested scales"),
    "NF4, blocks of 128": (lambda w: ops.quantize_4bit(w, blocksize=128), 4.25, "NF4, blocks of 128"),
    "affine4, groups of 64": (ops.quantize_affine4, 4.375, "NF4"),
    "affine4, groups of 128": (lambda w: ops.quantize_affine4(w, 128), 4.188, "NF4, nested scales"),
    "NVFP4": (ops.quantize_nvfp4, 4.5, "NF4"),
    "MXFP4": (ops.quantize_mxfp4, 4.25, "NF4, blocks of 128"),
}


def compare_formats(shape, dtype, batches, seconds):
    """Print the processor time of each format's product, and its ratios."""
    torch.set_num_threads(1)
    weight = torch.randn(shape)

    def made(quantize):
        packed = quantize(weight)
        return packed._replace(codes=in_huge_pages(packed.codes))

    packed = [{name: made(quantize) for name, (quantize, _, _) in FORMATS.items()} for _ in range(COPIES)]
    for batch in batches:
        x = torch.randn(batch, shape[1]).to(dtype)
        rows = {
            (name, i): lambda w=w, x=x: ops.linear_4bit(x, w) for i, ws in enumerate(packed) for name, w in ws.items()
        }
        times = measure.interleaved(rows, seconds, 15, time.process_time)
        median = {name: statistics.median(ms for i in range(COPIES) for ms in times[name, i]) for name in FORMATS}
        print(f"\n{batch} rows of {dtype}, {shape[0]} x {shape[1]} (ms of one thread)")
        print(f"{'':26}{'bits':>7}{'median':>9}{'of NF4':>9}{'at equal bits':>16}")
        for name, (_, bits, peer) in FORMATS.items():
            found = median[name]
            print(f"{name:26}{bits:7.3f}{found:9.3f}{found / median['NF4']:9.3f}{found / median[peer]:16.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 32, 256, 1024])
    parser.add_argument("--ours", action="store_true", help="neither bitsandbytes nor lower levels")
    parser.add_argument("--formats", action="store_true", help="compare the 4-bit formats with NF4")
    parser.add_argument("--shape", type=int, nargs=2, metavar=("OUT", "IN"), help="shape of the weight of --formats")
    measure.add_level_argument(parser)
    options = parser.parse_args()
    measure.run_at(options.level)
    torch.set_num_threads(options.threads)
    size, dtype, info = options.size, getattr(torch, options.dtype), build_info()
    measure.print_surroundings(options.threads)
    if options.formats:
        compare_formats(options.shape or (size, size), dtype, options.batches, options.seconds)
        return
    rate = max(measure.product_rate(kind) for kind in {dtype, torch.float32})
    print(
        f"{size} x {size} {options.dtype}, dense product {rate:.0f} GFLOP/s, {measure.last_cache() >> 20} MiB of cache"
    )

    one = ops.quantize_4bit(torch.randn(size, size), double_quant=True)
    stored = sum(part.nbytes for part in words(one))
    count, few = measure.beyond_caches(stored), measure.beyond_caches(size * size * dtype.itemsize)

    def layers():
        return [ops.quantize_4bit(torch.randn(size, size), double_quant=True) for _ in range(count)]

    nested = layers()
    plain = [ops.quantize_4bit(torch.randn(size, size)) for _ in range(count)]
    dense = [torch.randn(size, size).to(dtype) for _ in range(few)]
    weights = {
        "read": (nested, lambda w: lambda x: [part.sum() for part in words(w)]),
        "dense": (dense, lambda w: lambda x: F.linear(x, w)),
        "peftcore": (nested, lambda w: lambda x: ops.linear_4bit(x, w)),
        "peftcore, plain scales": (plain, lambda w: lambda x: ops.linear_4bit(x, w)),
    }

    def with_lora(layer):
        w, a, b = layer
        return lambda x: ops.lora_linear(x, w, None, a, b, 0.5)

    adapted = [f"LoRA in {name}" for name in dict.fromkeys(("float32", options.dtype))]
    factors = [torch.float32, dtype]
    for name, kind in zip(adapted, factors, strict=False):
        thin = [(torch.randn(RANK, size).to(kind), torch.randn(size, RANK).to(kind)) for _ in nested]
        weights[name] = [(w, *pair) for w, pair in zip(layers(), thin, strict=True)], with_lora
    sizes = {
        "dense": dense[0].nbytes,
        "peftcore, plain scales": sum(p.nbytes for p in words(plain[0])),
    }
    sizes |= {name: stored + 2 * RANK * size * kind.itemsize for name, kind in zip(adapted, factors, strict=False)}
    if not options.ours:
        import bitsandbytes as bnb
        import bitsandbytes.functional as functional

        def theirs(pair):
            codes, state = pair
            state.dtype = dtype
            return lambda x: bnb.matmul_4bit(x, codes.t(), quant_state=state)

        packed = [functional.quantize_4bit(torch.randn(size, size), quant_type="nf4") for _ in range(count)]
        weights["bitsandbytes"] = packed, theirs

    def at(level):
        def call_of(w):
            def call(x):
                ops.extension.set_cpu_level(level)
                try:
                    return ops.linear_4bit(x, w)
                finally:
                    ops.extension.set_cpu_level(info.cpu_level)

            return call

        return nested, call_of

    if not options.ours:
        lower = [level for level in reversed(info.cpu_levels) if level != info.cpu_level]
        weights |= {f"peftcore, {level}": at(level) for level in lower}

    for batch in options.batches:
        back = batch >= 256
        x = torch.randn(batch, size).to(dtype).requires_grad_(back)
        grad = torch.randn(batch, size).to(dtype)

        def timed(call, x=x, grad=grad, back=back):
            def run():
                with torch.set_grad_enabled(back):
                    y = call(x)
                    if back and isinstance(y, torch.Tensor):
                        torch.autograd.grad(y, x, grad)

            return run

        rows = {name: [timed(call_of(w)) for w in ws] for name, (ws, call_of) in weights.items()}
        title = f"{batch} rows, forward{' and backward' if back else ''} (ms)"
        operations = (1 + back) * 2 * batch * size**2
        found = measure.from_memory(rows, options.seconds)
        floor = max(statistics.median(found[0]["read"]), operations / rate / 1e6)
        moved = {name: sizes.get(name, stored) for name in rows}
        measure.print_rates(title, found, "dense", moved, operations, floor)
        measure.note_pairs(title.removesuffix(" (ms)"), found[0], "bitsandbytes")
        low, median, _ = measure.spread(found[0]["peftcore"])
        for name in adapted:
            with_it = measure.spread(found[0][name])
            print(f"{name + ' over peftcore':34}{with_it[0] / low:9.3f}{with_it[1] / median:9.3f}")


if __name__ == "__main__":
    main()
