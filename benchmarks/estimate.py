"""Predicted memory of a training step beside what a process really took, over many configurations.

    python benchmarks/estimate.py [--only WORD ..] [--threads 2] [--output estimate.json] [--picture estimate.png]

Each configuration runs in a process of its own: a model of that shape with random weights takes two steps, of which the
second is measured. `counted` is the peak that a counting allocator saw above what there was before the model
(counting_allocator.c, compiled here and preloaded), to be compared with the tensors of the prediction; `process` is the
peak of the whole process, to be compared with the prediction and the libraries. Both exist on Linux only.
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
    """Two steps for real, after one of a model of one layer, with which everything is imported; sizes in bytes."""
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

    def reset():
        counter.counted_reset()
        measure.reset_peak()

    seconds = steps(config, method, chosen, 2, reset)
    counted = counter.counted_peak() - before
    return {"counted": counted, "process": resident("VmHWM"), "libraries": libraries, "seconds": seconds}


def steps(config, method, chosen, count, reset):
    """Make a model and train it for so many steps, before each of which `reset` is called; seconds of the last."""
    import torch
    import transformers

    from peftcore.estimating import step

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
        for name, value in step.make_inputs(model, chosen["batch_size"], chosen["length"]).items()
    }
    if "input_ids" in inputs:
        inputs["input_ids"] = torch.randint(3, 1000, inputs["input_ids"].shape)
    optimizer = step.make_optimizer(model, chosen.get("optimizer", "adamw_torch"), paged=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
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
    return time.perf_counter() - start


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


def in_words(results):
    """Median, 95th percentile and the extremes of the errors, in percent of what was measured."""
    lines = []
    for what, measured in (("tensors, counted", counted), ("process", process)):
        errors = sorted(100 * (measured(each)[0] / measured(each)[1] - 1) for each in results.values())
        sizes = sorted(map(abs, errors))
        at = min(len(sizes) - 1, int(0.95 * len(sizes)))
        lines.append(
            f"{what:20}{len(errors)} cases, |error| median {statistics.median(sizes):.1f} %, 95 % of them within "
            f"{sizes[at]:.1f} %, from {errors[0]:+.1f} % to {errors[-1]:+.1f} %"
        )
    return "\n".join(lines)


def as_table(results):
    """A row of Markdown a case, in MB."""
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


def picture(results, file):
    """Predicted against measured, a point a case."""
    from matplotlib.figure import Figure

    from peftcore.cli.chart import BLUE, GREY, INK, PALE

    figure = Figure(figsize=(6.4, 5.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    points = [tuple(size / 1e6 for size in process(each)) for each in results.values()]
    low, high = 0.8 * min(map(min, points)), 1.25 * max(map(max, points))
    axes.fill_between([low, high], [0.92 * low, 0.92 * high], [1.08 * low, 1.08 * high], color=PALE, label="within 8 %")
    axes.plot([low, high], [low, high], color=GREY, linewidth=1)
    axes.scatter([m for _, m in points], [p for p, _ in points], color=BLUE, s=22, zorder=3)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set_xlabel("measured: peak of the process beside its libraries, MB", color=INK)
    axes.set_ylabel("predicted, MB", color=INK)
    axes.set_title(f"A training step's memory, {len(points)} configurations", loc="left", fontsize=11, color=INK)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="cases whose name has all these words")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="estimate.json")
    parser.add_argument("--limit", type=int, help="run so many more cases, and leave what lies in the output")
    parser.add_argument("--picture", help="a PNG of what lies in the output, predicted against measured")
    parser.add_argument("--table", action="store_true", help="print what lies in the output as Markdown")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        print(json.dumps(run(next(case for case in CASES if name_of(case) == options.run))))
        return
    import torch

    # What lies in the output already is not run again, and unless there is a limit predicted anew.
    torch.set_num_threads(options.threads)  # by which libraries take memory
    results = json.loads(Path(options.output).read_text()) if Path(options.output).exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "counting.so")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, HERE / "counting_allocator.c"], check=True)
        for case in CASES:
            name = name_of(case)
            if any(word not in name for word in options.only or ()):
                continue
            config, method, chosen = arguments_of(case)
            if options.limit is not None:
                if name in results or options.limit == 0:
                    continue
                options.limit -= 1
            start = time.process_time()
            try:
                found = peftcore.estimate(config, method, **chosen, **FIELDS.get(method, {}))
            except peftcore.PeftcoreError as error:
                print(f"{name:60} not estimated: {error}", flush=True)
                continue
            taken = time.process_time() - start
            measured = results.get(name) or preloaded(["--run", name], library, options.threads)
            state = found.parts["optimizer state"] if found.paged else 0
            predicted = {"predicted": found.peak, "resident": found.resident, "paged": state, "estimating": taken}
            results[name] = each = {**measured, **predicted, "parts": found.parts}
            shown = []
            for what, (said, was) in (("counted", counted(each)), ("process", process(each))):
                shown.append(f"{said / 1e6:9.1f}{was / 1e6:9.1f} {what} {100 * (said / was - 1):+6.1f} %")
            print(f"{name:60}{' '.join(shown)}{taken:6.1f} s  {found.where}", flush=True)
            Path(options.output).write_text(json.dumps(results, indent=1))
    known = {name: each for name, each in results.items() if "paged" in each}
    print(in_words(known))
    if options.table:
        print(as_table(known))
    if options.picture:
        picture(known, options.picture)


if __name__ == "__main__":
    main()
