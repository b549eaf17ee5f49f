"""Comparison with llama.cpp for each kind of model that is exported: tiny ones with random weights.

    python benchmarks/export/families.py --llama PYTHON [FOLDER]

PYTHON is that of an environment with llama-cpp-python (`make export-check` makes one); FOLDER (default: .demo/families)
gets the files. For each model, with an adapter that has ranks of its own for some modules: the largest difference of
llama.cpp's logits from ours, of the model, of the model with its adapter, and of the merged model, all in fp32, next
to what the adapter changes and the largest logit. llama.cpp looks GELU up in a table of 16 bits, and so do
Gemma's models here; without it they are 0.002 of the largest logit apart, and with it what is at a rounding's edge.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peftcore_gguf.tensor_names import family_of
from torch import Tensor, nn

import peftcore

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.exported import SIZES, apply, tokenizer  # noqa: E402

ROWS = torch.randint(3, 256, (2, 40), generator=torch.Generator().manual_seed(0))
ROPE = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA_3 = {**ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 8}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3's rope": ("Llama", {"rope_parameters": LLAMA_3}),
    "llama, linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, yarn": ("Llama", {"rope_parameters": {"rope_type": "yarn", **ROPE}}),
    "mistral": ("Mistral", {"sliding_window": 48}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3moe": ("Qwen3Moe", {"head_dim": 32, **EXPERTS}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3", GEMMA),
    "gemma3, untied": ("Gemma3", {**GEMMA, "tie_word_embeddings": False}),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MOST = {"gelu_pytorch_tanh": 2e-3, "silu": 1e-4}  # of the largest logit


class Looked(nn.Module):
    """GELU by tanh of a number of 16 bits, in 16 bits; from 10 on the number itself (ggml/src/ggml-cpu/vec.h)."""

    def forward(self, x: Tensor) -> Tensor:
        looked = nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x >= 10, x, looked)


def made(name: str) -> nn.Module:
    """Return a tiny model, all of whose weights matter."""
    kind, changes = FAMILIES[name]
    of_text = getattr(transformers, f"{kind}TextConfig", None) or getattr(transformers, f"{kind}Config")
    torch.manual_seed(0)
    config = of_text(**{**SIZES, **changes})
    config._attn_implementation = "eager"  # which caps scores
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for layer in model.model.layers if "Gemma" in kind else ():
        layer.mlp.act_fn = Looked()
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.0 if "Gemma" in kind or "norm" not in key else 1.0, 0.3)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(ROWS).logits


def write(name: str, folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Return ({what: its job for llama_logits.py}, {what: our logits})."""
    model, place = made(name), folder / name.replace(", ", "-").replace("'", "").replace(" ", "-")
    place.mkdir(parents=True, exist_ok=True)
    ours = {"base": logits(model)}
    base = peftcore.export(model, place / "base.gguf", format="gguf", tokenizer=tokenizer(), gguf_type="f32")
    targets = [each for each in TARGETS if any(path.endswith(each) for path, _ in model.named_modules())]
    apply(model, r=4, target_modules=targets, rank_pattern={"q_proj": 8}, alpha_pattern={"v_proj": 3}, std=0.2)
    ours["adapter"] = ours["merged"] = logits(model)
    lora = peftcore.export(model, place / "adapter.gguf", format="gguf", adapter="default")
    peftcore.merge(model)
    merged = peftcore.export(model, place / "merged.gguf", format="gguf", tokenizer=tokenizer(), gguf_type="f32")
    files = {"base": (base, None), "adapter": (base, lora), "merged": (merged, None)}
    jobs = {
        what: {"model": str(file), "lora": beside and str(beside), "out": str(place / f"{what}.npz")}
        for what, (file, beside) in files.items()
    }
    return {what: {**each, "tokens": ROWS.tolist(), "texts": [], "ask": ""} for what, each in jobs.items()}, ours


def main(folder: Path, llama: str, names: list[str]) -> None:
    written = {name: write(name, folder) for name in names}
    jobs = [job for found, _ in written.values() for job in found.values()]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run([llama, HERE / "llama_logits.py", folder / "jobs.json"], check=True, stderr=subprocess.DEVNULL)
    print(f"{'':24}{'base':>10}{'adapter':>10}{'merged':>10}{'(its change)':>14}{'(largest)':>11}")
    wrong = []
    for name, (found, ours) in written.items():
        theirs = {what: np.load(job["out"]) for what, job in found.items()}
        off = [
            max(float(abs(theirs[what][f"row{i}"] - row.numpy()).max()) for i, row in enumerate(ours[what]))
            for what in found
        ]
        largest = ours["merged"].abs().max().item()
        change = (ours["merged"] - ours["base"]).abs().max().item()
        print(f"{name:24}{''.join(f'{each:10.6f}' for each in off)}{change:14.2f}{largest:11.2f}")
        if max(off) > MOST[family_of(made(name)).activation] * largest:
            wrong.append(name)
    if wrong:
        raise SystemExit(f"llama.cpp computes something else: {', '.join(wrong)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / ".demo/families")
    parser.add_argument("--llama", required=True)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    given = parser.parse_args()
    main(given.folder.resolve(), given.llama, given.only)
