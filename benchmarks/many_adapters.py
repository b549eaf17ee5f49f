"""Cost of changes with many adapters: adding, switching, choosing, loading, memory; peft in the same run.

    python benchmarks/many_adapters.py [--adapters 1000] [--layers 32] [--hidden 64] [--peft 50] [--threads 2]
                                       [--only add,mix,peft]

A Llama of `layers` layers, LoRA r=8 on its seven linear layers each.

add     one after the other; all but the first are inactive. Memory is what the process holds more of (resident set).
mix     64 different adapters for 64 samples over one for all, 4096 x 4096, bf16. The floor is the operations at the
        rate of a large product.
peft    gets fewer of them, since its times grow with their number: both are shown at that number. It loads adapters
        with `low_cpu_mem_usage`, its fastest way.
"""

import argparse
import gc
import itertools
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import measure
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftcore
from peftcore import ops
from peftcore.plugin import set_trainable

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
SAMPLES = 64
LOADING = "loading one (the last ten)"
LATEST, AT_PEFTS_NUMBER = {}, {}  # medians by row: of the last such row, and with as many adapters as peft has


def milliseconds(change, times=1):
    """Return (least, median) ms of `times` calls."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        change()
        found.append((time.perf_counter() - start) * 1e3)
    return min(found), statistics.median(found)


def row(what, least, median):
    LATEST[what] = median
    print(f"  {what:52}{least:10.2f}{median:10.2f}", flush=True)


def resident_bytes():
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def llama(options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=options.hidden,
        intermediate_size=2 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config).eval()


def choosing(model, names, there):
    """Time a switch of adapters, and one adapter for each sample of a batch, among resident ones that do not train."""
    others, shift = itertools.cycle(names[1:]), itertools.count()

    def mixed():
        first = next(shift)
        return [names[(first + i) % there] for i in range(SAMPLES)]

    row("switching", *milliseconds(lambda: peftcore.activate(model, next(others)), 20))
    choose = lambda: peftcore.activate(model, mixed(), per_sample=True)  # noqa: E731
    choose()
    row(f"{min(there, SAMPLES)} for {SAMPLES} samples", *milliseconds(choose, 20))


def add(options):
    """Time adapters that were applied, in memory; chosen ones do not train."""
    model, ids = llama(options), torch.randint(0, 256, (1, 16))
    root = tempfile.TemporaryDirectory()
    folder = peftcore.save(peftcore.apply(llama(options), "lora", r=8), Path(root.name) / "adapter")
    with torch.no_grad():
        row("the model alone, forward of 16 tokens", *milliseconds(lambda: model(ids), 30))
    there, before, begin = 0, 0, time.perf_counter()
    for target in dict.fromkeys((1, min(options.peft, options.adapters), options.adapters)):
        added, loaded = [], []
        for i in range(there, target):
            if target - i <= 10:
                load = lambda i=i: peftcore.load(model, folder, adapter=f"a{i}")  # noqa: E731
                loaded.append(milliseconds(load)[0])
            else:
                added.append(milliseconds(lambda i=i: peftcore.apply(model, "lora", r=8, adapter=f"a{i}"))[0])
            peftcore.activate(model, "a0")
            if i == 0:
                before, begin = resident_bytes(), time.perf_counter()
        there = target
        print(f" {target} adapters, after {time.perf_counter() - begin:.1f} s")
        if added:
            row("adding one (the last ten)", min(added[-10:]), statistics.median(added[-10:]))
        row(LOADING, min(loaded), statistics.median(loaded))
        if target > 1:
            row("switching to one that trains", *milliseconds(lambda: peftcore.activate(model, "a1"), 1))
            names = [f"a{i}" for i in range(target)]
            for name in names[:SAMPLES]:
                set_trainable(model, name, False)
            choosing(model, names[:SAMPLES], min(target, SAMPLES))
            peftcore.activate(model, "a0")
        with torch.no_grad():
            row("forward of 16 tokens", *milliseconds(lambda: model(ids), 30))
        if target == options.peft:
            AT_PEFTS_NUMBER.update(LATEST)
    grown = resident_bytes() - before
    held = sum(p.nbytes for name, p in model.named_parameters() if ".lora_" in name) * (there - 1) / there
    print(f"  memory: {grown / 2**20:,.0f} MB more for adapters of {held / 2**20:,.0f} MB ({grown / held:.2f})")
    root.cleanup()
    row("removing one", *milliseconds(lambda: peftcore.remove(model, f"a{there - 1}"), 1))


def mix(options):
    """Time the operator: 64 samples of a row each, bf16."""
    measure.keep_freed_memory()
    size, r = 4096, 16
    index, scales = torch.arange(SAMPLES), [1.0] * SAMPLES
    rate = measure.product_rate(torch.bfloat16)
    for rows in (1, 16):
        x = torch.randn(SAMPLES, rows, size).bfloat16()
        w = (torch.randn(size, size) / 64).bfloat16()
        a = [(torch.randn(r, size) / 64).bfloat16() for _ in range(SAMPLES)]
        b = [(torch.randn(size, r) / 4).bfloat16() for _ in range(SAMPLES)]
        with torch.no_grad():
            times = measure.interleaved(
                {
                    "frozen": lambda x=x, w=w: torch.nn.functional.linear(x, w),
                    "one for all": lambda x=x, w=w, a=a, b=b: ops.lora_linear(x, w, None, a[0], b[0], 1.0, 0.0),
                    "64 different": lambda x=x, w=w, a=a, b=b: ops.lora_linear_per_sample(
                        x, w, None, a, b, scales, index
                    ),
                },
                8,
            )
        least = {name: min(each) for name, each in times.items()}
        medians = {name: statistics.median(each) for name, each in times.items()}
        print(f" {SAMPLES} samples of {rows} rows, {size} x {size}, r={r}, bf16")
        floor = 2 * SAMPLES * rows * size * (size + 2 * r) / rate / 1e6
        print(f"  {'floor of one for all':52}{floor:10.2f}")
        for name in times:
            row(name, least[name], medians[name])
        ratio, usual = (each["64 different"] / each["one for all"] for each in (least, medians))
        print(f"  64 different over one for all: {ratio:.2f} (medians {usual:.2f})")


def peft(options):
    import peft

    count, ids = options.peft, torch.randint(0, 256, (1, 16))
    config = peft.LoraConfig(r=8, target_modules="all-linear")
    wrapped = peft.get_peft_model(llama(options), config, adapter_name="a0")
    added = [milliseconds(lambda i=i: wrapped.add_adapter(f"a{i}", config))[0] for i in range(1, count)]
    print(f" {count} adapters")
    row("adding one (the last ten)", min(added[-10:]), statistics.median(added[-10:]))
    others = itertools.cycle(range(1, count))
    row("switching", *milliseconds(lambda: wrapped.set_adapter(f"a{next(others)}"), 10))
    with torch.no_grad():
        row("forward of 16 tokens", *milliseconds(lambda: wrapped(input_ids=ids), 30))
    number = itertools.count()
    with tempfile.TemporaryDirectory() as folder:
        wrapped.save_pretrained(folder, selected_adapters=["a0"])
        load = lambda: wrapped.load_adapter(f"{folder}/a0", f"b{next(number)}", low_cpu_mem_usage=True)  # noqa: E731
        row(LOADING, *milliseconds(load, 10))
    for what in ("adding one (the last ten)", LOADING, "switching", "forward of 16 tokens"):
        if what in AT_PEFTS_NUMBER:
            measure.note_ratio(f"{count} adapters: {what}", AT_PEFTS_NUMBER[what] / LATEST[what], "peft")


PARTS = {"add": add, "mix": mix, "peft": peft}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--peft", type=int, default=50)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="add,mix,peft")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measure.print_surroundings(options.threads)
    for name in options.only.split(","):
        print(f"\n{name}: {'peft' if name == 'peft' else 'peftcore'} (ms)".ljust(55) + "     least    median")
        PARTS[name](options)


if __name__ == "__main__":
    main()
