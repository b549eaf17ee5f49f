"""Tokens per second of `peftcore serve`: requests for different adapters at the same time, and one after another.

    OMP_NUM_THREADS=2 python benchmarks/serve.py [--adapters 100] [--tokens 32] [--dtype fp32]

A base of SmolLM2-135M's shape with random weights, and LoRA adapters of r=8 on every linear layer. A client of the
`openai` package asks over HTTP, with a thread for each request. Every figure is the best of three; the two ways take
turns, so that other work on the machine meets both. The last lines send one request to each of the adapters. The floor
is a plain read of the base's weights for each token, once for all requests that are answered together.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import measure
import openai
import torch
import uvicorn
from peftcore_serve import command
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

import peftcore

SIZES = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
PROMPT = list(range(100, 132))


def main(adapters: int, tokens: int, dtype: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base, root = Path(folder, "base"), Path(folder, "adapters")
        make(base, root, adapters)
        listening = command.listen("127.0.0.1", 0)
        measure.print_surroundings(torch.get_num_threads())
        began = time.perf_counter()
        server = command.make(str(base), root, dtype=dtype, limit=adapters)
        size = sum(weights.nbytes for weights in load_file(base / "model.safetensors").values())
        size //= 1 if dtype == "fp32" else 2
        print(f"loaded in {time.perf_counter() - began:.1f} s; ", end="")
        floor = size / measure.read_rate() / 1e9
        print(f"floor of a token {floor * 1e3:.1f} ms")
        runs = uvicorn.Server(command.configured(server))
        thread = threading.Thread(target=runs.run, args=([listening],))
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        try:
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=3600) as client:
                compare(client, adapters, tokens, floor)
        finally:
            runs.should_exit = True
            thread.join()


def compare(client: openai.OpenAI, adapters: int, tokens: int, floor: float) -> None:
    def answer(name: str) -> int:
        found = client.completions.create(model=name, prompt=PROMPT, max_tokens=tokens, temperature=0)
        assert found.usage is not None
        return found.usage.completion_tokens

    def together(names: list[str]) -> int:
        with ThreadPoolExecutor(len(names)) as threads:
            return sum(threads.map(answer, names))

    def one_by_one(names: list[str]) -> int:
        return sum(map(answer, names))

    names = [f"user{i}" for i in range(adapters)]
    together(names[:16])  # load them
    print("tokens per second of all requests\nrequests   together   one by one   floor: together   one by one")
    for count in (1, 4, 16):
        fastest = dict.fromkeys((together, one_by_one), 0.0)
        for _ in range(3):
            for way in fastest:
                fastest[way] = max(fastest[way], rate(way, names[:count]))
        print(f"{count:8d}{fastest[together]:11.1f}{fastest[one_by_one]:13.1f}", end="")
        print(f"{count / floor:18.0f}{1 / floor:13.0f}", flush=True)
    for what in ("read from disk", "in memory"):
        began = time.perf_counter()
        written = together(names)
        seconds = time.perf_counter() - began
        print(f"{adapters} adapters, {what}: {seconds:.1f} s, {written / seconds:.1f} tokens/s", flush=True)


def rate(way: Callable[[list[str]], int], names: list[str]) -> float:
    began = time.perf_counter()
    written = way(names)
    return written / (time.perf_counter() - began)


def make(base: Path, root: Path, adapters: int) -> None:
    """Write the base, its tokenizer, and the adapters."""
    disable_progress_bar()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**SIZES, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True, eos_token_id=None)
    )
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(49152)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save_pretrained(base)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0").save_pretrained(base)
    peftcore.apply(model, "lora", r=8)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for i in range(adapters):
        for parameter in parameters:
            parameter.data.normal_(std=0.02)
        peftcore.save(model, root / f"user{i}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", default="fp32")
    given = parser.parse_args()
    main(given.adapters, given.tokens, given.dtype)
