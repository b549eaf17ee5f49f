"""What a change costs where many adapters are there: adding, switching, mixing in a batch, the forward. peft beside.

    python benchmarks/many_adapters.py [--adapters 1000] [--layers 32] [--hidden 64] [--peft 100] [--threads 2]

A Llama of `layers` layers, LoRA r=8 on its seven linear layers each. Adapters are added one after the other and rest
but for the first. peft gets fewer of them, since its times grow with their number: both are shown at that number too.
"""

import argparse
import copy
import itertools
import logging
import resource
import statistics
import time
import warnings

import measure
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftcore

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")


def milliseconds(change, times=1):
    """(least, median) of so many calls."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        change()
        found.append((time.perf_counter() - start) * 1e3)
    return min(found), statistics.median(found)


def row(what, least, median):
    print(f"  {what:44}{least:10.2f}{median:10.2f}", flush=True)


def ours(model, count, ids, shown):
    print("\npeftcore (ms)                                      least    median")
    mixed = [f"a{i % shown}" for i in range(64)]
    there, others = 0, itertools.cycle(range(1, shown))
    for target in (1, shown, count):
        added = []
        for i in range(there, target):
            added.append(milliseconds(lambda i=i: peftcore.apply(model, "lora", r=8, adapter=f"a{i}"))[0])
            peftcore.activate(model, "a0")
        there = target
        print(f" {target} adapters")
        row("adding one (the last ten)", min(added[-10:]), statistics.median(added[-10:]))
        if target > 1:
            row("switching", *milliseconds(lambda: peftcore.activate(model, f"a{next(others)}"), 20))
            mix = milliseconds(lambda: peftcore.activate(model, mixed, per_sample=True), 5)
            row("64 for the samples of a batch", *mix)
            peftcore.activate(model, "a0")
        with torch.no_grad():
            row("forward of 16 tokens", *milliseconds(lambda: model(ids), 30))


def theirs(model, count, ids):
    import peft

    print("\npeft (ms)                                          least    median")
    config = peft.LoraConfig(r=8, target_modules="all-linear")
    wrapped = peft.get_peft_model(model, config, adapter_name="a0")
    added = [milliseconds(lambda i=i: wrapped.add_adapter(f"a{i}", config))[0] for i in range(1, count)]
    print(f" {count} adapters")
    row("adding one (the last ten)", min(added[-10:]), statistics.median(added[-10:]))
    others = itertools.cycle(range(1, count))
    row("switching", *milliseconds(lambda: wrapped.set_adapter(f"a{next(others)}"), 10))
    with torch.no_grad():
        row("forward of 16 tokens", *milliseconds(lambda: wrapped(input_ids=ids), 30))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--peft", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measure.print_surroundings(options.threads)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=options.hidden,
        intermediate_size=2 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    other, ids = copy.deepcopy(model), torch.randint(0, 256, (1, 16))
    with torch.no_grad():
        row("the model alone, forward of 16 tokens", *milliseconds(lambda: model(ids), 30))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours(model, options.adapters, ids, min(options.peft, options.adapters))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    held = sum(p.nbytes for name, p in model.named_parameters() if ".lora_" in name)
    print(f"  memory: {grown / 2**20:,.0f} MB more for adapters of {held / 2**20:,.0f} MB ({grown / held:.2f})")
    if options.peft:
        theirs(other, options.peft, ids)


if __name__ == "__main__":
    main()
