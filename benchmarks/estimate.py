"""Predicted memory of a training step beside what a process really took, over many configurations.

    python benchmarks/estimate.py [--only WORD ..] [--threads 2] [--output estimate.json] [--picture estimate.png]

Each configuration runs in a process of its own: a model of that shape with random weights takes four steps, of which
the second's memory is measured, and the fastest after the first timed. What lies in the output is not measured again,
only predicted anew: a run that was stopped goes on. `counted` is the peak that a counting allocator saw above what
there was before the model (counting_allocator.c, compiled here and preloaded), to be compared with the tensors of the
prediction; `process` is the peak of the whole process, to be compared with the prediction and the libraries. Both exist
on Linux only.
"""

import argparse
import copy
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import measure

import peftcore

HERE = Path(__file__).parent
warnings.simplefilter("ignore")


def smol(layers=30, **more):
    from transformers import LlamaConfig

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    return LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=49152, tie_word_embeddings=True, **more)


def llama_1b(layers=16):
    from transformers import LlamaConfig

    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    return LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=128256, tie_word_embeddings=True)


def minilm():
    from transformers import BertConfig

    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
    return BertConfig(**sizes, vocab_size=30522, num_labels=3, architectures=["BertForSequenceClassification"])


def gpt2():
    from transformers import GPT2Config

    return GPT2Config(architectures=["GPT2LMHeadModel"], bos_token_id=1, eos_token_id=2, n_positions=1024)


def t5():
    from transformers import T5Config

    sizes = {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6}
    return T5Config(**sizes, decoder_start_token_id=0, architectures=["T5ForConditionalGeneration"])


def vit():
    from transformers import ViTConfig

    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
    return ViTConfig(**sizes, num_labels=10, architectures=["ViTForImageClassification"])


def moe():
    from transformers import Qwen3MoeConfig

    sizes = {"hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 384, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    experts = {"num_experts": 16, "num_experts_per_tok": 4}
    return Qwen3MoeConfig(**sizes, **heads, **experts, vocab_size=32000, architectures=["Qwen3MoeForCausalLM"])


MODELS = {
    "smol": smol,
    "smol4": lambda: smol(4),
    "1b": llama_1b,
    "1b2": lambda: llama_1b(2),
    "minilm": minilm,
    "gpt2": gpt2,
    "t5": t5,
    "vit": vit,
    "moe": moe,
}
OTHERS = sorted({*peftcore.methods()} - {"arrow", "adapter-fusion", "lora"})  # two need adapters that are trained
FIELDS = {
    "adalora": {"total_step": 1000},
    "alora": {"alora_invocation_tokens": [3]},
    "trainable-tokens": {"token_indices": [5, 6]},
    "bitfit": {"add_missing": True},
    "c3a": {"block_size": 64},
    "vblora": {"vector_length": 64},
}
CASES = [  # model, method, what differs from batch 4 x 128 in bf16
    ("smol", "lora", {}),
    ("smol4", "lora", {"batch_size": 1, "length": 1024}),
    ("smol4", "lora", {"dtype": "float32"}),
    ("smol4", "lora", {"gradient_checkpointing": True, "batch_size": 8, "length": 256}),
    ("smol4", "lora", {"quantize": "nf4"}),
    ("smol4", "dora", {}),
    ("smol4", None, {"optimizer": "adamw_8bit"}),
    ("smol4", "ia3", {"batch_size": 8, "length": 64}),
    ("minilm", "lora", {"dtype": "float32", "batch_size": 16}),
    ("gpt2", "lora", {"dtype": "float32"}),
    ("t5", "lora", {"dtype": "float32"}),
    ("vit", "lora", {"dtype": "float32", "batch_size": 8}),
    ("moe", "lora", {}),
    ("1b2", "qlora", {"batch_size": 1, "length": 256, "optimizer": "paged_adamw_8bit"}),
    *(("smol4", method, {"dtype": "float32"}) for method in OTHERS),
    *(("smol4", "lora", {"dtype": "float32", "batch_size": size, "length": 64}) for size in (2, 8, 16)),
    *(("smol4", "lora", {"dtype": "float32", "batch_size": 1, "length": length}) for length in (64, 256, 512)),
    *(("smol4", None, {"dtype": "float32", "optimizer": name}) for name in ("adamw_torch", "sgd", "lion_32bit")),
    ("smol4", None, {"dtype": "float32", "optimizer": "paged_adamw_8bit"}),
    ("smol4", None, {"dtype": "float32", "gradient_accumulation": 2}),
    ("smol4", "lora", {"dtype": "float32", "gradient_checkpointing": True, "batch_size": 8}),
    ("smol4", "lora", {"dtype": "float32", "gradient_checkpointing": "reentrant", "batch_size": 8}),
    ("smol4", "lora", {"dtype": "float32", "quantize": "nf4", "gradient_checkpointing": True}),
    *(("minilm", method, {"dtype": "float32", "batch_size": 8}) for method in ("ia3", "bitfit", None)),
    *(("gpt2", method, {"dtype": "float32", "batch_size": 2}) for method in ("ia3", "bitfit", "prefix-tuning")),
    *(("t5", method, {"dtype": "float32", "batch_size": 8, "length": 64}) for method in ("ia3", "lora")),
    *(("vit", method, {"dtype": "float32"}) for method in ("dora", None)),
    *(("moe", method, {"dtype": "float32", "batch_size": 2}) for method in ("ia3", "lora", "qlora")),
    ("1b2", "lora", {"dtype": "float32", "batch_size": 1}),
    ("1b2", "qlora", {"dtype": "float32", "batch_size": 2, "gradient_checkpointing": True}),
    ("smol", "dora", {"dtype": "float32", "batch_size": 1, "length": 256}),
    ("gpt2", "lora", {"dtype": "float32", "batch_size": 1, "length": 1024, "gradient_checkpointing": True}),
    ("minilm", "lora", {"batch_size": 16, "length": 64}),
    ("t5", "lora", {"dtype": "float32", "batch_size": 2, "gradient_checkpointing": True}),
    ("vit", "lora", {"dtype": "float32", "batch_size": 16}),
    ("moe", "qlora", {"batch_size": 1, "length": 512, "gradient_checkpointing": True}),
    ("1b", "qlora", {"batch_size": 1, "length": 64, "gradient_checkpointing": True}),
]
STEPS = 4
DEFAULTS = {"batch_size": 4, "length": 128, "dtype": "bfloat16"}


def arguments_of(case):
    """(config, method, arguments of `peftcore.estimate`)."""
    import torch

    model, method, more = case
    chosen = {**DEFAULTS, **more}
    return MODELS[model](), method, {**chosen, "dtype": getattr(torch, chosen["dtype"])}


def name_of(case):
    model, method, more = case
    chosen = {**DEFAULTS, **more}
    rest = [f"{name}={value}" for name, value in more.items() if name not in ("batch_size", "length", "dtype")]
    dtype = {"bfloat16": "bf16", "float32": "fp32"}[chosen["dtype"]]
    return " ".join([model, method or "full", f"{chosen['batch_size']}x{chosen['length']}", dtype, *rest])


def run(case):
    """Steps for real, after one of a model of one layer, with which everything is imported; sizes in bytes.

    The second one's memory is measured, and the time of the fastest after the first.
    """
    config, method, chosen = arguments_of(case)
    counter = ctypes.CDLL(None)
    for name in ("counted_now", "counted_peak"):
        getattr(counter, name).restype = ctypes.c_long
    small = copy.deepcopy(config)
    small.num_hidden_layers = 1
    steps(small, method, {**chosen, "batch_size": 1, "length": 8}, 1, lambda: None)
    gc.collect()
    counter.malloc_trim(0)  # what the small model leaves would be counted among the libraries
    before, libraries = counter.counted_now(), resident("VmRSS")
    peaks = []

    def reset():
        peaks.append((counter.counted_peak() - before, resident("VmHWM")))
        counter.counted_reset()
        measure.reset_peak()

    seconds = steps(config, method, chosen, STEPS, reset)
    counted, process = peaks[2]
    return {"counted": counted, "process": process, "libraries": libraries, "seconds": min(seconds[1:])}


def steps(config, method, chosen, count, reset):
    """Make a model and train it for so many steps, before each of which `reset` is called; seconds of each."""
    import torch
    import transformers

    from peftcore.estimating import loop

    torch.manual_seed(0)
    kind = getattr(transformers, (config.architectures or ["LlamaForCausalLM"])[0])
    model = kind._from_config(config, dtype=chosen["dtype"]).train()
    if chosen.get("quantize"):
        peftcore.quantize(model, chosen["quantize"])
    if method is not None:
        peftcore.apply(model, method, **FIELDS.get(method, {}))
    if chosen.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": chosen["gradient_checkpointing"] == "reentrant"})
    inputs = {
        name: torch.randn(value.shape, dtype=value.dtype) if value.is_meta else value
        for name, value in loop.make_inputs(model, chosen["batch_size"], chosen["length"]).items()
    }
    if "input_ids" in inputs:
        inputs["input_ids"] = torch.randint(3, 1000, inputs["input_ids"].shape)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = loop.make_optimizer(parameters, chosen.get("optimizer", "adamw_torch"), paged=True)
    seconds = []
    for _ in range(count):
        reset()
        start = time.perf_counter()
        for _ in range(chosen.get("gradient_accumulation", 1)):
            loss = model(**inputs).loss
            (loss + peftcore.extra_loss(model) if method else loss).backward()
            del loss
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds


def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024


def preloaded(arguments, library, threads):
    out = subprocess.run(
        [sys.executable, __file__, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_PRELOAD": library, "OMP_NUM_THREADS": str(threads)},
    )
    if out.returncode:
        raise RuntimeError(out.stderr[-2000:])
    return json.loads(out.stdout.splitlines()[-1])


def in_words(results, times=False):
    """Median, 95th percentile and the extremes of the errors, in percent of what was measured."""
    lines = []
    for what, measured in (("tensors, counted", counted), ("process", process), ("time of a step", timed))[: 2 + times]:
        errors = sorted(100 * (said / was - 1) for said, was in map(measured, results.values()))
        sizes = sorted(map(abs, errors))
        at = min(len(sizes) - 1, int(0.95 * len(sizes)))
        lines.append(
            f"{what:20}{len(errors)} cases, |error| median {statistics.median(sizes):.1f} %, 95 % of them within "
            f"{sizes[at]:.1f} %, from {errors[0]:+.1f} % to {errors[-1]:+.1f} %"
        )
    return "\n".join(lines)


def as_table(results, times=False):
    """A row of Markdown a case, in MB, or in seconds."""
    if times:
        lines = ["| | seconds: predicted, measured | |", "|---|---|---|"]
        for name, each in results.items():
            said, was = timed(each)
            lines.append(f"| {name} | {said:.2f}, {was:.2f} | {100 * (said / was - 1):+.0f} % |")
        return "\n".join(lines)
    lines = ["| | tensors: predicted, counted | | process: predicted, measured | |", "|---|---|---|---|---|"]
    for name, each in results.items():
        cells = []
        for said, was in (counted(each), process(each)):
            cells += [f"{said / 1e6:.0f}, {was / 1e6:.0f}", f"{100 * (said / was - 1):+.1f} %"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def counted(each):
    """(predicted, measured) bytes: of tensors and what operators take; pages are none of the allocator's."""
    return each["predicted"] - each["paged"], each["counted"]


def process(each):
    """(predicted, measured) bytes: of a process, without the libraries that it began with."""
    return each["resident"], each["process"] - each["libraries"]


def timed(each):
    """(predicted, measured) seconds of a step."""
    return each["time"], each["seconds"]


def picture(results, file, times=False):
    """Predicted against measured, a point a case."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    from peftcore.cli.chart import BLUE, GREY, INK, PALE

    measured, scale, near = (timed, 1, 0.15) if times else (process, 1e6, 0.08)
    figure = Figure(figsize=(6.4, 5.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    points = [tuple(size / scale for size in measured(each)) for each in results.values()]
    low, high = 0.8 * min(map(min, points)), 1.25 * max(map(max, points))
    ends, least, most = [low, high], [(1 - near) * low, (1 - near) * high], [(1 + near) * low, (1 + near) * high]
    axes.fill_between(ends, least, most, color=PALE, label=f"within {100 * near:.0f} %")
    axes.plot([low, high], [low, high], color=GREY, linewidth=1)
    axes.scatter([m for _, m in points], [p for p, _ in points], color=BLUE, s=22, zorder=3)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    what = "seconds of a step" if times else "peak of the process beside its libraries, MB"
    axes.set_xlabel(f"measured: {what}", color=INK)
    axes.set_ylabel("predicted, s" if times else "predicted, MB", color=INK)
    title = f"A training step's {'time' if times else 'memory'}, {len(points)} configurations"
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    if times:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set(major_locator=LogLocator(2), major_formatter=FormatStrFormatter("%g"), minor_locator=NullLocator())
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="cases whose name has all these words")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="estimate.json", help="results; what lies there is not measured again")
    parser.add_argument("--limit", type=int, help="measure so many more cases, and leave what lies in the output")
    parser.add_argument("--times", action="store_true", help="compare seconds: on a machine that does nothing else")
    parser.add_argument("--picture", help="a PNG of what lies in the output, predicted against measured")
    parser.add_argument("--table", action="store_true", help="print what lies in the output as Markdown")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        print(json.dumps(run(next(case for case in CASES if name_of(case) == options.run))))
        return
    import torch

    torch.set_num_threads(options.threads)  # by which libraries take memory
    results = json.loads(Path(options.output).read_text()) if Path(options.output).exists() else {}
    cases = {name_of(case): case for case in CASES}
    cases = {name: case for name, case in cases.items() if all(word in name for word in options.only or ())}
    if options.limit is not None:
        cases = dict([item for item in cases.items() if item[0] not in results][: options.limit])
    began, new = time.perf_counter(), sum(name not in results for name in cases)
    print(f"{len(cases)} cases, {new} of them to be measured", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "counting.so")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, HERE / "counting_allocator.c"], check=True)
        for number, (name, case) in enumerate(cases.items(), 1):
            at = f"{number:3}/{len(cases)} {time.perf_counter() - began:5.0f} s  {name:58}"
            try:
                found, taken = predicted(case)
            except peftcore.PeftcoreError as error:
                print(f"{at} not estimated: {error}", flush=True)
                continue
            measured = results.get(name) or preloaded(["--run", name], library, options.threads)
            results[name] = each = {**measured, **found}
            shown = []
            for what, (said, was) in (("counted", counted(each)), ("process", process(each))):
                shown.append(f"{said / 1e6:9.1f}{was / 1e6:9.1f} {what} {100 * (said / was - 1):+6.1f} %")
            said, was = timed(each)
            print(f"{at}{' '.join(shown)}{said:7.2f}{was:7.2f} s; predicted in {taken:.1f} s", flush=True)
            Path(options.output).write_text(json.dumps(results, indent=1))
    known = {name: each for name, each in results.items() if "time" in each}
    if not known:
        return
    print(in_words(known, options.times))
    if options.table:
        print(as_table(known, options.times))
    if options.picture:
        picture(known, options.picture, options.times)


def predicted(case):
    """What is said of a case, and the processor's seconds that it took to say it."""
    config, method, chosen = arguments_of(case)
    start = time.process_time()
    found = peftcore.estimate(config, method, **chosen, **FIELDS.get(method, {}), device="cpu")
    paged = found.parts["optimizer state"] if found.paged else 0
    sizes = {"predicted": found.peak, "resident": found.beyond_libraries.high, "paged": paged, "parts": found.parts}
    return {**sizes, "time": found.seconds}, time.process_time() - start


if __name__ == "__main__":
    main()
