"""Cost of DoRA over LoRA: a layer's norms, a layer forward and backward, a training step. peft in the same run.

    python benchmarks/dora.py [--threads 2] [--seconds 10] [--rank 16] [--only norms linear step] [--cpu]

Rows of a table are timed in turn, in one process; all keep the memory that they free. The step is engine.py's: the
shape of SmolLM2-135M in bf16, batch 4 x 128, r=16 on every linear layer, no dropout.
"""

import argparse
import logging
import time
import warnings

import engine
import lora
import measure
import torch
from torch import nn
from torch.nn import functional as F

import peftcore
from peftcore import ops

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
SHAPES = [(512, 576, 1536, "bfloat16"), (512, 1536, 576, "bfloat16"), (1024, 4096, 4096, "bfloat16")]


def norms(k, n, dtype, rank, seconds):
    """Time the norms of W + B A."""
    w = torch.randn(n, k, dtype=getattr(torch, dtype))
    a, b = torch.randn(rank, k) / 16, torch.randn(n, rank) / 16
    packed = peftcore.ops.quantize_4bit(w, double_quant=True)
    rows = {
        "row_norms": lambda: ops.row_norms(w, a, b, 0.5),
        "row_norms in 4 bits": lambda: ops.row_norms(packed, a, b, 0.5),
        "composed": lambda: torch.linalg.vector_norm(w.float() + 0.5 * (b @ a), dim=1),
        "as peft": lambda: torch.linalg.norm(w + 0.5 * (b @ a).to(w.dtype), dim=1),
        "one read of W": lambda: w.view(torch.int32).sum(),
    }
    times = measure.interleaved(rows, seconds)
    lora.table(f"norms of {k} -> {n}, {dtype}, r={rank} (ms)", times, "row_norms")
    exact = (w.double() + 0.5 * (b.double() @ a.double())).norm(dim=1)
    for name in ("row_norms", "as peft"):
        print(f"{name:34} off by at most {((rows[name]().double() - exact) / exact).abs().max():.1e} of n")


def linear(m, k, n, dtype, rank, seconds):
    """Time forward and backward of one layer."""
    import peft

    dtype = getattr(torch, dtype)
    x, dy = torch.randn(m, k).to(dtype).requires_grad_(), torch.randn(m, n).to(dtype)
    layer = nn.Linear(k, n, bias=False, dtype=dtype).requires_grad_(False)
    rows = {"frozen": lambda: torch.autograd.grad(F.linear(x, layer.weight), x, dy)}
    for method in ("lora", "dora"):
        ours = nn.Sequential(nn.Linear(k, n, bias=False, dtype=dtype))
        peftcore.apply(ours, method, r=rank, target_modules=["0"])
        config = peft.LoraConfig(r=rank, target_modules=["0"], use_dora=method == "dora")
        theirs = peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(k, n, bias=False, dtype=dtype)))
        for who, model in (("peftcore", ours), ("peft", theirs)):
            inputs = (x, *(p for p in model.parameters() if p.requires_grad))
            rows[f"{who} {method}"] = lambda model=model, inputs=inputs: torch.autograd.grad(model(x), inputs, dy)
    times = measure.interleaved(rows, seconds)
    lora.table(f"{k} -> {n}, {m} rows, {dtype}, r={rank}, forward and backward (ms)", times, "peftcore lora")


def stepper(kind, layers):
    """Return a training step of engine.py's model."""
    model = engine.llama(layers)
    if kind == "peftcore dora":
        peftcore.apply(model, "dora", r=engine.R, lora_alpha=engine.R)
    elif kind == "peft dora":
        import peft

        config = peft.LoraConfig(r=engine.R, lora_alpha=engine.R, target_modules="all-linear", use_dora=True)
        model = peft.get_peft_model(model, config)
    else:
        model = engine.with_adapter(kind.split()[0], model)
    tokens = torch.randint(0, 49152, (engine.BATCH, engine.LENGTH), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step():
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


KINDS = ("peftcore lora", "peftcore dora", "peft lora", "peft dora")


def steps(kinds, layers, seconds, clock):
    """Time of a training step, interleaved, and the peak memory of each in a process of its own."""
    times = measure.interleaved({kind: stepper(kind, layers) for kind in kinds}, seconds, clock=clock)
    lora.print_steps(__file__, times, layers)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--only", nargs="+", default=["norms", "linear", "step"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of step; the first is the base")
    parser.add_argument("--cpu", action="store_true", help="CPU time of the step: with --threads 1, on a busy machine")
    parser.add_argument("--layers", type=int, default=30, help="of the model of a step")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        measure.print_peak(stepper(options.peak, options.layers))
        return
    measure.print_surroundings(options.threads)
    measure.keep_freed_memory()
    torch.manual_seed(0)
    for m, k, n, dtype in SHAPES:
        if "norms" in options.only:
            norms(k, n, dtype, options.rank, options.seconds / 5)
        if "linear" in options.only:
            linear(m, k, n, dtype, options.rank, options.seconds / 5)
    if "step" in options.only:
        clock = time.process_time if options.cpu else time.perf_counter
        steps(options.kinds, options.layers, options.seconds * 4, clock)


if __name__ == "__main__":
    main()
