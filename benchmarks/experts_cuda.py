"""Experts on a GPU next to PyTorch's grouped_mm, transformers, peft and LoRA by hand, in one run.

    python benchmarks/experts_cuda.py [--models qwen3 gpt-oss mixtral] [--tokens 1 16 512 4096] [--rank 16]

Needs a GPU; without one it says so and ends. For each model's shape and each number of tokens two tables, in bf16 with
factors in fp32. Forward alone up to 16 tokens, as in generation; forward and gradients of x and of the factors beyond.

operator: one weight of all experts over rows that are sorted already. "split" is LoRA as Unsloth publishes it for fused
experts: x W, x A and (x A) B are three grouped_mm, each with PyTorch's gradient; "loop" is a LoRA layer for each expert
over its rows, Unsloth's and axolotl's way with lists of layers, which waits for the offsets.
module: Qwen3-MoE's module of experts with that shape, through routing, both products and the gate: transformers'
grouped_mm, peft's `target_parameters` over it, and ours.

Every call takes another routing, so that experts come from memory as in a model. The floor is the larger of what must
be moved (the weights as stored of experts that have rows, x, y) over the bandwidth of a device copy, and the operations
of the base products over the rate of a large cuBLAS product, both measured in this run.
"""

import argparse
import itertools
import logging
import statistics
import sys
import warnings

import torch
from experts import experts, factors, in_nf4, routing, with_peft
from measure_cuda import milliseconds, rates
from torch.nn import functional as F

from peftcore import ops
from peftcore.plugin import experts_forward

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
DTYPE = torch.bfloat16
SHAPES = {"qwen3": (128, 2048, 768, 8), "gpt-oss": (32, 2880, 2880, 4), "mixtral": (8, 4096, 14336, 2)}
ROUTINGS = 16


def offsets_of(index, count):
    return (index.reshape(-1)[:, None] == torch.arange(count, device=index.device)).sum(0).cumsum(0).to(torch.int32)


def split(x, offsets, weight, a, b, scale):
    """Return y of LoRA over all experts by three products."""
    thin = F.grouped_mm(x, a.to(x.dtype).mT, offs=offsets)
    return F.grouped_mm(x, weight.mT, offs=offsets) + scale * F.grouped_mm(thin, b.to(x.dtype).mT, offs=offsets)


def loop(x, offsets, weight, a, b, scale):
    """Return y of LoRA, computed expert by expert."""
    parts, begin = [], 0
    for e, end in enumerate(offsets.tolist()):
        if end > begin:
            rows, low, high = x[begin:end], a[e].to(x.dtype), b[e].to(x.dtype)
            parts.append(F.linear(rows, weight[e]) + scale * F.linear(F.linear(rows, low), high))
        begin = end
    return torch.cat(parts)


def of_operator(module, rank, offsets, rows):
    """Return ({name: call}, x, the trained factors, the number of values of an expert's weight)."""
    weight, changes = module.gate_up_proj.data, factors(module, rank)
    (thin,) = changes["gate_up_proj"]
    four = in_nf4(module).packed_parameter("gate_up_proj")
    a, b, scale = thin[:3]
    x = torch.randn(rows, weight.shape[2], device=weight.device, dtype=DTYPE)
    turn = itertools.cycle(offsets)
    calls = {
        "grouped_mm": lambda x: F.grouped_mm(x, weight.mT, offs=next(turn)),
        "peftcore": lambda x: ops.grouped_linear(x, next(turn), weight),
        "peftcore NF4": lambda x: ops.grouped_linear(x, next(turn), four),
        "peftcore LoRA": lambda x: ops.grouped_lora_linear(x, next(turn), weight, None, a, b, scale=scale),
        "peftcore LoRA NF4": lambda x: ops.grouped_lora_linear(x, next(turn), four, None, a, b, scale=scale),
        "LoRA, split grouped_mm": lambda x: split(x, next(turn), weight, a, b, scale),
        "LoRA, loop": lambda x: loop(x, next(turn), weight, a, b, scale),
    }
    return calls, x, [a, b], weight[0].numel()


def of_module(module, rank, routings, tokens):
    packed, changes = in_nf4(module), factors(module, rank)
    theirs, trained = with_peft(module, rank, "grouped_mm")
    ours = [t for (thin,) in changes.values() for t in thin[:2]]
    x = torch.randn(tokens, module.gate_up_proj.shape[2], device=module.gate_up_proj.device, dtype=DTYPE)
    turn = itertools.cycle(routings)
    calls = {
        "transformers grouped_mm": lambda x: module(x, *next(turn)),
        "peft target_parameters": lambda x: theirs(x, *next(turn)),
        "peftcore": lambda x: experts_forward(module, x, *next(turn)),
        "peftcore NF4": lambda x: experts_forward(packed, x, *next(turn)),
        "peftcore LoRA": lambda x: experts_forward(module, x, *next(turn), changes=changes),
        "peftcore LoRA NF4": lambda x: experts_forward(packed, x, *next(turn), changes=changes),
    }
    return calls, x, [*ours, *trained], sum(w[0].numel() for w in module.parameters())


def table(title, calls, x, trained, least_bytes, operations, back, rate):
    """Print a table of the calls. `least_bytes(name)`, `operations`: those of one pass."""
    x.requires_grad_(back)
    leaves = [x, *trained] if back else []

    def step(call):
        def run():
            with torch.set_grad_enabled(back):
                y = call(x)
            if back:
                torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)

        return run

    print(f"\n{title}, forward{' and backward' if back else ''} (us)")
    print(f"{'':26}{'min':>9}{'median':>9}{'IQR':>8}{'GB/s':>8}{'TFLOP/s':>9}   of the floor")
    passes, (bandwidth, flops) = 1 + back, rate
    for name, times in milliseconds({name: step(call) for name, call in calls.items()}).items():
        low, median, high = statistics.quantiles(times, n=4)
        moved, done = passes * least_bytes(name), passes * operations
        floor = max(moved / bandwidth / 1e6, done / flops / 1e9)
        least = min(times)
        print(
            f"{name:26}{least * 1e3:9.1f}{median * 1e3:9.1f}{(high - low) * 1e3:8.1f}{moved / least / 1e6:8.0f}"
            f"{done / least / 1e9:9.1f}   {least / floor:6.2f} of {floor * 1e3:.1f}"
        )


def tables(model, tokens, rank, rate, device="cuda"):
    count, hidden, intermediate, top_k = SHAPES[model]
    with torch.device(device):
        module = experts(count, hidden, intermediate)
        routings = [routing(tokens, count, top_k) for _ in range(ROUTINGS)]
        routings = [(index, shares.to(DTYPE)) for index, shares in routings]
        offsets, rows, back = [offsets_of(index, count) for index, _ in routings], tokens * top_k, tokens > 16
        used = statistics.mean(len(index.unique()) for index, _ in routings)
        print(f"\n{model}: {count} experts, {tokens} tokens, top {top_k}: {used:.1f} experts have rows")
        for kind, (calls, x, trained, each) in (
            ("operator", of_operator(module, rank, offsets, rows)),
            ("module", of_module(module, rank, routings, tokens)),
        ):
            wide = 2 * rows * (hidden + 2 * intermediate) * (1 if kind == "operator" else 2)

            def least_bytes(name, each=each, wide=wide):
                return used * each * (0.516 if "NF4" in name else 2) + wide  # 4 bits, and nested scales by 64

            table(f"{model}, {kind}", calls, x, trained, least_bytes, 2 * rows * each, back, rate)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 512, 4096])
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/experts_cuda.py needs a GPU, and PyTorch sees none: nothing was measured")
        sys.exit(0)
    bandwidth, flops = rate = rates()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, rank {options.rank}; ", end="")
    print(f"copy {bandwidth:.0f} GB/s, product {flops:.0f} TFLOP/s")
    for model, tokens in itertools.product(options.models, options.tokens):
        tables(model, tokens, options.rank, rate)


if __name__ == "__main__":
    main()
