"""Time of `apply` with every method on a model of 7 billion parameters, on the meta device, which needs no memory.

    python benchmarks/apply.py [--methods NAME ...] [--layers 32] [--times 3]

Llama-2-7B's shape, fields at their defaults; the fastest of some times, each on a model of its own, in processor time.
Next to it are what is trained, and what else the adapters have (banks, indices), each storage once. The meta
device computes and moves nothing, so the floor is zero.
"""

import argparse
import logging
import time
import warnings

import methods
import torch

import peftcore
from peftcore.plugin import set_trainable

FIELDS = {
    **methods.FIELDS,
    "cpt": {"cpt_token_ids": [5, 6, 7], "cpt_tokens_type_mask": [1, 2, 4]},
    "arrow": {"experts": ["a", "b"], "top_k": 1},
    "adapter-fusion": {"adapters": ["a", "b"]},
    "cartridge": {"num_virtual_tokens": 20},
    "bitfit": {"add_missing": True},
}
COMBINED = {"arrow": ("lora", {}), "adapter-fusion": ("adapter", {"placement": "pfeiffer"})}


def llama(layers):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers)).to(torch.bfloat16).requires_grad_(False)


def applied(method, layers):
    """Return (seconds, number of trainable values, bytes of the adapters' other tensors)."""
    model = llama(layers)
    if method in COMBINED:
        for name in "ab":
            peftcore.apply(model, COMBINED[method][0], adapter=name, **COMBINED[method][1])
            set_trainable(model, name, False)
    start = time.process_time()
    peftcore.apply(model, method, **FIELDS.get(method, {}))
    seconds = time.process_time() - start
    (adapter,) = (a for a in peftcore.summary(model).adapters if a.name == "default")
    trained = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    return seconds, sum(trained.values()), adapter.buffer_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(peftcore.methods()))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    peftcore.apply(llama(2), "lora")  # imports
    print(f"{'method':26}{'apply, s':>10}{'trained':>15}{'else, MB':>12}")
    for method in options.methods:
        found = [applied(method, options.layers) for _ in range(options.times)]
        seconds, trained, beside = min(found)
        print(f"{method:26}{seconds:10.2f}{trained:15,}{beside / 1e6:12.1f}", flush=True)


if __name__ == "__main__":
    main()
