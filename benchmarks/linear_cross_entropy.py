"""Cross-entropy of a head: what it takes without logits, next to PyTorch's of materialized logits, in the same run.

    python benchmarks/linear_cross_entropy.py [--threads 2] [--seconds 20] [--rows 1024] [--busy]

Loss and gradient of hidden states with a frozen head, as a step of an adapter needs them. The floor is the time of the
two products alone. Memory is the peak of a process of its own, without what it held before. The error is the relative
one of the gradient, and the absolute one of the loss, from float64.
"""

import argparse
import json
import time

import measure
import torch
from torch.nn import functional as F

from peftcore import ops

SHAPES = {"SmolLM2-135M": (576, 49152), "Llama-3.2-1B": (2048, 128256), "Qwen3-0.6B": (1024, 151936)}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def inputs(shape, dtype, rows):
    width, classes = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(classes, width, generator=generator).mul_(width**-0.5).to(dtype)
    labels = torch.randint(classes, (rows,), generator=generator)
    return hidden, weight, labels


def theirs(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def ours(hidden, weight, labels):
    return ops.linear_cross_entropy(hidden, weight, labels)


def half_labelled(hidden, weight, labels):
    return ops.linear_cross_entropy(hidden, weight, labels.masked_fill(torch.arange(len(labels)) % 2 == 0, -100))


WAYS = {"F.cross_entropy": theirs, "linear_cross_entropy": ours, "half of the rows labelled": half_labelled}


def gradient(way, hidden, weight, labels):
    loss = way(hidden, weight, labels)
    return loss.detach(), *torch.autograd.grad(loss, hidden)


def products(hidden, weight, labels):
    """Multiply as the head and its gradient do, in pieces whose logits stay in the cache."""
    for rows in hidden.detach().split(128):
        (rows @ weight.t()) @ weight


def errors(shape, dtype, rows):
    given = inputs(shape, dtype, min(rows, 256))
    wide = given[0].detach().double().requires_grad_(), given[1].double(), given[2]
    loss, wanted = gradient(theirs, *wide)
    found = {}
    for name in list(WAYS)[:2]:
        one, grad = gradient(WAYS[name], *given)
        found[name] = float((one - loss).abs()), float((grad - wanted).norm() / wanted.norm())
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--busy", action="store_true", help="count the process's own time: for a busy machine")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        shape, dtype = options.peak
        given = inputs(shape, DTYPES[dtype], options.rows)
        F.linear(given[0][:2], given[1])  # the library's own memory
        measure.give_back_freed_memory()
        measure.reset_peak()
        before = measure.peak_megabytes()
        gradient(WAYS[options.way], *given)
        print(json.dumps({"peak": measure.peak_megabytes() - before}))
        return
    measure.print_surroundings(options.threads)
    measure.keep_freed_memory()
    clock = time.process_time if options.busy else time.perf_counter
    for shape in options.shape or SHAPES:
        for name in options.dtype or ["bfloat16"]:
            given = inputs(shape, DTYPES[name], options.rows)
            rows = {way: lambda call=call, given=given: gradient(call, *given) for way, call in WAYS.items()}
            rows["products alone"] = lambda given=given: products(*given)
            times = measure.interleaved(rows, options.seconds, least=3, clock=clock)
            of = ("--peak", shape, name, "--rows", options.rows, "--way")
            peaks = {way: measure.in_child(__file__, *of, way)["peak"] for way in WAYS}
            off = errors(shape, DTYPES[name], options.rows)
            base = min(times["F.cross_entropy"])
            print(f"\n{shape}, {options.rows} rows, vocabulary {SHAPES[shape][1]:,}, {name}")
            print(f"{'':28}{'min ms':>9}{'median':>9}{'of F.':>8}{'MB':>9}{'loss off':>11}{'gradient':>10}")
            for way in rows:
                low, median, _ = measure.spread(times[way])
                peak = f"{peaks[way]:9.0f}" if way in peaks else ""
                error = f"{off[way][0]:11.1e}{off[way][1]:10.1e}" if way in off else ""
                print(f"{way:28}{low:9.1f}{median:9.1f}{low / base:8.2f}{peak}{error}", flush=True)
                if way == "linear_cross_entropy":
                    measure.note_ratio(f"{shape}, {name}: {way}", low / base, "F.cross_entropy")
                    ratio = peaks[way] / peaks["F.cross_entropy"]
                    measure.note_ratio(f"{shape}, {name}: {way}, memory", ratio, "F.cross_entropy")


if __name__ == "__main__":
    main()
