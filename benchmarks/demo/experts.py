"""A mixture of experts with real weights, fine-tuned by LoRA on its experts, next to the dense model it was made from.

    python benchmarks/demo/experts.py [FOLDER]

SmolLM2-135M is upcycled (Komatsuzaki et al. 2022, arXiv 2212.05055) to Mixtral's architecture: each of four experts is
a copy of the layer's MLP, and a router draws two for each token; their shares sum to one, so that the mixture computes
what the dense model does, until training tells its experts apart. 373 million parameters, of which LoRA reaches those
of the experts too, in bf16 and in 4 bits. The task is the demo's: movie-review snippets, 20 steps of 8.
"""

import json
import sys
from pathlib import Path

import torch
from run import ROOT, WRITER, fetch, peftcore

EXPERTS, CHOSEN = 4, 2
SHARED = (  # between the configs of Llama and Mixtral
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
RUNS = {
    "dense model": ("writer-bf16", WRITER, "lora"),
    "experts": ("experts", "models/upcycled", "lora"),
    "experts in 4 bits": ("experts-4bit", "models/upcycled", "qlora"),
}


def upcycle(folder: Path) -> None:
    """Write the mixture to `models/upcycled`, and check that it computes what SmolLM2 does."""
    from peftcore_cli.bases import models
    from transformers import MixtralConfig, MixtralForCausalLM

    to = folder / "models/upcycled"
    if (to / "config.json").exists():
        return
    dense = models.load_model(str(folder / WRITER), "causal-lm", dtype="fp32")
    facts = {name: getattr(dense.config, name) for name in SHARED}
    config = MixtralConfig(**facts, num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN, sliding_window=None)
    torch.manual_seed(0)
    mixture = MixtralForCausalLM(config)
    own, found = dense.state_dict(), mixture.state_dict()
    for name, tensor in found.items():
        layer = name.partition(".mlp.")[0]
        if name.endswith("experts.gate_up_proj"):
            one = torch.cat([own[f"{layer}.mlp.gate_proj.weight"], own[f"{layer}.mlp.up_proj.weight"]])
            tensor.copy_(one.expand_as(tensor))
        elif name.endswith("experts.down_proj"):
            tensor.copy_(own[f"{layer}.mlp.down_proj.weight"].expand_as(tensor))
        elif name.endswith("mlp.gate.weight"):
            tensor.normal_(std=0.02)
        else:
            tensor.copy_(own[name])
    tokens = torch.arange(1, 33)[None]
    with torch.no_grad():
        torch.testing.assert_close(mixture.eval()(tokens).logits, dense(tokens).logits, rtol=1e-3, atol=1e-3)
    mixture.to(torch.bfloat16).save_pretrained(to)
    models.load_tokenizer(str(folder / WRITER)).save_pretrained(to)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    fetch(folder)
    upcycle(folder)
    for output, model, method in RUNS.values():
        # fmt: off
        peftcore(folder, "train", "--model", model, "--data", "data/write_train.jsonl",
                 "--eval-data", "data/write_test.jsonl", "--method", method, "--set", "r=8", "--set", "lora_alpha=16",
                 "--dtype", "bf16", "--steps", "20", "--batch-size", "8", "--lr", "5e-4", "--max-length", "96",
                 "--output", output, "--overwrite")
        # fmt: on
    print(f"\n{'held-out perplexity':20}{'before':>10}{'after':>10}{'trained':>14}{'peak memory':>14}{'step':>10}")
    for label, (output, *_) in RUNS.items():
        found = json.loads((folder / output / "result.json").read_text())
        before, after = (found[when]["perplexity"] for when in ("before", "after"))
        trained, peak = found["trainable_parameters"], found["peak"]["memory"] / 1e9
        print(f"{label:20}{before:10.2f}{after:10.2f}{trained:14,}{peak:11.2f} GB", end="")
        print(f"{1e3 * found['step_seconds']:7.0f} ms")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / ".demo")
