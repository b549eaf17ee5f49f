"""LoRA's forward and backward over a frozen linear: lora_linear next to the plain composition and peft, in one run.

    python benchmarks/lora.py [--threads 2] [--seconds 4] [--rank 16] [--only linear call samples step]

Rows of a table are timed in turn, so a busy machine slows all alike, and all keep the memory that they free. Weights
and factors come from memory, as in a model: each row goes through as many layers as no cache holds, and is timed once
more with the one that it has just used ("in cache"). "frozen" is F.linear and the gradient of its input. The floor is
the operations of the frozen products and of the thin ones, 3 r (in + out) M multiplications, at the rate of a large
product, PyTorch's or peftcore's, or of "frozen" if that is higher: nothing read or written twice, no call. A and B are
fp32 next to a bf16 x, peft's default as well. Next to each table of times is one of errors.
"""

import argparse
import copy
import logging
import warnings

import exactness
import measure
import torch
from torch import nn
from torch.nn import functional as F

import peftcore
from peftcore import ops

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
SHAPES = [(1024, 576, 1536, "bfloat16"), (1024, 576, 1536, "float32"), (1024, 4096, 4096, "bfloat16")]


def table(title, times, base):
    print(f"\n{title}\n{'':34}{'min':>9}{'median':>9}{'IQR':>8}   of {base}: min, median")
    of = measure.spread(times[base])
    for name, row in times.items():
        low, median, width = measure.spread(row)
        print(f"{name:34}{low:9.3f}{median:9.3f}{width:8.3f}   {low / of[0]:8.3f}{median / of[1]:8.3f}")
    measure.note_pairs(title.removesuffix(" (ms)"), times)


def peft_layer(layer, rank, dropout):
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=["0"])
    return peft.inject_adapter_in_model(config, nn.Sequential(layer))[0].train()


def linear(m, k, n, dtype, rank, seconds):
    """Time forward and backward of a layer, of several in turn, so that weights and factors come from memory."""
    dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    count = measure.beyond_caches(k * n * dtype.itemsize)
    layers = [nn.Linear(k, n, bias=False, dtype=dtype).requires_grad_(False) for _ in range(count)]
    x, dy = torch.randn(m, k).to(dtype).requires_grad_(), torch.randn(m, n).to(dtype)
    factors = [(torch.randn(rank, k).requires_grad_(), torch.randn(n, rank).requires_grad_()) for _ in range(count)]

    def composed(w, a, b, p):
        s = F.linear(F.dropout(x, p) if p else x, a.to(dtype))
        return torch.addmm(F.linear(x, w), s, b.to(dtype).T, alpha=0.5)

    def timed(call, inputs):
        return lambda: torch.autograd.grad(call(), inputs, dy)

    def of_all(call, p):
        """Return `call` with the weight and factors of each layer."""
        return [
            timed(lambda w=layer.weight, a=a, b=b: call(w, a, b, p), (x, a, b))
            for layer, (a, b) in zip(layers, factors, strict=True)
        ]

    rows = {"frozen": [timed(lambda w=layer.weight: F.linear(x, w), (x,)) for layer in layers]}
    for p in (0.0, 0.1):
        drop = f", dropout {p}" if p else ""
        peers = [peft_layer(copy.deepcopy(layer), rank, p) for layer in layers]
        rows[f"peftcore{drop}"] = of_all(lambda w, a, b, p: ops.lora_linear(x, w, None, a, b, 0.5, p), p)
        rows[f"composed of PyTorch{drop}"] = of_all(composed, p)
        rows[f"peft{drop}"] = [
            timed(lambda peer=peer: peer(x), (x, *(t for t in peer.parameters() if t.requires_grad))) for peer in peers
        ]
    found = measure.from_memory(rows, seconds)
    frozen = 2 * k * n
    thin = 3 * rank * (k + n)
    # Forward and backward read W; x, y, dy and dx pass once.
    moved = dict.fromkeys(rows, (2 * k * n + 2 * m * (k + n)) * dtype.itemsize)
    title = f"{k} -> {n}, {m} rows, {dtype}, r={rank}, forward and backward, {count} layers in turn (ms)"
    rate = max(measure.product_rate(dtype), 2 * m * frozen / min(found[0]["frozen"]) / 1e6)
    operations = 2 * m * (frozen + thin)
    measure.print_rates(title, found, "frozen", moved, operations, operations / rate / 1e6)
    measure.note_pairs(f"a layer {k} -> {n}, {dtype}", found[0])
    print(f"errors against float64, peft in the same run (see exactness.py)\n{exactness.HEAD}")
    for row in exactness.lora([(256, k, n)], (rank,), (dtype,)):
        print(row)


def call(seconds):
    """Time a call on a 16 x 16 layer, where the products take no time."""
    x, w, a, b = torch.randn(1, 16), torch.randn(16, 16), torch.randn(16, 16), torch.randn(16, 16)

    def many(one):
        def run():
            for _ in range(500):
                one()

        return run

    rows = {"F.linear": many(lambda: F.linear(x, w)), "lora_linear": many(lambda: ops.lora_linear(x, w, None, a, b))}
    with torch.no_grad():
        times = measure.interleaved(rows, seconds)
    base, ours = (measure.spread(times[name])[1] * 2 for name in rows)
    print(f"\na call of a 16 x 16 layer: F.linear {base:.1f} µs, lora_linear {ours:.1f}, over it {ours - base:.1f}")


def samples(rank, seconds):
    """Time 16 samples of one row, each with another adapter, next to all with one adapter; several layers in turn."""
    scales, index = [0.5] * 16, torch.arange(16)
    for k, n in ((576, 1536), (4096, 4096)):
        x = torch.randn(16, k).bfloat16()
        rows = {"one adapter": [], "16 adapters": [], "base": []}
        for _ in range(measure.beyond_caches(2 * k * n)):
            w = torch.randn(n, k).bfloat16()
            a = [torch.randn(rank, k) for _ in range(16)]
            b = [torch.randn(n, rank) for _ in range(16)]
            rows["one adapter"].append(lambda w=w, a=a, b=b, x=x: ops.lora_linear(x, w, None, a[0], b[0], 0.5))
            rows["16 adapters"].append(
                lambda w=w, a=a, b=b, x=x: ops.lora_linear_per_sample(x, w, None, a, b, scales, index)
            )
            rows["base"].append(lambda w=w, x=x: F.linear(x, w))
        with torch.no_grad():
            found = measure.from_memory(rows, seconds)
        one = rank * (k + n)  # numbers, fp32
        moved = {"one adapter": 2 * k * n + 4 * one, "16 adapters": 2 * k * n + 64 * one, "base": 2 * k * n}
        title = f"{k} -> {n}, 16 samples, bf16, r={rank}, forward (ms)"
        measure.print_rates(title, found, "one adapter", moved, 32 * (k * n + one))


def stepper(kind, layers):
    """Return a training step of engine.py's model; 4-bit kinds keep the base in NF4."""
    import engine

    model = engine.llama(layers)
    if kind.endswith("qlora"):
        if kind.startswith("peft "):
            model = with_bitsandbytes(model)
        else:
            peftcore.quantize(model)
        kind = kind.split()[0]
    tokens = torch.randint(0, 49152, (engine.BATCH, engine.LENGTH), generator=torch.Generator().manual_seed(1))
    model = engine.with_adapter(kind.split()[0], model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None

    def step():
        model(input_ids=tokens, labels=tokens).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def with_bitsandbytes(model):
    """Replace every linear layer but the head by bitsandbytes' in NF4."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            made = bnb.nn.Linear4bit(module.in_features, module.out_features, False, torch.bfloat16, True, "nf4")
            made.weight = bnb.nn.Params4bit(module.weight.data, False, quant_type="nf4", compress_statistics=True)
            model.set_submodule(name, made.to("cpu"))
    return model


KINDS = ("frozen", "peftcore lora", "peft lora", "peftcore qlora", "peft qlora")


def steps(kinds, layers, seconds):
    """Time of a training step, interleaved, and the peak memory of each in a process of its own."""
    times = measure.interleaved({kind: stepper(kind, layers) for kind in kinds}, seconds)
    print_steps(__file__, times, layers)


def print_steps(file, times, layers):
    """Print a table of steps, and the peak memory of each kind, from processes that run `file`."""
    import engine

    kinds = list(times)
    table(f"a training step, {layers} layers of SmolLM2-135M's shape, bf16, batch 4 x 128 (ms)", times, kinds[0])
    print(f"{'floor, of engine.py':34}{engine.floor(layers):9.0f}")
    of = ("--threads", torch.get_num_threads(), "--layers", layers, "--peak")
    peaks = {kind: measure.in_child(file, *of, kind)["peak"] for kind in kinds}
    for kind, peak in peaks.items():
        print(f"{kind:34}peak {peak:6.0f} MB")
    measure.note_pairs("peak memory of a step", {kind: [peak] for kind, peak in peaks.items()})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--only", nargs="+", default=["linear", "call", "samples", "step"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of step; the first is the base")
    parser.add_argument("--dtypes", nargs="+", help="of linear, such as bfloat16; by default those of its shapes")
    parser.add_argument("--layers", type=int, default=30, help="of the model of a step")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    measure.add_level_argument(parser)
    options = parser.parse_args()
    measure.run_at(options.level)
    torch.set_num_threads(options.threads)
    if options.peak:
        measure.print_peak(stepper(options.peak, options.layers))
        return
    measure.print_surroundings(options.threads)
    measure.keep_freed_memory()
    if "linear" in options.only:
        sizes = dict.fromkeys(shape[:3] for shape in SHAPES)
        chosen = [(*size, dtype) for size in sizes for dtype in options.dtypes] if options.dtypes else SHAPES
        for shape in chosen:
            linear(*shape, options.rank, options.seconds)
    if "call" in options.only:
        call(options.seconds / 2)
    if "samples" in options.only:
        samples(options.rank, options.seconds / 2)
    if "step" in options.only:
        steps(options.kinds, options.layers, options.seconds * 5)


if __name__ == "__main__":
    main()
