"""QLoRA on SmolLM2-135M and real text next to peft + bitsandbytes: the loss it ends with, the time, the memory.

    python benchmarks/qlora.py [--threads 2] [--steps 40] [--rounds 1]

The demo's writer: 480 movie reviews to train, 150 held out, batch 8, r=8 on every linear layer, AdamW (fused) with a
linear schedule from 5e-4, no dropout; bf16, NF4 with double quantization. Both libraries see the same batches in the
same order and start from the same adapter: A drawn here from one seed, B zero. The loop, the optimizer and the
evaluation are the same code; each run has a process of its own and its peak of memory is that of the whole process.
"step" is the median over all but the first; loading includes quantizing. The floor is the operations of the frozen
products of a step with the median number of tokens, forward and for the gradient of the input, at the rate of a large
product in bf16.

The model stays in training mode, also where the held-out loss is measured (nothing in it depends on the mode):
on a CPU with bf16 dot products one forward in evaluation mode makes bitsandbytes repack its weights for good, and
training after that passes no gradient through its layers.
"""

import argparse
import json
import random
import statistics
import time

import measure
import smollm2
import torch

KINDS = {"peftcore": "peftcore + double quant", "peft + bitsandbytes": "bitsandbytes + double quant"}
R, ALPHA, BATCH, LR, MAX_LENGTH = 8, 16, 8, 5e-4, 96


def examples(name, tokenizer):
    from peftcore_cli.data import row_reading
    from peftcore_cli.tasks import registered

    rows = row_reading.read_rows(smollm2.DEMO / "data" / f"write_{name}.jsonl", "causal-lm")
    return registered.find("causal-lm").encode(rows, tokenizer, MAX_LENGTH).examples


def with_adapter(kind, model):
    if kind == "peftcore":
        import peftcore

        return peftcore.apply(model, "qlora", r=R, lora_alpha=ALPHA)
    import peft

    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


@torch.no_grad()
def same_start(model):
    """Set LoRA's A of each layer, in the order of the layers' names, uniform in ±1/sqrt(in), and B to zero."""
    generator = torch.Generator().manual_seed(0)
    found = sorted((name[name.index("layers.") :], p) for name, p in model.named_parameters() if p.requires_grad)
    for name, parameter in found:
        bound = parameter.shape[1] ** -0.5 if "lora_A" in name else 0.0
        parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
    return [parameter for _, parameter in found]


@torch.no_grad()
def held_out_loss(model, examples, collate):
    """Return the mean loss over the tokens to predict."""
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    loss = count = 0
    for start in range(0, len(ordered), 16):
        batch = collate(ordered[start : start + 16])
        predicted = int((batch["labels"][:, 1:] != -100).sum())
        loss += model(**batch).loss.item() * predicted
        count += predicted
    return loss / count


def run(kind, steps):
    from peftcore_cli.tasks import registered

    tokenizer = smollm2.tokenizer()
    train, held_out = examples("train", tokenizer), examples("test", tokenizer)
    order = [
        i
        for epoch in range(-(-steps * BATCH // len(train)))
        for i in random.Random(epoch).sample(range(len(train)), len(train))
    ]
    collate = registered.find("causal-lm").collator(tokenizer)
    model, load = smollm2.load(KINDS[kind])
    model = with_adapter(kind, model)
    trained = same_start(model)
    before = held_out_loss(model.train(), held_out, collate)
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    times, tokens = [], []
    for step in range(steps):
        batch = collate([train[i] for i in order[step * BATCH : (step + 1) * BATCH]])
        start = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
        tokens.append(batch["input_ids"].numel())
        schedule.step()
    after = held_out_loss(model, held_out, collate)
    return {
        "parameters": sum(p.numel() for p in trained),
        "load": load,
        "before": before,
        "after": after,
        "tokens": statistics.median(tokens[1:]),
        "step": statistics.median(times[1:]) * 1e3,
        "slowest": max(times) * 1e3,
        "training": sum(times),
        "peak": measure.peak_megabytes(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    measure.add_level_argument(parser)
    options = parser.parse_args()
    measure.run_at(options.level)
    torch.set_num_threads(options.threads)
    if options.kind:
        print(json.dumps(run(options.kind, options.steps)))
        return
    smollm2.prepare()
    measure.print_surroundings(options.threads)
    print(f"{options.steps} steps")
    print(f"{'':22}loss before   after   load (s)   step (ms)   slowest   training (s)   peak MB")
    rows = {kind: [] for kind in KINDS}
    for number in range(options.rounds):
        for kind in list(KINDS)[:: 1 if number % 2 == 0 else -1]:
            found = measure.in_child(__file__, "--kind", kind, "--threads", options.threads, "--steps", options.steps)
            rows[kind].append(found)
            print(
                f"{kind:22}{found['before']:11.4f}{found['after']:8.4f}{found['load']:11.2f}{found['step']:12.0f}{found['slowest']:10.0f}"
                f"{found['training']:15.1f}{found['peak']:10.0f}",
                flush=True,
            )
    ours, theirs = ({key: statistics.median(row[key] for row in found) for key in found[0]} for found in rows.values())
    assert ours["parameters"] == theirs["parameters"]
    ids = torch.zeros(BATCH, round(ours["tokens"] / BATCH), dtype=torch.long)
    rate = measure.product_rate(torch.bfloat16)
    print(f"floor of a step {measure.floor_of_step(smollm2.load('dense')[0], {'input_ids': ids}, rate):.0f} ms")
    print(f"loss {100 * (ours['after'] / theirs['after'] - 1):+.2f} %, ", end="")
    for key in ("step", "peak"):
        measure.note_ratio(f"QLoRA of SmolLM2-135M, {key}", ours[key] / theirs[key], "peft with bitsandbytes")
    print(
        ", ".join(f"{key} {ours[key] / theirs[key]:.2f}" for key in ("load", "step", "training", "peak")), "of theirs"
    )


if __name__ == "__main__":
    main()
