"""Predicted memory of a training step compared with the peak of a real process, on configurations drawn by a seed.

    OMP_NUM_THREADS=1 python benchmarks/estimate.py --seed 4242 --count 20 [--output estimate.json]

Each configuration (model shape, method, optimizer, checkpointing, dtype, batch) runs in a process of its own, which has
imported transformers' Trainer and run a tiny step: a model with random weights takes four steps, and the kernel reports
the peak. Drawn are configurations of 0.1 to 1.2 GB of tensors and at most 0.6 T operations. The output is kept, so that
a run that was stopped goes on. Linux only.
"""

import argparse
import ctypes
import gc
import json
import random
import statistics
import warnings
from pathlib import Path

import measure

import peftcore

warnings.simplefilter("ignore")
FIELDS = {
    "adalora": {"total_step": 1000},
    "alora": {"alora_invocation_tokens": [3]},
    "trainable-tokens": {"token_indices": [5, 6]},
    "bitfit": {"add_missing": True},
    "c3a": {"block_size": 32},
    "vblora": {"vector_length": 32},
}
NOT_DRAWN = {"arrow", "adapter-fusion", "cpt"}  # need trained adapters, or tokens of a prompt
BATCHES = [(1, 512), (2, 256), (4, 128), (8, 64), (8, 128), (16, 32), (16, 64), (1, 64)]
STEPS = 4


def draws(seed):
    """Yield one configuration after the other."""
    draw = random.Random(seed)
    others = sorted({*peftcore.methods()} - NOT_DRAWN)
    while True:
        chosen = {
            "family": draw.choice(["llama", "llama", "llama", "bert", "gpt2", "t5", "vit", "moe"]),
            "hidden": draw.choice([256, 384, 512, 768, 1024]),
            "layers": draw.choice([2, 3, 4, 6, 8, 12]),
            "vocab": draw.choice([2000, 8000, 32000, 50000]),
        }
        some = ["lora", "lora", "qlora", "dora", "ia3", None, None, *(draw.choice(others) for _ in range(3))]
        chosen["method"] = draw.choice(some)
        optimizers = ["adamw_torch", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "sgd", "lion_32bit"]
        chosen["optimizer"] = draw.choice(optimizers)
        chosen["gradient_checkpointing"] = draw.choice([False, False, True])
        chosen["dtype"] = draw.choice(["float32", "bfloat16"])
        chosen["batch_size"], chosen["length"] = draw.choice(BATCHES)
        yield chosen


def config_of(chosen):
    import transformers

    hidden, layers, vocab = chosen["hidden"], chosen["layers"], chosen["vocab"]
    heads = hidden // 64
    shared = heads // 2 if heads % 2 == 0 else heads
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    wide = {**sizes, "intermediate_size": 4 * hidden}
    if chosen["family"] == "llama":
        return transformers.LlamaConfig(
            **sizes, intermediate_size=hidden * 8 // 3 // 64 * 64, num_key_value_heads=shared, vocab_size=vocab,
            tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
        )  # fmt: skip
    if chosen["family"] == "bert":
        architectures = ["BertForSequenceClassification"]
        return transformers.BertConfig(**wide, vocab_size=vocab, num_labels=3, architectures=architectures)
    if chosen["family"] == "gpt2":
        return transformers.GPT2Config(
            n_embd=hidden, n_layer=layers, n_head=heads, vocab_size=vocab, bos_token_id=1, eos_token_id=2,
            architectures=["GPT2LMHeadModel"],
        )  # fmt: skip
    if chosen["family"] == "t5":
        return transformers.T5Config(
            d_model=hidden, d_kv=64, d_ff=2 * hidden, num_layers=layers, num_heads=heads, vocab_size=vocab,
            decoder_start_token_id=0, architectures=["T5ForConditionalGeneration"],
        )  # fmt: skip
    if chosen["family"] == "vit":
        return transformers.ViTConfig(**wide, num_labels=10, architectures=["ViTForImageClassification"])
    return transformers.Qwen3MoeConfig(
        **sizes, intermediate_size=2 * hidden, moe_intermediate_size=hidden, num_key_value_heads=shared, head_dim=64,
        num_experts=8, num_experts_per_tok=2, vocab_size=vocab, architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip


def name_of(chosen):
    """Return family, hidden size x layers x vocabulary, method, optimizer, dtype and batch x length."""
    sizes = f"{chosen['hidden']}x{chosen['layers']}x{chosen['vocab']}"
    run = [chosen["method"] or "full", chosen["optimizer"]]
    run += ["checkpointing"] if chosen["gradient_checkpointing"] else []
    dtype = {"bfloat16": "bf16", "float32": "fp32"}[chosen["dtype"]]
    return " ".join([chosen["family"], sizes, *run, dtype, f"{chosen['batch_size']}x{chosen['length']}"])


def estimate(chosen):
    import torch

    how = {name: chosen[name] for name in ("batch_size", "length", "optimizer", "gradient_checkpointing")}
    dtype, fields = getattr(torch, chosen["dtype"]), FIELDS.get(chosen["method"], {})
    return peftcore.estimate(config_of(chosen), chosen["method"], **how, dtype=dtype, **fields)


def run(chosen):
    """Run the steps, and return the peak of this process, what it had before, and the fastest step's seconds."""
    import transformers.trainer  # noqa: F401

    tiny = {"hidden": 128, "layers": 1, "vocab": 2000, "batch_size": 1, "length": 8}
    steps({**chosen, **tiny}, 1)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    steps(chosen, STEPS)
    return {"before": before, "peak": resident("VmHWM")}


def steps(chosen, count):
    """Train a model with random weights for so many steps."""
    import torch
    import transformers

    from peftcore.estimating import make_inputs, make_optimizer

    torch.manual_seed(0)
    config, method = config_of(chosen), chosen["method"]
    kind = getattr(transformers, config.architectures[0])
    model = kind._from_config(config, dtype=getattr(torch, chosen["dtype"])).train()
    if method is not None:
        peftcore.apply(model, method, **FIELDS.get(method, {}))
    if chosen["gradient_checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = {
        name: torch.randn(value.shape, dtype=value.dtype) if value.is_meta else value
        for name, value in make_inputs(model, chosen["batch_size"], chosen["length"]).items()
    }
    if "input_ids" in inputs:
        inputs["input_ids"] = torch.randint(3, 1000, inputs["input_ids"].shape)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, chosen["optimizer"], paged=True)
    measure.reset_peak()
    for _ in range(count):
        loss = model(**inputs).loss
        (loss + peftcore.extra_loss(model) if method else loss).backward()
        del loss
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024


def chosen_by(seed, count):
    """Return so many configurations of a size that runs here, with their estimates."""
    found = []
    for chosen in draws(seed):
        try:
            said = estimate(chosen)
        except peftcore.PeftcoreError:
            continue  # the method does not apply to the model
        if 1e8 <= said.peak <= 1.2e9 and said.flops <= 0.6e12:
            found.append((chosen, said))
        if len(found) == count:
            return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=4242)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--output", help="JSON file of measurements; an entry in it is not measured again")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        print(json.dumps(run(json.loads(options.run))))
        return
    file = Path(options.output) if options.output else None
    known = json.loads(file.read_text()) if file is not None and file.exists() else {}
    print(f"{'':62}{'predicted':>12}{'measured':>10}  width, MB")
    widths, held = [], 0
    for chosen, said in chosen_by(options.seed, options.count):
        name = name_of(chosen)
        if name not in known:
            known[name] = measure.in_child(__file__, "--run", json.dumps(chosen))
            if file is not None:
                file.write_text(json.dumps(known, indent=1))
        ran = known[name]
        within = said.beyond_libraries.plus(ran["before"])
        (low, high), peak = within, ran["peak"]
        widths.append((high - low) / ((high + low) / 2))
        held += within.holds(peak)
        row = f"{name:62}{f'{low / 1e6:,.0f}-{high / 1e6:,.0f}':>12}{peak / 1e6:10,.0f}{widths[-1]:6.0%}"
        if not within.holds(peak):
            row += f"  outside by {(peak - min(max(peak, low), high)) / peak:+.1%}"
        print(row, flush=True)
    print(f"\n{held} of {len(widths)} within; width: median {statistics.median(widths):.1%}, at most {max(widths):.1%}")


if __name__ == "__main__":
    main()
