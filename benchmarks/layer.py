"""The rest of a layer: RMSNorm and gated activations by one operator each, and a training step with them.

    python benchmarks/layer.py [--threads 1] [--seconds 10] [--busy] [--step]

Forward and gradient, next to PyTorch's operators as a model calls them, in the same run. The floor is the time of
copies that move as many bytes as inputs, outputs and their gradients have. The error is the
gradient's, relative to float64. `--step` measures a step of LoRA on all linear layers of a model in the shape of
SmolLM2-135M, with the loss without logits, and the peak memory of its process, with and without `peftcore.fuse`.
"""

import argparse
import json
import time

import measure
import torch
from torch.nn import functional as F

from peftcore import ops

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
BATCHES = ((4, 128), (2, 512))
WIDTH, INNER, EPS = 576, 1536, 1e-5


def norm(x, weight):
    """Return Llama's RMSNorm of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def gate(g, u):
    return F.silu(g) * u


# {name: (PyTorch's, ours, shapes of the inputs, how many of them have gradients, matrices that are read or written)}
PARTS = {
    "RMSNorm": (norm, lambda x, w: ops.rms_norm(x, w, EPS), lambda rows: [(rows, WIDTH), (WIDTH,)], 1, 2 + 3),
    "gate": (gate, ops.gated, lambda rows: [(rows, INNER), (rows, INNER)], 2, 3 + 5),
}


def inputs(shapes, dtype, differentiated):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [t.requires_grad_(i < differentiated) for i, t in enumerate(made)]


def gradients(call, given, grad):
    return torch.autograd.grad(call(*given), [t for t in given if t.requires_grad], grad)


def error(call, given, grad, exact):
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in given]
    wanted = gradients(exact, wide, grad.double())
    found = gradients(call, given, grad)
    return max(float((one - other).norm() / other.norm()) for one, other in zip(found, wanted, strict=True))


def step(dtype, batch, fused):
    from transformers import LlamaConfig, LlamaForCausalLM

    import peftcore

    torch.manual_seed(0)
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30}
    sizes = {"vocab_size": 49152, "hidden_size": WIDTH, "intermediate_size": INNER}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).to(dtype).train()
    peftcore.apply(model, "lora", r=8, target_modules="all-linear")
    peftcore.loss_without_logits(model)
    if fused:
        peftcore.fuse(model)
    ids = torch.randint(49152, batch, generator=torch.Generator().manual_seed(0))
    return lambda: model(input_ids=ids, labels=ids).loss.backward()


def measured(dtype, batch, fused, seconds):
    """Return a step's times in ms and its peak over the model's memory in MB."""
    call = step(DTYPES[dtype], batch, fused)
    measure.give_back_freed_memory()
    measure.reset_peak()
    before = measure.peak_megabytes()
    call()
    peak = measure.peak_megabytes() - before
    return measure.interleaved({"step": call}, seconds, least=3, clock=time.process_time)["step"], peak


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--step", action="store_true", help="measure a training step, not the operators")
    parser.add_argument("--busy", action="store_true", help="count the process's own time: for a busy machine")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        dtype, batch, fused = options.child
        sizes = tuple(map(int, batch.split("x")))
        times, peak = measured(dtype, sizes, fused == "fused", options.seconds)
        print(json.dumps({"ms": min(times), "peak": peak}))
        return
    measure.print_surroundings(options.threads)
    names = options.dtype or list(DTYPES)
    if options.step:
        print(f"{'a step':28}{'plain ms':>10}{'fused':>9}{'of it':>7}{'plain MB':>10}{'fused':>9}{'of it':>7}")
        for name in names:
            for batch in BATCHES:
                shape = "x".join(map(str, batch))
                arguments = ("--threads", options.threads, "--seconds", options.seconds, "--child", name, shape)
                one, other = (measure.in_child(__file__, *arguments, way) for way in ("plain", "fused"))
                print(f"{shape + ' ' + name:28}", end="")
                for key in ("ms", "peak"):
                    print(f"{one[key]:10.0f}{other[key]:9.0f}{other[key] / one[key]:7.2f}", end="")
                print()
        return
    measure.keep_freed_memory()
    clock = time.process_time if options.busy else time.perf_counter
    print(f"{'forward and gradient':34}{'PyTorch ms':>11}{'ours':>8}{'of it':>7}{'floor':>8}{'error':>10}{'ours':>10}")
    for name in names:
        for batch in BATCHES:
            for part, (theirs, ours, shapes, differentiated, moved) in PARTS.items():
                given = inputs(shapes(batch[0] * batch[1]), DTYPES[name], differentiated)
                grad, target = torch.randn(given[0].shape).to(DTYPES[name]), torch.empty_like(given[0])
                rows = {
                    "theirs": lambda call=theirs, given=given, grad=grad: gradients(call, given, grad),
                    "ours": lambda call=ours, given=given, grad=grad: gradients(call, given, grad),
                    "copy": lambda given=given, target=target: target.copy_(given[0].detach()),
                }
                low = {
                    row: min(times) for row, times in measure.interleaved(rows, options.seconds, clock=clock).items()
                }
                measure.note_ratio(f"{part} {batch[0]}x{batch[1]} {name}", low["ours"] / low["theirs"], "PyTorch")
                off = [error(call, given, grad, theirs) for call in (theirs, ours)]
                label = f"{part} {batch[0]}x{batch[1]} {name}"
                print(
                    f"{label:34}{low['theirs']:11.2f}{low['ours']:8.2f}{low['ours'] / low['theirs']:7.2f}"
                    f"{low['copy'] * moved / 2:8.2f}{off[0]:10.1e}{off[1]:10.1e}"
                )


if __name__ == "__main__":
    main()
