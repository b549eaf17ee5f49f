"""Time and memory of a training step with each method, next to Hugging Face PEFT's, in one run, and the ratios.

    python benchmarks/methods.py [--model minilm|smollm2] [--methods NAME ...] [--seconds 20] [--layers N] [--threads 2]
    python benchmarks/methods.py --quick        both models with fewer layers: at most ten minutes

All installed methods that PEFT has. Both libraries train the same adapter: ours is saved before the first step, and
PEFT reads it. MiniLM-L6's shape is in fp32, 8 texts of 32 tokens; SmolLM2-135M's in bf16 with adapters in fp32, 4
texts of 128. Weights are random. A step is forward, backward and AdamW, and whatever else the method does in one
(AdaLoRA's importance and allocation). Both are timed in turn, the first steps left out; the ratio is that of the
fastest ones. Memory is the peak of a process of its own in two steps beyond what it held with the base alone, after a
step of another model of one layer, which loads what the libraries load once. The floor is the operations of the
frozen products, forward and for the gradient of the input, at the rate of a large product. With --busy the clock is the
process's own time, of one thread, for machines that others use.
"""

import argparse
import gc
import logging
import multiprocessing
import os
import tempfile
import time
import warnings

import engine
import measure
import torch

import peftcore

SLOWER = 1.03  # a ratio above it is measured again for four times as long, and that stands
STEPS = 10_000  # of AdaLoRA's schedule, in whose middle every step allocates
# Where a default is none to compare with, or none at all.
FIELDS = {
    "lora": {"r": 16, "lora_alpha": 16},
    "dora": {"r": 16, "lora_alpha": 16},
    "alora": {"r": 16, "lora_alpha": 16, "alora_invocation_tokens": [11]},
    "adalora": {"init_r": 16, "target_r": 8, "total_step": STEPS},
    "boft": {"boft_block_size": 4},
    "c3a": {"block_size": 64},
    "cpt": {"cpt_token_ids": [12, 13, 14, 15], "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "vblora": {"vector_length": 64},
    "trainable-tokens": {"token_indices": list(range(100))},
}
OF_TASKS = ("multitask-prompt-tuning", "poly")
SHAPES = {"minilm": (6, 8, 32), "smollm2": (30, 4, 128)}  # layers, texts, tokens
QUICK = {"minilm": 3, "smollm2": 3}
KINDS = {"minilm": "SEQ_CLS", "smollm2": "CAUSAL_LM"}


def known() -> list[str]:
    """Return the installed methods that PEFT has, too."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return [
        name
        for name, method in peftcore.methods().items()
        if method.state.peft_type in PEFT_TYPE_TO_CONFIG_MAPPING and method.recorded_as is None
    ]


def base(shape, layers=None, vocabulary=None):
    """Return a frozen model of random weights."""
    torch.manual_seed(0)
    if shape == "smollm2":
        return engine.llama(layers or SHAPES[shape][0], **({"vocabulary": vocabulary} if vocabulary else {}))
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": layers or SHAPES[shape][0]}
    config = BertConfig(vocab_size=vocabulary or 30522, num_attention_heads=12, **sizes)
    return BertForSequenceClassification(config).train().requires_grad_(False)


def adapted(library, method, model, shape, start):
    """Return the model with the adapter in the folder `start`; with ours, the adapter is made and saved there first."""
    if library == "peftcore":
        model = peftcore.apply(model, method, **FIELDS.get(method, {}))
        if not os.listdir(start):
            peftcore.save(model, start)
        return model
    import peft

    config = peft.PeftConfig.from_pretrained(start)
    config.task_type, config.inference_mode = KINDS[shape], False
    if config.is_prompt_learning:  # which PEFT loads for inference alone
        return peft.get_peft_model(model, config)
    return peft.PeftModel.from_pretrained(model, start, config=config, is_trainable=True)


def stepper(library, method, model, shape, start):
    """Return a training step."""
    model = adapted(library, method, model, shape, start).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    _, texts, length = SHAPES[shape]
    words = model.config.vocab_size
    tokens = torch.randint(12, words, (texts, length), generator=torch.Generator().manual_seed(1))
    tokens[:, 1] = 11  # from which aLoRA acts
    labels = tokens if shape == "smollm2" else torch.arange(texts) % 2
    more = {"task_ids": torch.zeros(texts, dtype=torch.long)} if method in OF_TASKS else {}
    done = 0

    def step():
        nonlocal done
        done += 1
        loss = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels, **more).loss
        if library == "peftcore":
            loss = loss + peftcore.extra_loss(model)
        loss.backward()
        optimizer.step()
        if library == "peftcore":
            peftcore.after_step(model, done, STEPS, optimizer=optimizer)
        elif hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(done)
        optimizer.zero_grad()

    return step


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def warm(library, method, shape):
    """Run a step of a model of one layer, so that what libraries load and build once is not part of a timed step."""
    with tempfile.TemporaryDirectory() as start:
        for name in dict.fromkeys(("peftcore", library)):  # PEFT reads what ours has saved
            stepper(name, method, base(shape, 1, 2000), shape, start)()
    gc.collect()
    measure.give_back_freed_memory()


def peak(library, method, shape, start, sizes):
    """Return the MB of two steps beyond the base, in a process that does nothing else."""
    measure.map_large_blocks()
    warm(library, method, shape)
    model = base(shape, *sizes)
    sum(float(p.sum()) for p in model.parameters())  # every page is there
    gc.collect()
    before = resident()
    step = stepper(library, method, model, shape, start)
    measure.reset_peak()
    for _ in range(2):
        step()
    return measure.peak_megabytes() - before


def times(method, shape, start, sizes, seconds, busy):
    """Return {library: (fastest, median) ms}."""
    measure.keep_freed_memory()
    steps = {name: stepper(name, method, base(shape, *sizes), shape, start) for name in ("peftcore", "peft")}
    found = measure.interleaved(steps, seconds, clock=time.process_time if busy else time.perf_counter)
    return {name: measure.spread(each[1:])[:2] for name, each in found.items()}


def in_process(threads, work, *arguments):
    """Return the result of `work` in another process, or why it failed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["engine", "peft", "transformers", "peftcore.engine"])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=answer, args=(theirs, threads, work, arguments))
    child.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return f"ended with status {child.exitcode}"
    finally:
        child.join()


def answer(pipe, threads, work, arguments):
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    try:
        pipe.send(work(*arguments))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}".partition("\n")[0])


def compared(threads, method, shape, sizes, seconds, busy):
    """Return ((fastest, median) ms of ours, of PEFT, MB of ours, of PEFT), or why they cannot be compared."""
    with tempfile.TemporaryDirectory() as start:
        megabytes = []
        for library in ("peftcore", "peft"):
            megabytes.append(in_process(threads, peak, library, method, shape, start, sizes))
            if isinstance(megabytes[-1], str):
                return megabytes[-1]
        for longer in (1, 4):
            found = in_process(threads, times, method, shape, start, sizes, longer * seconds, busy)
            if isinstance(found, str):
                return found
            (low, _), (their_low, _) = found["peftcore"], found["peft"]
            if low / their_low <= SLOWER:
                break
    return found["peftcore"], found["peft"], *megabytes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--methods", nargs="+", choices=known(), default=known())
    parser.add_argument("--seconds", type=float, default=20, help="for each method and model")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--busy", action="store_true")
    options = parser.parse_args()
    threads, seconds = (1 if options.busy else options.threads), (2 if options.quick else options.seconds)
    measure.print_surroundings(threads)
    for shape in options.model:
        layers, texts, length = SHAPES[shape]
        sizes = (options.layers or (QUICK[shape] if options.quick else layers), 2000 if options.quick else None)
        clock = time.process_time if options.busy else time.perf_counter
        rate = measure.product_rate(torch.bfloat16 if shape == "smollm2" else torch.float32, clock=clock)
        tokens = torch.zeros(texts, length, dtype=torch.long)
        floor = measure.floor_of_step(base(shape, *sizes), {"input_ids": tokens}, rate)
        print(f"\n{shape}: {sizes[0]} layers, {texts} x {length} tokens; floor of a step {floor:.1f} ms")
        print(
            f"{'step, ms':26}{'ours':>8}{'PEFT':>9}{'ratio':>8}   of medians{'memory, MB':>14}{'PEFT':>8}{'ratio':>8}"
        )
        above = []
        for method in options.methods:
            found = compared(threads, method, shape, sizes, seconds, options.busy)
            if isinstance(found, str):
                print(f"{method:26}{'not compared':>14}: {found[:100]}", flush=True)
                continue
            (low, median), (their_low, their_median), first, second = found
            print(f"{method:26}{low:8.1f}{their_low:9.1f}{low / their_low:8.2f}{median / their_median:13.2f}", end="")
            print(f"{first:14.1f}{second:8.1f}{first / second:8.2f}", flush=True)
            measure.note_ratio(f"{method}, {shape}", low / their_low, "PEFT")
            measure.note_ratio(f"{method}, {shape}, memory", first / second, "PEFT")
            if max(low / their_low, first / second) > SLOWER:
                above.append(f"{method} ({low / their_low:.2f}, {first / second:.2f})")
        print(f"above PEFT by more than 3 % (time, memory): {', '.join(above) or 'none'}")


if __name__ == "__main__":
    main()
