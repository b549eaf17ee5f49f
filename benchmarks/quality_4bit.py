"""Perplexity of SmolLM2-135M on real text in each 4-bit format, and in NF4 next to bitsandbytes.

    python benchmarks/quality_4bit.py [--threads 2] [--tokens 8192] [--window 512] [--dtype bfloat16]

Text: the 1,000 movie-review snippets that the demo holds out, joined by newlines and cut into windows; every token of
a window but the first is predicted. Each row runs in a process of its own: it loads one folder of bf16, quantizing on
the way, and evaluates without gradients. `bits` are those of packed weights, scales and zero points over the quantized
weights; `tokens/s` are those of the evaluation, per second of one thread's processor time. The model was of 4 bits once
already (see smollm2.py), in groups of 32, which makes it more brittle than one that never was. Its rows of 576 inputs
have no groups of 128. affine4 rounds to nearest; "+ gptq" by GPTQ, with 2,048 tokens of the training snippets.
"+ loftq" is LoRA r=16 with LoftQ's start; `bits` leave it out, `load` is with it.

"as trained" is bitsandbytes in training mode, which computes from exact scales; in evaluation mode on a CPU with bf16
dot products it repacks its weights and rounds the scales to bf16.
"""

import argparse
import json
import math
import time

import measure
import smollm2
import torch
from torch.nn import functional as F

AS_TRAINED = ", as trained"
KINDS = ["dense"]
for library in smollm2.QUANTIZED:
    for double in ("", " + double quant"):
        KINDS += [library + double] + ([library + double + AS_TRAINED] if library == "bitsandbytes" else [])
KINDS += ["peftcore fp4", "peftcore mxfp4", "peftcore nvfp4", "peftcore affine4 64", "peftcore affine4 32"]
KINDS += ["peftcore affine4 64 + gptq", "peftcore affine4 32 + gptq"]
KINDS += [f"peftcore {name} + loftq" for name in ("nf4", "mxfp4", "affine4 64")]


def bits(model):
    """Return (bits a weight of the layers in 4 bits, number of such weights)."""
    tensors = model.state_dict()
    packed = [name.partition(".quant_state.")[0] for name in tensors if ".quant_state." in name]
    parts = [f"{name}{part}" for name in packed for part in ("", ".absmax", ".nested_absmax", ".zeros")]
    size = sum(tensors[name].nbytes for name in parts if name in tensors)
    count = sum(2 * tensors[name].nbytes for name in packed)
    return 8 * size / max(1, count), count


def run(kind, options):
    """Return the figures of one row."""
    model, seconds = smollm2.load(kind.removesuffix(AS_TRAINED), getattr(torch, options.dtype))
    weight_bits, count = bits(model)
    model.train(kind.endswith(AS_TRAINED))
    batch = smollm2.windows("classify_test", options.tokens, options.window)
    loss = 0.0
    with torch.no_grad():
        model(input_ids=batch[:1])  # what is done at a first call only
        start, used = time.perf_counter(), time.process_time()
        for ids in batch.split(4):
            logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
            loss += F.cross_entropy(logits.float(), ids[:, 1:].flatten(), reduction="sum").item()
    took, used = time.perf_counter() - start, time.process_time() - used
    predicted = batch.numel() - len(batch)
    found = {"perplexity": math.exp(loss / predicted), "bits": weight_bits, "weights": count, "load": seconds}
    found |= {"evaluate": took, "peak": measure.peak_megabytes(), "predicted": predicted}
    return found | {"tokens": batch.numel() / used}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--only", metavar="KIND", action="append", help=f"a row: {', '.join(KINDS)}; may be repeated")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.kind:
        print(json.dumps(run(options.kind, options)))
        return
    smollm2.prepare()
    measure.print_surroundings(options.threads)
    print(options.dtype)
    shared = [
        word for name in ("threads", "tokens", "window", "dtype") for word in (f"--{name}", getattr(options, name))
    ]
    print(f"{'':42}perplexity   to dense   bits   load (s)   evaluate (s)   tokens/s   peak MB")
    dense = None
    for kind in options.only or KINDS:
        found = measure.in_child(__file__, "--kind", kind, *shared)
        dense = dense or found["perplexity"]
        ratio = 100 * (found["perplexity"] / dense - 1)
        print(
            f"{kind:42}{found['perplexity']:10.4f}{ratio:+9.2f} %{found['bits']:7.3f}{found['load']:11.2f}"
            f"{found['evaluate']:15.1f}{found['tokens']:11.0f}{found['peak']:10.0f}",
            flush=True,
        )
    print(f"{found['predicted']:,} tokens predicted; {found['weights']:,} weights in 4 bits")


if __name__ == "__main__":
    main()
