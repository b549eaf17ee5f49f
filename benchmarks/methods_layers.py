"""A training step of layers alone with each method, next to Hugging Face PEFT's, all in one process.

    python benchmarks/methods_layers.py [--model smollm2] [--threads 1] [--seconds 2] [--methods loha lokr ...]

Two layers of SmolLM2-135M's or MiniLM-L6's shape with a vocabulary of 1,000, random weights in fp32, 512 tokens; fields
are at their defaults, and PEFT trains the adapter that ours was saved as. A step is forward and backward. The frozen
model's, ours and PEFT's are timed in turn: "ratio" is that of the shortest steps, "rounds" the median of the ratios of
two steps of the same round. Steps over the frozen model's include what each library does with the frozen layers: in
fp32 ours can be below 1, since peftcore multiplies faster than PyTorch there. The floor is the frozen products'
operations, forward and for the gradient of the input, at the rate of a large product. Kept memory is what the graph
holds for the backward pass, less the frozen model's, each storage once and parameters not.

A method that fails does not keep the others from being measured; the process then ends with 1.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings

import measure
import methods
import torch

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
TOKENS = torch.randint(12, 1000, (4, 128), generator=torch.Generator().manual_seed(1))
TOKENS[:, 1] = 11  # from which aLoRA acts
LEAST = 7  # rounds


def model(shape):
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if shape == "minilm":
        sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 12}
        made = BertForSequenceClassification(BertConfig(vocab_size=1000, **sizes))
    else:
        sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2, "vocab_size": 1000}
        made = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3))
    return made.eval().requires_grad_(False)  # without dropout


def stepper(shape, library, method, start):
    """Return a forward and a backward pass."""
    made = model(shape)
    if library == "frozen":
        made.enable_input_require_grads()
    else:
        made = methods.adapted(library, method, made, shape, start).eval()
    has_tasks = library != "frozen" and method in methods.OF_TASKS
    more = {"task_ids": torch.zeros(len(TOKENS), dtype=torch.long)} if has_tasks else {}
    return lambda: made(input_ids=TOKENS, **more).logits.float().logsumexp(-1).sum().backward()


def kept(step):
    """Return the MB that a step's graph holds, without parameters."""
    held = {}

    def pack(tensor):
        if tensor.is_sparse:
            pack(tensor._values())
            pack(tensor._indices())
        elif not isinstance(tensor, torch.nn.Parameter) and not isinstance(tensor._base, torch.nn.Parameter):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(held.values()) / 1e6


def compared(shape, method, seconds, clock):
    """Return {library: (times, MB kept for the backward pass)}."""
    with tempfile.TemporaryDirectory() as start:
        steps = {name: stepper(shape, name, method, start) for name in ("frozen", "peftcore", "peft")}
    memory = {name: kept(step) for name, step in steps.items()}
    return measure.interleaved(steps, seconds * len(steps), LEAST, clock), memory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(methods.SHAPES), default="smollm2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2, help="for each row")
    parser.add_argument("--busy", action="store_true", help="count the process's own time: for a busy machine")
    known = methods.known()
    parser.add_argument("--methods", nargs="+", choices=known, default=known)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measure.print_surroundings(options.threads)
    measure.keep_freed_memory()
    clock = time.process_time if options.busy else time.perf_counter
    rate = measure.product_rate(torch.float32, clock=clock)
    floor = measure.floor_of_step(model(options.model), {"input_ids": TOKENS}, rate)
    print(f"{options.model}: 2 layers, 512 tokens, fp32; floor of a step {floor:.1f} ms")
    print(f"{'':26}{'step, ms':>10}{'IQR':>7}{'PEFT':>9}{'IQR':>7}{'ratio':>7}{'rounds':>8}", end="")
    print(f"{'of frozen':>11}{'PEFT':>7}{'kept, MB':>11}{'PEFT':>8}")
    failed = False
    for method in options.methods:
        try:
            times, memory = compared(options.model, method, options.seconds, clock)
        except Exception as error:
            print(f"{method:26}failed: {type(error).__name__}: {error}".partition("\n")[0], flush=True)
            failed = True
            continue
        (ours, _, width), (theirs, _, their_width) = (measure.spread(times[name]) for name in ("peftcore", "peft"))
        frozen = min(times["frozen"])
        usual = statistics.median(one / other for one, other in zip(times["peftcore"], times["peft"], strict=True))
        print(
            f"{method:26}{ours:10.1f}{width:7.1f}{theirs:9.1f}{their_width:7.1f}{ours / theirs:7.2f}{usual:8.2f}",
            end="",
        )
        print(f"{ours / frozen:11.2f}{theirs / frozen:7.2f}", end="")
        more = [memory[name] - memory["frozen"] for name in ("peftcore", "peft")]
        print(f"{more[0]:11.1f}{more[1]:8.1f}", flush=True)
        measure.note_ratio(f"{method}, a step of two layers", ours / theirs, "PEFT")
    sys.exit(failed)


if __name__ == "__main__":
    main()
