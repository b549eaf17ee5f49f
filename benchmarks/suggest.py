"""Answers of `peftcore suggest` for models of 8B to 70B parameters and cards of 8 to 80 GB, and the time they take.

    OMP_NUM_THREADS=1 python benchmarks/suggest.py [--only Llama-3-8B] [--memory 24] [--length 2048]

Prints a row of Markdown for each: the first way, what it needs, and the seconds of a processor that the answer took.
Each is asked of a config alone, in a process of its own; --folder keeps them.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CARDS = {8: "rtx4060", 12: "rtx4070", 16: "rtx4090", 24: "rtx4090", 48: "l40s", 80: "h100"}
METHODS = ["lora", "qlora"]


def configs():
    from transformers import LlamaConfig, Qwen3MoeConfig

    llama = {"vocab_size": 128256, "num_key_value_heads": 8, "architectures": ["LlamaForCausalLM"]}
    small = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    qwen = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "vocab_size": 151936}
    return {
        "Llama-3-8B": LlamaConfig(**llama, **small),
        "Qwen3-30B-A3B": Qwen3MoeConfig(**qwen, **experts, **heads, architectures=["Qwen3MoeForCausalLM"]),
        "Llama-3-70B": LlamaConfig(**llama, **large),
    }


def ask(folder, memory, length):
    import peftcore

    peftcore.methods()  # what is imported and measured once is not the answer's
    start = time.process_time()
    try:
        found = peftcore.suggest(folder, METHODS, memory=f"{memory}GB", device=CARDS[memory], length=length)
        best = found.ways[0]
        needs = f"{best.memory.high / 1e9:.1f} of {found.memory / 1e9:.1f}"
        answer = f"`{' '.join(best.options())}` | {needs}"
    except peftcore.PeftcoreError as error:
        answer = f"{error} | "
    print(f"| {Path(folder).name} | {memory} | {answer} | {time.process_time() - start:.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="of the models that one")
    parser.add_argument("--memory", type=int, choices=CARDS, help="of the memories that one, in GB")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--folder", help="for the configs")
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        ask(options.ask, options.memory, options.length)
        return
    print(
        "| model | GB | the first way | needs, GB | answered in, s |\n|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as temporary:
        for name, config in configs().items():
            folder = Path(options.folder or temporary) / name
            config.save_pretrained(folder)
            for memory in CARDS:
                if options.only in (None, name) and options.memory in (None, memory):
                    more = ["--ask", str(folder), "--memory", str(memory), "--length", str(options.length)]
                    ran = subprocess.run([sys.executable, __file__, *more], stderr=subprocess.PIPE, text=True)
                    if ran.returncode:
                        sys.exit(ran.stderr)


if __name__ == "__main__":
    main()
