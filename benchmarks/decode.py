"""Greedy decoding: tokens a second of `generate` over a base in 4 bits, alone and with LoRA, next to others.

    python benchmarks/decode.py [--shapes smollm2-135m llama-1.1b llama-7b] [--prompts 32 512] [--batches 1 4 16]
                                [--compile] [--llama PYTHON] [--ours] [--processor-time --threads 1]

Models have random weights of the shapes named. In turn: the dense model in bf16, ours in NF4 (double quantization), the
same with LoRA r=16 on every linear layer, and both with the output head in NF4 as well, where no embedding shares it:
`quantize` leaves it dense unless `skip=[]` is passed, where llama.cpp's files have it in 8 or 6 bits; then all
fused (`peftcore.fuse`). Of the smaller shapes also peft's LoRA over the dense model, and peft over bitsandbytes.
PYTHON, of an environment with llama-cpp-python (`make export-check` makes one), adds llama.cpp with the same shape in
q4_0 and q4_K_M, alone and with a LoRA, on as many threads. It computes a token after each of ours, so that others on
the machine slow both alike: "of q4_0" is the median of llama.cpp's time over ours, with LoRA of llama.cpp's with LoRA.

--compile adds each of them once more with transformers' static cache and one token's step as one compiled graph; one
that cannot be compiled so is named with its reason.

"prefill" is the time until the first token, for tokens of the prompt a second; "decode" the tokens after it. The floor
of a token is what must be read, the packed layers and the head, at the speed of a plain read in this run.
"""

import argparse
import contextlib
import copy
import functools
import json
import logging
import statistics
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import measure
import torch
from torch import nn

import peftcore
from peftcore import quantization

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
R = 16
# Layers times the square of their width; more than that dense takes much memory, and with bitsandbytes much time.
DENSE_BELOW, BITSANDBYTES_BELOW = 3e8, 5e7
SHAPES = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}


def shared_copy(module):
    """Return a copy of the module that shares the memory of its tensors."""
    own = {id(p): nn.Parameter(p.data, requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, own | {id(b): b for b in module.buffers()})


def llama(shape, finished=lambda layer: layer, copied=copy.deepcopy):
    """Return the model in bf16, made of copies of one layer that `finished` has completed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(**{**SHAPES[shape], "num_hidden_layers": 1}, max_position_embeddings=2048)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    first = finished(model.model.layers[0])
    for index in range(1, SHAPES[shape]["num_hidden_layers"]):
        model.model.layers.append(copied(first))
        model.model.layers[index].self_attn.layer_idx = index
    config.num_hidden_layers = SHAPES[shape]["num_hidden_layers"]
    model.generation_config.pad_token_id = 0
    return model


def randomized(model):
    """Give LoRA's B random values, so that the adapter changes the outputs."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return model.eval()


def with_peft(model):
    import peft

    config = peft.LoraConfig(r=R, lora_alpha=R, target_modules="all-linear", task_type="CAUSAL_LM")
    return randomized(peft.get_peft_model(model, config))


def with_bitsandbytes(model):
    """Replace the model's layers by bitsandbytes', as transformers does."""
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            theirs = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, False, torch.bfloat16, compress_statistics=True, quant_type="nf4"
            )
            theirs.weight = bnb.nn.Params4bit(layer.weight.data, quant_type="nf4", requires_grad=False).to("cpu")
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, theirs)
    return model


def with_lora(model):
    return randomized(peftcore.apply(model, "lora", r=R, lora_alpha=R))


def models(shape, peers):
    size, found = SHAPES[shape]["num_hidden_layers"] * SHAPES[shape]["hidden_size"] ** 2, {}
    if size < DENSE_BELOW:
        dense = llama(shape)
        found["dense, bf16"] = dense
    packed = llama(shape, lambda layer: quantization.quantize(layer, double_quant=True))
    quantization.speed_up_decoding(packed)  # as `quantize` does with a whole model
    found |= {"peftcore, NF4": packed, "peftcore, NF4, LoRA": with_lora(shared_copy(packed))}
    if not SHAPES[shape]["tie_word_embeddings"]:
        whole = quantization.quantize(shared_copy(packed), skip=[])
        found |= {"peftcore, NF4, head too": whole, "peftcore, NF4, head too, LoRA": with_lora(shared_copy(whole))}
    found |= {f"{name}, fused": peftcore.fuse(shared_copy(found[name])) for name in list(found) if "NF4" in name}
    if peers and size < DENSE_BELOW:
        found["peft, bf16, LoRA"] = with_peft(shared_copy(dense))
    if peers and size < BITSANDBYTES_BELOW:
        found["peft, bitsandbytes NF4, LoRA"] = with_peft(with_bitsandbytes(copy.deepcopy(dense)))
    return found


def with_compiled_steps(found):
    """Return {name: (model, further fields)}: each model as it is, and with a compiled step of generation."""
    from transformers.generation.configuration_utils import CompileConfig

    step = CompileConfig(fullgraph=True, dynamic=False, mode=None)
    step._compile_all_devices = True  # transformers compiles by itself on accelerators alone
    fields = {"cache_implementation": "static", "compile_config": step}
    return {
        f"{name}{more}": (model, kw) for name, model in found.items() for more, kw in (("", {}), ("; step", fields))
    }


class Clock:
    """Seconds of each token. One of transformers' criteria to stop, which never does.

    Args:
        turn: called after each token but the first; its time is not counted.
    """

    now = staticmethod(time.perf_counter)

    def __init__(self, turn):
        self.turn, self.seconds, self.start = turn, [], self.now()

    def __call__(self, tokens, scores, **kwargs):
        self.seconds.append(self.now() - self.start)
        if len(self.seconds) > 1:
            self.turn()
        self.start = self.now()
        return torch.zeros(len(tokens), dtype=torch.bool)


def generated(model, tokens, count, fields, turn=lambda: None):
    """Return the seconds until the first token, and those of each of the `count` tokens that follow."""
    clock = Clock(turn)
    with torch.no_grad():
        model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            min_new_tokens=count + 1,
            max_new_tokens=count + 1,
            stopping_criteria=[clock],
            **fields,
        )
    return clock.seconds[0], clock.seconds[1:]


def bytes_of_token(model):
    """Return the bytes that a token reads: all parameters and buffers but an embedding that is only looked up."""
    lookup = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is lookup
    parts = [t for t in (*model.parameters(), *model.buffers()) if tied or t is not lookup]
    return sum(t.nbytes for t in parts)


def compiled_once(found, tokens, count):
    """Return the models that can generate, after a first run, in which steps are compiled."""
    left = dict(found)
    for name, (model, fields) in found.items():
        start = time.perf_counter()
        try:
            generated(model, tokens, count, fields)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
            del left[name]
        if fields and name in left:
            print(f"{name}: compiled and run once in {time.perf_counter() - start:.0f} s")
    return left


def table(found, shape, prompt, batch, count, rounds, peer):
    tokens = torch.randint(5, 30000, (batch, prompt), generator=torch.Generator().manual_seed(1))
    found = compiled_once(found, tokens, count)
    times = {name: ([], []) for name in found}
    theirs = {name: {kind: [] for kind in peer.kinds} for name in found}
    prefills = peer.started(prompt, batch, count, rounds)
    for _ in range(rounds):
        for name, (model, fields) in found.items():
            peer.again()
            turn = functools.partial(peer.token, "LoRA" in name, theirs[name])
            for kept, seconds in zip(times[name], generated(model, tokens, count, fields, turn), strict=True):
                kept.append(seconds)
    peer.stop()
    rate = measure.read_rate(Clock.now)
    print(f"\n{shape}, prompt of {prompt}, batch {batch}, {count} tokens, {rate:.1f} GB/s of a plain read")
    print(f"{'':42}{'prefill/s':>10}{'decode/s':>10}{'median':>10}{'MB a token':>12}{'of the floor':>14}", end="")
    print("".join(f"{f'of {kind}':>12}" for kind in peer.kinds))
    for name, (first, rest) in times.items():
        best, median = rates(rest, batch)
        size = bytes_of_token(found[name][0])
        print(f"{name:42}{batch * prompt / min(first):10.0f}{best:10.1f}{median:10.1f}", end="")
        print(f"{size / 1e6:12.0f}{best / (rate * 1e9 / size * batch):14.0%}", end="")
        ours = [seconds for each in rest for seconds in each]
        for seconds in theirs[name].values():
            print(f"{statistics.median(t / o for t, o in zip(seconds, ours, strict=True)):12.2f}", end="")
        print(flush=True)
    for ours in ("peftcore, NF4, LoRA", "peftcore, NF4, LoRA, fused"):
        for peer in ("peft, bf16, LoRA", "peft, bitsandbytes NF4, LoRA"):
            if peer in times:
                ratio = rates(times[peer][1], batch)[1] / rates(times[ours][1], batch)[1]
                measure.note_ratio(f"a token of {shape}, batch {batch}: {ours}", ratio, peer)
    for (kind, lora), seconds in prefills.items():
        rest = [each[kind][i : i + count] for name, each in theirs.items() if ("LoRA" in name) == lora
                for i in range(0, rounds * count, count)]  # fmt: skip
        best, median = rates(rest, batch)
        name = f"llama.cpp, {kind}{', LoRA' if lora else ''}"
        print(f"{name:42}{prompt / min(seconds):10.0f}{best:10.1f}{median:10.1f}", flush=True)


def rates(rounds, batch):
    """Return the tokens a second of the best round and of the median one. `rounds`: the seconds of each token."""
    seconds = sorted(sum(each) / len(each) for each in rounds)
    return batch / seconds[0], batch / seconds[len(seconds) // 2]


def byte_level(rows):
    """Return a tokenizer of `rows` tokens: 256 bytes, a pair of them, and names that no text contains."""
    import tokenizers
    import transformers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, letters[0] + letters[1], *(f"<{i}>" for i in range(rows - len(letters) - 1))]
    whole = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(letters[:2])]))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<0>")


class NoPeer:
    """Peer that is not installed."""

    kinds = ()

    def started(self, prompt, batch, count, rounds):
        return {}

    def again(self):
        pass

    def token(self, lora, seconds):
        pass

    stop = again


class LlamaCpp:
    """llama.cpp in a process of its own (decode_llama.py), until the end of the block."""

    def __init__(self, shape, options):
        self.kinds, self.folder = options.kinds, tempfile.TemporaryDirectory()
        folder = Path(self.folder.name)
        dense = llama(shape, copied=shared_copy)  # 7 billion numbers take 13 GB, the file 4
        tokenizer = byte_level(SHAPES[shape]["vocab_size"])
        model = peftcore.export(dense, folder / "model.gguf", format="gguf", tokenizer=tokenizer, gguf_type="q4_0")
        lora = peftcore.export(with_lora(dense), folder / "lora.gguf", format="gguf", adapter="default")
        jobs = {
            "model": str(model),
            "lora": str(lora),
            "kinds": options.kinds,
            "threads": options.threads,
            "processor_time": options.processor_time,
        }
        (folder / "jobs.json").write_text(json.dumps(jobs))
        command = [options.llama, Path(__file__).with_name("decode_llama.py"), folder / "jobs.json"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.communicate()
        self.folder.cleanup()

    def ask(self, *request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"decode_llama.py has ended, asked for {request}: what it says of it is above")
        return json.loads(answer)

    def started(self, prompt, batch, count, rounds):
        """Return the seconds of the prompt in each round, by kind, with LoRA and without; the first reads the file."""
        which = [(kind, lora) for kind in self.kinds for lora in (False, True)]
        return {each: [self.ask("start", *each, prompt, batch, count) for _ in range(rounds + 1)][1:] for each in which}

    def again(self):
        for kind in self.kinds:
            for lora in (False, True):
                self.ask("again", kind, lora)

    def token(self, lora, seconds):
        """Compute a token of each kind; add to its `seconds`."""
        for kind in self.kinds:
            seconds[kind].append(self.ask("token", kind, lora))

    def stop(self):
        self.ask("stop")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["smollm2-135m", "llama-1.1b"])
    parser.add_argument("--prompts", type=int, nargs="+", default=[32])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processor-time", action="store_true", help="where others use the machine, with --threads 1")
    parser.add_argument("--ours", action="store_true", help="neither peft nor bitsandbytes")
    parser.add_argument("--compile", action="store_true", help="compiled steps, too: minutes more")
    parser.add_argument("--llama", help="a Python that has llama-cpp-python")
    parser.add_argument(
        "--kinds", nargs="+", choices=["q4_0", "q4_K_M"], default=["q4_0", "q4_K_M"], help="of its files"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.processor_time:
        Clock.now = staticmethod(time.process_time)
    measure.print_surroundings(options.threads)
    for shape in options.shapes:
        with LlamaCpp(shape, options) if options.llama else contextlib.nullcontext(NoPeer()) as peer:
            found = models(shape, not options.ours)
            found = with_compiled_steps(found) if options.compile else {name: (found[name], {}) for name in found}
            for prompt in options.prompts:
                for batch in options.batches:
                    table(found, shape, prompt, batch, options.tokens, options.rounds, peer)


if __name__ == "__main__":
    main()
