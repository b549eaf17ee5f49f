"""A training step, its parts on and off: time and memory next to the frozen model's and peft's.

    python benchmarks/step.py [--model SmolLM2-135M] [--rows 4x128] [--dtype bfloat16] [--layers 4] [--short]
        [--level avx2] [--recompute none]

Forward and backward of a frozen model as transformers has it, whose inputs have gradients; of peft's LoRA; and of
peftcore's; each as it is and with every part that is asked for (`--part`). Weights are random. Each row runs in
processes of its own, in rounds, with the seconds of the processor, so that other work on the machine does not count;
memory is the most that its steps add to a process with the model, and to its tensors alone. The first column is the
share of the machine: the floor's seconds over the row's. The floor is the operations of the frozen products, forward
and for the gradient of the input, at the rate of a large product. The error is that of the gradient of the inputs,
from float64, with two layers, 64 tokens and no dropout.
"""

import argparse
import json
import time
import warnings

import measure
import torch
import transformers

import peftcore

MODELS = {
    "SmolLM2-135M": (
        "llama",
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
    ),
    "Llama-1.1B": (
        "llama",
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "vocab_size": 32000,
        },
    ),
    "Qwen3-0.6B": (
        "qwen3",
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
    ),
    "Gemma-3-1B": (
        "gemma3_text",
        {
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 262144,
            "tie_word_embeddings": True,
        },
    ),
    "mixture": (
        "qwen3_moe",
        {
            "hidden_size": 512,
            "intermediate_size": 1024,
            "moe_intermediate_size": 256,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "vocab_size": 49152,
        },
    ),
    "BERT": ("bert", {}),
    "ViT": ("vit", {}),
}
KINDS = {"bert": "AutoModelForSequenceClassification", "vit": "AutoModelForImageClassification"}
PARTS = {  # each changes a model in place, or raises PeftcoreError
    "without logits": peftcore.loss_without_logits,
    "fused": peftcore.fuse,
}
BASES = ("frozen", "peft", "peftcore")
warnings.simplefilter("ignore")


def build(name, dtype, layers, dropout=True):
    kind, sizes = MODELS[name]
    if layers:
        sizes = {**sizes, "num_hidden_layers": min(layers, sizes.get("num_hidden_layers", 12))}
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**sizes)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if not dropout and hasattr(config, name):
            setattr(config, name, 0.0)
    cls = getattr(transformers, KINDS.get(kind, "AutoModelForCausalLM"))
    return cls.from_config(config, dtype=dtype).requires_grad_(False).train()


def adapted(model, base, parts, recompute="auto"):
    """Return the model of a row, and the parts that its model takes."""
    torch.manual_seed(1)
    if base == "peft":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    elif base == "peftcore":
        peftcore.apply(model, "lora", r=16, target_modules="all-linear")
    taken = []
    for name in parts:
        try:
            options = {"recompute": recompute} if name == "fused" else {}
            PARTS[name](model.base_model.model if base == "peft" else model, **options)
            taken.append(name)
        except peftcore.PeftcoreError:  # no head for logits of tokens
            pass
    return model, taken


def inputs_of(model, rows):
    count = rows[0]
    generator = torch.Generator().manual_seed(2)
    if model.config.model_type == "vit":
        size = model.config.image_size
        return {
            "pixel_values": torch.randn(count, 3, size, size, generator=generator).to(model.dtype),
            "labels": torch.randint(2, (count,), generator=generator),
        }
    tokens = torch.randint(5, model.config.vocab_size, rows, generator=generator)
    return {
        "input_ids": tokens,
        "labels": torch.randint(2, (count,), generator=generator) if model.config.model_type == "bert" else tokens,
    }


def step(model, inputs):
    """Return loss and gradient of the inputs of the first layer."""
    seen = []

    def keep(module, args, output):
        seen.append(output.detach().requires_grad_())
        return seen[0]

    with model.get_input_embeddings().register_forward_hook(keep):
        loss = model(**inputs).loss
    loss.backward()
    model.zero_grad()
    return loss.detach(), seen[0].grad


def most_of_tensors(model, inputs):
    """Return the megabytes that PyTorch's allocator gives out in a step at most."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step(model, inputs)
    held = most = 0
    for event in profile.kineto_results.events():
        held += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, held)
    return most / 1e6


def floor(name, dtype, layers, rows):
    """Return the seconds that the frozen products of a step take."""
    model = build(name, dtype, layers)
    rate = measure.product_rate(dtype, clock=time.process_time)
    return measure.floor_of_step(model, inputs_of(model, rows), rate) / 1e3


def errors(name, dtype, base, parts):
    wide = build(name, torch.float64, 2, dropout=False)
    if hasattr(wide.config, "num_experts"):
        wide.set_experts_implementation("eager")  # PyTorch groups no products of fp64
    model = build(name, torch.float64, 2, dropout=False).to(dtype)
    wide.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
    of = inputs_of(wide, (1, 64))
    loss, wanted = step(wide, of)
    del wide
    found = step(
        adapted(model, base, parts)[0], {k: v.to(dtype) if v.is_floating_point() else v for k, v in of.items()}
    )
    return float((found[0] - loss).abs()), float((found[1] - wanted).norm() / wanted.norm())


def child(options):
    name, base, *parts = options.child
    dtype = getattr(torch, options.dtype)
    if base == "floor":
        return {"seconds": floor(name, dtype, options.layers, options.rows)}
    if options.errors:
        return {"errors": errors(name, dtype, base, parts)}
    model, taken = adapted(build(name, dtype, options.layers), base, parts, options.recompute)
    inputs = inputs_of(model, options.rows)
    first = {key: value[:1, :8] if value.dim() == 2 else value[:1] for key, value in inputs.items()}
    step(model, first)  # the libraries' own memory
    measure.give_back_freed_memory()
    measure.reset_peak()
    before = measure.peak_megabytes()
    step(model, inputs)
    peak = measure.peak_megabytes() - before
    measure.keep_freed_memory()
    seconds = []
    for _ in range(options.steps):
        began = time.process_time()
        step(model, inputs)
        seconds.append(time.process_time() - began)
    tensors = most_of_tensors(model, inputs)
    return {"peak": peak, "tensors": tensors, "seconds": min(seconds), "title": " + ".join([base, *taken])}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--rows", type=lambda text: tuple(map(int, text.split("x"))), action="append")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--layers", type=int, default=0, help="at most so many layers; 0: all")
    parser.add_argument("--part", choices=PARTS, action="append", help="parts to measure; default: all")
    parser.add_argument("--recompute", choices=("auto", "none"), default="auto", help="of fused modules")
    parser.add_argument("--together", action="store_true", help="no part, and all parts together; not each by itself")
    parser.add_argument("--short", action="store_true", help="frozen and peft as they are, peftcore with all parts")
    parser.add_argument("--base", choices=BASES, action="append")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--errors", action="store_true", help="measure errors instead")
    measure.add_level_argument(parser)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        options.rows = options.rows[0]
        print(json.dumps(child(options)))
        return
    measure.run_at(options.level)
    measure.print_surroundings(options.threads)
    parts = options.part or list(PARTS)
    single = [] if options.together else [[part] for part in parts]
    sets = [[], *single, *([parts] if len(parts) > 1 or options.together else [])]
    table = [(base, chosen) for base in options.base or BASES for chosen in sets]
    if options.short:
        table = [("frozen", []), ("peft", []), ("peftcore", parts)]
    for name in options.model or MODELS:
        for rows in options.rows or [(4, 128), (2, 512)]:
            of = (
                "--dtype",
                options.dtype,
                "--layers",
                options.layers,
                "--steps",
                options.steps,
                "--threads",
                options.threads,
                "--recompute",
                options.recompute,
                "--rows",
                f"{rows[0]}x{rows[1]}",
                *(["--errors"] if options.errors else []),
            )
            size = f"{rows[0]} x {rows[1]}, {options.dtype}, {options.layers or 'all'} layers"
            print(f"\n{name}, {size}{f', {options.level}' if options.level else ''}", flush=True)
            runs = {}
            if not options.errors:
                least = measure.in_child(__file__, *of, "--child", name, "floor")["seconds"]
            for _ in range(1 if options.errors else options.rounds):
                for base, chosen in table:
                    found = measure.in_child(__file__, *of, "--child", name, base, *chosen)
                    before = runs.setdefault((base, *chosen), found)
                    if not options.errors:
                        runs[(base, *chosen)] = {key: min(before[key], found[key]) for key in found}
            if options.errors:
                print_errors(runs)
                break
            print_times(runs, least, tokens=rows[0] * rows[1])
            note_ratios(runs, f"{name} {rows[0]}x{rows[1]}")


def print_errors(runs):
    print(f"{'':36}{'loss off':>12}{'gradient':>12}")
    for key, errors_of_run in runs.items():
        loss, gradient = errors_of_run["errors"]
        print(f"{' + '.join(key):36}{loss:12.1e}{gradient:12.1e}")


def print_times(runs, least, tokens):
    """Print a row for each run. Share: of the rate at which a large product runs, 1.00 in the row of the floor."""
    frozen, peft = runs.get(("frozen",)), runs.get(("peft",))
    heads = ("share", "ms", "tokens/s", "of frozen", "MB", "of peft", "tensors")
    print(f"{'':36}{heads[0]:>6}{heads[1]:>8}{heads[2]:>10}{heads[3]:>11}{heads[4]:>8}{heads[5]:>9}{heads[6]:>9}")
    rows = {"floor": {"seconds": least}, **{run["title"]: run for run in runs.values()}}
    for title, run in rows.items():
        seconds = run["seconds"]
        line = f"{title:36}{least / seconds:6.2f}{seconds * 1e3:8.0f}{tokens / seconds:10.0f}"
        line += f"{seconds / frozen['seconds']:11.2f}" if frozen else f"{'':11}"
        if "peak" in run:
            of_peft = f"{run['peak'] / peft['peak']:9.2f}" if peft else f"{'':9}"
            line += f"{run['peak']:8.0f}{of_peft}{run['tensors']:9.0f}"
        print(line, flush=True)


def note_ratios(runs, size):
    peft = runs.get(("peft",))
    for (base, *parts), run in runs.items():
        if peft and base == "peftcore":
            label = f"{size}, peftcore {' + '.join(parts)}".strip()
            measure.note_ratio(label, run["seconds"] / peft["seconds"], "peft")
            measure.note_ratio(f"{label}, memory", run["peak"] / peft["peak"], "peft")


if __name__ == "__main__":
    main()
