"""Experts' forward and backward next to transformers and peft, in one run, and one token through experts in 4 bits.

    python benchmarks/experts.py [--threads 2] [--seconds 20] [--rank 16] [--only step decode] [--slow]

step: 32 experts of [768, 1024] and [1024, 384], 256 tokens, top 8 (2048 rows), bf16; gradients for what enters, and for
the factors of LoRA. Weights come from memory, as in a model: each row goes through as many modules as no cache holds,
and is timed once more with the one that it has just used ("in cache"). Rows are timed in turn, and all keep the memory
that they free. The floor is that of the frozen rows: one dense pair of layers with the same operations, as the library
computes it, and all weights read twice at the bandwidth of a plain read. peft is its `target_parameters` over the same
module. --slow: also transformers' batched_mm and peft over its eager forward, once each.

decode: one token, top 8 of 128 experts of [1536, 2048] and [2048, 768] (Qwen3-30B-A3B) in NF4 with nested scales, other
experts at every call, so that they come from memory, as a share of a plain read's bandwidth.
"""

import argparse
import copy
import logging
import time
import warnings

import measure
import torch
from torch.nn import functional as F

from peftcore import ops
from peftcore.plugin import LowRank, experts_forward

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
TOKENS, TOP_K = 256, 8


def experts(count, hidden, intermediate, dtype=torch.bfloat16):
    """Return a frozen module of experts of Qwen3-MoE."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=count)
    config._experts_implementation = "grouped_mm"
    module = Qwen3MoeExperts(config).to(dtype).requires_grad_(False)
    for weight in module.parameters():
        weight.copy_(torch.randn(weight.shape, dtype=torch.float32) * weight.shape[-1] ** -0.5)
    return module


def routing(tokens, count, top_k):
    weights, index = torch.randn(tokens, count).softmax(-1).topk(top_k)
    return index, weights / weights.sum(-1, keepdim=True)


def factors(module, rank):
    """Return a low-rank product for each parameter; both factors are fp32, as peft's."""

    def change(weight):
        count, out, width = weight.shape
        a = (torch.randn(count, rank, width) * width**-0.5).requires_grad_()
        return LowRank(a, (torch.randn(count, out, rank) * rank**-0.5).requires_grad_(), 0.5)

    return {name: [change(weight)] for name, weight in module.named_parameters()}


def in_nf4(module):
    packed = {n: ops.quantize_4bit(w.float(), double_quant=True) for n, w in module.named_parameters()}
    module = copy.deepcopy(module)
    module.packed_parameter = packed.get
    return module


def with_peft(module, rank, implementation):
    """Return (the module with peft's LoRA on its parameters, the trained parameters)."""
    import peft

    module = copy.deepcopy(module)
    module.config._experts_implementation = implementation
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank // 2, target_modules=[], target_parameters=["0.gate_up_proj", "0.down_proj"]
    )
    model = peft.inject_adapter_in_model(config, torch.nn.Sequential(module)).train()
    return model[0], [p for p in model.parameters() if p.requires_grad]


def bandwidth(tensors):
    """Return the bytes a second of reading `tensors`, which no cache holds, with all threads; the best of three."""
    words = [t.contiguous().view(torch.uint8).view(-1)[: t.nbytes // 8 * 8].view(torch.int64) for t in tensors]
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        for t in words:
            t.sum()
        best = max(best, sum(t.nbytes for t in words) / (time.perf_counter() - start))
    return best


def floor_of(module, seconds):
    """Return the ms of the dense pair, and of reading the weights twice."""
    rows = TOKENS * TOP_K
    pairs = [(w[0].clone(), torch.randn(rows, w.shape[2]).bfloat16(), torch.randn(rows, w.shape[1]).bfloat16())
             for w in module.parameters()]  # fmt: skip

    def pair():
        for w, x, dy in pairs:
            F.linear(x, w)
            torch.mm(dy, w)

    dense = min(measure.interleaved({"pair": pair}, seconds)["pair"])
    rate = bandwidth([*module.parameters(), torch.randn(1 << 24)])
    return dense, 2e3 * sum(w.nbytes for w in module.parameters()) / rate, rate


def step(rank, seconds, slow):
    torch.manual_seed(0)
    dense = [experts(32, 1024, 384)]
    size = sum(w.nbytes for w in dense[0].parameters())
    dense += [copy.deepcopy(dense[0]) for _ in range(measure.beyond_caches(size) - 1)]
    module = dense[0]
    hidden = torch.randn(TOKENS, 1024).bfloat16().requires_grad_()
    grad, (index, shares) = torch.randn(TOKENS, 1024).bfloat16(), routing(TOKENS, 32, TOP_K)
    shares = shares.bfloat16()
    packed_size = size * 33 // 128  # of 16 bits 4.125
    packed = [in_nf4(module) for _ in range(measure.beyond_caches(packed_size))]
    changes = factors(module, rank)
    trained = [t for (change,) in changes.values() for t in (change.a, change.b)]

    def timed(forward, more=()):
        return lambda: torch.autograd.grad(forward(), (hidden, *more), grad)

    def theirs(implementation):
        def of(module):
            other = copy.copy(module)
            other.config = copy.deepcopy(module.config)
            other.config._experts_implementation = implementation
            return timed(lambda: other(hidden, index, shares))

        return [of(module) for module in dense]

    def ours(modules, changes=None):
        more = trained if changes else ()
        return [timed(lambda m=m: experts_forward(m, hidden, index, shares, changes=changes), more) for m in modules]

    def by_peft(implementation):
        others = [with_peft(module, rank, implementation) for module in dense]
        return [timed(lambda other=other: other(hidden, index, shares), more) for other, more in others]

    rows = {
        "peftcore": ours(dense),
        "peftcore NF4": ours(packed),
        f"peftcore LoRA r={rank}": ours(dense, changes),
        f"peftcore LoRA r={rank} on NF4": ours(packed, changes),
        "transformers grouped_mm": theirs("grouped_mm"),
        "transformers eager": theirs("eager"),
        f"peft r={rank}, grouped_mm": by_peft("grouped_mm"),
    }
    # First its backward alone, which others' memory would slow.
    pair, weights, rate = floor_of(module, min(2.0, seconds / 8))
    found = measure.from_memory(rows, seconds)
    exact = exact_result(module, hidden, index, shares)
    times = {name: min(found[0][f"transformers {name}"]) for name in ("grouped_mm", "eager")}
    moved = {name: 2 * (packed_size if "NF4" in name else size) for name in rows}  # forward and backward
    print(f"\ndense pair {pair:.2f} ms, weights twice at {rate / 1e9:.1f} GB/s {weights:.2f} ms", end="")
    title = f"32 experts, {TOKENS} tokens, top {TOP_K}, bf16, forward and backward (ms)"
    operations = 4 * TOKENS * TOP_K * size // (2 * 32)
    best = f"transformers {min(times, key=times.get)}"
    measure.print_rates(title, found, best, moved, operations, pair + weights)
    for name, peer in (("peftcore", best), (f"peftcore LoRA r={rank}", f"peft r={rank}, grouped_mm")):
        measure.note_ratio(f"32 experts: {name}", min(found[0][name]) / min(found[0][peer]), peer)
    for name in ("peftcore", "transformers grouped_mm", "transformers eager"):
        forward = experts_forward if name == "peftcore" else type(module).forward
        other = copy.deepcopy(module)
        other.config._experts_implementation = name.split()[-1]
        y = forward(other, hidden, index, shares).double()
        print(f"{name:34}error {float((y - exact).norm() / exact.norm()):.1e}")
    if slow:
        for name, calls in (("transformers batched_mm", theirs("batched_mm")), ("peft, eager", by_peft("eager"))):
            start = time.perf_counter()
            calls[0]()
            print(f"{name:34}{(time.perf_counter() - start) * 1e3:9.0f}   once")


@torch.no_grad()
def exact_result(module, hidden, index, shares):
    """Return the experts' output in float64."""
    other = copy.deepcopy(module).double()
    other.config._experts_implementation = "eager"
    return other(hidden.double(), index, shares.double())


@torch.no_grad()
def decode(seconds):
    torch.manual_seed(0)
    module = in_nf4(experts(128, 2048, 768))
    parts = [t for n in ("gate_up_proj", "down_proj") for t in module.packed_parameter(n).operands()[0][:2]]
    bytes_of_expert = sum(t.nbytes for t in parts) / 128
    hidden = torch.randn(1, 2048).bfloat16()
    calls = [routing(1, 128, TOP_K) for _ in range(64)]

    def token(index, shares):
        return lambda: experts_forward(module, hidden, index, shares.bfloat16())

    def read(index, _):
        def run():
            for t in parts:
                rows = t.view(128, -1)
                for e in index[0].tolist():
                    rows[e].view(torch.int64).sum()

        return run

    rows = {"token": [token(*call) for call in calls], "read": [read(*call) for call in calls]}
    found = measure.from_memory(rows, seconds)
    rate, one = bandwidth(parts), TOP_K * bytes_of_expert
    title = f"one token, {TOP_K} of 128 experts of Qwen3-30B-A3B in NF4 (ms): {one / 1e6:.1f} MB, a plain read "
    operations = 2 * TOP_K * sum(w[0].numel() for w in module.parameters())
    measure.print_rates(f"{title}{rate / 1e9:.1f} GB/s", found, "read", dict.fromkeys(rows, one), operations)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--only", nargs="+", choices=["step", "decode"], default=["step", "decode"])
    parser.add_argument("--slow", action="store_true")
    measure.add_level_argument(parser)
    options = parser.parse_args()
    measure.run_at(options.level)
    torch.set_num_threads(options.threads)
    measure.print_surroundings(options.threads)
    measure.keep_freed_memory()
    if "step" in options.only:
        step(options.rank, options.seconds, options.slow)
    if "decode" in options.only:
        decode(options.seconds / 4)


if __name__ == "__main__":
    main()
