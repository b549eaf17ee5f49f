"""What each method adds to a training step of layers alone, next to Hugging Face PEFT's, all in one process.

    python benchmarks/methods_layers.py [--model smollm2] [--threads 1] [--seconds 2] [--methods loha lokr ...]

Two layers of SmolLM2-135M's or MiniLM-L6's shape with a vocabulary of 1,000, random weights in fp32, 512 tokens; fields
are at their defaults, and PEFT trains the adapter that ours was saved as. Rows are timed in turn. Added time is a step
(forward, backward) less that of the frozen model, at the fastest of each, and there is a ratio where neither is
negative. Kept memory is what the graph holds for the backward pass, less the frozen model's, each storage once and
parameters not.
"""

import argparse
import logging
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
    """A forward and a backward pass."""
    made = model(shape)
    if library == "frozen":
        made.enable_input_require_grads()
    else:
        made = methods.adapted(library, method, made, shape, start).eval()
    has_tasks = library != "frozen" and method in methods.OF_TASKS
    more = {"task_ids": torch.zeros(len(TOKENS), dtype=torch.long)} if has_tasks else {}
    return lambda: made(input_ids=TOKENS, **more).logits.float().logsumexp(-1).sum().backward()


def kept(step):
    """MB that one step's graph holds, without parameters."""
    held = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and not isinstance(tensor._base, torch.nn.Parameter):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(held.values()) / 1e6


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
    print(f"{options.model}: 2 layers, 512 tokens, fp32")
    print(f"{'':26}{'frozen, ms':>12}{'IQR':>7}{'added, ms':>12}{'peft':>9}{'ratio':>8}{'kept, MB':>12}{'peft':>9}")
    for method in options.methods:
        with tempfile.TemporaryDirectory() as start:
            steps = {name: stepper(options.model, name, method, start) for name in ("frozen", "peftcore", "peft")}
        memory = {name: kept(step) for name, step in steps.items()}
        times = measure.interleaved(steps, options.seconds * len(steps), clock=clock)
        frozen, _, width = measure.spread(times["frozen"])
        ours, theirs = (min(times[name]) - frozen for name in ("peftcore", "peft"))
        more = [memory[name] - memory["frozen"] for name in ("peftcore", "peft")]
        # A step can take less than the frozen model's, whose products are PyTorch's.
        ratio = f"{ours / theirs:8.2f}" if ours > 0 and theirs > 0 else f"{'-':>8}"
        print(
            f"{method:26}{frozen:12.1f}{width:7.1f}{ours:12.1f}{theirs:9.1f}{ratio}{more[0]:12.1f}{more[1]:9.1f}",
            flush=True,
        )
        measure.note_ratio(f"{method}, a step of two layers", min(times["peftcore"]) / min(times["peft"]), "PEFT")


if __name__ == "__main__":
    main()
